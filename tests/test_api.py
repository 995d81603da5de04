"""The public API: what `from peftlib import ...` offers, and what it costs."""

import inspect
import subprocess
import sys

import pytest

import peftlib


@pytest.mark.parametrize("name", peftlib.__all__)
def test_every_public_name_exists_and_says_what_it_is(name):
    found = getattr(peftlib, name)
    assert name in dir(peftlib)
    if callable(found):
        assert found.__doc__
    if inspect.isfunction(found):
        hints = inspect.signature(found)
        assert hints.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in hints.parameters.values())


def test_importing_the_package_loads_no_heavy_library():
    code = "import peftlib, sys; print(sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        peftlib.trian  # noqa: B018
