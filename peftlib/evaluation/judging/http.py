"""One chat completion over HTTP: a call with a hard deadline and a size limit, and tolerant parsing of its answer."""

import asyncio
import contextlib
import json
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from urllib.parse import urlsplit

from peftlib.core.errors import JudgeError

MOST_BYTES = 1 << 20  # of an answer; a judge's are a few kilobytes
_MOST_ERROR_BYTES = 1 << 16  # of an error's body; the rest is not read
_LONGEST_RETRY_AFTER_S = 32 * 86400.0  # a longer one is an error: quotas renew monthly
_MOST_TOKENS = 10**9  # of one call; a larger number is invalid
_NO_API = "answers, but not like an OpenAI-compatible API: most URLs end in /v1"
_BROKEN = object()  # marks invalid JSON
_REFUSED = "\n(the model refused to answer)"  # appended, so that a refusal is never parsed as a verdict


class CallFailed(Exception):
    """A call without an answer. kind: a short name to count by. said: details. retry_after_s: from the server, or
    None."""

    def __init__(self, kind, said, retry_after_s=None):
        super().__init__(said)
        self.kind, self.said, self.retry_after_s = kind, said, retry_after_s


class Hopeless(Exception):
    """An answer after which retries are useless; its text follows the judge's name."""


@dataclass(frozen=True)
class Reply:
    """text: the judge's reply. Tokens: the server's counts, None without a count. is_refused: the server rejected
    the request, and text says why."""

    text: str
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    is_refused: bool = False


@dataclass(frozen=True)
class Answer:
    """A server's response. headers: a mapping. body: bytes, possibly truncated for an error."""

    status: int
    headers: dict
    body: bytes

    @property
    def retry_after_s(self):
        """Seconds that the server asks to wait before a retry, or None."""
        asked, seconds = self.headers.get("retry-after", "").strip(), math.inf
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        with contextlib.suppress(ValueError):
            seconds = float(asked)
        return max(0.0, seconds) if seconds < _LONGEST_RETRY_AFTER_S else None  # False for nan too

    @cached_property
    def _value(self):
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return _BROKEN

    def reply(self):
        """The Reply in an answer with status 2xx; its text is "" if the server sent none.

        CallFailed: truncated, or an error with a success status, so a retry may help. Hopeless: not a completion.
        """
        made = self._value
        is_json = "json" in (self.headers.get("content-type") or "json").lower() and self.body.lstrip()[:1] != b"<"
        if made is _BROKEN and (is_json or not self.body):
            raise CallFailed("unreadable answer", "the reply is empty or incomplete JSON", self.retry_after_s)
        if _part(made, "choices") is None and _part(made, "error"):  # some gateways return errors like this
            raise CallFailed("error in an answer", self.error_text(), self.retry_after_s)
        if not isinstance(made, dict) or "choices" not in made:
            raise Hopeless(_NO_API)
        tokens = (_count(_part(made, "usage", name)) for name in ("prompt_tokens", "completion_tokens"))
        return Reply(_text(made), *tokens)

    def error_text(self):
        """The server's own text about an error."""
        told = _part(self._value, "error") or self._value
        if isinstance(told, dict):
            told = next((told[name] for name in ("message", "detail", "msg", "title") if told.get(name)), told)
        if told is _BROKEN or not told:
            told = self.body.decode("utf-8", "replace")
            return "an HTML page" if told.lstrip()[:1] == "<" else told or "no message"
        with contextlib.suppress(RecursionError):
            return _clean(told if isinstance(told, str) else json.dumps(told, ensure_ascii=False))
        return "a message nested too deeply to show"

    @property
    def blamed(self):
        """The request parameter that caused an error, or None."""
        return _part(self._value, "error", "param")


def _part(value, *path):
    """The part of a JSON value at keys and indices; None if it has another shape."""
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for key in path:
            value = value[key]
        return value
    return None


def _text(made):
    message = _part(made, "choices", 0, "message")
    content, refusal = _part(message, "content"), _part(message, "refusal")
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else _part(part, "text") for part in content]
        content = "".join(part for part in parts if isinstance(part, str))
    if isinstance(content, str) and content:
        return _clean(content)
    return _clean(refusal) + _REFUSED if isinstance(refusal, str) and refusal else ""


def _count(value):
    """A token count as an int, or None if it is invalid."""
    if type(value) not in (int, float) or not 0 <= value <= _MOST_TOKENS or value != int(value):
        return None
    return int(value)


def _clean(text):
    """The text without lone surrogates, which JSON allows but files and terminals do not."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Poster:
    """Posts JSON to a URL and does not follow redirects, so that key and texts go nowhere else.

    key: sent as a bearer token; "" sends none. JudgeError: the package httpx2 is missing.
    """

    def __init__(self, url, *, key, timeout_s):
        try:
            import httpx2
        except ImportError:
            way_out = "pip install 'httpx2>=2.10', or use --local"
            raise JudgeError(f"--endpoint needs the package httpx2: {way_out}") from None
        self._httpx, self._url, self._timeout_s = httpx2, url, timeout_s
        # Uncompressed: the size of a compressed answer is only known after decompression.
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        self._headers |= {"Authorization": f"Bearer {key}"} if key else {}
        is_https = urlsplit(url).scheme == "https"
        # Loading the certificate authorities is slow and only needed with TLS. No proxy for http://, which is only
        # for this machine (see Endpoint): a proxy could read the request.
        tls = httpx2.create_ssl_context() if is_https else False
        self._how = {"timeout": None, "follow_redirects": False, "verify": tls, "trust_env": is_https}

    def post(self, payload):
        """The Answer to a JSON value, with any status. CallFailed: none in time. Hopeless: more than MOST_BYTES."""
        loop = asyncio.new_event_loop()  # only a coroutine can be cancelled at any point, even in a DNS lookup
        try:
            return loop.run_until_complete(self._post(payload))
        except TimeoutError:
            raise CallFailed("timeout", f"no complete answer within {self._timeout_s:g} s") from None
        except self._httpx.HTTPError as error:
            raise CallFailed("connection", str(error) or type(error).__name__) from None
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def _post(self, payload):
        # httpx's timeout applies to each read, so a slow server could exceed it: use one timeout for the whole call.
        async with (
            asyncio.timeout(self._timeout_s),
            self._httpx.AsyncClient(**self._how) as client,
            client.stream("POST", self._url, json=payload, headers=self._headers) as response,
        ):
            body, limit = b"", MOST_BYTES if response.is_success else _MOST_ERROR_BYTES
            async for part in response.aiter_raw():
                body += part
                if len(body) > limit and response.is_success:
                    size = f"more than {limit >> 20} MiB"
                    raise Hopeless(f"answered with {size}, too much for a judge's reply: check which server runs there")
                if len(body) > limit:
                    break
            return Answer(response.status_code, response.headers, body[:limit])
