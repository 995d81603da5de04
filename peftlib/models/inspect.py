"""Parts of a loaded model: its core, projections, trained weights, counts, and hidden states."""

from collections import Counter

import torch

from peftlib.core.errors import ModelError
from peftlib.core.limits import ATTENTION, MLP

PROJECTIONS = ATTENTION + MLP


def core(model):
    """The transformer without adapter wrapper; its `.model` returns hidden states and its `.lm_head` logits."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_weight(model):
    """(V, D) output embedding, tied to the input embedding in Gemma 3."""
    return core(model).get_output_embeddings().weight


def hidden_states(model, batch):
    """(B, T, D) last hidden states, after the final norm, of a batching.Batch.

    No padding mask: attention is causal, so a real token never sees the padding to its right. Rows packed into one
    sequence do not see each other and have positions from 0; a flat batch needs attention.use_kernel for that.
    """
    inner, packed = core(model).model, {}
    if batch.cu_seqlens is not None:
        packed = {
            "position_ids": batch.places,
            "attention_mask": {"full_attention": None, "sliding_attention": None},
            "cu_seqlens": batch.cu_seqlens,
        }
    elif batch.documents is not None:
        packed = {
            "position_ids": batch.places,
            "attention_mask": packed_masks(batch.documents, inner.config.sliding_window),
        }
    return inner(input_ids=batch.ids, use_cache=False, **packed).last_hidden_state


def packed_masks(documents, window):
    """{Gemma 3 layer type: (B, 1, T, T) bool}, True where a token attends to a token of its own document.

    documents: (B, T) ids. window: tokens, including itself, that a token of a sliding layer sees.
    """
    position = torch.arange(documents.shape[1], device=documents.device)
    back = position[:, None] - position
    seen = (documents[:, None, :, None] == documents[:, None, None, :]) & (back >= 0)
    return {"full_attention": seen, "sliding_attention": seen & (back < window)}


def trainable(model):
    """{name: parameter} of the trained parameters, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_named(name, projections):
    """Whether a module's path ends with one of them: "up_proj", or a single layer's "layers.3.mlp.up_proj"."""
    return any(f".{name}".endswith(f".{projection}") for projection in projections)


def in_layers(numbers):
    """The names, with layer, of all projections in these layers (numbers)."""
    groups = {"self_attn": ATTENTION, "mlp": MLP}
    return tuple(f"layers.{n}.{group}.{leaf}" for n in numbers for group in groups for leaf in groups[group])


def named_weights(model, projections):
    """{name: weight} of the plain layers with such a name (`is_named`). ModelError: there are none."""
    found = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if is_named(name, projections) and isinstance(module, torch.nn.Linear)
    }
    if not found:
        raise ModelError(f"no layer is named {', '.join(projections)}: this is not a Gemma-like model")
    return found


def has_dropout(model):
    """Whether a model's adapter has dropout, so that its forward pass draws random numbers."""
    configs = getattr(model, "peft_config", {}).values()
    return any(value for config in configs for name, value in vars(config).items() if "dropout" in name)


def is_four_bit(p):
    """Whether bitsandbytes stores a parameter in 4 bits."""
    return getattr(p, "quant_state", None) is not None


def count_parameters(model):
    """(trainable, total) numbers of weights; a 4-bit weight counts as the matrix it represents."""
    return sum(p.numel() for p in trainable(model).values()), sum(map(_numel, model.parameters()))


def _numel(p):
    return p.quant_state.shape.numel() if is_four_bit(p) else p.numel()


def layer_table(model):
    """[{layer, class, dtype, trains, count, weights}, ...]: how each kind of layer is stored."""
    count, weights = Counter(), Counter()
    for name, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            parts = [part for part in f"{name}.{leaf}".split(".") if not part.isdigit() and part != "default"]
            kind = ".".join(parts[-3:-1] if parts[-1] == "weight" else parts[-2:])
            dtype = "nf4" if is_four_bit(p) else str(p.dtype).removeprefix("torch.")
            key = (kind, type(module).__name__, dtype, p.requires_grad)
            count[key] += 1
            weights[key] += _numel(p)
    columns = ("layer", "class", "dtype", "trains")
    return [dict(zip(columns, key, strict=True)) | {"count": n, "weights": weights[key]} for key, n in count.items()]
