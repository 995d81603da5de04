import sys
import types

import pytest

from peftlib import env
from peftlib.errors import ModelError


def test_missing_token_error_names_both_ways_the_licence_and_the_mirror(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelError) as caught:
        env.hf_token()
    for part in ("HF_TOKEN", "secret", "accept its licence", "public mirror"):
        assert part in str(caught.value)


def test_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " planted ")
    assert env.hf_token() == "planted"


def test_output_root_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path))
    assert env.output_root() == tmp_path


@pytest.mark.parametrize("capability, precision", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_follows_compute_capability(monkeypatch, capability, precision):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert env.training_precision("cuda")[0] == precision


def test_kaggles_secret_is_asked_on_kaggle_and_colabs_is_not(monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    kaggle, colab = (types.ModuleType(name) for name in ("kaggle_secrets", "google.colab"))
    kaggle.BackendError = kaggle.CredentialError = type("Refused", (Exception,), {})
    answers = iter(["planted", kaggle.BackendError("no such secret")])

    class Client:
        def get_secret(self, label):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return f"{label} {answer}"

    kaggle.UserSecretsClient = Client
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
    monkeypatch.setitem(sys.modules, "google.colab", colab)  # Kaggle's image has it; its secrets would wait for a page
    assert env.hf_token() == "HF_TOKEN planted"
    with pytest.raises(ModelError, match="Add-ons > Secrets"):
        env.hf_token()
    assert "Kaggle's secret HF_TOKEN could not be read (Refused)" in capsys.readouterr().out
