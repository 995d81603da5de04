"""Published figures of GPUs and shapes of well-known models, for planning without network access."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.errors import ConfigError, ModelError
from peftlib.core.files import GIB
from peftlib.models.locate import hub_errors, locate, token_for


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Gemma-like model that affect memory. attention: (query, key and value) output widths."""

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

    def matrices(self, names):
        """[(out, in), ...] of the named projections, once each."""
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
        return [shapes[name.rsplit(".", 1)[-1]] for name in names]

    def all_matrices(self, names):
        """[(out, in), ...] of the named projections in the model; a name may be of one layer, "layers.3.mlp.…"."""
        each = zip(names, self.matrices(names), strict=True)
        return [matrix for name, matrix in each for _ in range(1 if "." in name else self.layers)]


# Text models; their config.json on the hub is gated.
SHAPES = {
    "gemma-3-270m": Shape(262144, 640, 2048, 18, (1024, 256, 256)),
    "gemma-3-1b": Shape(262144, 1152, 6912, 26, (1024, 256, 256)),
    "gemma-3-4b": Shape(262208, 2560, 10240, 34, (2048, 1024, 1024)),
}


def shape_of(model):
    """The Shape of 'packaged', a well-known id, a folder, or any other hub id (downloads only its config).

    ModelError: a folder without a config, an unavailable hub id, or another kind of model.
    """
    bare = model.split("/")[-1].lower().removesuffix("-it").removesuffix("-pt")  # without owner and tuning suffix
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
        raise ModelError(f"model={model!r} has no Gemma-like config ({reason}): its memory cannot be planned") from None


@dataclass(frozen=True)
class Card:
    """gib: memory that the driver leaves. tflops: published peak of dense 16-bit matrix products with float32 sums.

    gb_per_s: published memory bandwidth. device: part of torch's device name. dollars: per hour by PRICED; 0: unknown.
    """

    gib: float
    tflops: float
    gb_per_s: float
    precision: str  # for training: bf16 from compute capability 8.0
    device: str
    dollars: float = 0.0

    def cost(self, hours):
        """'$0.05 to $0.75' for (shortest, longest) hours if the price is known; at least a cent."""
        return " to ".join(dict.fromkeys(f"${max(0.01, self.dollars * time):,.2f}" for time in hours))


# n1-standard-4 with one T4 (as of 2026-05), g2-standard-4 and a2-highgpu-1g (2025-03), from copies of the list on
# GitHub, such as Cyclenerd/google-cloud-pricing-cost-calculator; Google's own page could not be reached.
PRICED = "Google Cloud, on demand, us-central1, from copies of its 2025 and 2026 price lists"
CARDS = {
    "t4": Card(14.6, 65, 320, "fp16", "T4", 0.54),
    "v100": Card(15.7, 125, 900, "fp16", "V100"),
    "l4": Card(22.0, 121, 300, "bf16", "L4", 0.71),
    "a10g": Card(22.0, 70, 600, "bf16", "A10G"),
    "rtx3090": Card(23.5, 71, 936, "bf16", "RTX 3090"),
    "rtx4090": Card(23.5, 165, 1008, "bf16", "RTX 4090"),
    "a100": Card(39.4, 312, 1555, "bf16", "A100 40GB", 3.67),
    "l40s": Card(44.4, 362, 864, "bf16", "L40S"),
    "a100-80": Card(79.1, 312, 2039, "bf16", "A100 80GB"),
    "h100": Card(79.1, 989, 3350, "bf16", "H100"),
    "h200": Card(139.8, 989, 4800, "bf16", "H200"),
}
_ALIASES = {"a10040": "a100", "a10040gb": "a100", "a10080": "a100-80", "a10080gb": "a100-80", "a10": "a10g"}
_ALIASES |= {"3090": "rtx3090", "4090": "rtx4090"}
NEAREST = "for another card, name the nearest of these and its memory, such as --gpu rtx4090 -p memory_gib=11"


def find_card(name):
    """(name, Card) of a GPU; case does not matter. ConfigError: unknown; the message lists the known ones."""
    key = re.sub("nvidia|tesla|geforce|[ _-]", "", name.lower())
    key = _ALIASES.get(key, key)
    if key not in CARDS:
        raise ConfigError(f"--gpu {name!r} is unknown: use {', '.join(CARDS)}; {NEAREST}")
    return key, CARDS[key]


def card_of_device(device):
    """The Card for torch's device name, or None."""
    words = re.split("[ -]", device or "")
    return next((card for card in CARDS.values() if set(card.device.split()) <= set(words)), None)


def short_name(device):
    """'H100' for torch's 'NVIDIA H100 80GB HBM3', 'T4' for 'Tesla T4'."""
    words = [word for word in device.split() if word not in ("NVIDIA", "Tesla", "GeForce")]
    return " ".join(words[:2] if words[:1] == ["RTX"] else words[:1])


def card_at_hand(*, is_strict=False):
    """(name in CARDS, Card with this machine's memory) of the local GPU; None: there is none, or it is not listed.

    ConfigError: is_strict, and it is not listed.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    card = card_of_device(seen.name)
    if card is None:
        if is_strict:
            memory = f"{seen.total_memory / GIB:.1f} GiB"
            raise ConfigError(f"no figures of this machine's {seen.name} ({memory}) are known: use --gpu; {NEAREST}")
        return None
    name = next(name for name, known in CARDS.items() if known is card)
    return name, replace(card, gib=seen.total_memory / GIB)
