"""What disks and damaged files raise, put into words: the path, what is wrong there, and the way out."""

import contextlib
import errno
import os
import re

from peftlib.core.errors import DiskError, PeftlibError, StudyError

MADE_AGAIN = "delete it and run the notebook that writes it again"
_OS_ERROR = re.compile(r"os error (\d+)")  # how libraries in Rust, such as safetensors, tell the number


@contextlib.contextmanager
def writing(path):
    """Within it, an error of the disk becomes a DiskError that names `path`, or the file that the error names."""
    try:
        yield
    except PeftlibError:
        raise
    except OSError as error:
        number = _number_of(error)
        if number is None:  # of the network, as requests has them
            raise
        raise _disk_error(number, error, path, "written") from error
    except Exception as error:
        number = _number_told(error)
        if number is None:
            raise
        raise _disk_error(number, error, path, "written") from error


@contextlib.contextmanager
def reading(path, way_out=MADE_AGAIN):
    """Within it, an error of the disk becomes a DiskError, what damage raises a StudyError; both name `path`."""
    try:
        yield
    except PeftlibError:
        raise
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is damaged (byte {error.start} is no UTF-8): {way_out}") from error
    except OSError as error:
        number = _number_of(error)
        if number is None:
            raise StudyError(f"{path} is damaged ({_first_line(error)}): {way_out}") from error
        raise _disk_error(number, error, path, "read") from error
    except (ValueError, EOFError, RecursionError) as error:
        raise StudyError(f"{path} is damaged ({_first_line(error)}): {way_out}") from error
    except Exception as error:
        if not _is_of_a_reader(error):
            raise
        raise StudyError(f"{path} is damaged ({_first_line(error)}): {way_out}") from error


def named(error):
    """The DiskError of an OSError that carries a number and a path, else None: the last net of the command line."""
    path, number = error.filename, error.errno
    if path is None or number is None or isinstance(path, int):
        return None
    return _disk_error(number, error, path, "used")


def _disk_error(number, error, path, action):
    named_file = getattr(error, "filename", None)
    path = named_file if isinstance(named_file, str | bytes | os.PathLike) else str(path)
    way_out = _WAYS_OUT.get(number, _FAILING)
    return DiskError(number, os.strerror(number), os.fsdecode(path), action=action, way_out=way_out)


def _number_of(error):
    """The errno of an OSError; of shutil.Error, which lists texts, the first that one names."""
    if error.errno is not None:
        return error.errno
    return _number_told(error)


def _number_told(error):
    """The errno that the message of another library's error names, or None."""
    text = str(error)
    found = _OS_ERROR.search(text) or re.search(r"\[[Ee]rrno (\d+)\]", text)
    if found:
        return int(found[1])
    spoken = (
        [number for number in _WAYS_OUT if os.strerror(number) in text] if type(error).__module__ != "builtins" else []
    )
    return spoken[0] if spoken else None


def _is_of_a_reader(error):
    """Whether an error is of a library that reads files: safetensors, tarfile, pyarrow, pickle in torch."""
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(names & {"safetensors_rust.SafetensorError", "tarfile.TarError", "pyarrow.ArrowException"})


def _first_line(error):
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


_FULL = "free some space there, or choose a place on another disk (for studies PEFTLIB_ROOT)"
_CLOSED = (
    "see who may write there and whether it is mounted read-only, or choose another place (for studies PEFTLIB_ROOT)"
)
_FAILING = (
    "see whether the disk is still mounted and sound, or choose a place on another one (for studies PEFTLIB_ROOT)"
)
_TAKEN = "something of another kind stands there, which has to be moved away first"
_LONG = "choose a shorter name of the study, or a folder with a shorter path (for studies PEFTLIB_ROOT)"
_GONE = "see whether it was moved or deleted meanwhile, and run the same again"
_WAYS_OUT = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EIO: _FAILING,
    errno.ESTALE: _FAILING,
    errno.ENOTCONN: _FAILING,
    errno.ENODEV: _FAILING,
    errno.EISDIR: _TAKEN,
    errno.ENOTDIR: _TAKEN,
    errno.EEXIST: _TAKEN,
    errno.ENOTEMPTY: _TAKEN,
    errno.ENAMETOOLONG: _LONG,
    errno.ENOENT: _GONE,
    errno.EMFILE: "too many files are open: restart this session",
}
