"""A study folder and a remote of its copies."""

import pytest
from kept_study import save

from peftlib.storage.mirror import Mirror
from peftlib.storage.store import Remote


@pytest.fixture
def study(tmp_path):
    """A study folder of every kind of file."""
    folder = tmp_path / "study"
    for name, text in {
        "config.json": "{}",
        "data/manifest.json": "{}",
        "data/train.parquet": "rows",
        "records/base-s0.json": '{"status": "ok"}',
        "predictions/base-s0.jsonl": "{}\n",
        "weights/galore-s0/model.safetensors": "weights",
        "compile/card.bin": "cache",
        "notebooks/01_data.ipynb": "{}",
        "notebooks/02_qlora.running.ipynb": "{}",
        "sweeps/qlora.json": "{}",
        "sweeps/qlora-1/records/qlora-s0.json": "{}",
        "sweeps/qlora-1/checkpoints/qlora-s0/step-000001/tensors.pt": "not kept",
        "lock.json": "{}",
        ".hidden": "x",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    save(folder, 3)
    return folder


@pytest.fixture
def remote(tmp_path):
    return Remote(tmp_path / "remote")


@pytest.fixture
def lines():
    return []


@pytest.fixture
def open_again(tmp_path, remote, lines):
    """open_again(name) -> the Mirror of a session on a new machine, after it has brought what there is."""

    def open_again(name="elsewhere", **settings):
        made = Mirror(tmp_path / name, remote, log=lines.append, **settings)
        made.restore()
        return made

    return open_again
