"""The models that judge: behind any OpenAI-compatible endpoint, or local by transformers."""

import dataclasses
import ipaddress
import json
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote, urlsplit

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.env import resolve_device
from peftlib.core.errors import JudgeError
from peftlib.core.files import readable_path, visible
from peftlib.evaluation.evaluate import evaluation_dtype
from peftlib.evaluation.inference.engines import greedy
from peftlib.evaluation.judging import replies
from peftlib.evaluation.judging.http import CallFailed, Hopeless, Poster
from peftlib.evaluation.judging.replies import Reply
from peftlib.models.load import auto_tokenizer, causal_model
from peftlib.models.locate import hub_errors, locate, token_for

KEY_VARIABLE = "OPENAI_API_KEY"
_SHORTEST_SECRET = 8  # characters
_LONGEST_SAID = 200  # characters of a server's words in a message
_MOST_REFUSALS = 3  # in a row: then it is not one request that is wrong
_REFUSALS = (400, 413, 422)  # of this one request
_PASSING = (408, 409, 425, 429)  # worth another try, as is all from 500
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0  # of ours; a server may ask for longer ones
_PATIENCE_S = 600.0  # with one question, its retries and waits included; more where the timeouts alone come to more


def endpoint_name(url, model):
    """The judge's name in verdicts. The same model on another server is another judge. JudgeError: no usable URL."""
    _check_url(url)
    return f"{model} at {url.rstrip('/')}"


def local_name(model):
    """A local model's name in verdicts."""
    folder = Path(model).expanduser()
    return f"{readable_path(folder) if model != PACKAGED_MODEL and folder.is_dir() else model} (local)"


class Endpoint:
    """A model behind an OpenAI-compatible API. The key is read from OPENAI_API_KEY and stored nowhere.

    url: base URL, such as http://127.0.0.1:8000/v1. timeout_s: of a whole call. retries: after a timeout, a lost
    connection, an unreadable answer, 408, 409, 425, 429 or 5xx, with waits that double unless the server asks for
    longer ones. counts: {'retried ...': n} so far.
    JudgeError: the URL is malformed, holds a secret or would send one unencrypted, or the package httpx2 is missing.
    """

    def __init__(self, url, model, *, timeout_s=60.0, retries=5, sleep=None):
        self.name = endpoint_name(url, model)
        self._model, self._retries = model, retries
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._patience_s = max(_PATIENCE_S, timeout_s * (retries + 1))
        self._key = _key()
        if self._without_key(self.name) != self.name:
            raise JudgeError(
                f"the endpoint's URL or the model's name holds the key: it belongs into {KEY_VARIABLE} alone"
            )
        self.counts, self._refusals, self._lock = Counter(), 0, threading.Lock()
        # Parameter names differ between servers: a refusal switches to the other form.
        self._limit_name, self._settings = "max_tokens", {"temperature": 0}
        place = f"{url.rstrip('/')}/chat/completions"
        # No proxy for a server on this machine: it could read what http:// sends.
        self._poster = Poster(place, key=self._key, timeout_s=timeout_s, is_direct=urlsplit(url).scheme == "http")

    def ask(self, messages, *, max_tokens):
        """The Reply to chat messages. JudgeError: down after all retries, unauthorised, or no such model or API."""
        attempt, end = 0, time.monotonic() + self._patience_s
        while True:
            given = {self._limit_name: max_tokens, **self._settings}
            try:
                reply = self._ask_once({"model": self._model, "messages": messages, **given}, given)
            except CallFailed as failure:
                self._wait(failure, attempt, end)
                attempt += 1
            else:
                if reply is not None:
                    return reply

    def stop(self):
        """Stop waiting for retries: calls that wait end in a JudgeError."""
        self._stopped.set()

    def _ask_once(self, payload, given):
        """The Reply, or None where a parameter is to be given otherwise."""
        try:
            answer = self._poster.post(payload)
            if 200 <= answer.status < 300:
                reply = replies.read(answer)
                self._refusals = 0
                return dataclasses.replace(reply, text=self._without_key(reply.text))
        except Hopeless as error:
            raise JudgeError(f"{self.name} {error}") from None
        said = self._clean(replies.words(answer))
        self._give_up_if_hopeless(answer, said)
        if self._is_adapted(replies.wrong_parameter(answer), given):
            return None
        if answer.status in _REFUSALS:
            return self._refused(said)
        raise CallFailed(f"status {answer.status}", said, answer.retry_after_s)

    def _wait(self, failure, attempt, end):
        """Count a failure and wait before the next try. JudgeError: this was the last one."""
        what = f"{self.name} cannot be asked: {failure.kind} {attempt + 1} times ({self._clean(failure.said)})"
        if attempt >= self._retries:
            raise JudgeError(what) from None
        doubling = min(_FIRST_WAIT_S * 2**attempt * random.uniform(1.0, 1.25), _LONGEST_WAIT_S)
        wait_s = max(failure.retry_after_s or 0.0, doubling)
        if time.monotonic() + wait_s > end:
            raise JudgeError(f"{what}, and the next try would be in {wait_s:,.0f} s: run it again after that") from None
        with self._lock:
            self.counts[f"retried {failure.kind}"] += 1
        self._sleep(wait_s)
        if self._stopped.is_set():
            raise JudgeError(f"{what}, and no more tries are wanted") from None

    def _refused(self, said):
        with self._lock:
            self._refusals += 1
            if self._refusals >= _MOST_REFUSALS:
                raise JudgeError(f"{self.name} refused {self._refusals} requests in a row ({said})")
        return Reply(said, is_refused=True)

    def _give_up_if_hopeless(self, answer, said):
        status = answer.status
        if status in (401, 403):
            # What the server says is not shown: some repeat the key.
            state = f"the key in {KEY_VARIABLE} was refused" if self._key else f"{KEY_VARIABLE} is not set"
            raise JudgeError(f"{self.name} is unauthorised (status {status}): {state}")
        if status in (404, 405):
            raise JudgeError(
                f"{self.name} is not there (status {status}: {said}): check --model, and that --endpoint ends as the "
                "server's documentation says, mostly in /v1"
            )
        if 300 <= status < 400:
            place = self._clean(answer.headers.get("location", "nowhere"))
            raise JudgeError(
                f"{self.name} sends its callers to {place} (status {status}), where neither key nor texts were sent: "
                "give that server's URL as --endpoint if it is the right one"
            )
        if status not in _REFUSALS and status not in _PASSING and not 500 <= status < 600:
            raise JudgeError(f"{self.name} answers with status {status} ({said}), which no other try would change")

    def _is_adapted(self, wrong, given):
        """Switch to the other form of a parameter that a server refused; returns whether there is one."""
        if wrong not in ("max_tokens", "temperature") or wrong not in given:
            return False
        if wrong == "max_tokens":
            self._limit_name = "max_completion_tokens"
        else:
            self._settings = {}
        return True

    def _without_key(self, text):
        """A server's text without the key, which some repeat. A short key is a placeholder and left in."""
        if len(self._key) < _SHORTEST_SECRET:
            return text
        for form in {self._key, quote(self._key, safe=""), json.dumps(self._key)[1:-1]}:
            text = text.replace(form, "(key)")
        return text

    def _clean(self, text):
        """A server's text on one line for a terminal, without the key, shortened."""
        return visible(" ".join(self._without_key(text).split()))[:_LONGEST_SAID]  # cut last: no half of a key is left


