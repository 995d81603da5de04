"""The Hugging Face token: where we look for it, and how we keep it out of everything that is written.

Only the hub client gets it. It is never printed, stored or put into the environment.
"""

import os
import re
import sys
from pathlib import Path

from peftlib.core.errors import ModelError
from peftlib.core.paths import checkout
from peftlib.core.session import host, is_watched

NAME = "HF_TOKEN"
MASK = "[token]"
_LEAST_CHARACTERS = 8  # anything shorter is not a token, and masking it would hit ordinary text
_FORM = r"\bhf_[A-Za-z0-9]{30,}\b|\bhf_oauth_[\w.~+/=-]{20,}"  # format of the hub's own tokens
_given: set[str] = set()  # tokens found by this process: secrets cannot be listed otherwise

_ADVICE = (
    f"set the environment variable {NAME}, or add a line {NAME}=... to a .env file in the working folder, or run "
    f"`hf auth login`, or add the secret {NAME} (on Colab the key icon, on Kaggle Add-ons > Secrets)"
)
_KAGGLE = "add it under Add-ons > Secrets, tick it for this notebook, and switch Internet on"
_COLAB = "click the key icon on the left, fill it in, switch on its 'Notebook access', and run this cell again"


def hf_token():
    """The token from HF_TOKEN, a .env file, huggingface_hub's login, or Colab's or Kaggle's secrets, in this order.

    ModelError: none of them has a token; the message says which could not be read and why.
    """
    problems = []
    for source in (_of_environment, _of_dotenv, _of_login, _of_secrets):
        token = source(problems)
        if token:
            _given.add(token)
            return token
    told = f". {'. '.join(problems)}. Other ways" if problems else ""
    raise ModelError(f"no Hugging Face token{told}: {_ADVICE}")


def without_tokens(text):
    """`text` with every known token, and anything that looks like one, masked."""
    return token_pattern().sub(MASK, text)


def token_pattern():
    """A pattern that matches all tokens known without asking a secret store."""
    older = os.environ.get("HUGGING_FACE_HUB_TOKEN", "").strip()
    known = {*_given, _of_environment([]), older, _of_dotenv([]), _stored()}
    known = sorted((token for token in known if len(token) >= _LEAST_CHARACTERS), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, known), _FORM]))


# Each source returns a token or "", and appends to `problems` why it could not be read.


def _of_environment(problems):
    return os.environ.get(NAME, "").strip()


def _of_dotenv(problems):
    """From the first .env that has one: in the working folder, then in the checkout."""
    from dotenv import dotenv_values

    # An installed copy is in site-packages, where a .env would not be the user's.
    places = [folder / ".env" for folder in (Path(), checkout()) if folder is not None]
    for path in (path for path in places if path.is_file()):  # a folder named .env may be a virtual environment
        try:
            token = (dotenv_values(path, encoding="utf-8-sig").get(NAME) or "").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path.resolve()} cannot be read ({error}): save it as UTF-8 text")
            continue
        if token:
            return token
    return ""


def _of_login(problems):
    """From `hf auth login` on this machine."""
    from huggingface_hub import get_token

    if _is_colab() and not _stored():
        return ""  # get_token would fall back to Colab's secret, and report a refusal only as a warning
    try:
        return (get_token() or "").strip()
    except Exception as error:  # noqa: BLE001  unreadable files, failed token refresh or CI token exchange
        problems.append(f"huggingface_hub's login cannot be used ({type(error).__name__}: {error})")
        return ""


def _stored():
    """The token in huggingface_hub's file, or "" if it has none or cannot be read, which get_token reports."""
    from huggingface_hub import constants

    try:
        return Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _is_colab():
    return host() == "colab" or (host() != "kaggle" and "google.colab" in sys.modules)


def _of_secrets(problems):
    """From Kaggle's or Colab's secrets."""
    is_kaggle = host() == "kaggle"
    if not is_kaggle and not _is_colab():
        return ""
    if not is_kaggle and not is_watched():
        # userdata.get needs a kernel and its open page. Elsewhere it raises AttributeError or waits forever.
        problems.append("Colab's secrets can be read only in a notebook cell, not from a terminal or a headless run")
        return ""
    try:
        if is_kaggle:
            from kaggle_secrets import UserSecretsClient

            token, why = UserSecretsClient().get_secret(NAME), "it is empty"
        else:
            from google.colab import userdata

            token, why = userdata.get(NAME), "it is empty"
    except Exception as error:  # noqa: BLE001  no such secret, no access, no network: no common base class
        token, why = "", f"{type(error).__name__}: {error}"
    token = (token or "").strip()
    if not token:
        problems.append(f"the secret {NAME} could not be read ({why:.200}): {_KAGGLE if is_kaggle else _COLAB}")
    return token
