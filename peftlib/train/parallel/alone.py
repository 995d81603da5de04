"""A single-process run with the interface of a multi-process one."""

import contextlib


class OneProcess:
    """A run in this process only: there is nothing to agree on with other processes."""

    rank, world = 0, 1
    is_main = True
    echo_s = 0.0  # as for session.interrupts
    bytes_exchanged = 0  # sent to the group by this process, in total

    def sum_(self, tensor):
        """Replace a tensor by its sum over all processes."""

    def broadcast_(self, tensors, source=0):
        """Replace tensors by those of one process."""

    def from_main(self, call):
        """Run `call` in the main process only, and return its result, a JSON value, in every process."""
        return call()

    @contextlib.contextmanager
    def main_first(self):
        """Context that the main process enters first, so that the others find what it downloads or writes."""
        yield

    def require_alike(self, facts):
        """ConfigError if {name: value} differs between processes."""

    @contextlib.contextmanager
    def together(self):
        """Context in which the failure of one process ends the others with its reason; the main one leaves first."""
        yield

    @contextlib.contextmanager
    def exchanging(self):
        """Context of a run's exchanges; what a process does after it, it does even if another one ends."""
        yield

    def require(self):
        """ParallelError: another process has failed."""
