"""The Hugging Face token: the order of its places, what a refusal says, and that it never gets out."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

from peftlib.cli import main
from peftlib.core import hub_token, session
from peftlib.core.errors import ModelError
from peftlib.runner import notebook_io as executed
from peftlib.storage import archive

CHECKOUT = Path(hub_token.__file__).resolve().parents[2]
LONG = "hf_" + "aB3" * 11 + "x"  # of the form of a token, but nobody's


@pytest.fixture
def colab(monkeypatch, no_token):
    """Colab's secrets in a watched kernel; `answer` is what they give or raise, `asked` counts."""
    userdata = types.ModuleType("google.colab.userdata")
    userdata.answer, userdata.asked = "of-colab", []

    def get(name):
        userdata.asked.append(name)
        if isinstance(userdata.answer, Exception):
            raise userdata.answer
        return userdata.answer

    userdata.get = get
    package = types.ModuleType("google.colab")
    package.userdata = userdata
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external")
    monkeypatch.setattr(hub_token, "is_watched", lambda: True)
    return userdata


def test_without_a_token_all_ways_to_give_one_are_named(no_token):
    with pytest.raises(ModelError) as caught:
        hub_token.hf_token()
    for part in ("variable HF_TOKEN", ".env", "hf auth login", "secret"):
        assert part in str(caught.value)


def test_the_environment_comes_before_env_files_before_the_login_before_secrets(colab, monkeypatch, tmp_path):
    (tmp_path / "checkout" / "notebooks").mkdir(parents=True)
    (tmp_path / "checkout" / "notebooks" / "01_data.ipynb").touch()
    assert hub_token.hf_token() == "of-colab"
    (tmp_path / "login").write_text("of-login\n")
    assert hub_token.hf_token() == "of-login"
    (tmp_path / "checkout" / ".env").write_text("OTHER=1\nHF_TOKEN=of-checkout\n")
    assert hub_token.hf_token() == "of-checkout"
    Path(".env").write_text("OTHER=1\n")
    assert hub_token.hf_token() == "of-checkout", "a .env without a token hides none"
    Path(".env").write_text("\ufeff# mine\nexport HF_TOKEN = 'of-folder'\nOTHER=1\n", encoding="utf-8")
    assert hub_token.hf_token() == "of-folder"
    monkeypatch.setenv("HF_TOKEN", " planted ")
    assert hub_token.hf_token() == "planted"
    assert len(colab.asked) == 1


def test_an_env_file_of_an_installed_copy_is_nobodys(no_token, tmp_path):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / ".env").write_text("HF_TOKEN=of-site-packages")
    with pytest.raises(ModelError):
        hub_token.hf_token()


def test_nothing_of_an_env_file_gets_into_the_environment_or_onto_the_screen(no_token, capfd):
    Path(".env").write_text("HF_TOKEN=of-folder\nOPENAI_API_KEY=other\nnot a line\n")
    before = dict(os.environ)
    assert hub_token.hf_token() == "of-folder"
    assert dict(os.environ) == before
    said = capfd.readouterr()
    assert "of-folder" not in said.out + said.err and "other" not in said.out + said.err


def test_a_folder_of_that_name_is_no_token_and_unreadable_text_is_told(no_token):
    Path(".env").mkdir()  # many call their virtual environment so
    with pytest.raises(ModelError, match="no Hugging Face token: set"):
        hub_token.hf_token()
    Path(".env").rmdir()
    Path(".env").write_text("HF_TOKEN=of-folder", encoding="utf-16")
    with pytest.raises(ModelError, match=r"\.env cannot be read .*save it as UTF-8") as caught:
        hub_token.hf_token()
    assert "of-folder" not in str(caught.value)


def test_git_ignores_env_files():
    assert ".env" in (CHECKOUT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_an_unreadable_login_is_told(no_token, tmp_path):
    (tmp_path / "login").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="huggingface_hub's login cannot be used"):
        hub_token.hf_token()


@pytest.mark.parametrize("name", ["NotebookAccessError", "SecretNotFoundError", "TimeoutException"])
def test_each_refusal_of_colab_has_its_way_out(colab, name):
    colab.answer = type(name, (Exception,), {})("no")
    with pytest.raises(ModelError, match=rf"secret HF_TOKEN could not be read \({name}: no\): .*'Notebook access'"):
        hub_token.hf_token()


def test_an_empty_secret_is_told(colab):
    colab.answer = " "
    with pytest.raises(ModelError, match=r"HF_TOKEN could not be read \(it is empty\): click the key icon"):
        hub_token.hf_token()


