"""Checks of methods on a notebook's own run: the hybrid's split and its alternatives, and GaLore's engines."""

import torch

from peftlib.data.store import load_split
from peftlib.models.inspect import PROJECTIONS, core, is_four_bit, named_weights
from peftlib.models.kernels.losses import batch_loss_sum
from peftlib.models.precision import autocast
from peftlib.notebook import demos
from peftlib.train import memory_model
from peftlib.train.batching import Rows


def placement(run):
    """[{projection, by GaLore, 4-bit with LoRA, chosen}, ...] of a hybrid TrainingRun.

    The values count layers: those where the full weight trains, those where it is frozen in NF4 with an adapter,
    and those that hybrid_galore assigns to GaLore."""
    whole = [name for kind, names in run.method.trains.items() if kind != "adapters" for name in names]
    parameters, layers = dict(run.model.named_parameters()), core(run.model).config.num_hidden_layers
    rows = []
    for leaf in PROJECTIONS:
        plain = [p for name, p in parameters.items() if name.endswith(f".{leaf}.weight")]
        bases = [name for name, p in parameters.items() if f".{leaf}.base_layer." in name and is_four_bit(p)]
        adapters = [parameters[base.replace("base_layer", "lora_B.default")] for base in bases]
        rows.append(
            {
                "projection": leaf,
                "by GaLore": sum(p.requires_grad and not is_four_bit(p) for p in plain),
                "4-bit with LoRA": sum(p.requires_grad for p in adapters),
                "chosen": sum(layers if name == leaf else name.endswith(f".{leaf}") for name in whole),
            }
        )
    return rows


def hybrid_choices(shape, cfg, *, precision="bf16"):
    """demos.memory_parts of the hybrid for some choices of hybrid_galore and cfg's own, by '<choice>: <n> M train'."""
    found = {}
    for choice in dict.fromkeys((cfg.hybrid_galore, "attention", "o_proj", f"last_{shape.layers // 2}_layers", "mlp")):
        chosen = cfg.replace(hybrid_galore=choice)
        millions = memory_model.trained_numbers(shape, "hybrid", chosen) / 1e6
        parts = demos.memory_parts(shape, chosen, ["hybrid"], precision=precision)
        found[f"{choice}: {millions:.1f} M train"] = parts["hybrid"]
    return found


def engines_apart(run, *, steps=4, gap=2):
    """The largest relative difference between the changes of `steps` steps by our GaLore and by galore_torch.

    run: a TrainingRun. Both start from copies of three weights of the last layer and get the same real gradients, one
    training row per step, with a basis refresh among the steps. Ours runs in its reference mode, which has
    galore_torch's arithmetic; otherwise it computes its bases in a faster way. Relative: norm of the difference over
    norm of galore_torch's change.
    """
    from peftlib.optim.galore import GaLoreAdamW
    from peftlib.optim.galore_original import galore_torch_adamw

    last = f"layers.{core(run.model).config.num_hidden_layers - 1}."
    names = [f"{last}{end}" for end in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    weights = list(named_weights(run.model, names).values())
    rows, cfg = Rows(load_split(run.study.data_dir, "train")), run.cfg
    ours, theirs = ([torch.nn.Parameter(w.detach().float().clone()) for w in weights] for _ in range(2))
    how = {"rank": cfg.galore_rank, "scale": cfg.galore_scale}
    mine = GaLoreAdamW(
        [{"params": ours, "update_gap": gap, **how}], lr=cfg.galore_learning_rate, eps=1e-6, reference=True
    )
    group = {"params": theirs, "update_proj_gap": gap, "proj_type": "std", **how}
    optimizers = mine, galore_torch_adamw([group], lr=cfg.galore_learning_rate)
    for step in range(steps):
        with autocast(run.device, run.precision):
            loss = batch_loss_sum(run.model, rows.batch([[step % len(rows)]], run.device))
        grads = torch.autograd.grad(loss, weights)
        for optimizer, copies in zip(optimizers, (ours, theirs)):
            sum((copy * grad).sum() for copy, grad in zip(copies, grads)).backward()
            optimizer.finish_accumulation()
            optimizer.step()
            optimizer.zero_grad()
    mine.detach()
    with torch.no_grad():
        triples = zip(ours, theirs, weights)
        return max(float((one - other).norm() / (other - start).norm()) for one, other, start in triples)
