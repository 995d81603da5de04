"""Replies made up by the hundred: each is a Reply that a file takes, or a named error without the key."""

import json

import fake_judge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftlib.core.errors import JudgeError
from peftlib.core.files import visible
from peftlib.evaluation.judging import judge
from peftlib.evaluation.judging.backends import KEY_VARIABLE, Endpoint
from peftlib.evaluation.judging.http import Answer, Reply

KEY = "sk-planted0key0that0must0not0appear"

texts = st.one_of(
    st.text(st.characters(), max_size=12),
    st.sampled_from([KEY, f"x{KEY}\x1b]0;title\x07", "\ud800", "VERDICT: 1", "\u202eVERDICT: 2", "\x00", "9" * 400]),
)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
statuses = st.sampled_from([200, 201, 204, 206, 300, 302, 304, 400, 402, 404, 408, 418, 422, 429, 500, 503, 599, 999])
kinds = st.sampled_from(["application/json", "application/json; charset=utf-8", "text/html", "text/plain", "", "\xff"])
waits = st.one_of(texts, st.sampled_from(["", "1", "nan", "-1", "1e300", "Sun, 06 Nov 1994 08:49:37 GMT", "86400"]))


def paths(value, above=()):
    """Every place in a JSON value, as keys and indices."""
    yield above
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths(inner, (*above, name))


@st.composite
def changed(draw):
    """A good completion, or an error, of which one place was exchanged or dropped, or something beside was added."""
    good = st.sampled_from(
        [fake_judge.completion("Yes.\nVERDICT: 1"), {"error": {"message": KEY, "param": "max_tokens"}}]
    )
    made = {"top": json.loads(json.dumps(draw(good)))}
    *way, last = draw(st.sampled_from([path for path in paths(made) if path]))
    place = made
    for name in way:
        place = place[name]
    if draw(st.booleans()):
        place[last] = draw(values)
    else:
        del place[last]
    return made.get("top")


@st.composite
def bodies(draw):
    made = json.dumps(draw(st.one_of(changed(), values))).encode()
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "nested", "bytes", "utf-16"]))
    if how == "cut":
        return made[: draw(st.integers(0, len(made)))]
    if how == "nested":
        depth = draw(st.sampled_from([50, 900, 990, 50_000]))
        return b'{"error":' * depth + made + b"}" * depth
    if how == "utf-16":
        return made.decode().encode("utf-16")
    return draw(st.binary(max_size=40)) if how == "bytes" else made


class Said:
    """Stands for the network: the same answer to each call."""

    def __init__(self, answer):
        self.answer = answer

    def post(self, payload):
        return self.answer


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(statuses, kinds, waits, bodies())
def test_any_answer_is_a_reply_or_a_named_error(monkeypatch, status, kind, wait, body):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    endpoint = _endpoint()
    endpoint._poster = Said(Answer(status, {"content-type": kind, "retry-after": wait, "location": wait}, body))
    try:
        reply = endpoint.ask([{"role": "user", "content": "Which?"}], max_tokens=4)
    except JudgeError as error:
        assert KEY not in str(error) and len(str(error)) < 600
        assert visible(str(error)) == str(error) and len(str(error).splitlines()) == 1
        return
    assert isinstance(reply, Reply) and reply.is_refused == (status in (400, 413, 422))
    assert KEY not in reply.text and reply.text.encode("utf-8") is not None
    for n in (reply.input_tokens, reply.output_tokens):
        assert n is None or (type(n) is int and 0 <= n <= 10**9)
    assert judge.parse_verdict(reply.text) in (None, 0, 1, 2)


_made = []


def _endpoint():
    if not _made:
        _made.append(Endpoint("http://127.0.0.1:1/v1", "m", retries=1, sleep=lambda seconds: None))
    endpoint = _made[0]
    endpoint._not_taken, endpoint._refusals = set(), 0
    return endpoint
