"""Import paths of the first edition that published model cards name, served by the modules that have their code now."""

import importlib
import importlib.abc
import importlib.machinery
import sys

ALIASES = {"peftlib.trained": "peftlib.models.saved", "peftlib.packaged": "peftlib.models.packaged"}


class _AliasFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in ALIASES else None

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(ALIASES[module.__name__])


def install():
    """Let the old paths be imported; what they stand for is loaded only then."""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())
