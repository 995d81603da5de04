"""Judge models: behind any OpenAI-compatible endpoint, or local with transformers.

Each has a name, counts ({'retried ...': n}), stop() and ask(messages, max_tokens=) -> http.Reply.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import random
import threading
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, urlsplit

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.env import resolve_device
from peftlib.core.errors import JudgeError
from peftlib.core.files import readable_path, visible
from peftlib.evaluation.evaluate import evaluation_dtype
from peftlib.evaluation.inference.engines import greedy
from peftlib.evaluation.judging.http import CallFailed, Hopeless, Poster, Reply
from peftlib.models.load import auto_tokenizer, causal_model
from peftlib.models.locate import hub_errors, locate, token_for

KEY_VARIABLE = "OPENAI_API_KEY"
_SHORTEST_SECRET = 8  # characters
_LONGEST_SAID = 200  # characters of a server's text in a message
_REFUSALS = (400, 413, 422)  # statuses that concern only this request
_MOST_REFUSALS = 3  # in a row; then the problem is not a single request
_PASSING = (408, 409, 425, 429)  # retried, like every status from 500
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0  # our own waits; a server may ask for longer ones
_PATIENCE_S = 600.0  # for one question with its retries and waits; longer if the timeouts alone exceed it


class Endpoint:
    """A model behind an OpenAI-compatible API. The key is read from OPENAI_API_KEY and stored nowhere.

    url: base URL, such as http://127.0.0.1:8000/v1. timeout_s: limit of a whole call. retries: how often a call is
    repeated after a timeout, a lost connection, an unreadable answer, status 408, 409, 425, 429 or 5xx; the waits
    double unless the server asks for longer ones. name: in verdicts; the same model at another URL is another judge.
    JudgeError: the URL is malformed, contains a secret or would send one unencrypted, or the package httpx2 is missing.
    """

    def __init__(self, url, model, *, timeout_s=60.0, retries=5, sleep=None):
        _check_url(url)
        self.name, self._model, self._retries = f"{model} at {url.rstrip('/')}", model, retries
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            faults = "characters that a key cannot contain, such as spaces or quotation marks"
            raise JudgeError(f"{KEY_VARIABLE} holds {faults}: set it again")
        if self._without_key(self.name) != self.name:
            raise JudgeError(f"the URL or the model's name contains the key: put it into {KEY_VARIABLE} instead")
        self.counts, self._refusals, self._lock = Counter(), 0, threading.Lock()
        self._not_taken = set()  # parameters that this server rejected: names differ between servers
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._patience_s = max(_PATIENCE_S, timeout_s * (retries + 1))
        self._poster = Poster(f"{url.rstrip('/')}/chat/completions", key=self._key, timeout_s=timeout_s)

    def ask(self, messages, *, max_tokens):
        """The Reply to chat messages. JudgeError: down after all retries, unauthorised, or no such model or API."""
        attempt, end = 0, time.monotonic() + self._patience_s
        while True:
            limit = "max_completion_tokens" if "max_tokens" in self._not_taken else "max_tokens"
            given = {limit: max_tokens} | ({} if "temperature" in self._not_taken else {"temperature": 0})
            try:
                answer = self._poster.post({"model": self._model, "messages": messages, **given})
                if 200 <= answer.status < 300:
                    reply, self._refusals = answer.reply(), 0
                    return dataclasses.replace(reply, text=self._without_key(reply.text))
                said = self._clean(answer.error_text())
                self._raise_if_hopeless(answer, said)
                if answer.blamed in ("max_tokens", "temperature") and answer.blamed in given:
                    self._not_taken.add(answer.blamed)
                elif answer.status in _REFUSALS:
                    return self._refused(said)
                else:
                    raise CallFailed(f"status {answer.status}", said, answer.retry_after_s)
            except Hopeless as error:
                raise JudgeError(f"{self.name} {error}") from None
            except CallFailed as failure:
                self._wait(failure, attempt, end)
                attempt += 1

    def stop(self):
        """Stop waiting for retries: waiting calls raise a JudgeError."""
        self._stopped.set()

    def _wait(self, failure, attempt, end):
        """Count a failure and wait before the retry. JudgeError: no retries are left."""
        tries = "1 try" if attempt == 0 else f"{attempt + 1} tries"
        what = f"{self.name} does not answer: {failure.kind} after {tries} ({self._clean(failure.said)})"
        if attempt >= self._retries:
            raise JudgeError(what) from None
        doubling = min(_FIRST_WAIT_S * 2**attempt * random.uniform(1.0, 1.25), _LONGEST_WAIT_S)
        wait_s = max(failure.retry_after_s or 0.0, doubling)
        if time.monotonic() + wait_s > end:
            raise JudgeError(f"{what}, and the next retry is due in {wait_s:,.0f} s: run it again then") from None
        with self._lock:
            self.counts[f"retried {failure.kind}"] += 1
        self._sleep(wait_s)
        if self._stopped.is_set():
            raise JudgeError(f"{what}, and retries were stopped") from None

    def _refused(self, said):
        with self._lock:
            self._refusals += 1
            if self._refusals >= _MOST_REFUSALS:
                raise JudgeError(f"{self.name} refused {self._refusals} requests in a row ({said})")
        return Reply(said, is_refused=True)

    def _raise_if_hopeless(self, answer, said):
        """Hopeless: a status that a retry would not change."""
        status = answer.status
        if status in (401, 403):  # the server's text is not shown: some servers repeat the key
            state = f"the key in {KEY_VARIABLE} was refused" if self._key else f"{KEY_VARIABLE} is not set"
            raise Hopeless(f"is unauthorised (status {status}): {state}")
        if status in (404, 405):
            ending = "--endpoint (see the server's documentation; it usually ends in /v1)"
            raise Hopeless(f"was not found (status {status}: {said}): check --model and {ending}")
        if 300 <= status < 400:
            place = self._clean(answer.headers.get("location", "nowhere"))
            way_out = "set --endpoint to that URL if it is the right one"
            raise Hopeless(f"redirects to {place} (status {status}), nothing was sent there: {way_out}")
        if status not in _REFUSALS and status not in _PASSING and not 500 <= status < 600:
            raise Hopeless(f"answers with status {status} ({said}), which a retry would not change")

    def _without_key(self, text):
        """A server's text without the key, which some servers repeat. A short key is a placeholder and is kept."""
        if len(self._key) >= _SHORTEST_SECRET:
            for form in {self._key, quote(self._key, safe=""), json.dumps(self._key)[1:-1]}:
                text = text.replace(form, "(key)")
        return text

    def _clean(self, text):
        """A server's text as one short line for a terminal, without the key."""
        return visible(" ".join(self._without_key(text).split()))[
            :_LONGEST_SAID
        ]  # truncate last, so that no part of a key remains


