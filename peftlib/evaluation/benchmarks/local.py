"""Benchmark rows from files, in the fields that the harness's own prompts need.

A file may have those fields, or the {query, choices, gold} renderings of llm-foundry, which are parsed back.
"""

import gzip
import json
import re
from itertools import takewhile
from pathlib import Path

from peftlib.core.errors import ConfigError, DataError, reading
from peftlib.core.files import sha256

_LETTERS = "ABCDEFGHIJ"
# A page of WikiText starts at its title; the hub's 62 test pages are split at the same lines.
_PAGE = re.compile(r"(?m)^(?= = [^=\n][^\n]* = $)")


def _after(text, start):
    if not text.startswith(start):
        raise ValueError(f"it does not start with {start!r}")
    return text[len(start) :]


def _lettered(row, field, text):
    # llm-foundry repeats an answer if a question has fewer than four.
    choices = list(dict.fromkeys(row["choices"]))
    key = _LETTERS[choices.index(row["choices"][row["gold"]])]
    return {field: text, "choices": {"text": choices, "label": list(_LETTERS[: len(choices)])}, "answerKey": key}


def _arc(row):
    return _lettered(row, "question", _after(row["query"], "Question: "))


def _openbookqa(row):
    return _lettered(row, "question_stem", row["query"])


def _piqa(row):
    first, second = row["choices"]
    goal = _after(row["query"], "Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _boolq(row):
    passage, found, question = _after(row["query"], "Passage: ").rpartition("\nQuestion: ")
    if not found or row["choices"] != ["no", "yes"]:
        raise ValueError("it is not a passage, question, no and yes")
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def _winogrande(row):
    first, second = row["context_options"]
    start = first[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))]
    if "_" in start:
        raise ValueError("'_' occurs before the gap")
    texts = {
        "sentence": f"{start}_ {row['continuation']}",
        "option1": first[len(start) :],
        "option2": second[len(start) :],
    }
    return {**texts, "answer": str(row["gold"] + 1)}


def _lambada(row):
    return {"text": f"{row['context']} {row['continuation']}"}


# {task: ({split: file without extension}, function that parses a rendering, a field that only renderings have)}
_FILES = {
    "arc_easy": ({"test": "arc_easy"}, _arc, "query"),
    "arc_challenge": ({"test": "arc_challenge"}, _arc, "query"),
    "piqa": ({"test": "piqa"}, _piqa, "query"),
    "winogrande": ({"test": "winogrande"}, _winogrande, "context_options"),
    "boolq": ({"test": "boolq"}, _boolq, "query"),
    "openbookqa": ({"test": "openbook_qa"}, _openbookqa, "query"),
    "lambada_openai": ({"test": "lambada_openai"}, _lambada, "context"),
    "wikitext": ({"test": "wikitext2_raw_test"}, None, None),
    "ifeval": ({"test": "ifeval/input_data"}, None, None),
    "gsm8k": ({"test": "gsm8k/test", "train": "gsm8k/train"}, None, None),
}


def overrides(name, folder):
    """(changes to the harness's config of a task so that its rows come from files, the files as text).

    ConfigError: no such folder, or a task without file support. DataError: a file is missing or has other rows.
    """
    if name not in _FILES:
        raise ConfigError(
            f"{name} cannot be read from files, only {', '.join(_FILES)}: omit --data to use the hub's rows"
        )
    if not Path(folder).is_dir():
        raise ConfigError(f"--data {folder}: no such folder")
    stems, apart, mark = _FILES[name]
    paths = {split: _find(name, Path(folder), stem) for split, stem in stems.items()}
    rows = {split: _rows(path, apart, mark) for split, path in paths.items()}
    shots = "train" if "train" in rows else None
    changed = {"custom_dataset": lambda **_: _dataset(rows), "training_split": shots, "fewshot_split": shots}
    source = ", ".join(f"{path.name} (SHA-256 {sha256(path)[:16]})" for path in paths.values())
    return {**changed, "validation_split": None, "test_split": "test"}, source


def _dataset(rows):
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def _find(name, folder, stem):
    endings = (".txt", ".txt.gz") if name == "wikitext" else (".jsonl", ".jsonl.gz")
    found = sorted(path for ending in endings for path in folder.rglob(stem + ending))
    if len(found) != 1:
        there = f"{len(found)} of them: {', '.join(map(str, found))}" if found else "none"
        raise DataError(f"{name} needs one {stem}{endings[0]} (or .gz) in {folder} or below, found {there}")
    return found[0]


def _rows(path, apart, mark):
    with reading(path):
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    if path.name.removesuffix(".gz").endswith(".txt"):
        return [{"page": page} for page in _PAGE.split(text) if page.strip()]
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(apart(row) if mark in row else row)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise DataError(
                f"{path}, line {number}: not a row of this benchmark ({what}); is it from another version of the file?"
            ) from None
    if not found:
        raise DataError(f"{path} has no rows")
    return found
