"""Trained models on disk: save them so that stock libraries can load them, and load them for evaluation and use."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peftlib.core.errors import ModelError
from peftlib.core.files import read_json, rename, sync_tree, write_json, write_text
from peftlib.models import identity
from peftlib.models.adapters import KINDS
from peftlib.models.chat_template import stop_at
from peftlib.models.inspect import core, trainable
from peftlib.models.kernels.adapters import fuse_adapters
from peftlib.models.layers import keep_residual_in_float32
from peftlib.models.load import (
    auto_tokenizer,
    causal_model,
    guard_four_bit,
    hide_log,
    load_base,
    peft_calls,
    readable,
    refuse_pickles,
)
from peftlib.models.precision import DTYPES, run_in_autocast

FACTS = "peftlib.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
ATTENTION_FILE = "attention.safetensors"  # weights trained in addition to the adapters, which PEFT would not save
_FACT_TYPES = {"is_adapter": bool, "model": str, "four_bit": list, "precision": str}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SETTINGS = (FACTS, ADAPTER_CONFIG, "config.json", "generation_config.json", *_TOKENIZER)
_AGAIN = "run the method's notebook again"


def save_trained(model, tokenizer, folder, facts):
    """Write `folder`, replacing an existing one only when the new one is complete; returns it.

    An adapter becomes a PEFT folder (PeftModel.from_pretrained), with additional trained weights in
    attention.safetensors; a fully trained model becomes a transformers folder in bf16, because fp16's range is too
    small for Gemma's residual. Each includes the tokenizer with chat template and stop ids.
    facts: JSON values stored in peftlib.json; needs 'model', 'four_bit', 'precision'.
    """
    folder = Path(folder)
    beside = _empty_beside(folder)
    is_adapter = hasattr(model, "peft_config")
    (_save_adapter if is_adapter else _save_full)(model, beside)
    tokenizer.save_pretrained(beside)
    stop_at(core(model)).generation_config.save_pretrained(beside)
    write_json(beside / FACTS, {**facts, "is_adapter": is_adapter})
    sync_tree(beside)  # checkpoints are deleted once these files exist
    shutil.rmtree(folder, ignore_errors=True)
    rename(beside, folder)
    return folder


def _empty_beside(folder):
    beside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def _save_adapter(model, folder):
    model.save_pretrained(folder)
    own = (model.base_model.prefix, "modules_to_save")  # name parts of what PEFT saves
    whole = {name: p for name, p in trainable(model).items() if not any(part in name for part in own)}
    if whole:
        save_file({name: p.detach().cpu().contiguous() for name, p in whole.items()}, folder / ATTENTION_FILE)


def _save_full(model, folder):
    state = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    # transformers writes the dtype of the model in memory, not of the tensors it was given
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")


def load_trained(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    merge: bool = True,
    on_16_bit: bool = False,
    dtype: torch.dtype = torch.float32,
    log: Callable[[str], object] = print,
) -> torch.nn.Module:
    """Load the trained model of a folder that save_trained wrote, in eval mode.

    merge=True: one plain model in `dtype`, with adapters merged into dequantized matrices. The 4-bit matrices are
    dequantized before any forward pass and never merged in place, which would quantize the result again. With fp16 only
    matrices have that dtype, and the model runs under autocast with its residual in float32, as in training.
    on_16_bit=True: merge into the base that was never rounded to 4 bits, as programs without NF4 support do.
    merge=False: the model as trained (4-bit, separate adapters), with the same logits as in training.
    log: called once with what could not be checked.
    ModelError: no such folder, its files do not match the run's record or cannot be read, or the base model that an
    adapter was trained on is unavailable or has changed.
    """
    folder = Path(folder)
    facts = facts_of(folder)
    identity.require_weights(folder, record_of(folder), log=log)
    if facts["is_adapter"]:
        _require_adapter(folder)
        identity.require_base(facts, facts["model"], what=f"the adapter in {folder}", log=log)
        based = {**facts, "four_bit": []} if on_16_bit and merge else facts
        model = _load_adapter(folder, based, device=device, merge=merge, dtype=dtype)
    else:
        first = torch.float32 if dtype == torch.float16 else dtype
        model = _in_dtype(causal_model(folder, dtype=first, device_map={"": device}), dtype, device)
    return model.eval().requires_grad_(False)


def _load_adapter(folder, facts, *, device, merge, dtype):
    four_bit = tuple(facts["four_bit"])
    base = load_base(facts["model"], precision=facts["precision"], device=device, four_bit=four_bit, runs=not merge)
    if merge:
        # float32 first: a bf16 matrix would round away most of the adapter's product
        base = (_dequantized(base) if four_bit else base).float()
    from peft import PeftModel  # after load_base, which silences what this import would print

    with peft_calls(), readable(folder):
        model = PeftModel.from_pretrained(base, folder)
    _require_adapter_fits(folder, model)
    if (folder / ATTENTION_FILE).exists():
        _put_whole_weights(model, folder / ATTENTION_FILE, device)
    if merge:
        return _in_dtype(stop_at(model.merge_and_unload()), dtype, device)
    guard_four_bit(model, four_bit)
    fuse_adapters(model)  # as in training: other kernels round differently
    run_in_autocast(stop_at(core(model)), device, facts["precision"])
    return model


def _put_whole_weights(model, path, device):
    parameters = dict(model.named_parameters())
    for name, tensor in tensors_of(path, device=device).items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ModelError(f"{path} has {name}, which does not fit this base model: use the one it was trained on")
        parameters[name].data = tensor


def _dequantized(base):
    hide_log("transformers.integrations.bitsandbytes", "The modules are dequantized in")  # as requested
    plain = base.dequantize(dtype=torch.float32)
    plain.is_loaded_in_4bit = False  # PEFT refuses to merge some types if this is True
    return plain


def _in_dtype(model, dtype, device):
    """The model in `dtype`; in fp16 its vectors stay in float32, and so does everything that fp16 cannot represent."""
    if dtype != torch.float16:
        return model.to(dtype)
    for p in model.parameters():
        if p.ndim > 1:
            p.data = p.data.half()
    keep_residual_in_float32(model)
    return run_in_autocast(model, device, "fp16")


def load_plain(model, *, device, dtype=torch.float32):
    """The untrained base model in eval mode, for comparison."""
    precision = next(name for name, found in DTYPES.items() if found == dtype)
    loaded = stop_at(load_base(model, precision=precision, device=device)).eval()
    return run_in_autocast(loaded, device, precision) if precision == "fp16" else loaded


def load_rounded(model, four_bit, *, precision, device, dtype=torch.float32):
    """The untrained base model in eval mode, with its `four_bit` matrices rounded to NF4 and back.

    This is where a method with 4-bit matrices starts from. precision: of training; they are rounded from it.
    """
    base = load_base(model, precision=precision, device=device, four_bit=four_bit, runs=False)
    return _in_dtype(stop_at(_dequantized(base).float()), dtype, device).eval().requires_grad_(False)


def export_merged(folder, out, *, dtype=torch.bfloat16, log=print):
    """Write the trained model in `folder` as a standalone 16-bit transformers folder; returns `out`.

    4-bit matrices are dequantized and adapters merged in float32, and only then the result is rounded to `dtype`.
    Includes tokenizer, chat template and stop ids. ModelError: `out` already exists; or as in load_trained.
    """
    out = Path(out)
    if out.exists():
        raise ModelError(f"{out} already exists: choose another folder")
    model = load_trained(folder, merge=True, dtype=torch.float32, log=log).to(dtype)
    beside = _empty_beside(out)
    model.save_pretrained(beside)
    auto_tokenizer(folder).save_pretrained(beside)
    os.replace(beside, out)
    return out


def facts_of(folder):
    """peftlib.json of a trained folder. ModelError: it is missing, or lacks required fields."""
    if not (folder / FACTS).exists():
        raise ModelError(f"no trained model in {folder}: run the method's notebook first")
    facts = read_json(folder / FACTS)
    wrong = [name for name, kind in _FACT_TYPES.items() if not isinstance(facts.get(name), kind)]
    if wrong:
        raise ModelError(f"{folder / FACTS} has no valid {', '.join(wrong)}: {_AGAIN}")
    return facts


def record_of(folder):
    """The record of a trained folder's run, from its export or from the study that contains it; else None."""
    exported, place = folder / "study" / "record.json", folder.absolute()
    if exported.is_file():
        # an export names its base model differently, so its settings files differ from the run's
        return {**read_json(exported), "settings_sha256": None}
    beside = place.parent.parent / "records" / f"{place.name}.json"
    return read_json(beside) if place.parent.name == "weights" and beside.is_file() else None


