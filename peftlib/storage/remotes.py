"""Remotes, where a study is kept beside the local disk: a folder, Google Drive, or a store that fsspec opens.

Any of them can fail or lie, so each archive is read back after it was written, and counts only with its sealed listing,
written last. Drive's trash counts as well, so in folders files keep their names, are overwritten in place, and are
emptied before they are deleted; renaming over a file would trash the old one.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

from peftlib.core.errors import ConfigError, PeftlibError, StudyError
from peftlib.core.files import HashingWriter, fault_of, gib, json_of, sealed, write_stream
from peftlib.core.hub_token import hf_token
from peftlib.core.json_reading import require_shape
from peftlib.core.session import is_watched

PUBLIC = "PEFTLIB_MIRROR_PUBLIC"  # environment variable: 1 to copy a study to a place that everybody can read
DRIVE = Path("/content/drive")
DRIVE_LIMIT_BYTES = 12 << 30  # of a free Drive's 15 GB; mail and photos share it
_LISTED = {"unit": str, "serial": int, "origin": str, "bytes": int, "sha256": str}  # facts of an archive on a remote
_FULL = (errno.ENOSPC, errno.EDQUOT)
_AWAY = (errno.ENOTCONN, errno.ENODEV, errno.ESTALE, errno.EIO, errno.ENOENT)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # what fsspec needs for a scheme
_ANONYMOUS: dict[str, dict] = {
    "s3": {"anon": True, "key": None, "secret": None},
    "gs": {"token": "anon"},
    "gcs": {"token": "anon"},
}
_SQUASH_BYTES = 1 << 30  # old versions that may pile up in a hub repository
_OURS = re.compile(r"initial commit$|[\w.-]+: [\w.-]+\.\d|peftlib: |Delete \S+\.(tar|json) $")  # commits made by us
_mounted_by_us = False  # whether this process has mounted Drive


def remote_of(study_name):
    """The remote of a study, or None where it has none.

    PEFTLIB_MIRROR names it: a folder, hf://USER/REPO, hf://buckets/USER/BUCKET, s3://BUCKET, gs://BUCKET, or off.
    Where it is not set, a mounted Drive is taken. ConfigError: a URL that nothing opens, or that is not whole.
    """
    named = os.environ.get("PEFTLIB_MIRROR", "").strip()
    if named:
        return None if named == "off" else Remote(named, study_name)
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


def is_public(api, repository, repo_type="model"):
    """Whether everybody can read a repository of the hub; one that does not exist is not public."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not api.repo_info(repository, repo_type=repo_type).private
    except RepositoryNotFoundError:
        return False


@contextlib.contextmanager
def as_os_errors():
    """Raise what a store's library raises as OSError, which is all that a remote may raise."""
    try:
        yield
    except (OSError, PeftlibError):
        raise
    except Exception as error:  # these libraries' errors have no class in common
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(errno.EIO, said[:200]) from error


