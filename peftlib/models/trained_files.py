"""A trained folder's files before anything is made of them: its facts, its adapter, and the record they belong to."""

import json
from pathlib import Path

from safetensors.torch import load_file

from peftlib.core.errors import ModelError
from peftlib.core.files import read_json
from peftlib.models.identity import known_sha256
from peftlib.models.safe_loading import readable, refuse_pickles

FACTS = "peftlib.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_KINDS = {"is_adapter": bool, "model": str, "four_bit": list, "precision": str}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SETTINGS = (FACTS, ADAPTER_CONFIG, "config.json", "generation_config.json", *_TOKENIZER)


def settings_digests(folder):
    """{name: SHA-256} of the files that decide what a trained folder's weights compute, and of its tokenizer."""
    return {name: known_sha256(folder / name) for name in _SETTINGS if (folder / name).is_file()}


def facts_of(folder):
    """peftlib.json of a trained folder. ModelError: there is none, or it lacks what a trained model needs."""
    if not (folder / FACTS).exists():
        raise ModelError(f"no trained model in {folder}: run the method's notebook first")
    facts = read_json(folder / FACTS)
    wrong = [name for name, kind in _KINDS.items() if not isinstance(facts.get(name), kind)]
    if wrong:
        raise ModelError(f"{folder / FACTS} has no valid {', '.join(wrong)}: run the method's notebook again")
    return facts


def record_of(folder):
    """The record of the run that a trained folder belongs to: beside it in its study, or within an export; else None."""
    study = folder.absolute().parent.parent
    beside = (
        study / "records" / f"{folder.absolute().name}.json" if folder.absolute().parent.name == "weights" else None
    )
    for path in (folder / "study" / "record.json", beside):
        if path is not None and path.is_file():
            record = read_json(path)
            # an export names its base model otherwise, so its settings are not the run's, byte for byte
            return record if path == beside else {**record, "settings_sha256": None}
    return None


def require_adapter(folder):
    """ModelError unless a folder holds a LoRA adapter as PEFT saves it."""
    path = folder / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no {ADAPTER_CONFIG}: run the method's notebook again") from None
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}): run the method's notebook again") from None
    wrong = _wrong_field(found)
    if wrong:
        raise ModelError(f"{path} is no config of a LoRA adapter ({wrong}): run the method's notebook again")
    refuse_pickles(folder)
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"{folder} has no {ADAPTER}: run the method's notebook again")


def _wrong_field(found):
    """What of an adapter's config is not as it should be, in words, or None."""
    if not isinstance(found, dict):
        return f"a {type(found).__name__}"
    if found.get("auto_map"):
        return "it names code in auto_map"
    if found.get("peft_type") != "LORA":
        return f"peft_type={found.get('peft_type')!r}"
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        return f"r={rank!r}"
    if type(alpha) not in (int, float):
        return f"lora_alpha={alpha!r}"
    return None


def tensors_of(path, device="cpu"):
    """{name: tensor} of a safetensors file. ModelError: it is damaged."""
    with readable(path):
        return load_file(path, device=device)


def require_adapter_fits(folder, model):
    """ModelError unless the adapter's file holds exactly the tensors that the model's adapters have, in their shapes.

    PEFT leaves an adapter whose tensor is missing as it was drawn.
    """
    held = {name: tensor.shape for name, tensor in tensors_of(Path(folder) / ADAPTER).items()}
    has = {name.replace(".default", ""): p.shape for name, p in model.named_parameters() if "lora_" in name}
    unlike = sorted(name for name in held.keys() | has.keys() if held.get(name) != has.get(name))
    if unlike:
        name = unlike[0]
        shown = [tuple(shapes[name]) if name in shapes else "nothing" for shapes in (held, has)]
        raise ModelError(
            f"{ADAPTER} in {folder} holds {shown[0]} for {name}, the model {shown[1]}: it was made with another base model "
            "or rank, or is damaged"
        )
