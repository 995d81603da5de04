"""GaLore: all projections train fully, with Adam's moments at rank r (Zhao et al. 2024, arXiv:2403.03507)."""

from peftlib.core.errors import ConfigError
from peftlib.methods.spec import GALORE_SETTINGS, MethodSpec, require_rank
from peftlib.models.inspect import PROJECTIONS, named_weights, trainable
from peftlib.models.kernels.projections import train_in_views
from peftlib.models.precision import DTYPES
from peftlib.optim.galore import GaLoreAdamW
from peftlib.optim.galore_original import galore_torch_adamw
from peftlib.optim.sharded import ShardedGaLoreAdamW


def prepare(model, cfg):
    """The model with trainable projections (in cfg.galore_weights) and norms (in float32), and a frozen embedding."""
    return train_projections_and_norms(model, cfg.galore_weights)


def train_projections_and_norms(model, dtype):
    """Make the seven projections trainable in `dtype`, and the norms in float32."""
    for name, p in model.named_parameters():
        if p.ndim == 1 and "norm" in name:
            p.requires_grad_(True)
    train_in(dtype, named_weights(model, PROJECTIONS))
    return model


def train_in(dtype, weights):
    """Make weights trainable in a dtype. The default is fp32, because 16 bits lose small updates; bf16 weights need
    half the memory, and the optimizer rounds them stochastically."""
    for p in weights.values():
        p.data = p.data.to(DTYPES[dtype])
        p.requires_grad_(True)


def split_trained(model, leaves):
    """(weights of the projections in `leaves`, all other trained weights), lists."""
    named = named_weights(model, leaves)
    return list(named.values()), [p for name, p in trainable(model).items() if name not in named]


def build_optimizer(model, cfg):
    """GaLore for the projections, and plain AdamW for the norms, with the effective rate of the projected weights."""
    projected, norms = split_trained(model, PROJECTIONS)
    plain = {"params": norms, "lr": cfg.galore_learning_rate * cfg.galore_scale, "weight_decay": 0.0}
    return galore_adamw(model, cfg, projected, plain)


def galore_adamw(model, cfg, projected, plain):
    """GaLoreAdamW over `projected` weights of a model, whose layers then compute only projected gradients, and one
    group of plain weights."""
    if cfg.galore_engine == "galore_torch":
        return _by_its_authors(cfg, projected, plain)
    make = ShardedGaLoreAdamW if cfg.shard_optimizer else GaLoreAdamW
    optimizer = make(
        [projected_group(projected, cfg, rank=cfg.galore_rank, scale=cfg.galore_scale), plain],
        lr=cfg.galore_learning_rate,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        on_refresh=cfg.galore_on_refresh,
        moment_bits=cfg.moment_bits,
        seed=cfg.seed,
    )
    optimizer.see_through(train_in_views(model, projected, cfg.galore_rank))
    return optimizer


def _by_its_authors(cfg, projected, plain):
    """galore_torch's optimizer. ConfigError: a setting that it does not support."""
    needed = {"moment_bits": 32, "galore_weights": "fp32", "galore_on_refresh": "keep", "shard_optimizer": False}
    for field, value in needed.items():
        if getattr(cfg, field) != value:
            raise ConfigError(
                f"{field}={getattr(cfg, field)!r} does not work with galore_engine='galore_torch': set {field} to "
                f"{value!r}, or galore_engine='peftlib'"
            )
    require_rank("galore_rank", cfg.galore_rank, [p.shape for p in projected])
    group = {"params": projected, "rank": cfg.galore_rank, "update_proj_gap": cfg.galore_update_interval}
    group |= {"scale": cfg.galore_scale, "proj_type": "std"}
    how = {"lr": cfg.galore_learning_rate, "weight_decay": cfg.weight_decay, "max_grad_norm": cfg.max_grad_norm}
    return galore_torch_adamw([group, plain], **how)


def by_engine(cfg):
    """The name in MethodSpec.trains for GaLore with cfg.galore_engine."""
    return "galore" if cfg.galore_engine == "peftlib" else cfg.galore_engine


def projected_group(weights, cfg, *, rank, scale):
    """The optimizer group of weights whose gradients are projected."""
    return {"params": weights, "rank": rank, "update_gap": cfg.galore_update_interval, "scale": scale}


SPEC = MethodSpec(
    name="galore",
    label="GaLore",
    description="GaLore (arXiv:2403.03507): the seven projections of each layer, Adam's moments in a low-rank view of "
    "each gradient; norms by AdamW, the tied embedding frozen",
    colors=("#d55e00", "#d55e00"),
    marker="s",
    trains={"galore": PROJECTIONS},
    rates=("galore_learning_rate",),
    settings=GALORE_SETTINGS,
    prepare=prepare,
    build_optimizer=build_optimizer,
    variants=("galore_engine",),
    by_config=lambda cfg, layers: {"trains": {by_engine(cfg): PROJECTIONS}},
)