class Remote:
    """A place of archives: NAME.tar, and its listing NAME.json with bytes, SHA-256 and facts. Methods raise OSError.

    place: a folder, or a URL as in remote_of; the study's files are below it in `study_name`. fs, api: an fsspec file
    system and a huggingface_hub.HfApi, for tests. ConfigError: nothing opens the URL. ModelError: no token for the hub.

    folder: the study's, None where the place is none of this machine's. lock_settle_s: see StudyLock; None where system
    locks cannot be kept there. creates_exclusively: whether of two that create a file one is refused. pace_s: seconds
    between two writes of what changes all the time, at least. doubt: what is not known about a copy before it is
    flushed; '' where a copy is there once it is written.
    """

    lock_settle_s: float | None = None
    pace_s = 0.0
    doubt = ""

    def __init__(self, place, study_name="", *, fs=None, api=None):
        self._name, self.folder = str(place).rstrip("/"), None
        self._scheme, is_url, below = self._name.partition("://")
        self._bucket = below.removeprefix("buckets/") if below.startswith("buckets/") else None  # on the hub
        self._repository, self._known, self._unsquashed, self._is_private = below, {}, 0, False
        if not is_url:
            self.folder, self.lock_settle_s = Path(place).expanduser() / study_name, 0.0
            self._scheme, self._name = "file", str(self.folder)
        elif self._scheme == "hf" and (self._bucket or below).count("/") != 1:
            raise ConfigError(f"PEFTLIB_MIRROR={self._name!r}: use hf://USER/REPO or hf://buckets/USER/BUCKET")
        self._is_repository = self._scheme == "hf" and not self._bucket
        if self._is_repository:
            self.pace_s = 300.0  # each is a commit, and the hub takes about a hundred an hour
        self.creates_exclusively = self._scheme != "hf"
        self.root = self._name if self.folder else f"{below}/{study_name}".rstrip("/")
        if fs is not None:
            self.fs = fs
        else:
            self._require_package()
        if api is not None:
            self.api = api

    def __str__(self):
        return self._name

    @functools.cached_property
    def api(self):
        """The hub's client."""
        from huggingface_hub import HfApi

        return HfApi(token=hf_token())

    @functools.cached_property
    def fs(self):
        """The fsspec file system."""
        import fsspec

        with as_os_errors():
            return fsspec.filesystem(self._scheme, **({"token": hf_token()} if self._scheme == "hf" else {}))

    @property
    def notice(self):
        """What a person should know when copying starts, in one line."""
        if not self._is_repository:
            return ""
        return (
            f"{self} keeps old versions of what is copied: peftlib squashes its history at every GiB of them, which "
            "frees their space, but not where it holds commits that are not peftlib's"
        )

    def at(self, name):
        """The path of a file of the study in `fs`."""
        return f"{self.root}/{name}"

    def listing(self, units=None):
        """{name: facts} of the archives whose listing is whole; whether an archive is, `fetch` finds out.

        units: only those, each asked for by its name: a store may list late what it holds.
        """
        with as_os_errors():
            self.fs.invalidate_cache(self.root)
            if units is None:
                marks = self._listed()
            else:
                marks = {f"{unit}.{slot}": None for unit in units for slot in (0, 1)}
            found = {name: self._facts(name, mark) for name, mark in marks.items()}
        return {name: facts for name, facts in found.items() if facts}

    def _listed(self):
        """{name: a mark that differs once its listing has changed; None where that is not known}."""
        try:
            entries = self.fs.ls(self.root, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        paths = [(PurePosixPath(entry["name"]), entry) for entry in entries if entry["type"] == "file"]
        return {p.stem: None if self.folder else str(entry) for p, entry in paths if p.suffix == ".json"}

    def _facts(self, name, mark):
        if mark is None or self._known.get(name, (None,))[0] != mark:
            facts = None
            with contextlib.suppress(FileNotFoundError, StudyError, UnicodeDecodeError):
                path = self.at(f"{name}.json")
                facts = require_shape(json_of(self.fs.cat_file(path).decode(), path, is_sealed=True), _LISTED, path)
            self._known[name] = mark, facts
        return self._known[name][1]

    def put(self, name, write, needed_bytes, facts):
        """Write an archive by write(writer), in place, read it back, and list it with `facts` (JSON values).

        OSError: also where it would not fit or everybody could read it, before anything is touched, and where what is
        read back differs.
        """
        with as_os_errors():
            self._require_place(name, needed_bytes)
            archive, listing = f"{name}.tar", f"{name}.json"
            if self.folder is not None:
                self._write(listing, lambda out: None)  # from here the old archive does not count
            made = self._write(archive, write)
            self._require_written(archive, made)
            self._write(listing, lambda out: out.write(sealed({**facts, **made})))
            self._unsquashed += made["bytes"]
            if self._unsquashed > _SQUASH_BYTES:
                self._squash()

    def _require_place(self, name, needed_bytes):
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            archive = self.folder / f"{name}.tar"
            free = self.free_bytes() + (archive.stat().st_size if archive.exists() else 0)
            if needed_bytes > free:
                said = f"{name} takes {gib(needed_bytes):.2f} GiB, {gib(max(0, free)):.2f} are free"
                raise OSError(errno.ENOSPC, said)
            return
        if self._bucket:
            self.api.create_bucket(self._bucket, private=True, exist_ok=True)
        elif self._is_repository:
            self.api.create_repo(self._repository, repo_type="model", private=True, exist_ok=True)
        refusal = None if self._is_private else self.refusal()
        if refusal:
            raise OSError(errno.EPERM, refusal)
        self.fs.invalidate_cache(self.root)  # it may say that a repository made just now is not there

    def _write(self, name, write):
        """Write one file; {'bytes', 'sha256'} of what was given."""
        if self.folder is not None:
            return write_stream(self.folder / name, write)
        words = {"commit_message": f"{PurePosixPath(self.root).name}: {name}"} if self._is_repository else {}
        with self.fs.open(self.at(name), "wb", **words) as raw:
            writer = HashingWriter(raw)
            write(writer)
        return {"bytes": writer.bytes, "sha256": writer.sha256}

    def _require_written(self, name, made):
        if self.folder is not None:
            return require_sound(self.folder / name, made, "read back")
        self.fs.invalidate_cache(self.root)
        hashed = self.fs.info(self.at(name)).get("lfs")  # the hub hashes what arrives
        if hashed:
            found = hashed.sha256
        else:
            with self.fs.open(self.at(name), "rb") as raw:
                found = hashlib.file_digest(raw, "sha256").hexdigest()
        if found != made["sha256"]:
            raise OSError(errno.EIO, f"read back: {name} is damaged (SHA-256 differs)")

    def fetch(self, name, facts, target):
        """Copy an archive to the local path `target`. OSError: it is not what its listing says."""
        with as_os_errors():
            self.fs.invalidate_cache(self.root)
            self.fs.get_file(self.at(f"{name}.tar"), str(target))
        require_sound(target, facts, name)

    def drop(self, name):
        """Delete an archive; in a folder it is emptied first."""
        with as_os_errors():
            for part in (f"{name}.json", f"{name}.tar"):
                if self.folder is None:
                    self.fs.rm(self.at(part))
                elif (self.folder / part).exists():
                    write_stream(self.folder / part, lambda out: None)
                    os.unlink(self.folder / part)

    def free_bytes(self):
        """Bytes that may still be written; a large number for a store, which names no limit in advance."""
        if self.folder is None:
            return 1 << 50
        return shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.exists())).free

    def refusal(self):
        """Why a study should not be copied there, in words, or None."""
        if os.environ.get(PUBLIC, "").strip() == "1":
            return None
        with as_os_errors():
            self._is_private = not self._is_public()
        if self._is_private:
            return None
        return (
            f"{self} is public, so everybody could read the study's rows, answers and weights: make it private in its "
            f"settings, name another place in PEFTLIB_MIRROR, or set {PUBLIC}=1 if that is meant"
        )

    def _is_public(self):
        if self._bucket:
            from huggingface_hub.errors import BucketNotFoundError

            try:
                return not self.api.bucket_info(self._bucket).private
            except BucketNotFoundError:
                return False
        if self._is_repository:
            return is_public(self.api, self._repository)
        if self._scheme not in _ANONYMOUS:
            return False
        # Rules, policies and access lists are many: whether somebody without a key can read a file settles it.
        probe = self.at("probe.txt")
        self.fs.pipe_file(probe, b"whether everybody can read this")
        settings = {**self.fs.storage_options, **_ANONYMOUS[self._scheme], "skip_instance_cache": True}
        try:
            return bool(type(self.fs)(**settings).cat_file(probe))
        except (FileNotFoundError, PermissionError):
            return False
        finally:
            self.fs.rm_file(probe)

    def _squash(self):
        """Free the space of old versions on the hub, where all of its history is of such copies."""
        self._unsquashed = 0
        if self._is_repository:
            commits = self.api.list_repo_commits(self._repository, repo_type="model")
            if all(_OURS.match(commit.title) for commit in commits):
                message = "peftlib: older versions are gone"
                self.api.super_squash_history(self._repository, repo_type="model", commit_message=message)

    def _require_package(self):
        import fsspec

        try:
            fsspec.get_filesystem_class(self._scheme)
        except ImportError:
            package = _PACKAGES.get(self._scheme, self._scheme)
            raise ConfigError(f"PEFTLIB_MIRROR={self._name!r} needs a package: pip install {package}") from None
        except ValueError:
            known = "a folder, hf://USER/REPO, s3://BUCKET or gs://BUCKET"
            raise ConfigError(f"PEFTLIB_MIRROR={self._name!r}: use {known}") from None

    def reconnect(self):
        """Take up a connection that was lost."""

    def flush(self):
        """Wait until all has arrived; returns the doubt that is left."""
        with contextlib.suppress(OSError), as_os_errors():
            if self._unsquashed:
                self._squash()
        return self.doubt

    def remedy(self, error):
        """What a person can do about an OSError of this remote, in words."""
        if error.errno == errno.EPERM and self.folder is None:
            return "nothing is copied there until then"
        if error.errno in _FULL:
            return f"free some space on {self}, or name another place in PEFTLIB_MIRROR"
        if self.folder is None:
            whose = "HF_TOKEN may" if self._scheme == "hf" else "this machine's credentials may"
            return f"see whether {whose} write to {self}, and the network, or set PEFTLIB_MIRROR to a folder or to off"
        if error.errno in _AWAY:
            return f"see whether {self.folder} is still mounted"
        return f"see whether {self.folder} can be written to, or set PEFTLIB_MIRROR to another place or to off"


class DriveRemote(Remote):
    """A study's folder on the Google Drive that Colab has mounted."""

    pace_s = 60.0  # it counts writes, and shows them late to other machines
    doubt = (
        "Colab uploads it in the background, so keep this runtime for some minutes, or see at "
        "drive.google.com that it is there"
    )

    def __init__(self, study_name):
        super().__init__(DRIVE / "MyDrive" / "peftlib", study_name)
        self.lock_settle_s = 3.0

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


def require_sound(path, listed, what):
    """OSError unless a file is the {'bytes', 'sha256'} that was written."""
    fault = fault_of(path, listed)
    if fault:
        raise OSError(errno.EIO, f"{what}: {fault}")
