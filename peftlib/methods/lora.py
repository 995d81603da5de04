"""LoRA on the 16-bit model, the baseline for QLoRA's costs and savings (Hu et al. 2021, arXiv:2106.09685)."""

from peftlib.methods.qlora import build_optimizer, prepare
from peftlib.methods.spec import LORA_SETTINGS, MethodSpec
from peftlib.models.inspect import PROJECTIONS

SPEC = MethodSpec(
    name="lora",
    label="LoRA",
    description="LoRA (arXiv:2106.09685): adapters on the seven projections of each layer, the rest frozen in 16 bits",
    colors=("#1b4a7a", "#56b4e9"),
    marker="^",
    trains={"adapters": PROJECTIONS},
    rates=("lora_learning_rate",),
    settings=LORA_SETTINGS,
    prepare=prepare,
    build_optimizer=build_optimizer,
)
