"""Plants a fault at every write, rename, flush and deletion of checkpoints and of their copies, and resumes after each.

    python tests/stress/faults.py [--short]     # --short: a fifth of the cases

For each operation of saving a checkpoint, and of copying it to a remote: an error (ENOSPC, EIO, errno 107), or the end
of the process with the file cut, empty, flipped or gone; then damage at rest; then a real file system that is full (a
small tmpfs, as root). After each, a new session must find the newest whole checkpoint, save on, and find that.
The last line is '<n> cases, <c> crashes, <l> lost good checkpoints'.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS.parent), str(_TESTS / "fakes"), str(_TESTS / "stress")]

from fault_disk import DEATHS, ERRORS, FaultDisk, damage

STILL = ("truncated", "zero bytes", "bit flipped", "missing")


def checkpoint(step):
    import torch

    from peftlib.storage.checkpoint import Checkpoint

    weights = {f"w{i}": torch.full((64, 32), float(step)) for i in range(3)}
    return Checkpoint(weights, {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": []}, {"at": step})


def quiet(line):
    """Nobody reads the log here."""


class Faults:
    """Counts cases, crashes and losses below a folder of its own."""

    def __init__(self, folder, every=1):
        self.folder, self.every = Path(folder), every
        self.cases, self.crashes, self.lost = Counter(), [], []

    def saving(self):
        """A fault at each operation of a save that also deletes an older checkpoint."""
        for keep in (1, 2):
            for at, kind in self._each(lambda disk, keep=keep: self._save(3, keep, disk), keep):
                before = self._fresh(keep)
                disk = FaultDisk(before, at=at, kind=kind)
                self._case(f"save, keep {keep}: {kind}", lambda d=disk, k=keep: self._save(3, k, d), before, keep, disk)

    def resting(self):
        """Damage to each file of the newest checkpoint, or of both."""
        for name, how, keep in itertools.product(("tensors.pt", "state.json", "manifest.json"), STILL, (1, 2)):
            place = self._fresh(keep)
            for step in (3, 4) if keep == 2 else (3,):
                self._save(step, 2, FaultDisk(place))
            newest = max(place.glob("step-*"))
            self._case(f"at rest: {how}", lambda n=newest / name, h=how: damage(n, h), place, keep)

    def copying(self):
        """A fault at each operation of a copy to a remote, then a session on an empty machine."""
        for at, kind in self._each(self._copy, None):
            root = self._fresh_study()
            self._copy_case(f"copy: {kind}", root, FaultDisk(root / "remote", at=at, kind=kind))

    def filling(self):
        """Saves on a file system of each of some sizes; False where none can be mounted."""
        place = self.folder / "small"
        for kib in range(40, 240, 8):
            place.mkdir(exist_ok=True)
            mounted = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], capture_output=True, check=False
            )
            if mounted.returncode:
                return False
            try:
                self._case("tmpfs full", lambda: self._fill(place), place, 1)
            finally:
                subprocess.run(["umount", str(place)], check=True)
        return True

    def _fill(self, place):
        from peftlib.core.errors import CheckpointError

        for step in range(1, 5):
            try:
                self._save(step, 1, FaultDisk(place))
            except CheckpointError:
                continue

    def _save(self, step, keep, disk):
        from peftlib.storage.checkpoint import CheckpointDir

        with disk.plugged_in():
            CheckpointDir(disk.folder, keep=keep, log=quiet).save(step, checkpoint(step))

    def _copy(self, disk):
        from peftlib.storage.mirror import Mirror
        from peftlib.storage.store import Remote

        root = disk.folder.parent
        with disk.plugged_in():
            mirror = Mirror(root / "study", Remote(root / "remote"), log=quiet)
            mirror.restore()
            mirror.copy_once(is_last=True)

    def _each(self, act, keep):
        """(operation number, kind) of every fault that `act` can meet."""
        disk = FaultDisk(self._fresh(keep) if keep else self._fresh_study() / "remote")
        act(disk)
        # A step that shares no factor with the number of kinds, so that each kind keeps its turn.
        return itertools.islice(itertools.product(range(len(disk.operations)), (*ERRORS, *DEATHS)), 0, None, self.every)

    def _case(self, name, act, place, keep, disk=None):
        """Run `act` with its fault, then resume in `place` as a new session would."""
        self._suffer(name, act, disk)
        self._resume(name, place, keep)

    def _suffer(self, name, act, disk):
        from peftlib.core.errors import CheckpointError

        self.cases[name] += 1
        try:
            act()
        except CheckpointError:
            pass
        except BaseException as error:  # noqa: BLE001
            if disk is None or not disk.is_dead:  # torch.save turns the end of the process into an error of its own
                self.crashes.append(f"{name}: {error!r}")

    def _resume(self, name, place, keep):
        from peftlib.core.errors import CheckpointError
        from peftlib.storage.checkpoint import CheckpointDir

        expected = newest_whole(place)
        try:
            again = CheckpointDir(place, keep=keep, log=quiet)
            found, _ = again.newest()
            if (found.state["at"] if found else None) != expected:
                self.lost.append(f"{name}: found {found and found.state['at']}, whole is {expected}")
            if "tmpfs" not in name:
                if expected is None or expected < 2:
                    self.lost.append(f"{name}: only {expected} is left")
                again.save(9, checkpoint(9))
                if CheckpointDir(place, keep=keep).newest()[0].state["at"] != 9:
                    self.lost.append(f"{name}: the save after it is not found")
        except CheckpointError as error:
            self.crashes.append(f"{name}: resume raised {error!r}")

    def _copy_case(self, name, root, disk):
        self._suffer(name, lambda: self._copy(disk), disk)
        self._on_an_empty_machine(name, root, at_least=1)
        self._copy(FaultDisk(root / "remote"))  # the next session here goes on and copies what was not
        self._on_an_empty_machine(f"{name}, copied again", root, at_least=2)

    def _on_an_empty_machine(self, name, root, at_least):
        from peftlib.storage.checkpoint import CheckpointDir
        from peftlib.storage.mirror import Mirror
        from peftlib.storage.store import Remote

        elsewhere = root / "elsewhere"
        shutil.rmtree(elsewhere, ignore_errors=True)
        try:
            Mirror(elsewhere, Remote(root / "remote"), log=quiet).restore()
            found, skipped = CheckpointDir(elsewhere / "checkpoints" / "qlora-s0", keep=1).newest()
        except BaseException as error:  # noqa: BLE001
            self.crashes.append(f"{name}: restore raised {error!r}")
            return
        if found is None or found.state["at"] < at_least or skipped:
            self.lost.append(f"{name}: {found and found.state['at']} came back, {skipped}")

    def _fresh(self, keep):
        """A folder of whole checkpoints 1 and 2 (2 alone where one is kept)."""
        from peftlib.storage.checkpoint import CheckpointDir

        place = Path(tempfile.mkdtemp(dir=self.folder))
        for step in (1, 2):
            CheckpointDir(place, keep=keep).save(step, checkpoint(step))
        return place

    def _fresh_study(self):
        """A folder with a study at step 2 and a remote that has it at step 1."""
        from peftlib.storage.checkpoint import CheckpointDir

        root = Path(tempfile.mkdtemp(dir=self.folder))
        run = CheckpointDir(root / "study" / "checkpoints" / "qlora-s0", keep=1)
        run.save(1, checkpoint(1))
        (root / "study" / "config.json").write_text("{}")
        self._copy(FaultDisk(root / "remote"))
        run.save(2, checkpoint(2))
        return root


def newest_whole(place):
    """The step of the newest checkpoint whose tensors and state are what was saved, found without peftlib's reading."""
    import torch

    whole = []
    for path in place.glob("step-*"):
        try:
            step = json.loads((path / "state.json").read_text())["at"]
            tensors = torch.load(path / "tensors.pt", weights_only=True)
            manifest = json.loads((path / "manifest.json").read_text())
            is_listed = (
                manifest.pop("seal") == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            )
            for name, listed in manifest["files"].items():
                is_listed &= hashlib.sha256((path / name).read_bytes()).hexdigest() == listed["sha256"]
        except (OSError, ValueError, KeyError, RuntimeError, EOFError):
            continue
        if is_listed and all(torch.equal(tensors["weights"][n], w) for n, w in checkpoint(step).weights.items()):
            whole.append(step)
    return max(whole, default=None)


def main(argv):
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(folder, every=5 if "--short" in argv else 1)
        faults.saving()
        faults.resting()
        faults.copying()
        if os.geteuid() != 0 or not faults.filling():
            print("tmpfs: not tried, for nothing can be mounted here")
    for name, n in sorted(faults.cases.items()):
        print(f"{n:5d}  {name}")
    for told in [*faults.crashes, *faults.lost][:20]:
        print(told)
    print(f"{faults.cases.total()} cases, {len(faults.crashes)} crashes, {len(faults.lost)} lost good checkpoints")
    return 1 if faults.crashes or faults.lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
