"""A peftlib model for lm-evaluation-harness: answers are saved as they come, and out-of-memory halves the batch."""

import contextlib
import functools
import gc
import hashlib
import io
import json
import math
import time

import lm_eval.utils
import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from peftlib.core.errors import DataError, ModelError, Stopped, StudyError
from peftlib.core.files import append_text, read_text
from peftlib.evaluation.inference.engines import generate_rows, resolve_engine

MAX_LENGTH = 2048  # tokens: the harness's default, and what fits the memory next to logits of 262,144 tokens
_CHUNK = {"loglikelihood_rolling": 4, "generate_until": 32}  # requests between writes
_MANY, _MANY_WRITTEN = 128, 1024  # for likelihoods; for generation on a GPU, which needs many rows to be busy
_LOG_SECONDS = 10.0


class Responses:
    """A model's responses to the harness's requests of one task, saved in a file, one per line.

    weights: identifies the model's weights. StudyError: the file has answers from other weights; it is not changed.
    """

    def __init__(self, path, weights):
        self.path, self.weights = path, weights
        self.kept, self.lines = {}, {}
        for line in read_text(path).split("\n") if path.exists() else ():
            try:
                row = json.loads(line)
                key, response = row["key"], row["response"]
            except (ValueError, KeyError, TypeError):
                continue  # truncated by a kill: will be asked again
            if row["weights"] != weights:
                raise StudyError(f"{path} holds answers from other weights: move it away and run again")
            self.kept[key] = tuple(response) if isinstance(response, list) else response
            self.lines[key] = row

    def add(self, found, **facts):
        """Append {key: response} immediately, after ending a line that a kill truncated."""
        rows = {key: {"key": key, "response": value, "weights": self.weights, **facts} for key, value in found.items()}
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
        is_cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        append_text(self.path, ("\n" if is_cut else "") + text)
        self.kept |= found
        self.lines |= rows

    def total(self, field):
        """Sum of a fact over the saved answers."""
        return sum(row[field] for row in self.lines.values())


