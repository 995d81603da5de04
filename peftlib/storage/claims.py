"""Claims on the runs of a study, each held by one worker at a time, here and on the study's remote."""

import contextlib
from pathlib import Path

from peftlib.storage.lock import STALE_S, StudyLock, live_owner
from peftlib.storage.mirror import running

_SUFFIX = "-lock.json"


class Claims:
    """Who works on which run of a study folder.

    Another machine's claim without a heartbeat for a while is taken over.
    """

    def __init__(self, folder, *, log=print):
        self.folder, self.log = Path(folder), log
        self._places = [(self.folder / "claims", {"stale_s": STALE_S})]
        mirror = running(folder)
        if mirror is not None and mirror.remote.lock_settle_s is not None:
            pace = {"heartbeat_s": 60.0, "stale_s": 240.0, "settle_s": mirror.remote.lock_settle_s}
            self._places.append((mirror.remote.folder / "claims", pace))

    @contextlib.contextmanager
    def take(self, run):
        """Hold the claim of a run; yields it: `require()` raises LockedError once another worker has taken over.

        LockedError: another live worker holds it (named). DiskError: a store that cannot be written.
        """
        told = {"name": f"{run}{_SUFFIX}", "place": f"{run} of study {self.folder.name!r}", "log": self.log}
        with contextlib.ExitStack() as stack:
            locks = [
                stack.enter_context(StudyLock(folder, f"working on {run}", **told, **pace))
                for folder, pace in self._places
            ]
            yield _Claim(locks)

    def owners(self):
        """{run: who holds its claim, in words}."""
        found = {}
        for folder, pace in reversed(self._places):
            for path in folder.glob(f"*{_SUFFIX}"):
                owner = live_owner(path, pace["stale_s"])
                if owner is not None:
                    found[path.name.removesuffix(_SUFFIX)] = owner
        return found


class _Claim:
    def __init__(self, locks):
        self._locks = locks

    def require(self):
        """LockedError once another worker has taken over."""
        for lock in self._locks:
            lock.require()
