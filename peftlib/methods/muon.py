"""Muon: matrices are updated by orthogonalized momentum (Jordan et al. 2024), a control for full fine-tuning."""

from peftlib.methods.full import prepare
from peftlib.methods.galore import split_trained
from peftlib.methods.spec import MethodSpec
from peftlib.models.inspect import PROJECTIONS
from peftlib.optim.muon import MuonAdamW


def build_optimizer(model, cfg):
    """Muon for the projections; AdamW with the same rate, without weight decay, for the norms."""
    matrices, norms = split_trained(model, PROJECTIONS)
    return MuonAdamW(
        matrices, norms, lr=cfg.muon_learning_rate, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm
    )


SPEC = MethodSpec(
    name="muon",
    label="Muon",
    description="Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): everything except the tied "
    "embedding, the matrices by their orthogonalized momentum in steps of AdamW's size (arXiv:2502.16982), norms by "
    "AdamW",
    colors=("#7512f4", "#8c3cef"),
    marker="p",
    is_default=False,
    trains={"muon": PROJECTIONS},
    rates=("muon_learning_rate",),
    prepare=prepare,
    build_optimizer=build_optimizer,
)
