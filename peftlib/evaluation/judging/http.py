"""One HTTP request to an endpoint with a hard deadline and a size limit, whatever the server does."""

import asyncio
import json
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from peftlib.core.errors import JudgeError

MOST_BYTES = 1 << 20  # of an answer; a judge's are a few kilobytes
_LONGEST_RETRY_AFTER_S = 32 * 86400.0  # a longer one is a mistake: quotas renew monthly
_MOST_ERROR_BYTES = 1 << 16  # of an error's body; the rest is not read


class CallFailed(Exception):
    """A call without an answer. kind: a short name to count by. said: details. retry_after_s: the server's wish, or
    None."""

    def __init__(self, kind, said, retry_after_s=None):
        super().__init__(said)
        self.kind, self.said, self.retry_after_s = kind, said, retry_after_s


class Hopeless(Exception):
    """An answer after which no retry helps; its text goes on from the judge's name."""


@dataclass(frozen=True)
class Answer:
    """What a server sent. headers: names in lower case. body: bytes, of an error perhaps not all."""

    status: int
    headers: dict
    body: bytes

    @property
    def kind(self):
        """The content type without its parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def retry_after_s(self):
        """Seconds that the server asks to wait before a retry, or None."""
        asked = self.headers.get("retry-after", "").strip()
        try:
            seconds = float(asked)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(asked).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                return None
        return max(0.0, seconds) if seconds < _LONGEST_RETRY_AFTER_S else None  # neither does nan pass


class Poster:
    """Posts JSON to a URL and follows no redirect, so that key and texts go nowhere else.

    key: sent as a bearer token; "" sends none. is_direct: not through a proxy that the environment names.
    JudgeError: the package httpx2 is missing.
    """

    def __init__(self, url, *, key, timeout_s, is_direct):
        self._httpx = _httpx2()
        self.url, self._timeout_s, self._is_direct = url, timeout_s, is_direct
        # Uncompressed: the size of a compressed answer is only known once it is unpacked.
        self._headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # The list of certificate authorities takes long to load and is only needed with TLS.
        is_https = urlsplit(url).scheme == "https"
        self._tls = self._httpx.create_ssl_context() if is_https else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def post(self, payload):
        """The Answer to a JSON value, whatever its status. CallFailed: none in time. Hopeless: more than MOST_BYTES."""
        loop = asyncio.new_event_loop()  # only a coroutine can be cancelled at any point, even in a DNS look-up
        try:
            return loop.run_until_complete(self._post(json.dumps(payload).encode("ascii")))
        except TimeoutError:
            raise CallFailed("timeout", f"no whole answer within {self._timeout_s:g} s") from None
        except self._httpx.HTTPError as error:
            raise CallFailed("connection", str(error) or type(error).__name__) from None
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def _post(self, content):
        # httpx's timeout applies to each read, so a server that drips bytes would outlive it: one clock for all.
        async with (
            asyncio.timeout(self._timeout_s),
            self._httpx.AsyncClient(
                timeout=None, follow_redirects=False, verify=self._tls, trust_env=not self._is_direct
            ) as client,
            client.stream("POST", self.url, content=content, headers=self._headers) as response,
        ):
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status_code, headers, await _read(response, headers))


async def _read(response, headers):
    limit = MOST_BYTES if response.is_success else _MOST_ERROR_BYTES
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        if response.is_success:
            raise CallFailed("unreadable answer", f"it came as {encoding}, which was not asked for")
        return b""
    parts, n_bytes = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        n_bytes += len(part)
        if n_bytes > limit:
            if response.is_success:
                raise Hopeless(
                    f"answered with more than {MOST_BYTES >> 20} MiB, no judge's length: see what runs there"
                )
            break
    return b"".join(parts)[:limit]


def _httpx2():
    try:
        import httpx2
    except ImportError:
        raise JudgeError("an endpoint needs the package httpx2: pip install 'httpx2>=2.10', or use --local") from None
    return httpx2
