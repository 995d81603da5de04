"""Adapters other than plain LoRA, one table entry each. `peft_file` supports PEFT's other types."""

from functools import partial

import torch

from peftlib.core.errors import ConfigError
from peftlib.methods import qlora
from peftlib.methods.spec import LORA_SETTINGS, MethodSpec
from peftlib.models.adapters import with_adapter
from peftlib.models.inspect import PROJECTIONS, named_weights
from peftlib.optim.adamw import AccumulatingAdamW
from peftlib.optim.adamw_8bit import adamw_8bit


def _lora(**changes):
    """prepare() for LoRA on all projections with some fields of PEFT's LoraConfig set."""
    return partial(_prepare_lora, changes=changes)


def _prepare_lora(model, cfg, changes):
    return qlora.with_adapters(model, cfg, PROJECTIONS, **changes)


def _oft(model, cfg):
    from peft import OFTConfig

    size, widths = cfg.oft_block_size, {p.shape[1] for p in named_weights(model, PROJECTIONS).values()}
    if any(width % size for width in widths):
        fits = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
        nearest = min(fits, key=lambda n: abs(n - size))
        raise ConfigError(f"oft_block_size={size} does not divide all widths of the layers: use {nearest}")
    config = OFTConfig(oft_block_size=size, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    return with_adapter(model, config, source=f"oft_block_size={size}")


def _with_frozen_a(model, cfg):
    adapted = qlora.prepare(model, cfg)
    for name, p in adapted.named_parameters():
        if ".lora_A." in name:
            p.requires_grad_(False)
    return adapted


def _two_rates(model, cfg):
    """AdamW with the groups of PEFT's create_loraplus_optimizer: B's rate is cfg.loraplus_lr_ratio times A's."""
    from peft.optimizers import create_loraplus_optimizer

    def make(groups, **settings):
        build = adamw_8bit if cfg.moment_bits == 8 else AccumulatingAdamW
        return build([group for group in groups if group["params"]], max_grad_norm=cfg.max_grad_norm, **settings)

    rates = {"lr": cfg.lora_learning_rate, "loraplus_lr_ratio": cfg.loraplus_lr_ratio}
    return create_loraplus_optimizer(model, make, **rates, loraplus_weight_decay=cfg.weight_decay)


def _projected_b(model, cfg):
    """AdamW over B only, with LoRA-FA's gradient, the closest to the full matrix's. It is a linear map, so a hook
    applies it to each micro-batch's gradient."""
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            a, scale = layer.lora_A["default"].weight, layer.scaling["default"]
            product = a @ a.T + 1e-8 * torch.eye(len(a), device=a.device)  # as in PEFT's LoraFAOptimizer
            inverse = torch.linalg.pinv(product) / scale**2
            layer.lora_B["default"].weight.register_hook(partial(torch.matmul, other=inverse))
    return qlora.build_optimizer(model, cfg)


def _but(*names):
    return tuple(name for name in LORA_SETTINGS if name not in names)


_PLACE = "on the seven projections of each layer, the rest frozen in 16 bits"
# name, label, description, colours for light and dark backgrounds, marker, MethodSpec fields that differ from LoRA's
_TABLE: tuple[tuple[str, str, str, tuple[str, str], str, dict], ...] = (
    (
        "dora",
        "DoRA",
        f"DoRA (arXiv:2402.09353): LoRA adapters that train each row's magnitude and direction separately, {_PLACE}",
        ("#4a02a2", "#a4cbe6"),
        "<",
        {"prepare": _lora(use_dora=True), "settings": _but("lora_use_dora")},
    ),
    (
        "rslora",
        "rsLoRA",
        f"rsLoRA (arXiv:2312.03732): LoRA adapters scaled by alpha / sqrt(rank), {_PLACE}",
        ("#987e48", "#e7d011"),
        ">",
        {"prepare": _lora(use_rslora=True), "settings": _but("lora_use_rslora")},
    ),
    (
        "pissa",
        "PiSSA",
        f"PiSSA (arXiv:2404.02948): LoRA adapters initialised with the weights' top singular components, {_PLACE}",
        ("#0e370b", "#a0f789"),
        "*",
        {"prepare": _lora(init_lora_weights="pissa"), "settings": _but("lora_init")},
    ),
    (
        "lora_plus",
        "LoRA+",
        f"LoRA+ (arXiv:2402.12354): LoRA adapters whose B has a multiple of A's learning rate, {_PLACE}",
        ("#f214c7", "#fc146a"),
        "h",
        {"build_optimizer": _two_rates, "settings": (*LORA_SETTINGS, "loraplus_lr_ratio")},
    ),
    (
        "lora_fa",
        "LoRA-FA",
        f"LoRA-FA (arXiv:2308.03303): LoRA adapters whose A is frozen at its random initialisation, {_PLACE}",
        ("#050247", "#76fcb2"),
        "d",
        {"prepare": _with_frozen_a, "build_optimizer": _projected_b, "settings": _but("lora_use_dora", "lora_init")},
    ),
    (
        "oft",
        "OFT",
        f"OFT (arXiv:2306.07280): block-wise rotations of each layer's inputs, {_PLACE}",
        ("#ed30f2", "#4d7437"),
        "H",
        {"prepare": _oft, "settings": ("oft_block_size",)},
    ),
    (
        "qdora",
        "QDoRA",
        "QDoRA: DoRA adapters (arXiv:2402.09353) on the seven projections of each layer, which are frozen in 4 bits "
        "(NF4, double quantization, arXiv:2305.14314)",
        ("#51104d", "#e00133"),
        "8",
        {"prepare": _lora(use_dora=True), "settings": _but("lora_use_dora"), "four_bit": PROJECTIONS},
    ),
)
_AS_LORA = {
    "trains": {"adapters": PROJECTIONS},
    "rates": ("lora_learning_rate",),
    "prepare": qlora.prepare,
    "build_optimizer": qlora.build_optimizer,
    "is_default": False,
    "is_counted": True,
}
SPECS = tuple(
    MethodSpec(name=name, label=label, description=words, colors=colors, marker=marker, **(_AS_LORA | own))
    for name, label, words, colors, marker, own in _TABLE
)
