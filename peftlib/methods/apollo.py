"""APOLLO: SGD's memory, AdamW's steps (Zhu et al. 2024, arXiv:2412.05270)."""

from peftlib.methods.galore import train_projections_and_norms
from peftlib.methods.spec import MethodSpec
from peftlib.models.inspect import PROJECTIONS, named_weights, trainable
from peftlib.optim.apollo import ApolloAdamW


def prepare(model, cfg):
    """The model with projections and norms trained, in float32; the tied embedding stays frozen."""
    return train_projections_and_norms(model, "fp32")


def build_optimizer(model, cfg):
    """APOLLO for the projections, plain AdamW at the same rate for the norms."""
    projected = named_weights(model, PROJECTIONS)
    norms = [p for name, p in trainable(model).items() if name not in projected]
    group = {
        "params": list(projected.values()),
        "rank": cfg.apollo_rank,
        "update_gap": cfg.galore_update_interval,
        "scale": cfg.apollo_scale,
    }
    return ApolloAdamW(
        [group, {"params": norms, "weight_decay": 0.0}],
        lr=cfg.apollo_learning_rate,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        seed=cfg.seed,
    )


SPEC = MethodSpec(
    name="apollo",
    label="APOLLO",
    description="APOLLO (arXiv:2412.05270): everything but the tied embedding, gradients scaled by a random projection",
    colors=("#6b4a10", "#f0b050"),
    marker="P",
    four_bit=(),
    trains={"apollo": PROJECTIONS},
    rates=("apollo_learning_rate",),
    settings=("apollo_rank", "apollo_scale", "galore_update_interval"),
    prepare=prepare,
    build_optimizer=build_optimizer,
)
