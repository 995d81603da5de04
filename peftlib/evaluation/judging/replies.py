"""What an OpenAI-compatible endpoint answered: one parser for replies of any shape, and for the words of an error."""

import json
from dataclasses import dataclass

from peftlib.evaluation.judging.http import CallFailed

_MOST_TOKENS = 10**9  # of one call; a larger number is no count
_BROKEN = object()  # in the place of what is no JSON
_REFUSED = "\n(the model refused to answer)"  # stands last, so that a refusal is never read as a verdict


class NotAnApi(Exception):
    """An answer that no OpenAI-compatible API gives."""


@dataclass(frozen=True)
class Reply:
    """text: what the judge wrote. Tokens: as the server counts them, None where it told no number. is_refused: the
    server would not take this request, and text says why."""

    text: str
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    is_refused: bool = False


def read(answer):
    """The Reply in a judge_http.Answer of status 2xx; its text is "" where the server wrote none.

    CallFailed: cut, or an error in a good answer's clothes, so another try may do. NotAnApi: no completion at all.
    """
    made = _json(answer.body)
    if made is _BROKEN:
        if answer.body and (answer.kind not in ("application/json", "") or answer.body.lstrip()[:1] == b"<"):
            raise NotAnApi
        raise CallFailed("unreadable answer", "what came is empty or no whole JSON", answer.retry_after_s)
    if not isinstance(made, dict):
        raise NotAnApi
    if "choices" not in made:
        if made.get("error"):  # some gateways tell of their upstream's errors so
            raise CallFailed("error in an answer", words(answer), answer.retry_after_s)
        raise NotAnApi
    usage = made.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(_text(made["choices"]), _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def words(answer):
    """What the server said about an error, as it said it."""
    made = _json(answer.body)
    told = made.get("error", made) if isinstance(made, dict) else made
    if isinstance(told, dict):
        told = next((told[name] for name in ("message", "detail", "msg", "title") if told.get(name)), told)
    if isinstance(told, str) and told:
        return _clean(told)
    if told is not _BROKEN and told:
        try:
            return _clean(json.dumps(told, ensure_ascii=False))
        except RecursionError:
            return "words nested too deep to show"
    text = answer.body.decode("utf-8", "replace")
    return "a page of HTML" if text.lstrip()[:1] == "<" else text or "no words"


def wrong_parameter(answer):
    """The request's parameter that an error blames, or None."""
    made = _json(answer.body)
    error = made.get("error") if isinstance(made, dict) else None
    return error.get("param") if isinstance(error, dict) else None


def _json(body):
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return _BROKEN


def _text(choices):
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(message, dict):
        return ""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if isinstance(content, str) and content:
        return _clean(content)
    refusal = message.get("refusal")
    return _clean(refusal) + _REFUSED if isinstance(refusal, str) and refusal else ""


def _part(part):
    if isinstance(part, dict):
        part = part.get("text")
    return part if isinstance(part, str) else ""


def _count(value):
    """Tokens as an int, or None for what is no count."""
    if type(value) not in (int, float) or not 0 <= value <= _MOST_TOKENS or value != int(value):
        return None
    return int(value)


def _clean(text):
    """JSON can name half characters, which no file and no terminal takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
