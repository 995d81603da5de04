"""A JupyterLab server of its own for the browser tests, and notebooks with a user's parameters to open in it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from peftlib.notebook import session as notebook
from peftlib.runner.execute import end_tree
from peftlib.runner.notebook_io import load, save, source_of, tags_of

CHECKOUT = Path(notebook.__file__).resolve().parents[2]
KERNEL_6 = "ipykernel6"
KERNEL_6_FOLDER = CHECKOUT / ".venv" / KERNEL_6  # made by a rule of the Makefile
_START_S, _STOP_S = 60, 20
# What JupyterLab would ask the network for, and what would change a page while it is looked at.
_SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
    "@jupyterlab/notebook-extension/tracker": {"scrollPastEnd": False},
}


def missing():
    """What the browser tests need and is not here, with the way out, or ''."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    packages = [name for name in ("jupyterlab", "selenium") if importlib.util.find_spec(name) is None]
    if programs:
        return f"no {' and no '.join(programs)}: apt-get install chromium chromium-driver"
    return f"no {' and no '.join(packages)}: pip install -e '.[browser]'" if packages else ""


class LabServer:
    """A running JupyterLab, as a context manager, with all that it reads and writes below `folder`.

    folder: a new one; `notebooks` in it is what the browser sees, `runs` is PEFTLIB_ROOT. `url`: its address; `token`:
    what lets one in. AssertionError: it does not start; its log is named.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.notebooks, self.runs = self.folder / "notebooks", self.folder / "runs"
        self.log_path = self.folder / "server.log"

    def __enter__(self):
        self.notebooks.mkdir(parents=True)
        self._write_settings()
        if KERNEL_6_FOLDER.is_dir():
            self._write_kernel(KERNEL_6, [KERNEL_6_FOLDER, CHECKOUT])
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += [
            "--ServerApp.port=0",
            f"--ServerApp.root_dir={self.notebooks}",
            "--LabApp.extension_manager=readonly",
        ]
        command += ["--LabApp.expose_app_in_browser=True"]  # for the theme alone; all else is clicked
        with open(self.log_path, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment())
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        self._process.terminate()  # it ends its kernels first
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            end_tree(psutil.Process(self._process.pid))
            self._process.wait()

    def end_kernels(self):
        """End every kernel; what they hold is lost."""
        for kernel in json.loads(self._ask("api/kernels")):
            self._ask(f"api/kernels/{kernel['id']}", "DELETE")

    def put(self, name, *, fields, kernel="python3", copy=None):
        """A copy of the notebook `name` for the browser to open, its parameters set; returns the copy's file name.

        fields: {parameter: value}, written as lines below the cell's own, as a user would add them. copy: another name.
        """
        content = load(CHECKOUT / "notebooks" / f"{name}.ipynb")
        [cell] = [cell for cell in content["cells"] if "parameters" in tags_of(cell)]
        cell["source"] = "\n".join([source_of(cell), *(f"{field} = {value!r}" for field, value in fields.items())])
        content["metadata"]["kernelspec"]["name"] = kernel
        path = self.notebooks / f"{copy or name}.ipynb"
        save(path, content)
        return path.name

    def _write_settings(self):
        for plugin, values in _SETTINGS.items():
            path = self.folder / "settings" / f"{plugin}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")

    def _write_kernel(self, name, python_path):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        env = {"PYTHONPATH": os.pathsep.join(map(str, python_path))}
        path = self.folder / "data" / "kernels" / name / "kernel.json"
        path.parent.mkdir(parents=True)
        spec = {"argv": argv, "display_name": name, "language": "python", "env": env}
        path.write_text(json.dumps(spec), encoding="utf-8")

    def _environment(self):
        ours = {
            "HOME": "home",
            "IPYTHONDIR": "ipython",
            "MPLCONFIGDIR": "matplotlib",
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
            "PEFTLIB_ROOT": "runs",
        }
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PEFTLIB_", "JUPYTER"))
        }
        environment |= {name: str(self.folder / place) for name, place in ours.items()}
        offline = {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")}
        # One thread: tiny tensors gain nothing from a second one, and the browser needs the other core.
        return environment | offline | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}

    def _wait_until_it_answers(self):
        # The port that the system gave is in this file, which is there once the server listens.
        info = self.folder / "runtime" / f"jpserver-{self._process.pid}.json"
        end = time.monotonic() + _START_S
        while True:
            assert self._process.poll() is None and time.monotonic() < end, f"no JupyterLab: see {self.log_path}"
            try:
                found = json.loads(info.read_text(encoding="utf-8"))
                self.url, self.token = f"http://127.0.0.1:{found['port']}/", found["token"]
                self._ask("api/status")
                return
            except (OSError, ValueError):  # not written yet, half written, not listening yet
                time.sleep(0.1)

    def _ask(self, path, method="GET"):
        headers = {"Authorization": f"token {self.token}"}
        asked = urllib.request.Request(f"{self.url}{path}", method=method, headers=headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.read()
