"""Made-up rows of sources, and what a built split holds of them."""

import gzip
import json

from peftlib import data

WORDS = [f"w{i}" for i in range(2000)]


def text(rng, low=5, high=40):
    return " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))


def alpaca_rows(rng, n):
    return [{"instruction": text(rng), "input": rng.choice(["", text(rng)]), "output": text(rng)} for _ in range(n)]


def chat_rows(rng, n):
    rows = []
    for i in range(n):
        turns = [text(rng) for _ in range(2 * rng.randrange(1, 4))]
        messages = [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(turns)]
        rows.append({"dataset": "made", "id": f"made_{i}", "messages": messages})
    return rows


def write_jsonl(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


def sources_text(files):
    return "; ".join(f"{name}={path}" for name, path in files.items())


def quiet(*args):
    pass


def splits_of(folder):
    return {split: data.load_split(folder, split) for split in ("test", "valid", "train")}


def messages_of(folder):
    return {split: rows.column("messages") for split, rows in splits_of(folder).items()}


def assert_accounts(manifest):
    for name in manifest["sources"]:
        kept = sum(manifest["counts"][split][name] for split in manifest["counts"])
        rejected = sum(manifest["rejected"][name].values())
        assert manifest["read"][name] == kept + rejected + manifest["unused"][name]
        assert manifest["unused"][name] >= 0


def counts_of(manifest, source):
    return tuple(manifest["counts"][split][source] for split in ("train", "valid", "test"))


TABLE = [{"instruction": f"ask {i}", "output": f"say {i}"} for i in range(3)]
