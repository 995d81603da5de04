"""Remotes, where a study is kept beside the local disk: a mounted Google Drive, any other folder, or a hub repository.

The one module that knows what Drive is: deleted files lie in its trash and still count, so files keep their names, are
overwritten in place, and are emptied before they are deleted; renaming over a file would trash the old one. A mount
can die or lie, so each file is read back after it was written, and counts only with its sealed listing, written last.
"""

import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path

from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.files import fault_of, gib, read_json, sealed, write_stream
from peftlib.core.json_reading import require_shape
from peftlib.core.session import is_watched

DRIVE = Path("/content/drive")
_BLOCK = 4 << 20  # bytes copied at once
DRIVE_LIMIT_BYTES = 12 << 30  # of a free Drive's 15 GB; mail and photos share it
_LISTED = {"unit": str, "serial": int, "origin": str, "bytes": int, "sha256": str}  # facts of an archive on a remote
_FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (errno.ENOTCONN, errno.ENODEV, errno.ESTALE, errno.EIO, errno.ENOENT)
_mounted_by_us = False  # whether this process has mounted Drive


def remote_of(study_name):
    """The remote of a study, or None where it has none.

    PEFTLIB_MIRROR names it: a folder, hf://USER/REPO, or off. Where it is not set, a mounted Drive is taken.
    ConfigError: hf:// without a repository.
    """
    named = os.environ.get("PEFTLIB_MIRROR", "").strip()
    if named.startswith("hf://"):
        from peftlib.storage.hub import HubRemote

        if named.count("/") < 3:
            raise ConfigError(f"PEFTLIB_MIRROR={named!r}: use hf://USER/REPO")
        return HubRemote(named.removeprefix("hf://"), study_name)
    if named:
        return None if named == "off" else FolderRemote(Path(named).expanduser() / study_name)
    return DriveRemote(study_name) if (DRIVE / "MyDrive").is_dir() else None


def mount_drive():
    """Mount Google Drive, which asks its owner for permission; where it is refused, work goes on with the local disk
    alone.

    ConfigError: this is not Colab.
    """
    global _mounted_by_us
    if not _can_ask_colab():
        raise ConfigError("Google Drive is asked for (drive=True or PEFTLIB_DRIVE=1), but only Colab can mount it")
    was_mounted = (DRIVE / "MyDrive").is_dir()
    try:
        _mount()
        _mounted_by_us = _mounted_by_us or not was_mounted
    except OSError as error:
        print(
            f"{error.strerror}: results stay on this machine and go with it. Run this cell again to allow it, or set "
            "PEFTLIB_DRIVE=0 to do without"
        )


def _mount(**how):
    """Mount Drive. OSError: refused, or it failed."""
    from google.colab import drive

    try:
        drive.mount(str(DRIVE), **how)
    except Exception as error:
        # Colab raises ValueError, RuntimeError and errors of its page's own kind, which are plain Exceptions.
        raise OSError(errno.ENOTCONN, f"Google Drive is not mounted ({error})") from error


def _can_ask_colab():
    """Whether this kernel can talk to Colab's page, as mounting needs: of one that papermill started there is none."""
    return "google.colab" in sys.modules and is_watched()


class Remote:
    """A place of archives: NAME.tar, and its listing NAME.json with bytes, SHA-256 and facts. Methods raise OSError.

    folder: None where it is none. lock_settle_s: see StudyLock; None where locks cannot be kept there. notice: what a
    person should know when copying starts. doubt: what is not known about a copy before it is flushed; '' where a copy
    is there once it is written.
    """

    folder: Path | None = None
    lock_settle_s: float | None = None
    notice = doubt = ""

    def refusal(self):
        """Why a study should not be copied there, in words, or None."""

    def reconnect(self):
        """Take up a connection that was lost."""

    def flush(self):
        """Wait until all has arrived; returns the doubt that is left."""
        return self.doubt


