"""Colab's own list of packages, as published, to the versions that tests/notebook/test_install_cell.py holds our
requirements against.

python tests/stress/colab_list.py [FILE_OR_URL]    writes tests/kernels/colab-packages.txt and says what has changed
"""

import datetime
import re
import sys
import urllib.request
from pathlib import Path
from urllib.parse import unquote

PUBLISHED = "https://raw.githubusercontent.com/googlecolab/backend-info/main/pip-freeze.gpu.txt"
TARGET = Path(__file__).resolve().parents[1] / "kernels" / "colab-packages.txt"
_OF_CUDA = ("cuda-", "nvidia-")  # these fit Colab's build of torch, and not the one on PyPI
_WHEEL = re.compile(r"/[\w.]+-(\d[\w.]*?)(?:\+[\w.]+)?-[\w.]+-[\w.]+-[\w.]+\.whl")


def versions(frozen):
    """{name: version} of `pip freeze` for `pip install -c`: NAME==VERSION and wheels' addresses, the rest is not on
    PyPI."""
    found = {}
    for line in frozen.splitlines():
        name, _, version = line.partition("==")
        wheel = _WHEEL.search(unquote(line))
        if wheel:
            name, version = line.partition(" @ ")[0], wheel[1]
        if re.fullmatch(r"[\w.-]+", name) and version and not name.startswith(_OF_CUDA):
            found[name] = version.strip().partition("+")[0]  # PyPI has no local versions
    return found


def main(source=PUBLISHED):
    if "://" in source:
        with urllib.request.urlopen(source, timeout=60) as answer:
            frozen = answer.read().decode()
    else:
        frozen = Path(source).read_text(encoding="utf-8")
    new = versions(frozen)
    if not {"torch", "ipykernel", "ipywidgets"} <= new.keys():
        sys.exit(f"{source} is no list of Colab's packages: it names no torch, ipykernel or ipywidgets")
    old = versions(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    head = f"# Colab's packages ({PUBLISHED}), read {datetime.date.today()} by tests/stress/colab_list.py\n"
    TARGET.write_text(head + "".join(f"{name}=={new[name]}\n" for name in sorted(new, key=str.lower)), encoding="utf-8")
    for name in sorted(old.keys() | new.keys(), key=str.lower):
        if old.get(name) != new.get(name):
            print(f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    print(f"{len(new)} packages in {TARGET.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
