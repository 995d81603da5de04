"""A run that one process trains, with the interface of several."""

import contextlib


class OneProcess:
    """A run in this process alone: everything that several processes agree on is its own word."""

    rank, world = 0, 1
    is_main = True
    bytes_exchanged = 0  # handed to the group by this process, in all

    def sum_(self, tensor):
        """Replace a tensor by its sum over all processes."""

    def broadcast_(self, tensors, source=0):
        """Replace tensors by those of one process."""

    def from_main(self, call):
        """What `call` returns in the main process, a JSON value; it runs there alone."""
        return call()

    @contextlib.contextmanager
    def main_first(self):
        """The main process goes through first: what it downloads or writes the others find."""
        yield

    def require_alike(self, facts):
        """ConfigError where {name: value} of two processes differ."""

    @contextlib.contextmanager
    def together(self):
        """Within it the failure of one process ends the others with its reason; nobody leaves before the main one."""
        yield

    def require(self):
        """ParallelError: another process has failed."""
