"""Leaks found the plain way, sharing no code with peftlib: an inverted index over every gram of every held-out row."""

import re
from collections import Counter, defaultdict

READINGS = {"letters and digits": re.compile(r"[^\W]+"), "between spaces": re.compile(r"\S+")}


def grams(messages, reading):
    """Set of word 5-grams of a whole conversation, as strings; a shorter one is one gram."""
    words = reading.findall(" ".join(m["content"] for m in messages).lower())
    return {"\x00".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def prompt(messages):
    """All that stands before the last turn, case, white space and the order of a quote and a stop aside."""
    text = " ".join(" ".join(m["content"] for m in messages[:-1]).lower().split())
    while (moved := re.sub(r"""([.,;:!?])(["'])""", r"\2\1", text)) != text:
        text = moved
    return text


def near_pairs(held_out, others, threshold=0.8):
    """{(i, j)}: others[j] has Jaccard similarity >= threshold to held_out[i] by any reading of 'word'."""
    return set().union(*(_near_pairs(held_out, others, threshold, reading) for reading in READINGS.values()))


def _near_pairs(held_out, others, threshold, reading):
    holders, sizes = defaultdict(list), []
    for i, messages in enumerate(held_out):
        own = grams(messages, reading)
        sizes.append(len(own))
        for gram in own:
            holders[gram].append(i)
    found = set()
    for j, messages in enumerate(others):
        own = grams(messages, reading)
        shared = Counter(i for gram in own for i in holders.get(gram, ()))
        found |= {(i, j) for i, n in shared.items() if n >= threshold * (sizes[i] + len(own) - n)}
    return found


def prompt_leaks(held_out, others):
    """{(i, j)}: the prompt of held_out[i] is the history of an answer in others[j]."""
    holders = defaultdict(list)
    for i, messages in enumerate(held_out):
        holders[prompt(messages)].append(i)
    return {
        (i, j)
        for j, messages in enumerate(others)
        for end in range(2, len(messages) + 1, 2)
        for i in holders.get(prompt(messages[:end]), ())
    }


def leaks(splits):
    """Counter of what `splits` ({'test'|'valid'|'train': [messages, ...]}) should not hold; empty where all is well."""
    found = Counter()
    for held, other in (("test", "valid"), ("test", "train"), ("valid", "train")):
        found[f"prompt of {held} in {other}"] = len(prompt_leaks(splits[held], splits[other]))
        found[f"near {held} in {other}"] = len(near_pairs(splits[held], splits[other]))
    for split in ("test", "valid"):
        rows = splits[split]
        found[f"prompt twice in {split}"] = len(rows) - len(set(map(prompt, rows)))
        found[f"near within {split}"] = len(near_pairs(rows, rows)) - len(rows)
    return +found
