"""The Python code of a model card, run as it stands there."""

import contextlib
import io
import re
import runpy
import tempfile
from pathlib import Path

import torch

_IDS = torch.tensor([[2, 105, 449, 363, 366, 367, 106, 363, 105, 453, 363]])


def run_code_of(folder, card, *, base=None):
    """(names that the code defines, what it printed), run in an export's folder. base: the base model's folder."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    if base is not None:
        (folder / base.name).symlink_to(base)
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        script = Path(work) / "card.py"
        script.write_text(code)
        names = runpy.run_path(str(script))
    return names, printed.getvalue()


def logits(model):
    """Of one conversation, in float32."""
    with torch.no_grad():
        return model(_IDS).logits.float()