class Local:
    """A local model by transformers, greedy. model: a folder, 'packaged' or a hub id. counts is always empty."""

    def __init__(self, model):
        self.name = local_name(model)
        self.counts = Counter()
        device = resolve_device("auto")
        with hub_errors(model):
            location, _ = locate(model)
            token = token_for(location)
            self._tokenizer = auto_tokenizer(location, token=token)
            dtype = evaluation_dtype(device)[0]
            loaded = causal_model(location, token=token, dtype=dtype, device_map={"": device})
        if not self._tokenizer.chat_template:
            raise JudgeError(f"{model} has no chat template: a judge must be a model that holds conversations")
        self._model = loaded.eval()

    def ask(self, messages, *, max_tokens):
        """The Reply to chat messages."""
        given = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        ids, mask = given["input_ids"], given["attention_mask"]
        stop = self._model.generation_config.eos_token_id
        pad = self._tokenizer.pad_token_id or 0
        reply = greedy(self._model, ids, mask, max_tokens, eos_token_id=stop, pad_token_id=pad)[0]
        return Reply(self._tokenizer.decode(reply, skip_special_tokens=True).strip(), ids.shape[1], len(reply))

    def stop(self):
        """Nothing to stop."""


def _key():
    """The key, or "". JudgeError: one that no header can carry."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise JudgeError(
            f"{KEY_VARIABLE} holds characters that no key has, such as spaces or quotation marks: set it again"
        )
    return key


def _check_url(url):
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # brackets or a port that are none
        parts = host = None
    is_plain = url.isprintable() and not set(url) & set(" \\")
    if host is None or not is_plain or parts.scheme not in ("http", "https"):
        raise JudgeError(
            "the endpoint is no URL that begins with http:// or https://, such as http://127.0.0.1:8000/v1"
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # The URL is kept beside each verdict, so nothing secret may stand in it.
        raise JudgeError(f"the endpoint's URL holds more than a place: put the key into {KEY_VARIABLE} instead")
    if parts.scheme == "http" and not _is_loopback(host):
        raise JudgeError(
            f"the endpoint {url} would send key and texts in the open: use https://, or for a server of your own a "
            f"tunnel (ssh -L 8000:127.0.0.1:{parts.port or 80} {host}) and http://127.0.0.1:8000"
        )


def _is_loopback(host):
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
