"""The change of full weight matrices as a LoRA adapter, by singular value decomposition of the difference."""

import json
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from peftlib import data
from peftlib.core.env import resolve_device
from peftlib.core.errors import ConfigError
from peftlib.methods.spec import require_rank
from peftlib.models.inspect import PROJECTIONS
from peftlib.models.load import load_base
from peftlib.models.saved import ADAPTER, ADAPTER_CONFIG, ATTENTION_FILE, facts_of, load_trained, tensors_of
from peftlib.train.batching import Rows, mean_loss

_WRAPPED = "base_model.model."  # prefix of PEFT's tensor names
_MORE, _ITERATIONS = 16, 4  # extra singular vectors and power iterations of torch.svd_lowrank


@dataclass(frozen=True)
class Kept:
    """layers: {weight: share of its change's energy (squared Frobenius norm) that the adapter keeps}. kept: of all
    changes together. outside: share in norms and embeddings, which a LoRA cannot hold. losses: see losses_of."""

    rank: int
    layers: dict
    kept: float
    outside: float
    losses: dict

    def lines(self):
        """Lines that an export prints and its card shows."""
        low, high = min(self.layers, key=self.layers.get), max(self.layers, key=self.layers.get)
        yield (
            f"rank {self.rank} keeps {self.kept:.1%} of the change's energy; per matrix "
            f"{self.layers[low]:.1%} ({low}) to {self.layers[high]:.1%} ({high})"
        )
        if self.outside:
            yield f"{self.outside:.2%} of it is in norms and embeddings, which a LoRA cannot hold: the base's are kept"
        split, n_rows, exact = (self.losses[name] for name in ("split", "rows", "exact"))
        own = self.losses["adapter"]
        gap = f"{own - exact:+.4f} nats per token"
        yield f"loss on the {n_rows} {split} rows: {exact:.4f} as trained, {own:.4f} with the adapter ({gap})"
        plain = self.losses["on_16_bit"]
        if plain is not None:
            yield f"on a base without NF4 rounding, as a server loads it: {plain:.4f} ({plain - exact:+.4f})"


def require_whole_weights(weights, method):
    """ConfigError: a trained folder has no full weights, or adapters that cannot become part of a LoRA."""
    if not facts_of(weights)["is_adapter"]:
        return
    if not (weights / ATTENTION_FILE).exists():
        raise ConfigError(f"form='lora': {method} has an adapter already: use form='adapter'")
    if _config(weights).get("use_dora"):
        raise ConfigError(
            "form='lora': a LoRA cannot hold DoRA's magnitudes: use form='merged', or train without lora_use_dora"
        )


def _config(weights):
    return json.loads((weights / ADAPTER_CONFIG).read_text(encoding="utf-8"))


def write_lora(weights, folder, rank):
    """Write a PEFT adapter of what differs between a trained folder and its base; returns (layers, kept, outside) as in
    Kept.

    A full-weight matrix becomes the leading `rank` singular vectors of its difference; existing adapters are kept
    unchanged. One lora_alpha for all and ranks by name (rank_pattern): PEFT, vLLM and llama.cpp agree on that scaling.
    ConfigError: the rank is larger than a matrix. ModelError: as load_trained.
    """
    from peft import LoraConfig

    facts = facts_of(weights)
    base = load_base(facts["model"], precision="fp32", device="cpu", runs=False)
    start = {name: p.detach() for name, p in base.named_parameters()}
    changes = {name: p.float() - start[name] for name, p in _trained_whole(weights, facts).items()}
    matrices = {name: change for name, change in changes.items() if name.split(".")[-2] in PROJECTIONS}
    require_rank("rank", rank, [change.shape for change in matrices.values()])
    energy = {name: float(change.square().sum()) for name, change in changes.items()}
    total = sum(energy.values())
    if not total:
        raise ConfigError("form='lora': training changed no full-weight matrix, so there is nothing to export")
    tensors, held = {}, {}
    for name, change in matrices.items():
        b, a, held[name] = _leading(change, rank)
        tensors |= _named(name.removesuffix(".weight"), a, b)
    patterns = {}
    if facts["is_adapter"]:
        adapter = _config(weights)
        own = adapter["r"]
        scale = adapter["lora_alpha"] / (own**0.5 if adapter["use_rslora"] else own) / (rank / own)
        for name, tensor in tensors_of(weights / ADAPTER).items():
            tensors[name] = tensor.float() * scale if "lora_B" in name else tensor.float()
        patterns = dict.fromkeys(adapter["target_modules"], own) if own != rank else {}
    leaves = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=patterns,
        target_modules=leaves,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.base_model_name_or_path = facts["model"]
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER, {"format": "pt"})
    layers = {name: held[name] / energy[name] if energy[name] else 1.0 for name in matrices}
    return layers, sum(held.values()) / total, sum(energy[name] for name in changes.keys() - matrices.keys()) / total


def _trained_whole(weights, facts):
    """{name in the base: tensor} of the weights that trained without an adapter."""
    if facts["is_adapter"]:
        return {name.removeprefix(_WRAPPED): t for name, t in tensors_of(weights / ATTENTION_FILE).items()}
    return dict(load_trained(weights, log=lambda line: None).named_parameters())


def _leading(change, rank):
    """(B, A, energy): the leading part of a float32 matrix as factors of equal size, and its squared Frobenius norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the random start, so that repeated exports are equal
        u, s, v = torch.svd_lowrank(change, q=min(rank + _MORE, *change.shape), niter=_ITERATIONS)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T, float(s[:rank].square().sum())


def _named(layer, a, b):
    return {f"{_WRAPPED}{layer}.lora_A.weight": a, f"{_WRAPPED}{layer}.lora_B.weight": b}


def losses_of(study, weights, adapter):
    """{'split', 'rows', 'exact', 'adapter', 'on_16_bit'}: losses in nats per token on the study's validation rows, or
    on its test rows if there are none.

    exact: of the trained folder. adapter: of the folder `adapter`, merged into the base as in training. on_16_bit:
    merged into the base without NF4 rounding; None if training did not round it.
    """
    split = "valid" if sum(study.manifest()["counts"]["valid"].values()) else "test"
    rows, device = Rows(data.load_split(study.data_dir, split)), resolve_device(study.cfg.device)

    def loss(folder, **how):
        model = load_trained(folder, device=device, log=lambda line: None, **how)
        return mean_loss(model, rows, device=device, precision="fp32")

    found = {"split": split, "rows": len(rows), "exact": loss(weights), "adapter": loss(adapter)}
    return {**found, "on_16_bit": loss(adapter, on_16_bit=True) if facts_of(weights)["four_bit"] else None}
