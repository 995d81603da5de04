"""Shapes of well-known models, for planning without the network."""

from dataclasses import dataclass
from pathlib import Path

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.errors import ModelError
from peftlib.models.locate import hub_errors, locate, token_for


@dataclass(frozen=True)
class Shape:
    """What of a Gemma-like model matters for memory. attention: (query, key and value) output widths."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    attention: tuple

    @classmethod
    def of(cls, config):
        """From a transformers config."""
        head = config.head_dim
        query, key = config.num_attention_heads * head, config.num_key_value_heads * head
        return cls(
            config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers, (query, key, key)
        )

    def matrices(self, leaves):
        """[(out, in), ...] of the named projections of one layer."""
        query, key, value = self.attention
        shapes = {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (value, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return [shapes[leaf] for leaf in leaves]


# Text models of one shape: their config.json on the hub is gated.
SHAPES = {
    "gemma-3-270m": Shape(262144, 640, 2048, 18, (1024, 256, 256)),
    "gemma-3-1b": Shape(262144, 1152, 6912, 26, (1024, 256, 256)),
}


def shape_of(model):
    """The Shape of 'packaged', a well-known id, a folder, or any other hub id (its config alone is fetched).

    ModelError: a folder without a config, a hub id that is not to be had, or a model of another kind.
    """
    bare = model.split("/")[-1].lower().removesuffix("-it").removesuffix("-pt")  # without owner and kind of tuning
    name = "gemma-3-270m" if model == PACKAGED_MODEL else bare
    if not Path(model).expanduser().is_dir() and name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    try:
        with hub_errors(model):
            location, _ = locate(model)
            config = AutoConfig.from_pretrained(location, token=token_for(location), trust_remote_code=False)
        return Shape.of(config.get_text_config())
    except (AttributeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model={model!r} has no config as Gemma's ({reason}): its memory cannot be planned") from None
