"""The tokenizer of a config's model: checked, with Gemma's chat template set."""

import hashlib
from pathlib import Path

from peftlib.models import chat_template as chat


def open_tokenizer(model):
    """Tokenizer of 'packaged', a hub id or a folder, with the bundled chat template.

    ModelError: not to be had (gated, unknown, no network), damaged, or not a Gemma 3 tokenizer.
    """
    from peftlib.models import safe_loading
    from peftlib.models.base import hub_errors, locate, token_for

    location, _ = locate(model)
    with hub_errors(model):
        tokenizer = safe_loading.tokenizer(location, token=token_for(location))
    chat.check_tokenizer(tokenizer)
    return chat.set_template(tokenizer)


def tokenizer_sha256(model):
    """SHA-256 of the tokenizer.json that `model` stands for. ModelError: there is none, or it is not to be had."""
    from transformers.utils import cached_file

    from peftlib.models.base import hub_errors, locate, token_for

    location, _ = locate(model)
    with hub_errors(model):
        path = Path(cached_file(location, "tokenizer.json", token=token_for(location)))
    return hashlib.sha256(path.read_bytes()).hexdigest()
