"""The kinds of PEFT's adapters that can be brought: what each must do, what is refused, what is counted."""

import pytest
import tiny
import torch

from peftlib.core.errors import ConfigError
from peftlib.models.adapters import KINDS, adapter_path, adapter_size, config_of, with_adapter
from peftlib.models.inspect import PROJECTIONS, trainable
from peftlib.models.load import guard_four_bit, load_base
from peftlib.models.saved import load_trained, save_trained
from peftlib.models.shapes import Shape

OWN = {
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "BOFT": {"boft_block_size": 4},
    "VERA": {"r": 16},
    "FOURIERFT": {"n_frequency": 50},
    "WAVEFT": {"n_frequency": 50},
    "C3A": {"block_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "VBLORA": {"r": 4, "vector_length": 16, "num_vectors": 8},
}
QUICK = ("OFT", "IA3", "LOHA", "VERA")
IDS = torch.randint(107, 400, (2, 20), generator=torch.Generator().manual_seed(1))


def fields_of(kind, **changes):
    return {"peft_type": kind, "target_modules": list(PROJECTIONS), **OWN.get(kind, {}), **changes}


def adapted(model, kind, **changes):
    return with_adapter(model, config_of(fields_of(kind, **changes), source="my.json"), source="my.json")


def base(tiny_model, four_bit):
    return load_base(str(tiny_model), precision="fp32", device="cpu", four_bit=PROJECTIONS if four_bit else ())


@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "nf4"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_a_kind_trains_and_is_saved_loaded_and_merged(tiny_model, tmp_path, kind, four_bit):
    torch.manual_seed(0)
    if four_bit and not KINDS[kind].takes_4_bit:
        with pytest.raises(ConfigError, match=f"peft_type='{kind}' does not support 4-bit weights"):
            adapted(base(tiny_model, four_bit), kind)
        return
    model = adapted(base(tiny_model, four_bit), kind)
    assert adapter_path(model) == ("fused" if kind == "LORA" else "peft")
    optimizer, losses = torch.optim.AdamW(trainable(model).values(), lr=1e-2), []
    for _ in range(4):
        logits = model.get_base_model()(IDS).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    trained = model.get_base_model()(IDS).logits
    facts = {"model": str(tiny_model), "four_bit": list(PROJECTIONS) if four_bit else [], "precision": "fp32"}
    facts |= {"model_sha256": None, "model_revision": None}
    folder = save_trained(model, tiny.tokenizer(), tmp_path / "weights" / "own-s0", facts)
    torch.manual_seed(99)  # nothing that was drawn at the start may have to be drawn again
    for merge in (False, True):
        loaded = load_trained(folder, merge=merge, log=str)
        if four_bit and not merge:
            guard_four_bit(loaded, PROJECTIONS)
        core = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded
        assert torch.allclose(core(IDS).logits, trained, atol=1e-5), merge


@pytest.mark.parametrize("kind", ["LORA", "OFT", "VERA", "dora", "pissa"])
def test_numbers_counted_without_memory_are_those_of_a_real_model(kind):
    changes = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}.get(kind, {})
    size = adapter_size(
        Shape.of(tiny.config()), lambda model: adapted(model, kind if not changes else "LORA", **changes)
    )
    plain = tiny.model().requires_grad_(False)
    before = sum(t.numel() for t in (*plain.parameters(), *plain.buffers()))
    model = adapted(plain, kind if not changes else "LORA", **changes)
    held = sum(t.numel() for t in (*model.parameters(), *model.buffers())) - before
    assert size[:2] == (sum(p.numel() for p in trainable(model).values()), held)
    assert size.kept == {"dora": 1.8, "OFT": 1.06, "VERA": 1.18}.get(kind, 1.0)


REFUSED = [
    ([], "is a list: use an object"),
    ({}, "peft_type=None is missing: use LORA, "),
    ({"peft_type": "LOR"}, "peft_type='LOR' is unknown .did you mean LORA"),
    ({"peft_type": ["LORA"]}, "peft_type=.*is unknown"),
    ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "peft_type='PREFIX_TUNING' trains a prompt before each"),
    ({"peft_type": "ADALORA"}, "peft_type='ADALORA' is not supported"),
    (fields_of("LORA", task_type="SEQ_CLS"), "task_type='SEQ_CLS' is not for language models: use 'CAUSAL_LM'"),
    (fields_of("LORA", lora_alhpa=8), "lora_alhpa=8 is not a field of LoraConfig: use lora_alpha"),
    (fields_of("LORA", auto_map={"a": "b"}), "refers to code in auto_map"),
    (fields_of("LORA", init_lora_weights="eva"), "init_lora_weights='eva' cannot be reproduced"),
    (fields_of("LORA", eva_config={"rho": 2}), "eva_config needs more than a study"),
    (fields_of("LORA", r=0), "PEFT rejects it .*r. should be a positive"),
    (fields_of("LORA", r=65), "r=65 is larger than q_proj: use 1..64 there"),
    (fields_of("LORA", r=33), "r=33 is larger than k_proj: use 1..32 there"),
    (fields_of("OFT", oft_block_size=4, r=4), "PEFT rejects it .You can only specify either r"),
    (fields_of("LORA", target_modules=["q_prj"]), "target_modules has 'q_prj', which is not a layer: use q_proj"),
    (fields_of("LORA", target_modules=["q_proj", "dense"]), "target_modules has 'dense'"),
    (fields_of("LORA", target_modules="nothing.*"), "PEFT rejects it .*nothing"),
    (fields_of("LORA", target_modules=["lm_head"]), "include the embedding, which stays frozen"),
    (fields_of("LORA", modules_to_save=["embed_tokens"]), "include the embedding, which stays frozen"),
]


@pytest.mark.parametrize("fields, told", REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_what_cannot_be_trained_is_refused_by_name(fields, told):
    with pytest.raises(ConfigError, match=f"my.json.*{told}"):
        with_adapter(tiny.model(), config_of(fields, source="my.json"), source="my.json")
    assert fields in [given for given, _ in REFUSED], "the caller's fields stay"


def test_fields_of_a_newer_peft_that_are_unused_are_let_pass_and_a_saved_config_is_taken_for_training():
    saved = fields_of("LORA", inference_mode=True, base_model_name_or_path="x/y", some_future_field=None)
    model = adapted(tiny.model(), "LORA", **{k: v for k, v in saved.items() if k != "peft_type"})
    assert len(trainable(model)) == 2 * 2 * len(PROJECTIONS)
