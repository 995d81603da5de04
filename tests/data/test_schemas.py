"""Rows of each schema as conversations: what is converted, what is rejected, and nothing in silence."""

import pytest

from peftlib.data.outcomes import NOTES, REASONS, RowRejected
from peftlib.data.schemas import convert, detect


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
        (chat(("narrator", "a"), ("assistant", "b")), "unknown_role"),
        (chat(("user", "a"), ("tool", "1"), ("assistant", "b")), "tool_use"),
        (chat(("user", "a"), ("Function", "1"), ("assistant", "b")), "tool_use"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "1"}]}, "other_schema"),
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
@pytest.mark.parametrize("value, reason", [(False, "not_text"), (1.5, "not_text"), ("\udc00", "lone_surrogate")])
def test_broken_alpaca_fields(field, value, reason):
    assert rejected({"instruction": "a", "input": "i", "output": "b", field: value}, "alpaca") == reason


def test_origin_is_the_rows_own_id():
    row = {"dataset": "flan", "id": "flan_1", **chat(("user", "a"), ("assistant", "b"))}
    assert convert(row, "tulu").origin == "flan_1"
    assert convert({**row, "prompt_id": "p"}, "tulu").origin == "p"
    assert convert({**row, "id": ["x"]}, "tulu").origin == ""


ALPACA = {"instruction": "a", "output": "b"}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
@pytest.mark.parametrize("field", ["input", "history", "system"])
def test_null_is_an_empty_field(field, missing):
    assert converted({**ALPACA, field: missing}) == (["a", "b"], set())


@pytest.mark.parametrize("field", ["instruction", "output"])
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_field_that_is_needed_may_not_be_null(field, missing):
    assert rejected({**ALPACA, field: missing}, "alpaca") == "not_text"


@pytest.mark.parametrize(
    "row, texts, notes",
    [
        ({**ALPACA, "system": "s"}, ["s\n\na", "b"], {"folded_system"}),
        ({**ALPACA, "system_prompt": "s "}, ["s\n\na", "b"], {"folded_system", "trimmed"}),
        ({**ALPACA, "input": " "}, ["a", "b"], {"trimmed"}),
        ({**ALPACA, "history": [["q", "r"]]}, ["q", "r", "a", "b"], {"used_history"}),
        (
            {**ALPACA, "history": '[["q", "r"]]', "system": "s"},
            ["s\n\nq", "r", "a", "b"],
            {"used_history", "folded_system"},
        ),
        ({**ALPACA, "history": []}, ["a", "b"], set()),
        ({**ALPACA, "history": "[]"}, ["a", "b"], set()),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["s\n\na", "b"],
            {"folded_system"},
        ),
        (
            {"system": "s", **chat(("system", "t"), ("user", "a"), ("assistant", "b"))},
            ["s\n\nt\n\na", "b"],
            {"folded_system"},
        ),
        (
            {"system": "s", **chat(("system", "s"), ("user", "a"), ("assistant", "b"))},
            ["s\n\na", "b"],
            {"folded_system", "dropped_repeated_system"},
        ),
        (chat(("developer", "s "), ("user", "a"), ("ai", "b")), ["s\n\na", "b"], {"folded_system", "trimmed"}),
        (chat(("user", PARTS), ("assistant", PARTS[:1])), ["one\ntwo", "one"], {"joined_parts"}),
        (
            {"messages": [turn("user", "a", name="Ann"), turn("assistant", "b", name=None)]},
            ["a", "b"],
            {"dropped_name"},
        ),
        (
            {"messages": [turn("user", "a", weight=1), turn("assistant", "b", weight=1)]},
            ["a", "b"],
            {"weight_without_effect"},
        ),
        ({"messages": [turn("user", "a", weight=0), turn("assistant", "b", weight=None)]}, ["a", "b"], set()),
        (
            {"messages": [turn("user", "a", tool_calls=[], images=None), turn("assistant", "b", function_call=None)]},
            ["a", "b"],
            set(),
        ),
        ({**ALPACA, "messages": None}, ["a", "b"], set()),
    ],
)
def test_fields_beside_the_usual_ones_are_used_and_counted(row, texts, notes):
    assert converted(row) == (texts, notes)
    assert notes <= NOTES.keys()


def weighted(*weights):
    """A conversation whose answers have these weights."""
    turns = []
    for i, weight in enumerate(weights):
        turns += [turn("user", f"q{i}"), turn("assistant", f"a{i}", weight=weight)]
    return convert({"messages": turns}, "messages")


