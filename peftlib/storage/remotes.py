"""The remote of a study, and Google Drive as Colab mounts it."""

import contextlib
import errno
import os
import sys
from pathlib import Path

from peftlib.core.errors import ConfigError
from peftlib.core.session import is_watched
from peftlib.storage.store import AWAY, FULL, Remote

DRIVE = Path("/content/drive")
DRIVE_LIMIT_BYTES = 12 << 30  # of a free Drive's 15 GB, which mail and photos share
_mounted_by_us = False  # whether this process has mounted Drive


def remote_of(study_name):
    """The remote of a study, or None.

    PEFTLIB_MIRROR names it: a folder, hf://USER/REPO, hf://buckets/USER/BUCKET, s3://BUCKET, gs://BUCKET, or off.
    If it is not set, a mounted Drive is used. ConfigError: an unsupported or incomplete URL.
    """
    named = os.environ.get("PEFTLIB_MIRROR", "").strip()
    if named:
        return None if named == "off" else Remote(named, study_name)
    return DriveRemote(study_name) if (DRIVE / "MyDrive").is_dir() else None


def mount_drive():
    """Mount Google Drive, which asks its owner for permission; if it is refused, only the local disk is used.

    ConfigError: this is not Colab.
    """
    global _mounted_by_us
    if not can_ask_colab():
        raise ConfigError("drive=True or PEFTLIB_DRIVE=1 asks for Google Drive, but only Colab can mount it")
    was_mounted = (DRIVE / "MyDrive").is_dir()
    try:
        _mount()
        _mounted_by_us = _mounted_by_us or not was_mounted
    except OSError as error:
        print(
            f"{error.strerror}: results stay on this machine and are lost with it. Run this cell again to allow it, "
            "or set PEFTLIB_DRIVE=0 to work without Drive"
        )


def _mount(**how):
    """Mount Drive. OSError: refused, or it failed."""
    from google.colab import drive

    try:
        drive.mount(str(DRIVE), **how)
    except Exception as error:
        # Colab raises ValueError, RuntimeError and its own errors, which are plain Exceptions.
        raise OSError(errno.ENOTCONN, f"Google Drive is not mounted ({error})") from error


def can_ask_colab():
    """Whether this kernel can talk to Colab's page, which mounting needs; a kernel started by papermill cannot."""
    return "google.colab" in sys.modules and is_watched()


class DriveRemote(Remote):
    """A study's folder on the Google Drive that Colab has mounted."""

    pace_s = 60.0  # Drive limits writes, and other machines see them late
    doubt = (
        "Colab uploads it in the background, so keep this runtime for a few minutes, or check at "
        "drive.google.com that it has arrived"
    )

    def __init__(self, study_name):
        super().__init__(DRIVE / "MyDrive" / "peftlib", study_name)
        self.lock_settle_s = 3.0

    def __str__(self):
        return "Google Drive"

    def put(self, name, write, needed_bytes, facts):
        if not self._is_mounted():  # else the copy would go to the local disk, below an empty mount point
            raise OSError(errno.ENOTCONN, "Google Drive is not mounted")
        super().put(name, write, needed_bytes, facts)

    def free_bytes(self):
        ours = sum(path.stat().st_size for path in self.folder.parent.rglob("*") if path.is_file())
        return min(super().free_bytes(), DRIVE_LIMIT_BYTES - ours)

    def reconnect(self):
        """Remount a Drive whose mount has died. OSError: remounting failed."""
        # On a live mount this would kill the uploads, also those of every other process.
        if can_ask_colab() and not self._is_mounted():
            _mount(force_remount=True)

    def flush(self):
        """Make Drive upload pending files; returns the remaining doubt.

        Colab does that only by unmounting Drive for the whole machine, so it is not done in a headless run, nor if
        another process mounted it.
        """
        if not _mounted_by_us or not can_ask_colab():
            return self.doubt
        from google.colab import drive

        try:
            drive.flush_and_unmount()
        except Exception as error:  # noqa: BLE001  ValueError today
            return f"Drive did not confirm the upload ({error}). {self.doubt}"
        with contextlib.suppress(OSError):  # all is uploaded; the next copy logs it if Drive is still away
            self.reconnect()
        return ""

    def remedy(self, error):
        if error.errno in FULL:
            return (
                "free some space on Drive (and empty its trash, which counts), or set PEFTLIB_MIRROR to another place"
            )
        if error.errno in AWAY:
            return "run drive.mount('/content/drive', force_remount=True) in a cell if it does not reconnect"
        return super().remedy(error)

    def _is_mounted(self):
        return (DRIVE / "MyDrive").is_dir()
