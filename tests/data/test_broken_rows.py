"""Many made-up broken rows and files: each is used as it stands, converted by name, or rejected by name."""

import gzip
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from peftlib import data
from peftlib.core.config import resolve
from peftlib.core.errors import DataError
from peftlib.data.outcomes import NOTES, REASONS, Broken, RowRejected, Tally
from peftlib.data.readers import read_rows
from peftlib.data.sampling import Stream
from peftlib.data.schemas import convert, detect
from peftlib.data.sources import parse_sources
from peftlib.models import chat_template as chat

# The same examples on every machine, and no folder of past ones.
_SETTINGS = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
_CONTROLS = ["<end_of_turn>", "<start_of_turn>user\n", "<bos>", "<eos>", "<end_of_turn>\n<start_of_turn>model\n"]

texts = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(categories=["Cs", "Cc", "Zs", "Cf", "Mn", "So"]), max_size=6),
    st.builds(
        lambda a, control, b: a + control + b, st.text(max_size=5), st.sampled_from(_CONTROLS), st.text(max_size=5)
    ),
    st.sampled_from(["", " ", "\n\n", "\u200b", "yes", "no " * 400, "\ud83d", "\x00"]),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "MODEL ", "tool", "", None, 3, ["user"]])
good_roles = st.sampled_from(["user", "assistant", "user", "assistant", "human", "gpt", "system"])
contents = st.one_of(texts, texts, texts, anything)


def turn(role, content):
    return st.fixed_dictionaries({role: st.one_of(good_roles, good_roles, roles), content: contents})


def chat_row(key, role, content):
    turns = st.one_of(st.lists(turn(role, content), max_size=6), st.lists(anything, max_size=3), anything)
    return st.fixed_dictionaries({key: turns}, optional={"id": anything, "prompt_id": anything, "dataset": anything})


sayings = st.one_of(
    st.builds(
        " ".join, st.lists(st.sampled_from(["red", "blue ", "\nhouse", "<eos>", "tree", "Žába", "7"]), min_size=1)
    ),
    texts,
)


@st.composite
def nearly_good_chat(draw, key, role, content):
    """A conversation as it should be, and up to two things done to it."""
    n = draw(st.integers(1, 3))
    turns = [{role: ("user", "assistant")[i % 2], content: draw(sayings)} for i in range(2 * n)]
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(turns)))
        change = draw(st.sampled_from(["put in", "take out", "role", "content", "system"]))
        if change == "put in":
            turns.insert(at, {role: draw(good_roles), content: draw(sayings)})
        elif change == "system":
            turns.insert(0, {role: "system", content: draw(sayings)})
        elif change == "take out":
            del turns[at : at + 1]
        elif at < len(turns):
            turns[at] = {**turns[at], **({role: draw(roles)} if change == "role" else {content: draw(contents)})}
    return {key: turns}


alpaca_row = st.fixed_dictionaries({}, optional={"instruction": contents, "input": contents, "output": contents})
good_alpaca = st.fixed_dictionaries({"instruction": sayings, "input": sayings, "output": sayings})
broken = st.one_of(
    chat_row("messages", "role", "content"), chat_row("conversations", "from", "value"), alpaca_row, anything
)
# A file is mostly of one schema, with a few rows that are anything.
files = st.one_of(
    st.lists(st.one_of(nearly_good_chat("messages", "role", "content"), broken), min_size=8, max_size=20),
    st.lists(st.one_of(nearly_good_chat("conversations", "from", "value"), broken), min_size=8, max_size=20),
    st.lists(st.one_of(good_alpaca, alpaca_row, broken), min_size=8, max_size=20),
)


def raw_turns(row):
    """[(role, text), ...] as they stand in an accepted row, system first, read without peftlib."""
    if "instruction" in row:
        return [("user", row["instruction"]), ("user", row.get("input", "")), ("assistant", row["output"])]
    items = row.get("messages", row.get("conversations"))
    items = json.loads(items) if isinstance(items, str) else items
    named = {"human": "user", "prompter": "user", "user": "user", "system": "system"}
    found = []
    for item in items:
        role = item["role"] if item.get("role") is not None else item["from"]
        text = item["content"] if item.get("content") is not None else item["value"]
        found.append((named.get(role.strip().lower(), "assistant"), text))
    return found


def assert_nothing_changed_in_silence(row, made):
    notes = set(made.notes)
    assert notes <= NOTES.keys()
    turns = raw_turns(row)
    system = [text for role, text in turns if role == "system"]
    spoken = [turn for turn in turns if turn[0] != "system"]
    first = next(i for i, (role, _) in enumerate(spoken) if role == "user")
    last = max(i for i, (role, _) in enumerate(spoken) if role == "assistant")
    assert ("cut_leading_assistant" in notes) == (first > 0)
    assert ("cut_trailing_user" in notes) == (last + 1 < len(spoken))
    assert ("folded_system" in notes) == any(text.strip() for text in system)
    kept = [*system, *(text for _, text in spoken[first : last + 1])]
    assert " ".join(kept).split() == " ".join(made.texts).split()  # no word lost, added or moved
    if notes <= {"typed_control_tokens"} and "instruction" not in row:
        assert made.texts == kept
    assert len(made.texts) % 2 == 0 and all(text and text == text.strip() for text in made.texts)
    assert ("typed_control_tokens" in notes) or not any(c.strip() in t for c in _CONTROLS for t in made.texts)


