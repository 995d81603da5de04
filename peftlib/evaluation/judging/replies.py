"""Parsing of an OpenAI-compatible endpoint's answers, whatever their shape: replies and error messages."""

import json
from dataclasses import dataclass

from peftlib.evaluation.judging.http import CallFailed, Hopeless

_MOST_TOKENS = 10**9  # of one call; a larger number is no count
_NO_API = "answers, but not as an OpenAI-compatible API does: most URLs end in /v1"
_BROKEN = object()  # instead of a value: it is no JSON
_REFUSED = "\n(the model refused to answer)"  # put last, so that a refusal is never read as a verdict


@dataclass(frozen=True)
class Reply:
    """text: what the judge wrote. Tokens: as the server counts them, None without a count. is_refused: the server
    rejected the request, and text says why."""

    text: str
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    is_refused: bool = False


def read(answer):
    """The Reply in an http.Answer of status 2xx; its text is "" where the server wrote none.

    CallFailed: cut, or an error sent as a success, so a retry may help. Hopeless: no completion at all.
    """
    made = _json(answer.body)
    if made is _BROKEN:
        if answer.body and (answer.kind not in ("application/json", "") or answer.body.lstrip()[:1] == b"<"):
            raise Hopeless(_NO_API)
        raise CallFailed("unreadable answer", "what came is empty or no whole JSON", answer.retry_after_s)
    if not isinstance(made, dict):
        raise Hopeless(_NO_API)
    if "choices" not in made:
        if made.get("error"):  # as some gateways pass on errors
            raise CallFailed("error in an answer", words(answer), answer.retry_after_s)
        raise Hopeless(_NO_API)
    usage = made.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(_text(made["choices"]), _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def words(answer):
    """The server's own text about an error."""
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
    """A number of tokens as an int, or None if it is not one."""
    if type(value) not in (int, float) or not 0 <= value <= _MOST_TOKENS or value != int(value):
        return None
    return int(value)


def _clean(text):
    """The text without lone surrogates, which JSON allows and files and terminals do not."""
    return text.encode("utf-8", "replace").decode("utf-8")
