"""LoRA on the model in 16 bits: what QLoRA costs and saves shows against it (Hu et al. 2021, arXiv:2106.09685)."""

from peftlib.methods.qlora import build_optimizer, with_adapters
from peftlib.models.base import PROJECTIONS

__all__ = ["FOUR_BIT", "RATES", "TRAINS", "build_optimizer", "prepare"]

FOUR_BIT = ()
TRAINS = {"adapters": PROJECTIONS}
RATES = ("lora_learning_rate",)


def prepare(model, cfg):
    """The model with float32 LoRA adapters on all seven projections; everything else frozen, in 16 bits."""
    return with_adapters(model, cfg, PROJECTIONS)