def test_colab_is_not_asked_outside_a_kernel_or_where_nobody_looks(colab, monkeypatch):
    monkeypatch.setattr(hub_token, "is_watched", session.is_watched)  # this process is no kernel
    # What Colab's own function comes to in a terminal.
    colab.answer = AttributeError("'NoneType' object has no attribute 'kernel'")
    with pytest.raises(ModelError, match="only in a notebook cell, not from a terminal"):
        hub_token.hf_token()
    assert colab.asked == []


def test_huggingface_hub_does_not_ask_colab_a_second_time(colab, monkeypatch):
    from huggingface_hub.utils import _auth

    monkeypatch.setattr(_auth, "is_google_colab", lambda: True)
    monkeypatch.setattr(_auth, "_IS_GOOGLE_COLAB_CHECKED", False)
    colab.answer = type("NotebookAccessError", (Exception,), {})("HF_TOKEN")
    with pytest.raises(ModelError, match="Notebook access"):
        hub_token.hf_token()
    assert len(colab.asked) == 1


def test_a_kernel_is_watched_unless_its_client_or_the_runner_says_otherwise(monkeypatch):
    assert not session.is_watched()
    found = types.SimpleNamespace(_allow_stdin=True)
    monkeypatch.setattr(session, "running_kernel", lambda: found)
    assert session.is_watched()
    found._allow_stdin = False
    assert not session.is_watched()
    found._allow_stdin = True
    monkeypatch.setenv("PEFTLIB_HEADLESS", "1")
    assert not session.is_watched()


def test_kaggles_secret_is_asked_on_kaggle_and_colabs_is_not(colab, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")  # its image has Colab's modules and variables too
    kaggle = types.ModuleType("kaggle_secrets")
    answers = iter(["planted", type("BackendError", (Exception,), {})("no such secret")])

    class Client:
        def get_secret(self, label):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return f"{label} {answer}"

    kaggle.UserSecretsClient = Client
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
    assert hub_token.hf_token() == "HF_TOKEN planted"
    with pytest.raises(
        ModelError, match=r"secret HF_TOKEN could not be read \(BackendError: .*\): add it under Add-ons"
    ):
        hub_token.hf_token()
    assert colab.asked == []


# It never gets out


@pytest.fixture
def tokens(colab, monkeypatch, tmp_path):
    """Tokens that stand in every place at once, and one that was given by a secret."""
    colab.answer = "token-of-a-secret"
    assert hub_token.hf_token() == colab.answer
    monkeypatch.setenv("HF_TOKEN", "token-of-the-environment")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "token-of-the-old-variable")
    Path(".env").write_text("HF_TOKEN=token-of-the-file.with+signs")
    (tmp_path / "login").write_text("token-of-the-login")
    return [
        colab.answer,
        *(f"token-of-the-{place}" for place in ("environment", "old-variable", "login")),
        "token-of-the-file.with+signs",
        LONG,
        "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6.x_y-z",
    ]


def test_every_kind_of_token_is_masked_and_ordinary_words_are_not(tokens):
    for token in tokens:
        assert hub_token.without_tokens(f"sent {token}, refused") == "sent [token], refused"
    for text in ("hf_hub_download(repo_id)", "hf_token()", "HF_TOKEN", "hf_quantizer_with_a_very_long_name_indeed"):
        assert hub_token.without_tokens(text) == text


def test_executed_copies_hold_no_token(tokens, tmp_path):
    said = " ".join(tokens)
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": [said]},
        {"output_type": "error", "ename": "E", "evalue": said, "traceback": [said]},
        {"output_type": "display_data", "data": {"text/html": [said], "text/plain": said}},
    ]
    notebook = {"metadata": {}, "cells": [{"cell_type": "code", "source": "", "metadata": {}, "outputs": outputs}]}
    executed.tidy(notebook, tmp_path)
    assert not [token for token in tokens if token in json.dumps(notebook)]


def test_a_mirror_takes_no_env_file_along(tmp_path):
    for name in (".env", "config.json"):
        (tmp_path / name).write_text("{}")
    assert archive.units_of(tmp_path) == {"study": [tmp_path / "config.json"]}


def test_a_command_in_colabs_terminal_ends_in_the_named_error(colab, monkeypatch, capsys):
    monkeypatch.setattr(hub_token, "is_watched", session.is_watched)  # this process is no kernel
    assert main(["plan", "-p", "profile", "t4", "-p", "model", "google/gemma-9-it"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and colab.asked == []
    assert "no Hugging Face token. Colab's secrets can be read only in a notebook cell" in said
