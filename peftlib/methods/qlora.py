"""QLoRA: adapters on a frozen 4-bit model (Dettmers et al. 2023, arXiv:2305.14314)."""

from peftlib.errors import ConfigError
from peftlib.models import PROJECTIONS, core, peft_calls, trainable
from peftlib.optim.adamw import AccumulatingAdamW

FOUR_BIT = PROJECTIONS


def prepare(model, cfg):
    """The model with float32 LoRA adapters on all seven projections; everything else frozen."""
    return with_adapters(model, cfg, PROJECTIONS)


def build_optimizer(model, cfg):
    """AdamW over the adapters."""
    return AccumulatingAdamW(
        list(trainable(model).values()),
        lr=cfg.lora_learning_rate,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
    )


def with_adapters(model, cfg, targets):
    """A PeftModel with LoRA (Hu et al. 2021, arXiv:2106.09685) on `targets`: W x + alpha/r B A x, B zero at first.

    ConfigError: lora_rank above the shorter side of a target.
    """
    from peft import LoraConfig, get_peft_model

    shortest = min(
        min(module.in_features, module.out_features)
        for name, module in core(model).named_modules()
        if name.rsplit(".", 1)[-1] in targets
    )
    if cfg.lora_rank > shortest:
        raise ConfigError(f"lora_rank={cfg.lora_rank} is larger than a layer: use 1..{shortest}")
    adapters = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    with peft_calls():
        return get_peft_model(model, adapters)
