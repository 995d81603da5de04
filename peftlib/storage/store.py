"""Archives on a store that fsspec opens: a folder, a repository or bucket of the Hugging Face hub, S3, Google Cloud.

Any store can fail or return wrong data, so each archive is read back after writing, and is valid only with its sealed
listing, which is written last. Drive's trash uses the quota, so in folders files keep their names, are overwritten in
place, and are truncated before they are deleted; renaming over a file would move the old one to the trash.
"""

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import time
from pathlib import Path, PurePosixPath

from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.files import HashingWriter, fault_of, gib, json_of, sealed, write_stream
from peftlib.core.hub_token import hf_token
from peftlib.core.json_reading import require_shape
from peftlib.storage import hub
from peftlib.storage.hub import as_os_errors

PUBLIC = "PEFTLIB_MIRROR_PUBLIC"  # environment variable: 1 allows copies to a public place
_LISTED = {"unit": str, "serial": int, "origin": str, "bytes": int, "sha256": str}  # facts of an archive on a remote
FULL = (errno.ENOSPC, errno.EDQUOT)
AWAY = (errno.ENOTCONN, errno.ENODEV, errno.ESTALE, errno.EIO, errno.ENOENT)
_SCHEMES = ("file", "hf", "s3", "gs", "gcs", "memory")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}  # what fsspec needs for a scheme
_ANONYMOUS: dict[str, dict] = {
    "s3": {"anon": True, "key": None, "secret": None},
    **{scheme: {"token": "anon"} for scheme in ("gs", "gcs")},
}
_SQUASH_BYTES = 1 << 30  # old versions that may accumulate in a hub repository


