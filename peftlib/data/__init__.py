"""From sources to train/valid/test rows: read, convert, select without leaks, tokenize, store."""

from peftlib.data.build import build_data
from peftlib.data.card import push_to_hub
from peftlib.data.store import load_split
from peftlib.models.load import load_tokenizer

__all__ = ["build_data", "load_split", "load_tokenizer", "push_to_hub"]
