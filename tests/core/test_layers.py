"""core stands below everything else and loads without torch."""

import ast
import subprocess
import sys

from peftlib import core
from peftlib.core.paths import PACKAGE

NAMES = sorted(path.stem for path in (PACKAGE / "core").glob("[!_]*.py"))


def test_core_imports_neither_torch_nor_anything_above_it():
    for name in NAMES:
        tree = ast.parse((PACKAGE / "core" / f"{name}.py").read_text(encoding="utf-8"))
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        above = [module for module in modules if module.startswith("peftlib.") and not module.startswith(core.__name__)]
        assert above == [], name
    code = f"import sys, {', '.join(f'peftlib.core.{name}' for name in NAMES)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