def test_answers_of_weight_0_are_context_and_what_follows_the_last_scored_one_is_cut():
    assert weighted(1, 1).unscored == () and weighted(1, 1).notes == ()
    made = weighted(0, 1.0, False, True)
    assert (made.unscored, made.notes, len(made.texts)) == ((1, 5), ("unscored_turn",), 8)
    made = weighted(1, 0)
    assert (made.texts, made.unscored, made.notes) == (["q0", "a0"], (), ("cut_trailing_unscored",))


@pytest.mark.parametrize(
    "row, reason, field",
    [
        ({**ALPACA, "system": 3}, "not_text", "system"),
        ({**ALPACA, "history": [["q"]]}, "bad_history", "history[0]"),
        ({**ALPACA, "history": [["q", None]]}, "not_text", "history[0][1]"),
        ({**ALPACA, "history": "no json"}, "not_json", "history"),
        ({**ALPACA, "history": {"q": "r"}}, "bad_history", "history[0]"),
        ({**ALPACA, "tools": [{"name": "f"}]}, "tool_use", "tools"),
        ({**ALPACA, "image": "cat.png"}, "not_text_part", "image"),
        ({**ALPACA, "output": " "}, "empty_turn", "output"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference_pair", "chosen, rejected"),
        ({**ALPACA, "chosen": "b", "rejected": "c"}, "preference_pair", "chosen, rejected"),
        (
            chat(("user", "a"), ("assistant", [{"type": "image_url", "image_url": {"url": "x"}}])),
            "not_text_part",
            "messages[1].content[0]",
        ),
        (
            chat(("user", [{"type": "text", "text": None}]), ("assistant", "b")),
            "not_text",
            "messages[0].content[0].text",
        ),
        (chat(("user", []), ("assistant", "b")), "not_text", "messages[0].content"),
        (chat(("user", "a"), ("assistant", "")), "empty_turn", "messages[1].content"),
        (
            chat(("user", "a"), ("assistant", "b"), ("system", "s"), ("assistant", "b")),
            "late_system",
            "messages[2].content",
        ),
        (
            {"messages": [turn("user", "a"), turn("assistant", None, tool_calls=[{"id": 1}])]},
            "tool_use",
            "messages[1].tool_calls",
        ),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b", function_call={"name": "f"})]},
            "tool_use",
            "messages[1].function_call",
        ),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b", audio={"id": 1})]},
            "not_text_part",
            "messages[1].audio",
        ),
        (
            {"messages": [turn("user", "a", value="z"), turn("assistant", "b")]},
            "ambiguous_turn",
            "messages[0].content and .value",
        ),
        ({"messages": [turn("user", "a"), turn("assistant", "b", weight=0.5)]}, "bad_weight", "messages[1].weight"),
        ({"messages": [turn("user", "a"), turn("assistant", "b", weight="0")]}, "bad_weight", "messages[1].weight"),
        ({"messages": [turn("user", "a", weight=2), turn("assistant", "b")]}, "bad_weight", "messages[0].weight"),
        ({"messages": [turn("user", "a"), turn("assistant", "b", weight=0)]}, "nothing_scored", "messages"),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b", weight=0), turn("assistant", "c")]},
            "mixed_weights",
            "messages[2].content",
        ),
        ({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}, "repeated_field", "messages[0]"),
    ],
)
def test_rejected_rows_name_their_field(row, reason, field):
    schema = "messages" if "messages" in row else "alpaca"
    with pytest.raises(RowRejected) as caught:
        convert(row, schema)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert reason in REASONS


@pytest.mark.parametrize(
    "row, ignored",
    [
        (
            {**ALPACA, "id": 3, "source": "web", "text": "a b", "score": 0.5, "meta": {"x": 1}, "__index_level_0__": 0},
            (),
        ),
        ({**ALPACA, "context": "c", "explanation": " ", "rationale": None}, ("context",)),
        ({**ALPACA, "label": False}, ("label",)),
        ({**ALPACA, "column 1": "17", "rating": "0.5", "weight": "0.5"}, ("weight",)),
        ({"prompt": "a", "prompt_id": "1", **chat(("user", "a "), ("assistant", "b"))}, ()),
        ({"prompt": "other", **chat(("user", "a"), ("assistant", "b"))}, ("prompt",)),
        ({**ALPACA, **chat(("user", "a"), ("assistant", "b"))}, ("instruction", "output")),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b", reasoning_content="hm", id="x")]},
            ("messages[].reasoning_content",),
        ),
    ],
)
def test_fields_that_are_not_used_and_could_matter_are_named(row, ignored):
    assert convert(row, detect(row)).ignored == ignored
