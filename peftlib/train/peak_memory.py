"""Peak memory of a stretch of work: allocated on the GPU, else the rise of the process tree's resident memory."""

import threading
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Context manager; `peak_bytes` and `reserved_bytes` can be read inside and after it.

    On CUDA the peaks are exact: allocated, and reserved from the driver. On CPUs the resident memory is sampled every
    `interval` seconds and `peak_bytes` is its rise since the start; `reserved_bytes` is None, for nothing is reserved.
    """

    def __init__(self, device, *, interval=0.1):
        self.device = device
        self.peak_bytes = 0
        self.reserved_bytes = None
        self._resident_bytes = 0  # of the process tree, at the last look
        self._interval = interval
        self._is_over = threading.Event()

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._start_bytes = self._resident_bytes = _tree_bytes()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *exc):
        self._is_over.set()
        if self.device == "cuda":
            self.read()
        else:
            self._sampler.join()

    def read(self):
        """(peak_bytes, reserved_bytes) up to now."""
        if self.device == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated()
            self.reserved_bytes = torch.cuda.max_memory_reserved()
        else:
            self._resident_bytes = _tree_bytes()
            self.peak_bytes = max(self.peak_bytes, self._resident_bytes - self._start_bytes)
        return self.peak_bytes, self.reserved_bytes

    def now(self):
        """(bytes in use, bytes reserved or None) at the moment, on a CPU all that is resident at the last look; waits for nothing."""
        if self.device == "cuda":
            return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return self._resident_bytes, None

    def _sample(self):
        while not self._is_over.wait(self._interval):
            self.read()


def machine_bytes():
    """The memory of this machine, or what its container may take of it."""
    whole = psutil.virtual_memory().total
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    found = [path.read_text(encoding="utf-8").strip() for path in limits if path.is_file()]
    return min([whole, *(int(text) for text in found if text.isdigit())])


def _tree_bytes():
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
