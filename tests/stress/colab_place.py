"""A place like Colab's machine, in a folder: Debian with Colab's Python and packages, in which the five notebooks are
run as they are.

    python tests/stress/colab_place.py build PLACE [--colabtools FOLDER]    once, as root: ten minutes and 14 GB
    python tests/stress/colab_place.py run PLACE [--notebooks 01 02]        the cells in order, then a summary
    python tests/stress/colab_place.py test PLACE [ARGUMENTS OF PYTEST]     the tests under Colab's Python and packages
    python tests/stress/colab_place.py shell PLACE COMMAND ...              anything else there, peftlib installed as
    on Colab

Packages come in the versions that Colab publishes (tests/kernels/colab-packages.txt, see colab_list.py; --constraints
names another list), the kernel is the one of google.colab. Every run works in an overlay on the place, which stays as
it was built. The notebooks install from the repository's public address, which git is told to find in this checkout's
HEAD. What is missing: a GPU, Google Drive (a folder stands for it), and the page.
"""

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "docs" / "build")]
from update_badges import address

from peftlib.notebook.session import NOTEBOOKS

SUITE = "trixie"  # the Debian with Colab's Python, 3.13
COLABTOOLS = "git+https://github.com/googlecolab/colabtools"
_DEBIAN = "ca-certificates,git,make,build-essential,python3.13,python3.13-venv,fonts-dejavu-core"
# What peftlib and its dependencies touch, and what a kernel of Colab's needs, of the 600 packages there.
_PACKAGES = """
    pip setuptools wheel numpy pandas pyarrow matplotlib scipy pillow protobuf psutil fsspec tqdm pyyaml requests httpx absl-py nltk
    tabulate ipykernel ipywidgets ipython jupyter_client jupyter_server ipyparallel ipython_genutils tornado google-auth portpicker
    anywidget httplib2 seaborn nbclient nbformat nbconvert debugpy python-dotenv torch torchao transformers peft accelerate datasets
    huggingface_hub tokenizers safetensors sentencepiece tensorboard openai diffusers gradio fastapi uvicorn
"""
_ENVIRONMENT = {
    "PATH": "/venv/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "COLAB_RELEASE_TAG": "release-colab-simulated",
    "PIP_CERT": "/etc/ssl/certs/ca-certificates.crt",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
_LENT = ("/dev", "/sys")  # this machine's, mounted there
_COPIED = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")


def build(place, constraints, colabtools):
    """Debian, a venv of its Python, Colab's packages, google.colab."""
    if not (place / "usr" / "bin" / "python3.13").exists():
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={_DEBIAN}", SUITE, str(place)], check=True)
    (place / "content").mkdir(exist_ok=True)
    shutil.copy(constraints, place / "root" / "constraints.txt")
    if Path(colabtools).is_dir():
        shutil.copytree(colabtools, place / "root" / "colabtools", dirs_exist_ok=True)
        colabtools = "/root/colabtools"
    with mounted(place):
        call(place, ["python3.13", "-m", "venv", "/venv"])
        pip = ["/venv/bin/python", "-m", "pip", "install", "-q", "--no-cache-dir"]
        call(place, [*pip, "-c", "/root/constraints.txt", *_PACKAGES.split()])
        call(place, [*pip, "--no-deps", "--no-build-isolation", colabtools])
        call(place, ["/venv/bin/pip", "check"], check=False)


def run(place, notebooks, *, drive, environment):
    """Execute notebooks in the place; exit code 0 if all of their cells came to their end, see colab_kernel.py."""
    with overlaid(place) as top:
        serve(top)
        names = [name for name in NOTEBOOKS if not notebooks or name in notebooks or name[:2] in notebooks]
        for name in names:
            shutil.copy(CHECKOUT / "notebooks" / f"{name}.ipynb", top / "root" / f"{name}.ipynb")
        shutil.copy(HERE / "colab_kernel.py", top / "root")
        word = "--drive" if drive else "--no-drive"
        command = ["/venv/bin/python", "/root/colab_kernel.py", word, *(f"/root/{name}.ipynb" for name in names)]
        return call(top, command, check=False, environment=environment).returncode


def test(place, words):
    """Run the tests of this checkout's HEAD in the place, nothing of a hub asked; pytest's exit code."""
    with overlaid(place) as top:
        serve(top)
        call(top, ["git", "clone", "-q", address(), "/root/checkout"])
        call(top, ["pip", "install", "-q", "/root/checkout[colab,demo,gguf,test]"])
        call(top, ["pip", "uninstall", "-q", "-y", "peftlib"])
        call(top, ["pip", "install", "-q", "--no-deps", "-e", "/root/checkout"])
        # Not Colab: tests say where they are themselves.
        offline = {
            name: "1"
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
        }
        command = ["env", "-C", "/root/checkout", "-u", "COLAB_RELEASE_TAG", "python", "-m", "pytest", "-q", *words]
        return call(top, command, check=False, environment=offline).returncode


def shell(place, command):
    """Run a command in the place after what the install cell does there; its exit code."""
    with overlaid(place) as top:
        serve(top)
        call(top, ["pip", "install", "-q", f"peftlib[colab,demo] @ git+{address()}"])
        return call(top, command, check=False).returncode


def serve(place):
    """Let git in the place find this checkout's HEAD at the public address."""
    subprocess.run(["git", "clone", "-q", "--bare", str(CHECKOUT), str(place / "root" / "peftlib.git")], check=True)
    # A worktree's HEAD may be another branch than the one that a clone takes.
    head = subprocess.run(["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    served = ["git", "-C", str(place / "root" / "peftlib.git"), "update-ref", "--no-deref", "HEAD", head.stdout.strip()]
    subprocess.run(served, check=True)
    rule = f'[url "file:///root/peftlib.git"]\n\tinsteadOf = {address()}\n[safe]\n\tdirectory = *\n'
    (place / "root" / ".gitconfig").write_text(rule)


def call(place, command, *, check=True, environment=None):
    """A command in the place, as root of it, in /content."""
    variables = [f"{name}={value}" for name, value in {**_ENVIRONMENT, **(environment or {})}.items()]
    inside = ["env", "-i", "-C", "/content", *variables, *command]
    # Processes of its own: the age of a session is that of its first process.
    first = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.run(["chroot", str(place), *first, *inside], check=check)


@contextlib.contextmanager
def mounted(place):
    """This machine's devices, network settings and certificates in the place, and what this machine's pip reads."""
    for path in map(Path, _COPIED):
        if path.exists():
            (place / path.parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place / path.relative_to("/"))
    lent = [*_LENT, *(folder for folder in ("/opt/wheels", "/opt/pypi", "/opt/pypi-more") if Path(folder).is_dir())]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_mount(place / "proc", "-t", "proc", "proc"))
        for folder in lent:
            stack.enter_context(_mount(place / folder.lstrip("/"), "--rbind", "--make-rslave", folder))
        yield


@contextlib.contextmanager
def overlaid(place):
    """A copy of the place that takes all changes and is thrown away."""
    scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{place.name}-run-"))
    upper, work, top = (scratch / name for name in ("upper", "work", "top"))
    for folder in (upper, work, top):
        folder.mkdir(parents=True)
    try:
        # redirect_dir: else pip copies each old package to move it aside, as no plain disk would make it.
        layers = f"lowerdir={place},upperdir={upper},workdir={work},redirect_dir=on"
        with _mount(top, "-t", "overlay", "-o", layers, "overlay"), mounted(top):
            yield top
    finally:
        shutil.rmtree(scratch)


@contextlib.contextmanager
def _mount(target, *words):
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *words, str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(target)], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = {name: commands.add_parser(name) for name in ("build", "run", "test", "shell")}
    for each in asked.values():
        each.add_argument("place", type=Path)
    asked["build"].add_argument("--constraints", type=Path, default=HERE.parent / "kernels" / "colab-packages.txt")
    asked["build"].add_argument(
        "--colabtools", default=COLABTOOLS, help="a folder with google.colab's source, or an address"
    )
    asked["run"].add_argument("--notebooks", nargs="*", default=[], help="01 02_qlora ...; default: all")
    asked["run"].add_argument("--no-drive", dest="drive", action="store_false", help="refuse Google Drive when asked")
    asked["run"].add_argument("-e", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="environment")
    for name in ("test", "shell"):
        asked[name].add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is mounted is unmounted
    place = args.place.resolve()
    if args.command == "build":
        build(place, args.constraints, args.colabtools)
    elif args.command == "run":
        sys.exit(run(place, args.notebooks, drive=args.drive, environment=dict(args.e)))
    else:
        sys.exit({"test": test, "shell": shell}[args.command](place, args.words))


if __name__ == "__main__":
    main()