def _check_url(url):
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # invalid brackets or port
        parts = host = None
    is_plain = url.isprintable() and not set(url) & set(" \\")
    if host is None or not is_plain or parts.scheme not in ("http", "https"):
        raise JudgeError(
            "the endpoint must be a URL that starts with http:// or https://, such as http://127.0.0.1:8000/v1"
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # The URL is stored with each verdict, so it must not contain secrets.
        raise JudgeError(f"the endpoint's URL contains more than an address: put the key into {KEY_VARIABLE} instead")
    is_loopback = host == "localhost"
    with contextlib.suppress(ValueError):  # a host name
        is_loopback = ipaddress.ip_address(host).is_loopback
    if parts.scheme == "http" and not is_loopback:
        raise JudgeError(
            f"the endpoint {url} would send key and texts unencrypted: use https://, or for your own server "
            f"a tunnel (ssh -L 8000:127.0.0.1:{parts.port or 80} {host}) and http://127.0.0.1:8000"
        )


class Local:
    """A local model run with transformers and greedy decoding, loaded at the first question.

    model: a folder, 'packaged' or a hub id. ask raises ModelError or JudgeError if it cannot be loaded or has no chat
    template.
    """

    def __init__(self, model):
        folder = Path(model).expanduser()
        is_folder = model != PACKAGED_MODEL and folder.is_dir()
        self.name, self.counts = f"{readable_path(folder) if is_folder else model} (local)", {}
        self._named = model

    @cached_property
    def _loaded(self):
        """(model, tokenizer)."""
        device = resolve_device("auto")
        with hub_errors(self._named):
            location, _ = locate(self._named)
            token = token_for(location)
            tokenizer = auto_tokenizer(location, token=token)
            dtype = evaluation_dtype(device)[0]
            model = causal_model(location, token=token, dtype=dtype, device_map={"": device})
        if not tokenizer.chat_template:
            raise JudgeError(f"{self._named} has no chat template: a judge must be a chat model")
        return model.eval(), tokenizer

    def ask(self, messages, *, max_tokens):
        """The Reply to chat messages."""
        model, tokenizer = self._loaded
        how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        given = tokenizer.apply_chat_template(messages, **how).to(model.device)
        ids, pad = given["input_ids"], tokenizer.pad_token_id or 0
        stop = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": pad}
        reply = greedy(model, ids, given["attention_mask"], max_tokens, **stop)[0]
        return Reply(tokenizer.decode(reply, skip_special_tokens=True).strip(), ids.shape[1], len(reply))

    def stop(self):
        """Nothing to stop."""
