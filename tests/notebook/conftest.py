import contextlib

import pytest
from front_end import started


@pytest.fixture(scope="session")
def kernel_of():
    """kernel_of(name) -> (KernelManager, client) of one kernel a version, which all tests share; see front_end.started."""
    with contextlib.ExitStack() as stack:
        made = {}

        def get(name):
            if name not in made:
                made[name] = stack.enter_context(started(name))
            return made[name]

        yield get
