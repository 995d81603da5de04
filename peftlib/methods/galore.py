"""GaLore: all projections train in full, Adam's moments in a rank-r view (Zhao et al. 2024, arXiv:2403.03507)."""

from peftlib.models import PROJECTIONS, named_weights, trainable
from peftlib.optim.galore import GaLoreAdamW

FOUR_BIT = ()


def prepare(model, cfg):
    """The model with projections and norms trained, in float32; the tied embedding stays frozen."""
    for name, p in model.named_parameters():
        if p.ndim == 1 and "norm" in name:
            p.requires_grad_(True)
    train_in_float32(named_weights(model, PROJECTIONS))
    return model


def build_optimizer(model, cfg):
    """GaLore for the projections. Norms get plain AdamW at the rate that the projected weights effectively have."""
    projected = named_weights(model, PROJECTIONS)
    norms = [p for name, p in trainable(model).items() if name not in projected]
    plain = {"params": norms, "lr": cfg.galore_learning_rate * cfg.galore_scale, "weight_decay": 0.0}
    return optimizer(cfg, projected.values(), plain)


def optimizer(cfg, projected, plain):
    """GaLoreAdamW over `projected` weights and one group of plain ones."""
    group = {
        "params": list(projected),
        "rank": cfg.galore_rank,
        "update_gap": cfg.galore_update_gap,
        "scale": cfg.galore_scale,
    }
    return GaLoreAdamW(
        [group, plain],
        lr=cfg.galore_learning_rate,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
    )


def train_in_float32(weights):
    """Switch training on; float32 because bf16 and fp16 round small updates away."""
    for p in weights.values():
        p.data = p.data.float()
        p.requires_grad_(True)
