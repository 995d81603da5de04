"""QLoRA: adapters on a frozen 4-bit model (Dettmers et al. 2023, arXiv:2305.14314)."""

from peftlib.core.errors import ConfigError
from peftlib.methods.spec import LORA_SETTINGS, MethodSpec, require_rank
from peftlib.models.adapters import with_adapter
from peftlib.models.inspect import PROJECTIONS, core, is_four_bit, is_named, named_weights, trainable
from peftlib.optim.adamw import AccumulatingAdamW
from peftlib.optim.adamw_8bit import adamw_8bit


def prepare(model, cfg):
    """The model with float32 LoRA adapters on all seven projections; everything else is frozen as loaded."""
    return with_adapters(model, cfg, PROJECTIONS)


def build_optimizer(model, cfg):
    """AdamW over the adapters, with moments in cfg.moment_bits."""
    make = adamw_8bit if cfg.moment_bits == 8 else AccumulatingAdamW
    return make(
        list(trainable(model).values()),
        lr=cfg.lora_learning_rate,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
    )


def with_adapters(model, cfg, targets, **changes):
    """A PeftModel with LoRA (Hu et al. 2021, arXiv:2106.09685) on `targets`: W x + alpha/r B A x, B initially zero.

    PEFT's options rsLoRA, DoRA and PiSSA come from the config. changes: fields of PEFT's LoraConfig that a method sets.
    ConfigError: lora_rank exceeds the shorter side of a target, or PiSSA on 4-bit weights. ModelError: no layer has
    one of the names.
    """
    from peft import LoraConfig

    named_weights(model, targets)
    layers = [layer for name, layer in core(model).named_modules() if is_named(name, targets)]
    require_rank("lora_rank", cfg.lora_rank, [(layer.out_features, layer.in_features) for layer in layers])
    if cfg.lora_init.startswith("pissa") and any(map(is_four_bit, model.parameters())):
        raise ConfigError(
            f"lora_init={cfg.lora_init!r} needs the singular values of 16-bit weights: use it with method lora, "
            "or lora_init='default'"
        )
    settings = {
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": cfg.lora_dropout,
        "target_modules": list(targets),
        "use_rslora": cfg.lora_use_rslora,
        "use_dora": cfg.lora_use_dora,
        "init_lora_weights": True if cfg.lora_init == "default" else cfg.lora_init,
        "task_type": "CAUSAL_LM",
    }
    return with_adapter(model, LoraConfig(**(settings | changes)), source="LoRA")


SPEC = MethodSpec(
    name="qlora",
    label="QLoRA",
    description="QLoRA (arXiv:2305.14314): LoRA adapters on the seven projections of each layer, the rest frozen, the "
    "projections in 4 bits (NF4, double quantization)",
    colors=("#0072b2", "#0072b2"),
    marker="o",
    trains={"adapters": PROJECTIONS},
    rates=("lora_learning_rate",),
    settings=LORA_SETTINGS,
    prepare=prepare,
    build_optimizer=build_optimizer,
    four_bit=PROJECTIONS,
)
