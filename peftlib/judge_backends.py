"""Who judges: any OpenAI-compatible endpoint, or a local model by transformers."""

import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from peftlib.config import PACKAGED_MODEL
from peftlib.errors import JudgeError
from peftlib.notebook import readable_path

KEY_VARIABLE = "OPENAI_API_KEY"
_MOST_REFUSALS = 3  # in a row: then it is not one request that is wrong
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0


@dataclass(frozen=True)
class Reply:
    """text: what the judge wrote. is_refused: the server would not take this request, and text says why."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    is_refused: bool = False


def endpoint_name(url, model):
    """What verdicts call a model behind an endpoint: another server of the same model is another judge."""
    _check_url(url)
    return f"{model} at {url.rstrip('/')}"


def local_name(model):
    """What verdicts call a local model."""
    folder = Path(model).expanduser()
    return f"{readable_path(folder) if model != PACKAGED_MODEL and folder.is_dir() else model} (local)"


class Endpoint:
    """A model behind an OpenAI-compatible API. The key comes from OPENAI_API_KEY alone and is kept nowhere else.

    url: base URL, such as http://127.0.0.1:8000/v1. timeout_s: of one call. retries: of a call that met a timeout, a
    lost connection, an unreadable answer, 408, 409, 429 or 5xx, with waits that double. counts: {'retried ...': n} so far.
    JudgeError: the URL is none or holds a secret, or the package openai is missing.
    """

    def __init__(self, url, model, *, timeout_s=60.0, retries=5, sleep=time.sleep):
        self.name = endpoint_name(url, model)
        self._model, self._retries, self._sleep = model, retries, sleep
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self.counts, self._refusals, self._lock = Counter(), 0, threading.Lock()
        # Names change between servers: the first refusal of one switches to the other form.
        self._limit_name, self._settings = "max_tokens", {"temperature": 0}
        openai = _openai()
        # Retries are ours, for they are counted. A local server needs no key, the client does.
        self._client = openai.OpenAI(base_url=url, api_key=self._key or "none", timeout=timeout_s, max_retries=0)

    def ask(self, messages, *, max_tokens):
        """The Reply to chat messages. JudgeError: down after all retries, unauthorised, or no such model or API."""
        openai, attempt = _openai(), 0
        while True:
            given = {self._limit_name: max_tokens, **self._settings}
            try:
                return self._ask_once(messages, given)
            except openai.APIError as error:
                self._give_up_if_hopeless(error)
                if self._is_adapted(error, given):
                    continue
                if isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
                    return self._refused(error)
                self._wait(error, attempt)
            except ValueError as error:  # what came is cut or no JSON
                self._wait(error, attempt)
            attempt += 1

    def _ask_once(self, messages, given):
        made = self._client.chat.completions.create(model=self._model, messages=messages, **given)
        if not hasattr(made, "choices"):
            raise JudgeError(f"{self.name} answers, but not as an OpenAI-compatible API does: most URLs end in /v1")
        self._refusals = 0
        if not made.choices:
            return Reply("")  # an answer without an answer: malformed, like any other
        usage = made.usage
        return Reply(
            made.choices[0].message.content or "",
            (usage.prompt_tokens or 0) if usage else 0,
            (usage.completion_tokens or 0) if usage else 0,
        )

    def _wait(self, error, attempt):
        """Count a failure and wait before the next try. JudgeError: this was the last one."""
        kind = _kind(error)
        if attempt >= self._retries:
            said = self._said(error)
            raise JudgeError(f"{self.name} cannot be asked: {kind} {attempt + 1} times ({said})") from None
        with self._lock:
            self.counts[f"retried {kind}"] += 1
        self._sleep(_wait_s(error, attempt))

    def _refused(self, error):
        with self._lock:
            self._refusals += 1
            if self._refusals >= _MOST_REFUSALS:
                raise JudgeError(f"{self.name} refused {self._refusals} requests in a row ({self._said(error)})")
        return Reply(self._said(error), is_refused=True)

    def _give_up_if_hopeless(self, error):
        openai = _openai()
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            # What the server says is not shown: some repeat the key.
            state = f"the key in {KEY_VARIABLE} was refused" if self._key else f"{KEY_VARIABLE} is not set"
            raise JudgeError(f"{self.name} is unauthorised (status {error.status_code}): {state}") from None
        if isinstance(error, openai.NotFoundError):
            raise JudgeError(
                f"{self.name} is not there (status 404: {self._said(error)}): check --model, and that --endpoint ends "
                "as the server's documentation says, mostly in /v1"
            ) from None

    def _is_adapted(self, error, given):
        """Whether a refusal named a parameter of `given` that can be given otherwise, as it is from now on."""
        wrong = getattr(error, "param", None)
        if wrong == "max_tokens" and wrong in given:
            self._limit_name = "max_completion_tokens"
            return True
        if wrong == "temperature" and wrong in given:
            self._settings = {}
            return True
        return False

    def _said(self, error):
        """The server's own words, shortened; the client's message leaves some of them out."""
        response = getattr(error, "response", None)
        text = response.text if response is not None else str(error)
        text = text.replace(self._key, "(key)") if self._key else text  # before the cut, which might leave half of it
        return " ".join(text.split())[:200]


class Local:
    """A local model by transformers, greedy. model: a folder, 'packaged' or a hub id. counts is always empty."""

    def __init__(self, model):
        from peftlib import safe_loading
        from peftlib.env import resolve_device
        from peftlib.evaluate import evaluation_dtype
        from peftlib.models import hub_errors, locate, token_for

        self.name = local_name(model)
        self.counts = Counter()
        device = resolve_device("auto")
        with hub_errors(model):
            location, _ = locate(model)
            token = token_for(location)
            self._tokenizer = safe_loading.tokenizer(location, token=token)
            dtype = evaluation_dtype(device)[0]
            loaded = safe_loading.causal_model(location, token=token, dtype=dtype, device_map={"": device})
        if not self._tokenizer.chat_template:
            raise JudgeError(f"{model} has no chat template: a judge must be a model that holds conversations")
        self._model = loaded.eval()

    def ask(self, messages, *, max_tokens):
        """The Reply to chat messages."""
        import torch

        given = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        n_given = given["input_ids"].shape[1]
        with torch.no_grad():
            made = self._model.generate(
                **given,
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                pad_token_id=self._tokenizer.pad_token_id or 0,
            )
        reply = made[0, n_given:]
        return Reply(self._tokenizer.decode(reply, skip_special_tokens=True).strip(), n_given, len(reply))


def _openai():
    try:
        import openai
    except ImportError:
        raise JudgeError("an endpoint needs the package openai: pip install 'peftlib[judge]', or use --local") from None
    return openai


def _check_url(url):
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JudgeError(
            "the endpoint is no URL that begins with http:// or https://, such as http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        # The URL is kept beside each verdict, so nothing secret may stand in it.
        raise JudgeError(f"the endpoint's URL holds more than a place: put the key into {KEY_VARIABLE} instead")


def _kind(error):
    """What went wrong, as a short name to count by."""
    openai = _openai()
    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    if isinstance(error, (ValueError, openai.APIResponseValidationError)):
        return "unreadable answer"
    return f"status {getattr(error, 'status_code', 'unknown')}"


def _wait_s(error, attempt):
    """Seconds to wait: what the server asks for, else doubling with a quarter of chance, never over a minute."""
    response = getattr(error, "response", None)
    try:
        asked = float(response.headers.get("retry-after")) if response is not None else 0.0
    except (TypeError, ValueError):
        asked = 0.0
    doubling = _FIRST_WAIT_S * 2**attempt * random.uniform(1.0, 1.25)
    return min(max(asked, doubling), _LONGEST_WAIT_S)
