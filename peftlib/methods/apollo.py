"""APOLLO: SGD's memory, AdamW's steps (Zhu et al. 2024, arXiv:2412.05270)."""

from peftlib.methods.full import prepare
from peftlib.methods.galore import projected_group, split_trained
from peftlib.methods.spec import MethodSpec
from peftlib.models.inspect import PROJECTIONS
from peftlib.optim.apollo import ApolloAdamW


def build_optimizer(model, cfg):
    """APOLLO for the projections, plain AdamW with the same rate for the norms."""
    projected, norms = split_trained(model, PROJECTIONS)
    return ApolloAdamW(
        [
            projected_group(projected, cfg, rank=cfg.apollo_rank, scale=cfg.apollo_scale),
            {"params": norms, "weight_decay": 0.0},
        ],
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
    trains={"apollo": PROJECTIONS},
    rates=("apollo_learning_rate",),
    settings=("apollo_rank", "apollo_scale", "galore_update_interval"),
    prepare=prepare,
    build_optimizer=build_optimizer,
)
