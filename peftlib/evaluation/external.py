"""Models that were trained elsewhere, checked and loaded for evaluation: PEFT adapters and whole transformers
folders."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from peftlib import data
from peftlib import methods as registry
from peftlib.core.errors import ConfigError, ModelError
from peftlib.core.limits import require_folder_name
from peftlib.evaluation.results import BASE_CUT
from peftlib.models import identity, saved
from peftlib.models.chat_template import stop_at
from peftlib.models.load import auto_tokenizer, peft_calls, readable, refuse_pickles
from peftlib.models.locate import locate
from peftlib.models.saved import ADAPTER, ADAPTER_CONFIG, FACTS, facts_of, tensors_of

_MODEL_CONFIG = "config.json"
# PEFT's files do not record the base's precision during training.
_UNQUANTIZED = "the unquantized base (an adapter that was trained on a 4-bit base may score otherwise there)"
_ROUNDED = "the base with its 4-bit matrices dequantized, as it was trained"


@dataclass(frozen=True)
class External:
    """A checked folder. name: of its row in the report. base: the study's model, a config's `model`. scored_on: what an
    adapter is merged into, as text; '' for a whole model. files: {name: SHA-256} of its weights."""

    folder: Path
    name: str
    base: str
    scored_on: str
    files: dict
    log: object

    def record_fields(self):
        """The record's fields about the model, besides the scores."""
        kind = "adapter" if self.scored_on else "model"
        fields = {"folder": self.folder.name, "kind": kind, "files": self.files, "scored_on": self.scored_on}
        if self.scored_on:
            where = {
                "model_provenance": f"{locate(self.base)[1]}, with the adapter {self.folder.name} trained elsewhere"
            }
        else:
            where = {"model": self.folder.name, "model_provenance": "a local folder, trained elsewhere"}
            where |= {"model_sha256": None, "model_revision": None}
        return {"trained_elsewhere": fields, **where}

    def load(self, *, device, dtype):
        """One plain merged model in eval mode. ModelError: damaged, or unfit for the study's model or tokenizer."""
        if (self.folder / FACTS).is_file():
            return saved.load_trained(self.folder, device=device, dtype=dtype, log=self.log)
        if self.scored_on:
            return _merged(self.folder, self.base, device=device, dtype=dtype)
        model = saved.load_plain(str(self.folder), device=device, dtype=dtype)
        n_tokens = len(data.load_tokenizer(self.base))
        if model.get_input_embeddings().num_embeddings < n_tokens:
            raise ModelError(f"{self.folder} has no embeddings for all {n_tokens} tokens of the study's tokenizer")
        return model


def open_folder(folder, base, *, name="", log=print):
    """The External in a folder, for a config's model `base`, without loading it. Errors as in
    evaluate.evaluate_path."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the folder of a PEFT adapter or a transformers model")
    folder, scored_on = folder.resolve(), ""
    name = name or folder.name
    require_folder_name("name", name)
    if registry.known(name) or name in (registry.BASE, BASE_CUT) or "-vs-" in name:
        raise ConfigError(f"name={name!r} is reserved: choose another name for the model in {folder}")
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / _MODEL_CONFIG).is_file():
        raise ConfigError(f"{folder} has neither {ADAPTER_CONFIG} nor {_MODEL_CONFIG}: it is no adapter or model")
    refuse_pickles(folder)
    if is_adapter and (folder / FACTS).is_file():
        facts = facts_of(folder)
        _require_same_base(folder, facts["model"], base)
        scored_on = _ROUNDED if facts["four_bit"] else "the unquantized base, as it was trained"
    elif is_adapter:
        _check_adapter(folder, base)
        scored_on = _UNQUANTIZED
    else:
        _require_same_tokenizer(folder, base)
    files = {path.name: identity.known_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    if not files:
        raise ModelError(f"{folder} has no safetensors files, so there are no weights to evaluate")
    return External(folder, name, base, scored_on, files, log)


def _check_adapter(folder, base):
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        named, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({error})") from None
    if config.get("auto_map"):
        raise ModelError(f"{path} names code in auto_map, which peftlib never runs: remove it")
    if not (isinstance(kind, str) and isinstance(named, str) and named):
        raise ModelError(f"{path} lacks peft_type or base_model_name_or_path, which peftlib needs to find its base")
    if not (folder / ADAPTER).is_file():
        raise ModelError(f"{folder} has no {ADAPTER}")
    _require_same_base(folder, named, base)


def _require_same_base(folder, named, base):
    """ModelError unless an adapter's base model `named` has the same name or weights as the study's."""
    here = locate(base)[0]
    if named in (base, here):
        return
    is_here = Path(named).expanduser().is_dir()
    if is_here and identity.base_facts(named)["model_sha256"] == identity.base_facts(base)["model_sha256"]:
        return
    raise ModelError(
        f"the adapter in {folder} was trained on {named}, this study's model is {base}: evaluate it in a study of that "
        f"model; if the weights are the same, set base_model_name_or_path in {ADAPTER_CONFIG} to {here}"
    )


def _require_same_tokenizer(folder, base):
    if not (folder / "tokenizer.json").is_file():
        return  # as written by model.save_pretrained; load() checks the number of embeddings
    if auto_tokenizer(folder).get_vocab() != data.load_tokenizer(base).get_vocab():
        raise ModelError(f"{folder} uses another tokenizer than {base}, so it cannot read the study's rows")


def _merged(folder, base, *, device, dtype):
    """The base model with a PEFT adapter merged into it in float32, then converted to `dtype` as in load_plain."""
    from peft import PeftModel, get_peft_model_state_dict

    plain = saved.load_plain(base, device=device, dtype=torch.float32)
    with peft_calls(), readable(folder):
        model = PeftModel.from_pretrained(plain, folder)
        kept = get_peft_model_state_dict(model, save_embedding_layers=False)
    if not hasattr(model, "merge_and_unload"):
        kind = model.peft_config["default"].peft_type
        raise ModelError(f"{folder} holds a {kind} adapter, which cannot be merged into the model's weights")
    unlike = {name for name in kept.keys() ^ tensors_of(folder / ADAPTER).keys() if "embed_tokens" not in name}
    if unlike:  # PEFT would leave a missing tensor at its random initialization
        raise ModelError(f"{ADAPTER} in {folder} does not fit {base}: {min(unlike)} is in only one of them")
    merged = model.merge_and_unload()
    if dtype != torch.float32:
        rounded = saved.load_plain(base, device=device, dtype=dtype)
        head = rounded.get_output_embeddings()
        if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())  # trained separately from the embedding
        rounded.load_state_dict(merged.state_dict())
        merged = rounded
    return stop_at(merged).eval().requires_grad_(False)
