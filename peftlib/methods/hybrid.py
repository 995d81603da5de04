"""The layer-wise hybrid: LoRA on 4-bit projections; the other projections unquantized and trained by GaLore."""

from dataclasses import replace

from peftlib.core.errors import ConfigError
from peftlib.core.limits import last_layers, projections_of
from peftlib.methods.galore import by_engine, galore_adamw, split_trained, train_in
from peftlib.methods.qlora import with_adapters
from peftlib.methods.spec import GALORE_SETTINGS, LORA_SETTINGS, MethodSpec
from peftlib.models.inspect import ATTENTION, MLP, PROJECTIONS, core, in_layers, named_weights


def split(cfg, layers):
    """(projections trained by GaLore, the others) according to cfg.hybrid_galore, named as in inspect.is_named.

    ConfigError: last_K_layers with K not below `layers`, the model's number.
    """
    last = last_layers(cfg.hybrid_galore)
    if not last:
        chosen = projections_of("hybrid_galore", cfg.hybrid_galore)
        return chosen, tuple(leaf for leaf in PROJECTIONS if leaf not in chosen)
    if last >= layers:
        raise ConfigError(
            f"hybrid_galore={cfg.hybrid_galore!r} leaves none of the model's {layers} layers in 4 bits: use "
            f"last_1_layers to last_{layers - 1}_layers, or the method galore"
        )
    return in_layers(range(layers - last, layers)), in_layers(range(layers - last))


def _split_of(model, cfg):
    return split(cfg, core(model).config.num_hidden_layers)


def prepare(model, cfg):
    """Adapters on one side of the split, full training of the other; norms and embedding frozen."""
    whole, adapted = _split_of(model, cfg)
    model = with_adapters(model, cfg, adapted)
    # After adding adapters, which freezes the rest. PEFT does not save these weights, saved.save_trained does.
    train_in(cfg.galore_weights, named_weights(model, whole))
    return model


def build_optimizer(model, cfg):
    """GaLore for the weights and AdamW for the adapters, each with its own rate."""
    whole, adapters = split_trained(model, _split_of(model, cfg)[0])
    return galore_adamw(model, cfg, whole, {"params": adapters, "lr": cfg.lora_learning_rate})


def _by_config(cfg, layers):
    whole, adapted = split(cfg, layers)
    found = {"trains": {"adapters": adapted, by_engine(cfg): whole}, "four_bit": adapted}
    if cfg.hybrid_galore == "attention":
        return found
    last = last_layers(cfg.hybrid_galore)
    where = f"all projections of the last {last} of {layers} layers" if last else ", ".join(whole)
    return found | {
        "description": f"a layer-wise hybrid (hybrid_galore={cfg.hybrid_galore}): {where} in full by GaLore "
        "(arXiv:2403.03507), LoRA adapters on the other projections over NF4 weights (arXiv:2305.14314), the rest "
        "frozen"
    }


SPEC = MethodSpec(
    name="hybrid",
    label="hybrid",
    description="a layer-wise hybrid: LoRA adapters on the three MLP projections over NF4 weights (arXiv:2305.14314), "
    "the four attention projections in full by GaLore (arXiv:2403.03507), the rest frozen",
    colors=("#009e73", "#009e73"),
    marker="D",
    trains={"adapters": MLP, "galore": ATTENTION},
    rates=("lora_learning_rate", "galore_learning_rate"),
    settings=("hybrid_galore", *LORA_SETTINGS, *GALORE_SETTINGS),
    prepare=prepare,
    build_optimizer=build_optimizer,
    four_bit=MLP,
    variants=("hybrid_galore", "galore_engine"),
    by_config=_by_config,
)


def _of_mlp(cfg):
    return cfg.replace(hybrid_galore="mlp")


# The ablation of the hybrid's placement is a separate method, so that one study can have both.
MLP_SPEC = replace(
    SPEC,
    name="hybrid_mlp",
    label="hybrid, reversed",
    description="the hybrid reversed: the three MLP projections in full by GaLore (arXiv:2403.03507), LoRA "
    "adapters on the four attention projections over NF4 weights (arXiv:2305.14314), the rest frozen",
    colors=("#0d95ff", "#bb68fd"),
    marker=(4, 1, 0),  # a four-pointed star
    trains={"adapters": ATTENTION, "galore": MLP},
    settings=(*LORA_SETTINGS, *GALORE_SETTINGS),
    prepare=lambda model, cfg: prepare(model, _of_mlp(cfg)),
    build_optimizer=lambda model, cfg: build_optimizer(model, _of_mlp(cfg)),
    four_bit=ATTENTION,
    variants=("galore_engine",),
    by_config=lambda cfg, layers: {"trains": {"adapters": ATTENTION, by_engine(cfg): MLP}},
    is_default=False,
)