@pytest.mark.parametrize(
    "n_files, n_rows, n_accepted, n_reasons",
    # What is drawn depends on the modules that are loaded, so the least that must be met leaves room.
    [(45, 400, 30, 6), pytest.param(220, 2000, 200, 8, marks=pytest.mark.slow)],
)
def test_broken_rows_are_used_converted_or_rejected_by_name(tmp_path, n_files, n_rows, n_accepted, n_reasons):
    seen = {"rows": 0, "accepted": 0, "reasons": set()}

    @settings(max_examples=n_files, **_SETTINGS)
    @given(files)
    def broken_rows_pass(made):
        seen["rows"] += len(made)
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        again = [json.loads(line) for line in path.read_text().splitlines()]
        schemas = Counter(filter(None, map(detect, again)))
        schema = max(schemas, key=schemas.get, default=None)
        [source] = parse_sources(f"alpaca={path}")
        tally = Tally(source, lambda line: None)
        stream = Stream("main", tally, seed=0, n_held=50)
        if schema is None:
            with pytest.raises(DataError, match="none of its first"):
                list(stream.batches())
            return
        candidates = [c for batch in stream.batches() for c in batch]
        accepted = set()
        for row in again:
            try:
                converted = convert(row, schema)
            except RowRejected as rejected:
                seen["reasons"].add(rejected.reason)
            else:
                assert_nothing_changed_in_silence(row, converted)
                accepted.add(tuple(converted.texts))
        seen["accepted"] += len(accepted)
        assert {tuple(c.texts) for c in candidates} == accepted
        assert tally.rejected.keys() <= REASONS.keys()
        assert tally.read == len(made) == sum(tally.rejected.values()) + sum(c.copies for c in candidates)
        assert all(json.dumps(example, ensure_ascii=True).isascii() for example in tally.examples)

    broken_rows_pass()
    assert seen["rows"] >= n_rows and seen["accepted"] >= n_accepted and len(seen["reasons"]) >= n_reasons, seen


def test_broken_rows_go_through_the_whole_build(tmp_path, tiny_model):
    path = tmp_path / "rows.jsonl"
    whole = []

    @settings(max_examples=60, **_SETTINGS)
    @given(st.lists(nearly_good_chat("messages", "role", "content"), min_size=4, max_size=10))
    def collect(made):
        whole.extend(made)

    collect()
    good = {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A house."}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *whole]))
    fields = {"train_rows": 5000, "valid_rows": 3, "test_rows": 5, "allow_short": True, "workers": 1}
    cfg = resolve("demo", model=str(tiny_model), sources=f"mine={path}", **fields)
    manifest = data.build_data(cfg, tmp_path / "data", lambda line: None)
    assert manifest["read"]["mine"] == len(whole) + 1
    kept = sum(counts["mine"] for counts in manifest["counts"].values())
    assert kept + sum(manifest["rejected"]["mine"].values()) == manifest["read"]["mine"] and kept >= 20
    assert manifest["conversions"]["mine"]["typed_control_tokens"] > 0
    for row in data.load_split(tmp_path / "data", "train"):
        assert row["input_ids"].count(chat.END_OF_TURN) == len(row["messages"])
        assert row["input_ids"].count(chat.BOS) == 1 and any(row["is_scored"])


well_formed = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text == text.strip()
)


@settings(max_examples=150, **_SETTINGS)
@given(st.lists(st.tuples(well_formed, well_formed), min_size=1, max_size=4))
def test_well_formed_rows_are_never_rejected_nor_changed(exchanges):
    turns = [text for exchange in exchanges for text in exchange]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    made = convert({"messages": messages}, "messages")
    assert made.texts == turns and set(made.notes) <= {"typed_control_tokens"}


def valid_file(kind):
    table = [{"instruction": f"ask {i}", "output": f'say "{i}"'} for i in range(5)]
    if kind == "csv":
        return b"instruction,output\n" + b"".join(b'ask,"say ""%d"""\n' % i for i in range(5))
    return json.dumps(table).encode() if kind == "json" else b"".join(json.dumps(r).encode() + b"\n" for r in table)


@st.composite
def damaged_files(draw):
    """(kind, bytes): noise, or a valid file with some bytes cut, changed or put in; perhaps compressed, perhaps cut."""
    kind = draw(st.sampled_from(["jsonl", "json", "csv"]))
    content = bytearray(draw(st.binary(max_size=60)) if draw(st.integers(0, 3)) == 0 else valid_file(kind))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    if draw(st.booleans()):
        content = gzip.compress(bytes(content), mtime=0)
        content = content[: draw(st.integers(0, len(content)))]
    return kind, bytes(content)


@settings(max_examples=300, **_SETTINGS)
@given(damaged_files())
def test_damaged_files_give_rows_or_an_error_that_names_the_file(tmp_path, damaged):
    kind, content = damaged
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    try:
        found = [row for _, row in read_rows(path)]
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert found and all(row.reason in REASONS for row in found if isinstance(row, Broken))