class FolderRemote(Remote):
    """Archives in a folder, whose listings are written last."""

    lock_settle_s = 0.0

    def __init__(self, folder):
        self.folder = Path(folder)

    def __str__(self):
        return str(self.folder)

    def listing(self):
        """{name: facts} of the archives whose listing is whole; whether an archive is, `fetch` finds out."""
        return facts_below(self.folder)

    def put(self, name, write, needed_bytes, facts):
        """Write an archive by write(writer), in place, read it back, and list it with `facts` (JSON values).

        OSError: also where it would not fit, before anything is touched, and where what is read back differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        archive, listing = self._paths(name)
        free = self.free_bytes() + (archive.stat().st_size if archive.exists() else 0)
        if needed_bytes > free:
            raise OSError(errno.ENOSPC, f"{name} takes {gib(needed_bytes):.2f} GiB, {gib(max(0, free)):.2f} are free")
        write_stream(listing, lambda out: None)  # from here the old archive does not count
        made = write_stream(archive, write)
        require_sound(archive, made, "read back")
        write_stream(listing, lambda out: out.write(sealed({**facts, **made})))

    def fetch(self, name, facts, target):
        """Copy an archive to the local path `target`. OSError: it is not what its listing says."""
        archive, _ = self._paths(name)
        with open(archive, "rb") as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, _BLOCK)
        require_sound(target, facts, name)

    def drop(self, name):
        """Delete an archive, emptied first."""
        for path in reversed(self._paths(name)):  # the listing goes first
            if path.exists():
                write_stream(path, lambda out: None)
                os.unlink(path)

    def free_bytes(self):
        """Bytes that may still be written."""
        return shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.exists())).free

    def remedy(self, error):
        """What a person can do about an OSError of this remote, in words."""
        if error.errno in _FULL:
            return f"free some space on {self.folder}, or name another place in PEFTLIB_MIRROR"
        if error.errno in _AWAY:
            return f"see whether {self.folder} is still mounted"
        return f"see whether {self.folder} can be written to, or set PEFTLIB_MIRROR to another place or to off"

    def _paths(self, name):
        return self.folder / f"{name}.tar", self.folder / f"{name}.json"


class DriveRemote(FolderRemote):
    """A study's folder on the Google Drive that Colab has mounted."""

    lock_settle_s = 3.0
    doubt = (
        "Colab uploads it in the background, so keep this runtime for some minutes, or see at "
        "drive.google.com that it is there"
    )

    def __init__(self, study_name):
        super().__init__(DRIVE / "MyDrive" / "peftlib" / study_name)

    def __str__(self):
        return "Google Drive"

    def put(self, name, write, needed_bytes, facts):
        if not self._is_mounted():  # else the copy would be made on this machine's disk, below an empty mount point
            raise OSError(errno.ENOTCONN, "Google Drive is not mounted")
        super().put(name, write, needed_bytes, facts)

    def free_bytes(self):
        ours = sum(path.stat().st_size for path in self.folder.parent.rglob("*") if path.is_file())
        return min(super().free_bytes(), DRIVE_LIMIT_BYTES - ours)

    def reconnect(self):
        """Mount a Drive again whose mount has died. OSError: it does not come back."""
        # Of one that lives this would kill the uploads, and for every other process too.
        if _can_ask_colab() and not self._is_mounted():
            _mount(force_remount=True)

    def flush(self):
        """Have Drive upload what its mount still holds back; returns the doubt that is left.

        Colab can do it only by unmounting Drive for the whole machine, so not in a headless run, nor where somebody
        else has mounted it.
        """
        if not _mounted_by_us or not _can_ask_colab():
            return self.doubt
        from google.colab import drive

        try:
            drive.flush_and_unmount()
        except Exception as error:  # noqa: BLE001  ValueError today
            return f"Drive did not say that it arrived ({error}). {self.doubt}"
        with contextlib.suppress(OSError):  # all is uploaded; the next copy says so if Drive is still away
            self.reconnect()
        return ""

    def remedy(self, error):
        if error.errno in _FULL:
            return (
                "free some space on Drive (and empty its trash, which counts), or name another place in PEFTLIB_MIRROR"
            )
        if error.errno in _AWAY:
            return "run drive.mount('/content/drive', force_remount=True) in a cell if it does not come back"
        return super().remedy(error)

    def _is_mounted(self):
        return (DRIVE / "MyDrive").is_dir()


def facts_below(folder):
    """{name: facts} of the whole listings in a folder."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(StudyError, OSError):
            found[path.stem] = require_shape(read_json(path, is_sealed=True), _LISTED, path)
    return found


def require_sound(path, listed, what):
    """OSError unless a file is the {'bytes', 'sha256'} that was written."""
    fault = fault_of(path, listed)
    if fault:
        raise OSError(errno.EIO, f"{what}: {fault}")
