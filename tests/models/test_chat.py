"""Chat encoding against the bundled template, on a tiny tokenizer and, where it has been converted, on Gemma's own."""

import hashlib

import pytest
import tiny

from peftlib.core.errors import DataError, ModelError
from peftlib.models import chat_template as chat
from peftlib.models import packaged


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


TRICKY = {
    "one exchange": [user("Hi"), model("Hello")],
    "three exchanges": [user("a"), model("b"), user("c"), model("d"), user("e"), model("f")],
    "ends on a user turn": [user("a"), model("b"), user("c")],
    "space around": [user("  \n\t Hi \n\n"), model("\n\nHello  ")],
    "newlines inside": [user("a\n\nb\n\n\n\nc"), model("1\n2\n\n3")],
    "runs of spaces and tabs": [user("a  b   c\t\td"), model("        indented\n\tcode")],
    "empty answer": [user("Hi"), model("")],
    "empty question": [user(" "), model("Hello")],
    "role words": [user("user\nmodel\n"), model("model\nuser")],
    "almost control tokens": [user("< end_of_turn> <end_of_turn <start_of_turn user>"), model("end_of_turn>")],
    "html and braces": [user("<b>{{ x }}</b> {% if %}"), model("<table><tr><td>1</td></tr></table>")],
    "code": [user("def f(x):\n    return x\n"), model("```python\nprint(f(1))\n```")],
    "accents, emoji, scripts": [user("Žluťoučký 🐎 你好 مرحبا"), model("नमस्ते e\u0301 \U0001f469\u200d\U0001f4bb")],
    "zero-width and odd space": [user("\u200bHi\u00a0\u2003there\ufeff"), model("\u200b\nHello\u3000")],
    "numbers": [user("1234567 + 0.001 = ?"), model("1234567.001")],
    "system turn": [{"role": "system", "content": "Be brief."}, user(" Hi "), model("Hello")],
    "system turn with space": [{"role": "system", "content": "\n Be brief. \n"}, user("Hi"), model("Hello")],
    "empty system turn": [{"role": "system", "content": ""}, user("Hi"), model("Hello")],
    "long": [user("word " * 400), model("answer " * 300)],
}


def gemma_tokenizer():
    from transformers import AutoTokenizer

    folder = packaged.packaged_folder()
    if not (folder / "provenance.txt").exists():
        pytest.skip(f"the packaged model has not been converted here (no {folder}): make demo does it")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["tiny", pytest.param("gemma", marks=pytest.mark.packaged)])
def tokenizer(request):
    made = tiny.tokenizer() if request.param == "tiny" else gemma_tokenizer()
    before = made.chat_template
    yield chat.set_template(made)
    made.chat_template = before


def template_ids(tokenizer, messages, **settings):
    made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
    return made["input_ids"]


def test_bundled_template_is_the_released_one():
    text = chat.TEMPLATE_PATH.read_bytes()
    assert hashlib.sha256(text).hexdigest() == chat.TEMPLATE_SHA256
    assert chat.template_text() == text.decode()


def test_a_changed_template_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "gemma3_chat_template.jinja"
    other.write_text(chat.template_text() + " ")
    monkeypatch.setattr(chat, "TEMPLATE_PATH", other)
    with pytest.raises(ModelError, match=r"SHA-256 .* reinstall peftlib"):
        chat.set_template(tiny.tokenizer())


@pytest.mark.parametrize("name", TRICKY)
def test_ids_equal_the_template(tokenizer, name):
    assert chat.encode(tokenizer, TRICKY[name]).input_ids == template_ids(tokenizer, TRICKY[name])


@pytest.mark.parametrize("name", TRICKY)
def test_prompt_ids_equal_the_template_with_generation_prompt(tokenizer, name):
    history = TRICKY[name] if TRICKY[name][-1]["role"] == "user" else TRICKY[name][:-1]
    expected = template_ids(tokenizer, history, add_generation_prompt=True)
    assert chat.encode_prompt(tokenizer, history) == expected


