"""Full fine-tuning of everything except the embedding, by AdamW with 8-bit moments."""

from peftlib.methods.galore import split_trained, train_projections_and_norms
from peftlib.methods.spec import MethodSpec
from peftlib.models.inspect import PROJECTIONS
from peftlib.optim.adamw_8bit import adamw_8bit


def prepare(model, cfg):
    """The model with trainable projections and norms in float32; the tied embedding stays frozen."""
    return train_projections_and_norms(model, "fp32")


def build_optimizer(model, cfg):
    """8-bit AdamW over everything that trains; no weight decay for norms."""
    matrices, norms = split_trained(model, PROJECTIONS)
    return adamw_8bit(
        [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=cfg.full_learning_rate,
        max_grad_norm=cfg.max_grad_norm,
    )


SPEC = MethodSpec(
    name="full",
    label="full fine-tuning",
    description="full fine-tuning: everything except the tied embedding, by 8-bit AdamW",
    colors=("#c875a4", "#b968a0"),
    marker="v",
    trains={"full": PROJECTIONS},
    rates=("full_learning_rate",),
    prepare=prepare,
    build_optimizer=build_optimizer,
)
