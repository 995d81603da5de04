"""The layer-wise hybrid: LoRA on 4-bit MLP projections, unquantized attention projections trained by GaLore."""

from peftlib.methods.galore import galore_adamw, split_trained, train_in
from peftlib.methods.qlora import with_adapters
from peftlib.methods.spec import GALORE_SETTINGS, LORA_SETTINGS, MethodSpec
from peftlib.models.inspect import ATTENTION, MLP, named_weights


def prepare(model, cfg):
    """Adapters on the MLP, attention projections trained in full; norms and embedding frozen."""
    model = with_adapters(model, cfg, MLP)
    # After the adapters, which freeze the rest. PEFT does not save these weights: saved.save_trained does.
    train_in(cfg.galore_weights, named_weights(model, ATTENTION))
    return model


def build_optimizer(model, cfg):
    """GaLore for attention, AdamW for the adapters, each at its own rate."""
    attention, adapters = split_trained(model, ATTENTION)
    return galore_adamw(model, cfg, attention, {"params": adapters, "lr": cfg.lora_learning_rate})


SPEC = MethodSpec(
    name="hybrid",
    label="hybrid",
    description="a layer-wise hybrid: LoRA adapters on the three MLP projections over NF4 weights (arXiv:2305.14314), "
    "the four attention projections in full by GaLore (arXiv:2403.03507), the rest frozen",
    colors=("#009e73", "#009e73"),
    marker="D",
    trains={"adapters": MLP, "galore": ATTENTION},
    rates=("lora_learning_rate", "galore_learning_rate"),
    settings=(*LORA_SETTINGS, *GALORE_SETTINGS),
    prepare=prepare,
    build_optimizer=build_optimizer,
    four_bit=MLP,
)
