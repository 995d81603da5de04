"""Errors that a user can act on: each message names the problem, the value and what to do.

`writing` and `reading` convert errors from disks and damaged files to these.
"""

import contextlib
import errno
import os
import re


class PeftlibError(Exception):
    """Base of all errors that peftlib raises on purpose; the command line prints them without a traceback."""

    def _render_traceback_(self):
        """What a notebook shows (IPython's protocol): only the message. The cell still fails."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(PeftlibError, ValueError):
    """An unknown field, a value out of range, or fields that contradict each other."""


class DataError(PeftlibError, ValueError):
    """A data source that is missing, empty or too small, or that has an unknown schema."""


class StudyError(PeftlibError, RuntimeError):
    """A study folder that lacks an earlier stage's output or was made with another config."""


class LockedError(StudyError):
    """A study folder that another live session is using."""


class NodeError(PeftlibError, RuntimeError):
    """A machine that cannot do a run, although another one in the cluster may."""


class DiskError(PeftlibError, OSError):
    """A disk that is full, read-only or failing, or a path that it does not accept.

    action: what could not be done with the file, such as 'written'. way_out: what the user can do about it.
    """

    def __new__(cls, number, strerror, path, *, action, way_out):
        return super().__new__(cls, number, strerror, path)

    def __init__(self, number, strerror, path, *, action, way_out):
        super().__init__(number, strerror, path)
        self.action, self.way_out = action, way_out

    def __str__(self):
        return f"{self.filename} cannot be {self.action} ({self.strerror}): {self.way_out}"


class SchemaError(StudyError):
    """An undamaged file written by a peftlib with another schema version."""


class ModelError(PeftlibError, RuntimeError):
    """A model or tokenizer that cannot be loaded, or that is not what it claims to be."""


class CheckpointError(PeftlibError, RuntimeError):
    """A checkpoint that cannot be resumed here; the message says why."""


class Stopped(PeftlibError):
    """Work that stopped early; finished work is kept, and the same call resumes from there."""


class ParallelError(PeftlibError, RuntimeError):
    """A process of a multi-process run has failed or is gone; the last checkpoint is kept."""


class NonFiniteLossError(PeftlibError, FloatingPointError):
    """The training loss is inf or nan; the last good checkpoint is kept."""


class JudgeError(PeftlibError, RuntimeError):
    """An unusable judge: its endpoint is down, rejects the key, or does not serve the model."""


MADE_AGAIN = "delete it and run the notebook that writes it again"


@contextlib.contextmanager
def writing(path):
    """Convert disk errors to a DiskError that names `path`, or the file that the error itself names."""
    try:
        yield
    except PeftlibError:
        raise
    except Exception as error:
        number = _number_of(error)
        if number is None:  # not a disk error: a network error, as in requests, or a bug
            raise
        raise _disk_error(number, error, path, "written") from error


def require_writable(path):
    """DiskError if this user may not create `path`, before work whose result goes there."""
    above = next(place for place in (path, *path.parents) if place.exists())
    with writing(path):
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


@contextlib.contextmanager
def reading(path, way_out=MADE_AGAIN):
    """Convert disk errors to a DiskError and damaged files to a StudyError; both name `path`."""
    try:
        yield
    except PeftlibError:
        raise
    except Exception as error:
        number = _number_of(error) if isinstance(error, OSError) else None
        if number is not None:
            raise _disk_error(number, error, path, "read") from error
        if not isinstance(error, (OSError, ValueError, EOFError, RecursionError)) and not _is_of_a_reader(error):
            raise
        said = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
        if isinstance(error, UnicodeDecodeError):
            said = f"byte {error.start} is not UTF-8"
        raise StudyError(f"{path} is damaged ({said}): {way_out}") from error


def disk_error(error):
    """The DiskError for an OSError with an errno and a path, else None: the command line's last resort."""
    if error.filename is None or error.errno is None or isinstance(error.filename, int):
        return None
    return _disk_error(error.errno, error, error.filename, "used")


def _disk_error(number, error, path, action):
    named = getattr(error, "filename", None)
    path = named if isinstance(named, str | bytes | os.PathLike) else str(path)
    way_out = _WAYS_OUT.get(number, _FAILING)
    return DiskError(number, os.strerror(number), os.fsdecode(path), action=action, way_out=way_out)


def _number_of(error):
    """The errno of an OSError, or the first one named in another library's message (shutil.Error lists messages)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    # safetensors, like other libraries in Rust, writes "os error 28".
    found = re.search(r"os error (\d+)\b|\[[Ee]rrno (\d+)\]", text)
    if found:
        return int(found[1] or found[2])
    if type(error).__module__ == "builtins":
        return None
    return next((number for number in _WAYS_OUT if os.strerror(number) in text), None)


def _is_of_a_reader(error):
    """Whether an error comes from a library that reads files: safetensors, tarfile, pyarrow."""
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(names & {"safetensors_rust.SafetensorError", "tarfile.TarError", "pyarrow.ArrowException"})


_ELSEWHERE = "(for studies, set PEFTLIB_ROOT)"
_FULL = f"free some space there, or use another disk {_ELSEWHERE}"
_CLOSED = f"check the permissions and whether it is mounted read-only, or use another folder {_ELSEWHERE}"
_FAILING = f"check that the disk is still mounted and healthy, or use another disk {_ELSEWHERE}"
_OF_ANOTHER_KIND = "something of another type already exists there: move it away first"
_WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _CLOSED),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV), _FAILING),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY), _OF_ANOTHER_KIND),
    errno.ENAMETOOLONG: f"choose a shorter study name, or a folder with a shorter path {_ELSEWHERE}",
    errno.ENOENT: "check whether it was moved or deleted in the meantime, then run it again",
    errno.EMFILE: "too many files are open: restart this session",
}
