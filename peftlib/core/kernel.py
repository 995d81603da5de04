"""The Jupyter kernel that this process is, if it is one, and whether somebody sits before it."""

import os
import sys


def running_kernel():
    """The ipykernel kernel of this process; None in scripts, terminals and plain IPython."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    return getattr(ipython.get_ipython(), "kernel", None) if ipython else None


def is_watched():
    """Whether this is a kernel whose front end can answer a question: Jupyter or Colab, not papermill or our runner."""
    kernel = running_kernel()
    if kernel is None or os.environ.get("PEFTLIB_HEADLESS") == "1":
        return False
    return bool(getattr(kernel, "_allow_stdin", True))  # what the client of the running cell said about itself
