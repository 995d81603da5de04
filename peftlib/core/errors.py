"""Errors that a user can act on: each message names the thing, its value and the way out."""


class PeftlibError(Exception):
    """Base of every error peftlib raises on purpose; the command line prints it without a traceback."""

    def _render_traceback_(self):
        """What a notebook shows for it (IPython's protocol): the message alone. The cell fails as ever."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(PeftlibError, ValueError):
    """An unknown field, a value out of range, or fields that contradict each other."""


class DataError(PeftlibError, ValueError):
    """A data source that is missing, empty, of another schema, or too small."""


class StudyError(PeftlibError, RuntimeError):
    """A study folder that lacks an earlier stage's output or was made with another config."""


class LockedError(StudyError):
    """A study folder that another live session works in."""


class DiskError(PeftlibError, OSError):
    """A disk that is full, read-only or failing, or a path that it does not take.

    action: what could not be done with the file, such as 'written'. way_out: what to do about it, in words.
    """

    def __new__(cls, number, strerror, path, *, action, way_out):
        return super().__new__(cls, number, strerror, path)

    def __init__(self, number, strerror, path, *, action, way_out):
        super().__init__(number, strerror, path)
        self.action, self.way_out = action, way_out

    def __str__(self):
        return f"{self.filename} cannot be {self.action} ({self.strerror}): {self.way_out}"


class SchemaError(StudyError):
    """A file that a peftlib of another schema version wrote; undamaged."""


class ModelError(PeftlibError, RuntimeError):
    """A model or tokenizer that cannot be had, or that is not what it claims to be."""


class CheckpointError(PeftlibError, RuntimeError):
    """A checkpoint that cannot be resumed here, with the reason."""


class Stopped(PeftlibError):
    """Work that ends before its time is over; what is done is kept, and the same call goes on from there."""


class NonFiniteLossError(PeftlibError, FloatingPointError):
    """Training met a loss that is inf or nan; the last good checkpoint is kept."""


class JudgeError(PeftlibError, RuntimeError):
    """A judge that cannot be asked: its endpoint is down, refuses the key, or does not serve the model."""
