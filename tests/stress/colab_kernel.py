"""Runs notebooks inside the place that colab_place.py builds: a kernel of google.colab's each, the cells as they are.

A cell that begins with `# Install` is timed, and packages that it changed are told. Between notebooks the studies on
the local disk are deleted, as each notebook that a badge opens has a machine of its own; Drive, which a folder stands
for, brings them back. Ends with a line a notebook: cells that passed, cells that failed, seconds.
"""

import importlib.metadata
import json
import os
import shutil
import sys
import time
from pathlib import Path

from jupyter_client.manager import KernelManager

INSTALL, INSTALL_LIMIT_S = "# Install", 30
MAY_CHANGE = {"transformers", "peft", "accelerate", "huggingface-hub", "tokenizers", "torchao"}
_KERNEL = "from ipykernel.kernelapp import IPKernelApp; from google.colab._kernel import Kernel; "
_KERNEL += "IPKernelApp.launch_instance(kernel_class=Kernel, extensions=['google.colab'])"
_DRIVE = Path("/content/drive/MyDrive")
# The page that would answer is not there.
_STAND_INS = """
from google.colab import drive, userdata
from pathlib import Path

def _mount(mountpoint, **how):
    {mount}

def _get(key):
    raise userdata.SecretNotFoundError(key)

drive.mount, drive.flush_and_unmount, userdata.get = _mount, lambda **how: None, _get
"""
_MOUNTS = "Path(mountpoint, 'MyDrive').mkdir(parents=True, exist_ok=True); print('Mounted at', mountpoint)"
_REFUSES = "raise ValueError('mount failed: refused')"


class Kernel:
    """A fresh kernel of Colab's; what a cell shows is printed as it comes."""

    def __init__(self, drive):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.kernel_spec.argv[:] = [sys.executable, "-c", _KERNEL, "-f", "{connection_file}"]
        self.manager.start_kernel(cwd="/content")
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        self.run(_STAND_INS.format(mount=_MOUNTS if drive else _REFUSES))

    def run(self, source):
        """'' if the cell came to its end, else its error."""
        self.kinds = set()
        reply = self.client.execute_interactive(source, allow_stdin=True, timeout=None, output_hook=self._show)[
            "content"
        ]
        return "" if reply["status"] == "ok" else f"{reply.get('ename')}: {reply.get('evalue')}"

    def _show(self, message):
        content = message["content"]
        self.kinds |= set(content.get("data", {}))
        text = content.get("text") or content.get("data", {}).get("text/plain", "")
        for kind in ("application/vnd.colab-display-data+json", "application/vnd.jupyter.widget-view+json"):
            if kind in content.get("data", {}):
                text = f"[{kind}] {json.dumps(content['data'][kind])[:200]}"
        print("".join(text).rstrip("\n")[:3000], flush=True)

    def end(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def installed():
    return {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}


def install(kernel, source, faults):
    """Run an install cell; notes what is wrong in `faults`, returns a line about it."""
    before, started = installed(), time.monotonic()
    error = kernel.run(source)
    seconds, after = time.monotonic() - started, installed()
    changed = {name: f"{old} -> {after.get(name)}" for name, old in before.items() if after.get(name) != old}
    if changed.keys() - MAY_CHANGE:
        faults.append(f"the install cell changed {sorted(changed.keys() - MAY_CHANGE)}")
    if seconds > INSTALL_LIMIT_S:
        faults.append(f"the install cell took {seconds:.1f} s")
    if "application/vnd.colab-display-data+json" in kernel.kinds:
        faults.append("Colab asks for a restart after the install cell")
    told = ", ".join(f"{name} {versions}" for name, versions in sorted(changed.items())) or "nothing"
    busy = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"  # a busy machine installs as slowly as it is busy
    return error, f"install {seconds:.1f} s ({busy}), {len(after) - len(before)} packages new, changed: {told}"


def notebook(path, *, drive, faults):
    """Run all cells of a notebook; the lines of the summary about it."""
    kernel, lines, passed, failed = Kernel(drive), [], 0, []
    started = time.monotonic()
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        source, begun = "".join(cell["source"]), time.monotonic()
        print(f"\n=== {path.stem} cell {number}: {source.splitlines()[-1]}", flush=True)
        if source.startswith(INSTALL):
            error, line = install(kernel, source, faults)
            lines.append(f"{path.stem}: {line}")
        else:
            error = kernel.run(source)
        print(f"--- {time.monotonic() - begun:.1f} s {error and 'FAILED'}", flush=True)
        passed += not error
        failed += [f"{path.stem} cell {number} ({source.splitlines()[0][:60]}): {error}"] if error else []
    kernel.end()
    faults += failed
    lines.append(f"{path.stem}: {passed} cells passed, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    return lines


def main(words):
    drive = words[0] == "--drive"
    summary, faults = [], []
    for path in map(Path, words[1:]):
        summary += notebook(path, drive=drive, faults=faults)
        if drive:
            shutil.rmtree("/content/runs", ignore_errors=True)  # the next notebook is opened on a machine of its own
    print("\nSUMMARY", *summary, *(f"FAULT {fault}" for fault in faults), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