class Remote:
    """Archives NAME.tar with listings NAME.json (bytes, SHA-256 and facts). Methods raise OSError.

    place: a folder, or a URL as in remote_of; the study's files are below it in `study_name`. fs, api: an fsspec file
    system and a huggingface_hub.HfApi, for tests. ConfigError: unsupported URL. ModelError: no token for the hub.

    folder: the study's folder, None if the place is not on this machine. lock_settle_s: see StudyLock; None if the
    place cannot hold locks. creates_exclusively: whether creating a file fails if another has just created it. pace_s:
    minimum seconds between writes of files that change often. doubt: what is uncertain about a copy until it is
    flushed; '' if a written copy is certain.
    """

    lock_settle_s: float | None = None
    pace_s = 0.0
    doubt = ""

    def __init__(self, place, study_name="", *, fs=None, api=None):
        self._name, self.folder = str(place), None
        self._scheme, is_url, below = self._name.partition("://")
        below = below.strip("/")
        self._bucket = below.removeprefix("buckets/") if below.startswith("buckets/") else None  # on the hub
        self._repository, self._known, self._unsquashed, self._is_private = below, {}, 0, False
        if not is_url:
            self.folder, self.lock_settle_s = Path(place).expanduser() / study_name, 0.0
            self._scheme, self._name = "file", str(self.folder)
        elif self._scheme == "hf" and (self._bucket or below).count("/") != 1:
            raise ConfigError(f"PEFTLIB_MIRROR={self._name!r}: use hf://USER/REPO or hf://buckets/USER/BUCKET")
        self._is_repository, self.creates_exclusively = self._scheme == "hf" and not self._bucket, self._scheme != "hf"
        if self._is_repository:
            self.pace_s = 300.0  # each is a commit, and the hub allows about a hundred per hour
        self.root = self._name if self.folder else f"{below}/{study_name}".rstrip("/")
        self.__dict__ |= {name: given for name, given in (("fs", fs), ("api", api)) if given is not None}
        if fs is None:
            self._require_package(below)

    def __str__(self):
        return self._name

    @functools.cached_property
    def api(self):
        """The hub client."""
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
        """One line to log when copying starts, or ''."""
        if not self._is_repository:
            return ""
        return (
            f"{self} keeps old versions of copied files: peftlib squashes its history after every GiB of them to free "
            "their space, unless it holds commits that are not peftlib's"
        )

    def at(self, name):
        """The path of a file of the study in `fs`."""
        return f"{self.root}/{name}"

    def listing(self, units=None):
        """{name: facts} of the archives with a valid listing; `fetch` verifies the archives themselves.

        units: only these, each looked up by its name, because a store's listing may lag.
        """
        with as_os_errors():
            self.fs.invalidate_cache(self.root)
            marks = self._listed() if units is None else {f"{unit}.{n}": None for unit in units for n in (0, 1)}
            found = {name: self._facts(name, mark) for name, mark in marks.items()}
        return {name: facts for name, facts in found.items() if facts}

    def _listed(self):
        """{name: a mark that changes with its listing; None if unknown}."""
        try:
            entries = self.fs.ls(self.root, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        paths = [(PurePosixPath(entry["name"]), entry) for entry in entries if entry["type"] == "file"]
        return {p.stem: None if self.folder else str(entry) for p, entry in paths if p.suffix == ".json"}

    def _facts(self, name, mark):
        if mark is None or self._known.get(name, (None,))[0] != mark:
            self._known[name] = mark, self._read_facts(self.at(f"{name}.json"))
        return self._known[name][1]

    def _read_facts(self, path):
        for is_last in (self.folder is not None, False, True):
            try:
                with as_os_errors():
                    text = self.fs.cat_file(path).decode(errors="replace")
                return require_shape(json_of(text, path, is_sealed=True), _LISTED, path)
            except FileNotFoundError:
                return None
            except (OSError, StudyError) as error:  # possibly temporary
                if is_last and (self.folder is not None or isinstance(error, StudyError)):
                    return None
                if is_last:
                    raise
                time.sleep(0.2)

    def put(self, name, write, needed_bytes, facts):
        """Write an archive by write(writer), in place, read it back, and list it with `facts` (JSON values).

        OSError: also if it would not fit or would be public, before anything is changed, and if verification
        fails.
        """
        with as_os_errors():
            self._require_place(name, needed_bytes)
            archive, listing = f"{name}.tar", f"{name}.json"
            if self.folder is not None:
                self._write(listing, lambda out: None)  # from here the old archive is invalid
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
                said = f"{name} needs {gib(needed_bytes):.2f} GiB, {gib(max(0, free)):.2f} GiB free"
                raise OSError(errno.ENOSPC, said)
            return
        if self._bucket:
            self.api.create_bucket(self._bucket, private=True, exist_ok=True)
        elif self._is_repository:
            self.api.create_repo(self._repository, repo_type="model", private=True, exist_ok=True)
        refusal = None if self._is_private else self.refusal()
        if refusal:
            raise OSError(errno.EPERM, refusal)
        self.fs.invalidate_cache(self.root)  # the cache may not have a new repository yet

    def _write(self, name, write):
        """Write one file; returns {'bytes', 'sha256'} of the content."""
        if self.folder is not None:
            return write_stream(self.folder / name, write)
        words = {"commit_message": f"{PurePosixPath(self.root).name}: {name}"} if self._is_repository else {}
        with self.fs.open(self.at(name), "wb", **words) as raw:
            writer = HashingWriter(raw)
            write(writer)
        return {"bytes": writer.bytes, "sha256": writer.sha256}

    def _require_written(self, name, made):
        if self.folder is not None:
            return require_sound(self.folder / name, made, "verification failed")
        self.fs.invalidate_cache(self.root)
        hashed = self.fs.info(self.at(name)).get("lfs")  # the hub hashes what it receives
        with contextlib.nullcontext() if hashed else self.fs.open(self.at(name), "rb") as raw:
            found = hashed.sha256 if hashed else hashlib.file_digest(raw, "sha256").hexdigest()
        if found != made["sha256"]:
            raise OSError(errno.EIO, f"verification failed: {name} is damaged (SHA-256 differs)")

    def fetch(self, name, facts, target):
        """Copy an archive to the local path `target`. OSError: it does not match its listing."""
        with as_os_errors():
            self.fs.invalidate_cache(self.root)
            self.fs.get_file(self.at(f"{name}.tar"), str(target))
        require_sound(target, facts, name)

    def drop(self, name):
        """Delete an archive; in a folder it is truncated first."""
        with as_os_errors():
            for part in (f"{name}.json", f"{name}.tar"):
                if self.folder is None:
                    self.fs.rm(self.at(part))
                elif (self.folder / part).exists():
                    write_stream(self.folder / part, lambda out: None)
                    os.unlink(self.folder / part)

    def free_bytes(self):
        """Free bytes; a large number for a store, which has no known limit."""
        if self.folder is None:
            return 1 << 50
        return shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.exists())).free

    def refusal(self):
        """Why a study should not be copied there, as text, or None."""
        if os.environ.get(PUBLIC, "").strip() == "1":
            return None
        with as_os_errors():
            self._is_private = not self._is_public()
        if self._is_private:
            return None
        return (
            f"{self} is public, so anyone could read the study's rows, answers and weights: make it private, set "
            f"PEFTLIB_MIRROR to another place, or, if you intend that, set {PUBLIC}=1 or use `peftlib --public`"
        )

    def _is_public(self):
        if self._scheme == "hf":
            return hub.is_public(self.api, self._bucket or self._repository, "bucket" if self._bucket else "model")
        if self._scheme not in _ANONYMOUS:
            return False
        # There are many rules, policies and access lists, so test whether a file can be read without a key.
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
        """Free the space of old versions on the hub if its history has only such copies."""
        self._unsquashed = 0
        if self._is_repository:
            hub.squash(self.api, self._repository)

    def _require_package(self, below):
        import fsspec

        try:
            fsspec.get_filesystem_class(self._scheme)
            if self._scheme not in _SCHEMES or (not below and self.folder is None):
                raise ValueError("no bucket")
        except ImportError:
            package = _PACKAGES.get(self._scheme, self._scheme)
            raise ConfigError(f"PEFTLIB_MIRROR={self._name!r} needs a package: pip install {package}") from None
        except ValueError:
            use = "use a folder, hf://USER/REPO, s3://BUCKET or gs://BUCKET"
            raise ConfigError(f"PEFTLIB_MIRROR={self._name!r}: {use}") from None

    def reconnect(self):
        """Restore a lost connection."""

    def flush(self):
        """Wait until everything has arrived; returns the remaining doubt."""
        with contextlib.suppress(OSError), as_os_errors():
            if self._unsquashed:
                self._squash()
        return self.doubt

    def remedy(self, error):
        """What the user can do about an OSError of this remote, as text."""
        if error.errno == errno.EPERM and self.folder is None:
            return "nothing is copied there until that changes"
        if error.errno in FULL:
            return f"free some space on {self}, or set PEFTLIB_MIRROR to another place"
        if self.folder is None:
            whose = "HF_TOKEN may" if self._scheme == "hf" else "this machine's credentials may"
            return f"check that {whose} write to {self}, check the network, or set PEFTLIB_MIRROR to a folder or to off"
        if error.errno in AWAY:
            return f"check whether {self.folder} is still mounted"
        return f"check that {self.folder} is writable, or set PEFTLIB_MIRROR to another place or to off"


def require_sound(path, listed, what):
    """OSError unless a file has the {'bytes', 'sha256'} that were written."""
    fault = fault_of(path, listed)
    if fault:
        raise OSError(errno.EIO, f"{what}: {fault}")