def settings_digests(folder):
    """{name: SHA-256} of the files that determine what a trained folder's weights compute, and of its tokenizer."""
    return {name: identity.known_sha256(folder / name) for name in _SETTINGS if (folder / name).is_file()}


def tensors_of(path, device="cpu"):
    """{name: tensor} of a safetensors file. ModelError: it is damaged."""
    with readable(path):
        return load_file(path, device=device)


def _require_adapter(folder):
    """ModelError unless a folder contains an adapter as saved by PEFT."""
    path = folder / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no {ADAPTER_CONFIG}: {_AGAIN}") from None
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}): {_AGAIN}") from None
    wrong = _wrong_field(found)
    if wrong:
        raise ModelError(f"{path} is not the config of an adapter that peftlib can train ({wrong}): {_AGAIN}")
    refuse_pickles(folder)
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"{folder} has no {ADAPTER}: {_AGAIN}")


def _wrong_field(found):
    """What is wrong with an adapter's config, as text, or None."""
    if not isinstance(found, dict):
        return f"a {type(found).__name__}"
    rank, alpha, is_lora = found.get("r"), found.get("lora_alpha"), found.get("peft_type") == "LORA"
    faults = {
        "it refers to code in auto_map": bool(found.get("auto_map")),
        f"peft_type={found.get('peft_type')!r}": found.get("peft_type") not in KINDS,
        f"r={rank!r}": is_lora and (type(rank) is not int or rank < 1),
        f"lora_alpha={alpha!r}": is_lora and type(alpha) not in (int, float),
    }
    return next((fault for fault, is_so in faults.items() if is_so), None)


def _require_adapter_fits(folder, model):
    """ModelError unless the adapter file contains exactly the tensors of the model's adapters, with their shapes.

    PEFT silently leaves an adapter with a missing tensor at its random initialisation.
    """
    from peft import get_peft_model_state_dict

    held = {name: tensor.shape for name, tensor in tensors_of(folder / ADAPTER).items()}
    has = {name: t.shape for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    for name in sorted(held.keys() | has.keys()):
        if held.get(name) != has.get(name):
            there, here = (tuple(shapes[name]) if name in shapes else "nothing" for shapes in (held, has))
            raise ModelError(
                f"{ADAPTER} in {folder} has {there} for {name}, the model has {here}: it was made with another base "
                "model or rank, or is damaged"
            )
