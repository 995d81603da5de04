"""Rows of each schema as conversations: what is converted, what is rejected, and nothing in silence."""

import pytest

from peftlib.data.convert import NOTES, REASONS, RowRejected, convert, detect


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def converted(row):
    made = convert(row, detect(row))
    return made.texts, set(made.notes)


def rejected(row, schema="messages"):
    with pytest.raises(RowRejected) as caught:
        convert(row, schema)
    return caught.value.reason


@pytest.mark.parametrize(
    "row, schema",
    [
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"dataset": "x", "id": "x1", "messages": []}, "tulu"),
        ({"prompt": "a", "prompt_id": "1", "messages": []}, "ultrachat"),
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"text": "a"}, None),
        ({"instruction": "a"}, None),
        ([], None),
        (None, None),
    ],
)
def test_schema_is_found_by_field_names(row, schema):
    assert detect(row) == schema


@pytest.mark.parametrize(
    "row, texts, notes",
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.\n\n1 2", "3"], set()),
        ({"instruction": "Add.", "input": "", "output": "3"}, ["Add.", "3"], set()),
        ({"instruction": "Add.", "input": " ", "output": " 3\n"}, ["Add.", "3"], {"trimmed"}),
        (chat(("user", "a"), ("assistant", "b")), ["a", "b"], set()),
        (chat(("user", "a\n"), ("assistant", "b")), ["a", "b"], {"trimmed"}),
        (chat(("Human", "a"), ("GPT", "b"), ("prompter", "c"), ("model", "d")), ["a", "b", "c", "d"], set()),
        (chat(("system", "s"), ("user", "a"), ("assistant", "b")), ["s\n\na", "b"], {"folded_system"}),
        (chat(("system", " "), ("user", "a"), ("assistant", "b")), ["a", "b"], {"dropped_empty_system"}),
        (
            chat(("system", "s"), ("system", "t"), ("user", "a"), ("assistant", "b")),
            ["s\n\nt\n\na", "b"],
            {"folded_system"},
        ),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), ["a\n\nb", "c"], {"merged_turns"}),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), ["a", "b\n\nc"], {"merged_turns"}),
        (chat(("assistant", "x"), ("user", "a"), ("assistant", "b")), ["a", "b"], {"cut_leading_assistant"}),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c")), ["a", "b"], {"cut_trailing_user"}),
        (chat(("user", "a <end_of_turn>"), ("assistant", "b")), ["a <end_of_turn>", "b"], {"typed_control_tokens"}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a", "b"], set()),
        ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, ["a", "b"], set()),
    ],
)
def test_conversions_are_made_and_named(row, texts, notes):
    assert converted(row) == (texts, notes)
    assert notes <= NOTES.keys()


@pytest.mark.parametrize(
    "row, reason",
    [
        (None, "not_an_object"),
        ("text", "not_an_object"),
        ([{"role": "user", "content": "a"}], "not_an_object"),
        ({"text": "a"}, "other_schema"),
        ({"instruction": "a", "output": "b"}, "other_schema"),
        ({"conversations": []}, "other_schema"),
        ({"messages": None}, "wrong_type"),
        ({"messages": {"role": "user"}}, "wrong_type"),
        ({"messages": ["a", "b"]}, "wrong_type"),
        ({"messages": "no json"}, "not_json"),
        ({"messages": "[" * 100_000}, "not_json"),
        ({"messages": []}, "no_exchange"),
        (chat(("user", "a")), "no_exchange"),
        (chat(("assistant", "b"), ("user", "a")), "no_exchange"),
        (chat(("system", "s")), "no_exchange"),
        (chat(("tool", "a"), ("assistant", "b")), "unknown_role"),
        (chat((None, "a"), ("assistant", "b")), "unknown_role"),
        (chat((3, "a"), ("assistant", "b")), "unknown_role"),
        (chat(("user", "a"), ("system", "s"), ("assistant", "b")), "late_system"),
        (chat(("user", None), ("assistant", "b")), "not_text"),
        (chat(("user", "a"), ("assistant", 42)), "not_text"),
        (chat(("user", ["a"]), ("assistant", "b")), "not_text"),
        (chat(("user", "a"), ("assistant", "")), "empty_turn"),
        (chat(("user", " \n"), ("assistant", "b")), "empty_turn"),
        (chat(("user", "a"), ("assistant", "\ud83d")), "lone_surrogate"),
    ],
)
def test_rejected_rows_have_their_reason(row, reason):
    assert rejected(row) == reason
    assert reason in REASONS


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
@pytest.mark.parametrize("value, reason", [(None, "not_text"), (1.5, "not_text"), ("\udc00", "lone_surrogate")])
def test_broken_alpaca_fields(field, value, reason):
    assert rejected({"instruction": "a", "input": "i", "output": "b", field: value}, "alpaca") == reason


def test_origin_is_the_rows_own_id():
    row = {"dataset": "flan", "id": "flan_1", **chat(("user", "a"), ("assistant", "b"))}
    assert convert(row, "tulu").origin == "flan_1"
    assert convert({**row, "prompt_id": "p"}, "tulu").origin == "p"
    assert convert({**row, "id": ["x"]}, "tulu").origin == ""
