"""The import paths that published model cards name."""

import subprocess
import sys


def test_a_published_cards_imports_work_and_mean_todays_modules():
    import peftlib.trained
    from peftlib.packaged import packaged_model

    from peftlib.models import packaged, saved

    assert peftlib.trained is saved and peftlib.trained.load_trained is saved.load_trained
    assert packaged_model is packaged.packaged_model
    assert saved.__name__ == "peftlib.models.saved" and saved.__spec__.name == "peftlib.models.saved"


def test_importing_peftlib_loads_neither_them_nor_torch():
    code = "import sys, peftlib; print(sorted({'torch', 'peftlib.models', 'peftlib.trained'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