class KeepingModel(HFLM):
    """HFLM that asks in fixed chunks of requests, so that a resumed run has the same batches, and so the same numbers,
    as an uninterrupted one."""

    def __init__(self, model, tokenizer, responses, *, batch, precision, deadline, log):
        head = model.get_output_embeddings().weight
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=MAX_LENGTH, softmax_dtype="float32"
        )
        model.get_output_embeddings().weight = head  # HFLM ties it to the embedding, even if it was trained separately
        self._responses, self._precision, self._deadline, self._told = responses, precision, deadline, log

    def loglikelihood(self, requests, disable_tqdm=True):
        return self._answered("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return self._answered("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests, disable_tqdm=True):
        is_greedy = not any(_settings(self, request)["do_sample"] for request in requests)
        is_ours = is_greedy and resolve_engine(self.model, "auto") == "slots"
        return self._answered("generate_until", self._greedily if is_ours else super().generate_until, requests)

    def _greedily(self, requests, disable_tqdm=True):
        """super().generate_until with our engine, about ten times as fast: a finished row makes room for the next.
        Stop strings truncate the text afterwards, as in HFLM."""
        eos, prompts, limits, stops = self.tok_decode(self.eot_token_id, skip_special_tokens=False), [], [], []
        for request in requests:
            settings = _settings(self, request)
            limits.append(settings["max_gen_toks"])
            stops.append(handle_stop_sequences(settings["until"], eos=eos))
            room = self.max_length - limits[-1]
            ids, _ = self.tok_batch_encode([request.args[0]], left_truncate_len=room, truncation=self.truncation)
            prompts.append(ids[0].tolist())
        made = dict(generate_rows(self.model, prompts, limits, log=self._told))
        texts = [self.tok_decode(made[number]) for number in range(len(prompts))]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def _loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=None):
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _answered(self, kind, ask, requests):
        keys = [_key(kind, request.args) for request in requests]
        by_key = dict(zip(keys, requests))
        unique, size = list(by_key), _CHUNK.get(kind, _MANY)
        if kind == "generate_until" and self.device.type != "cpu":
            size = _MANY_WRITTEN
        chunks = [unique[at : at + size] for at in range(0, len(unique), size)]
        kept = self._responses.kept
        to_ask = [chunk for chunk in chunks if any(key not in kept for key in chunk)]
        progress = _Progress(len(unique), sum(map(len, to_ask)), self._told)
        for chunk in to_ask:
            why = self._deadline.passed()
            if why:
                raise Stopped(f"{why}: {len(kept)} answers are kept; run again")
            started = time.monotonic()
            found = self._ask(ask, [by_key[key] for key in chunk])
            seconds = (time.monotonic() - started) / len(chunk)
            self._responses.add(dict(zip(chunk, map(_finite, found))), precision=self._precision, seconds=seconds)
            progress.count(len(chunk))
        return [kept[key] for key in keys]

    def _ask(self, ask, requests):
        while True:
            try:
                return ask(requests, disable_tqdm=True)
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                    raise
                if self.batch_size_per_gpu == 1:
                    raise ModelError(f"not even one row fits the memory ({error}): use a larger GPU") from None
            self.batch_size_per_gpu //= 2
            self._told(f"out of memory: continuing with {self.batch_size_per_gpu} rows at a time")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def score(lm, benchmark, *, limit=0):
    """[sample, ...] of the harness: a task's rows in order with their metrics. limit: number of rows, 0 for all.

    DataError: an answer that the task's parser cannot read.
    """
    task = benchmark.task
    task.set_fewshot_seed(seed=1234)  # the harness's default
    plain = task.process_results

    def named(doc, results):
        try:
            return plain(doc, results)
        except Exception as error:
            raise DataError(f"{task.task_name}: {error!r} while scoring the answer {results!r:.300}") from error

    task.process_results = named
    how = {"limit": limit or None, "bootstrap_iters": 0, "apply_chat_template": benchmark.is_generated}
    with _templates_once(), contextlib.redirect_stderr(io.StringIO()):  # hides its progress bars
        found = evaluator.evaluate(lm, {"tasks": {task.task_name: task}}, fewshot_as_multiturn=True, **how)
    rows = [row for row in found["samples"][task.task_name] if row["filter"] == benchmark.filter]
    return sorted(rows, key=lambda row: row["doc_id"])


@contextlib.contextmanager
def _templates_once():
    """Cache templates: the harness compiles one for every row, which takes longer than a small model's answer."""
    templates = lm_eval.utils.env
    templates.from_string = functools.lru_cache(maxsize=64)(templates.from_string)
    try:
        yield
    finally:
        del templates.from_string  # restore the class's method


def _settings(lm, request):
    return normalize_gen_kwargs(request.args[1], lm.max_gen_toks)


def _key(kind, args):
    return hashlib.sha256(json.dumps([kind, *args]).encode()).hexdigest()[:32]


def _finite(response):
    number = response[0] if isinstance(response, tuple) else response
    if isinstance(number, float) and not math.isfinite(number):
        raise ModelError(f"the model gives a text the log-likelihood {number}: its weights are broken")
    return response


class _Progress:
    """Logs requests answered and time left, every few seconds and at the end."""

    def __init__(self, n_requests, n_open, log):
        self.n_requests, self.n_open, self.log = n_requests, n_open, log
        self.done, self.started = 0, time.monotonic()
        self.logged = self.started

    def count(self, n):
        self.done += n
        now = time.monotonic()
        if now - self.logged < _LOG_SECONDS and self.done < self.n_open:
            return
        self.logged, left = now, int((now - self.started) / self.done * (self.n_open - self.done))
        answered = self.n_requests - self.n_open + self.done
        self.log(f"{answered}/{self.n_requests} requests  ETA {left // 60}:{left % 60:02d}")
