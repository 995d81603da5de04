"""Trained models on disk: saved so that stock libraries load them, and loaded for evaluation or further use."""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from peftlib.core.errors import ModelError
from peftlib.core.files import rename, sync_tree, write_json, write_text
from peftlib.models import identity, safe_loading, trained_files
from peftlib.models.base import core, guard_four_bit, keep_residual_in_float32, load_base, peft_calls, trainable
from peftlib.models.chat_template import STOP_IDS
from peftlib.models.layers import fuse_adapters
from peftlib.models.precision import run_in_autocast
from peftlib.models.trained_files import FACTS

ATTENTION = "attention.safetensors"  # what trains beside the adapters, which PEFT would not save


def save_trained(model, tokenizer, folder, facts):
    """Write `folder`, replacing it only when the new one is whole; returns it.

    An adapter becomes a PEFT folder (PeftModel.from_pretrained), with weights trained beside it in
    attention.safetensors; a fully trained model becomes a transformers folder in bf16, whose range holds Gemma's
    residual where fp16's does not. Tokenizer with chat template and stop ids come with each.
    facts: JSON values kept in peftlib.json; needs 'model', 'four_bit', 'precision'.
    """
    folder = Path(folder)
    beside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    is_adapter = hasattr(model, "peft_config")
    if is_adapter:
        _save_adapter(model, beside)
    else:
        _save_full(model, beside)
    tokenizer.save_pretrained(beside)
    stop_at(core(model)).generation_config.save_pretrained(beside)
    write_json(beside / FACTS, {**facts, "is_adapter": is_adapter})
    sync_tree(beside)  # checkpoints are deleted once these are there
    shutil.rmtree(folder, ignore_errors=True)
    rename(beside, folder)
    return folder


def _save_adapter(model, folder):
    model.save_pretrained(folder)
    whole = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items() if "lora_" not in name}
    if whole:
        save_file(whole, folder / ATTENTION)


def _save_full(model, folder):
    state = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    # transformers writes the dtype of the model in memory, not that of the tensors it was given
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n")


def stop_at(model):
    """The model, its generation config set to Gemma's stop ids and greedy decoding; returns it."""
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id = list(STOP_IDS), 2, 0
    settings.do_sample, settings.top_k, settings.top_p, settings.temperature = False, None, None, None
    return model


def load_trained(folder, *, device="cpu", merge=True, dtype=torch.float32, log=print):
    """The trained model of a folder that save_trained wrote, in eval mode.

    merge=True: one plain model in `dtype`, adapters merged into dequantized matrices. The 4-bit matrices are
    dequantized before any forward pass and never merged in place, which would quantize the result again. In fp16 only
    matrices are, and the model runs under autocast with its residual in float32, as in training.
    merge=False: the form that was trained (4-bit, adapters beside), with the logits it had in training.
    log: told once what could not be checked.
    ModelError: no such folder, its files are not those of the run's record or not readable, or the base model that an
    adapter was trained on is not to be had or another one now.
    """
    folder = Path(folder)
    facts = trained_files.facts_of(folder)
    identity.require_weights(folder, trained_files.record_of(folder), log=log)
    if not facts["is_adapter"]:
        first = torch.float32 if dtype == torch.float16 else dtype
        model = safe_loading.causal_model(folder, dtype=first, device_map={"": device})
        return _in_dtype(model, dtype, device).eval().requires_grad_(False)
    trained_files.require_adapter(folder)
    identity.require_base(facts, facts["model"], what=f"the adapter in {folder}", log=log)
    return _load_adapter(folder, facts, device=device, merge=merge, dtype=dtype)


def export_merged(folder, out, *, dtype=torch.bfloat16, log=print):
    """Write a trained model of `folder` as one standalone transformers folder in 16 bits; returns `out`.

    4-bit matrices are dequantized, adapters merged in float32, and only then is the result rounded to `dtype`.
    Tokenizer, chat template and stop ids come with it. ModelError: `out` is there already; or as in load_trained.
    """
    out = Path(out)
    if out.exists():
        raise ModelError(f"{out} is there already: choose another folder")
    model = load_trained(folder, merge=True, dtype=torch.float32, log=log).to(dtype)
    beside = out.with_name(f".writing-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    safe_loading.tokenizer(folder).save_pretrained(beside)
    os.replace(beside, out)
    return out


def _load_adapter(folder, facts, *, device, merge, dtype):
    four_bit = tuple(facts["four_bit"])
    base = load_base(facts["model"], precision=facts["precision"], device=device, four_bit=four_bit, runs=not merge)
    if merge:
        # float32 first: a bf16 matrix would round most of the adapter's product away
        base = (_dequantized(base) if four_bit else base).float()
    from peft import PeftModel  # after load_base, which quiets what this import would print

    with peft_calls(), safe_loading.readable(folder):
        model = PeftModel.from_pretrained(base, folder)
    trained_files.require_adapter_fits(folder, model)
    if (folder / ATTENTION).exists():
        _put_whole_weights(model, folder / ATTENTION, device)
    if merge:
        model = _in_dtype(stop_at(model.merge_and_unload()), dtype, device)
    else:
        guard_four_bit(model, four_bit)
        fuse_adapters(model)  # as in training: other kernels round otherwise
        run_in_autocast(stop_at(core(model)), device, facts["precision"])
    return model.eval().requires_grad_(False)


def _dequantized(base):
    transformers_log = logging.getLogger("transformers.integrations.bitsandbytes")
    transformers_log.addFilter(_is_worth_reading)
    return base.dequantize(dtype=torch.float32)


def _is_worth_reading(log_record):
    return not str(log_record.msg).startswith("The modules are dequantized in")  # as was asked for


def _in_dtype(model, dtype, device):
    """The model in `dtype`; in fp16 its vectors stay in float32, and with them what fp16 cannot hold."""
    if dtype != torch.float16:
        return model.to(dtype)
    for p in model.parameters():
        if p.ndim > 1:
            p.data = p.data.half()
    keep_residual_in_float32(model)
    return run_in_autocast(model, device, "fp16")


def _put_whole_weights(model, path, device):
    parameters = dict(model.named_parameters())
    for name, tensor in trained_files.tensors_of(path, device=device).items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ModelError(f"{path} holds {name}, which does not fit this base model: use the one it was made on")
        parameters[name].data = tensor


def load_plain(model, *, device, dtype=torch.float32):
    """The untrained base model in eval mode, for comparison."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    loaded = stop_at(load_base(model, precision=precision, device=device)).eval()
    return run_in_autocast(loaded, device, precision) if precision == "fp16" else loaded


def load_rounded(model, four_bit, *, precision, device, dtype=torch.float32):
    """The untrained base model in eval mode, its `four_bit` matrices rounded to NF4 and back.

    It is what a method that holds them so starts from. precision: of training, from which they are rounded.
    """
    base = load_base(model, precision=precision, device=device, four_bit=four_bit, runs=False)
    return _in_dtype(stop_at(_dequantized(base).float()), dtype, device).eval().requires_grad_(False)
