import pytest

from peftlib.core import env


def test_output_root_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path))
    assert env.output_root() == tmp_path


@pytest.mark.parametrize("capability, precision", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_follows_compute_capability(monkeypatch, capability, precision):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert env.training_precision("cuda")[0] == precision