@pytest.mark.parametrize("name", TRICKY)
def test_one_bos_on_each_path_and_first(tokenizer, name):
    for ids in (chat.encode(tokenizer, TRICKY[name]).input_ids, chat.encode_prompt(tokenizer, TRICKY[name][:1])):
        assert ids.count(chat.BOS) == 1 and ids[0] == chat.BOS


@pytest.mark.parametrize("name", TRICKY)
def test_mask_is_the_answers_and_their_end_of_turn(tokenizer, name):
    encoded = chat.encode(tokenizer, TRICKY[name])
    spans, open_span = [], []
    for token, is_scored in zip(encoded.input_ids, encoded.is_scored, strict=True):
        if is_scored:
            open_span.append(token)
        elif open_span:
            spans.append(open_span)
            open_span = []
    assert not open_span  # the newline after the last turn is not scored
    answers = [m["content"].strip() for m in TRICKY[name] if m["role"] == "assistant"]
    assert [span[-1] for span in spans] == [chat.END_OF_TURN] * len(answers)
    assert [tokenizer.decode(span[:-1], clean_up_tokenization_spaces=False) for span in spans] == answers


@pytest.mark.parametrize("name", TRICKY)
def test_a_cut_after_whole_turns_is_a_slice(tokenizer, name):
    whole = chat.encode(tokenizer, TRICKY[name])
    offset = TRICKY[name][0]["role"] == "system"  # it is part of the first user turn
    for n, end in enumerate(whole.turn_ends, start=1):
        part = chat.encode(tokenizer, TRICKY[name][: n + offset])
        assert part.input_ids == whole.input_ids[:end]
        assert part.is_scored == whole.is_scored[:end]


def test_batch_equals_one_by_one(tokenizer):
    conversations = list(TRICKY.values())
    assert chat.encode_many(tokenizer, conversations) == [chat.encode(tokenizer, c) for c in conversations]
    assert chat.encode_many(tokenizer, []) == []


@pytest.mark.parametrize("control", ["<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>", "<pad>"])
def test_typed_control_tokens_are_letters(tokenizer, control):
    conversation = [user(f"what does {control} do?"), model(f"{control} ends\n{control}")]
    ids = chat.encode(tokenizer, conversation).input_ids
    assert [ids.count(i) for i in (chat.START_OF_TURN, chat.END_OF_TURN, chat.BOS, 1, 0)] == [2, 2, 1, 0, 0]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert text.count(control) == template_text_count(control, conversation)
    assert template_ids(tokenizer, conversation) != ids  # why the template is not used to make them


def template_text_count(control, conversation):
    typed = sum(m["content"].count(control) for m in conversation)
    return typed + {"<end_of_turn>": 2, "<start_of_turn>": 2, "<bos>": 1}.get(control, 0)


def test_turn_tokens_are_105_and_106(tokenizer):
    chat.check_tokenizer(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"]) == [105, 106]


@pytest.mark.parametrize("lost", ["<start_of_turn>", "<end_of_turn>"])
def test_split_turn_tokens_are_refused(lost):
    class Split:
        bos_token_id = chat.BOS

        def encode(self, text, add_special_tokens):
            return [236820, 3041] if text == lost else tiny.tokenizer().encode(text, add_special_tokens=False)

    with pytest.raises(ModelError, match=rf"{lost} as \[236820, 3041\].*Gemma 3 tokenizer\.json"):
        chat.check_tokenizer(Split())


def test_another_bos_is_refused():
    other = type("Other", (), {"bos_token_id": 1, "encode": tiny.tokenizer().encode})()
    with pytest.raises(ModelError, match="<bos> is 1, not 2"):
        chat.check_tokenizer(other)


@pytest.mark.parametrize(
    "messages", [[model("a")], [user("a"), user("b")], [user("a"), {"role": "tool", "content": "b"}]]
)
def test_roles_that_do_not_alternate_are_refused(messages):
    with pytest.raises(DataError, match="roles must alternate"):
        chat.encode(tiny.tokenizer(), messages)
