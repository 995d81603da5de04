"""Forward passes of a stock Gemma 3 over cache slots: prefill without logits, then one token per row."""

import contextlib
import functools
import inspect
import types

import torch
import torch.nn.functional as F

from peftlib.models.inspect import core

_ATTENTION = "peftlib_slots"


@contextlib.contextmanager
def slot_forwards(model):
    """Temporarily let `model` use slot_attention and run each norm as one kernel."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, slot_attention)
    config = core(model).model.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    norms = [module for module in core(model).model.modules() if type(module).__name__ == "Gemma3RMSNorm"]
    for norm in norms:
        norm.scale = 1.0 + norm.weight.detach().float()
        norm.forward = types.MethodType(_norm, norm)
    try:
        yield
    finally:
        config._attn_implementation = before
        for norm in norms:
            del norm.forward, norm.scale


@contextlib.contextmanager
def running(model):
    """A context for forward passes of a model's parts: no gradients, and the autocast of the model's forward."""
    with torch.no_grad(), running_precision(model), _kernels(model):
        yield


def running_precision(model):
    """The autocast context that a model's own forward runs in, see precision.run_in_autocast."""
    return getattr(core(model), "running_precision", contextlib.nullcontext)()


def _kernels(model):
    """On a GPU, without cuDNN's attention, which would replan for each of our many shapes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if next(model.parameters()).device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _norm(self, x):
    return F.rms_norm(x.float(), self.scale.shape, self.scale, self.eps).type_as(x)


def slot_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """(B, T, H, D) attention output, None. query: (B, H, T, D); key, value: (B, H_kv, L, D).

    For T = 1 the query heads that share a key head become one head's T, so that keys are read once and never copied.
    Otherwise the prompt attends to itself, causally if no mask is given.
    """
    rows, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    if tokens == 1:
        query = query.reshape(rows, key.shape[1], shared, width)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(rows, 1, heads, width), None
    key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=scaling
    )
    return out.transpose(1, 2), None


def read_prompts(model, cache, ids, *, slots, lengths):
    """Fill cache slots with right-padded prompts, without logits. ids: (n, T); slots, lengths: (n,), all int64.

    No padding mask is needed: a token never attends to its right, and padding's cache entries are masked until they are
    overwritten.
    """
    inner = core(model).model
    place = torch.arange(ids.shape[1], device=ids.device)
    window = inner.config.sliding_window or len(place)
    band = None
    if len(place) > window:
        back = place[:, None] - place
        band = ((back >= 0) & (back < window))[None, None]
    inner(
        input_ids=ids,
        position_ids=place.expand_as(ids),
        attention_mask={"full_attention": None, "sliding_attention": band},
        use_cache=True,
        **{_cache_argument(type(inner)): cache.prompts(slots, lengths)},
    )


def next_tokens(model, cache, tokens, positions, *, seen):
    """(n,) most likely next token of the first n slots. tokens, positions: (n,), of the token that is read now."""
    inner = core(model).model
    hidden = inner(
        input_ids=tokens[:, None],
        position_ids=positions[:, None],
        attention_mask=cache.masks(positions, seen),
        use_cache=True,
        **{_cache_argument(type(inner)): cache.steps(positions, seen)},
    )
    # A logit soft cap, as in some Gemmas, does not change their order.
    logits = core(model).get_output_embeddings()(hidden.last_hidden_state[:, 0])
    return logits.max(-1).indices if logits.device.type == "cpu" else logits.argmax(-1)


@functools.cache
def _cache_argument(kind):
    """The name of the cache argument in a model class's forward, renamed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
