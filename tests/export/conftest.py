import shutil

import pytest


@pytest.fixture(scope="session")
def kept_studies(tmp_path_factory):
    """Folder of finished studies, which later tests get copies of."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(finished, make_study, kept_studies, tmp_path):
    """As in tests/conftest.py, but a method without fields of its own trains once for all tests."""

    def make(method, is_scored=False, **fields):
        kept = kept_studies / f"{method}-{is_scored}"
        if fields or not kept.exists():
            study = finished(method, is_scored=is_scored, **fields)
            if not fields:
                shutil.copytree(study.folder, kept)
            return study
        shutil.copytree(kept, tmp_path / "runs" / "tiny", dirs_exist_ok=True)
        return make_study(lora_learning_rate=1e-2, galore_learning_rate=1e-2)

    return make
