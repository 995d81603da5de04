"""What is measured on the exact Gemma-3-1B shape: the rows of results/bench/methods.json, and the model's folder."""

import os
import tempfile
from pathlib import Path

SEQUENCES, TOKENS = 16, 1024
SHAPE_1B = {
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
}
FOLDER = Path(os.environ.get("BENCH_DIR", tempfile.gettempdir())) / "gemma3_1b_shape"
# Peers that count with the best of their settings under the cap: one micro-batch suits none of them all.
PEER_GRID = {
    "unsloth": ("qlora", [(4, "on"), (8, "on"), (16, "on"), (32, "on"), (4, "off"), (8, "off"), (16, "off")]),
    "qlora_liger": ("qlora", [(4, "off"), (8, "off"), (16, "on"), (32, "on")]),
    "galore8_liger": ("galore", [(4, "off"), (4, "on"), (8, "on"), (16, "on"), (32, "on")]),
}
MAIN = ("qlora", "galore", "hybrid")
MIXED_STEPS = 48
DEFAULTS = {
    "precision": "bf16",
    "cap_gib": 0.0,
    "micro_batch": 4,
    "checkpointing": "off",
    "compile": "auto",
    "graphs": True,
    "masks": False,  # pack rows with masks, as on a card without the kernels
    "recomputed": None,  # layers, where checkpointing is on; None: all
    "is_cheap": False,  # compiled layers recompute the cheap activations
    "chunk": 0,  # positions whose logits are in memory at once; 0: as a run has it
    "seq": TOKENS,
    "steps": 7,
    "fields": {},  # of the config, beside the gpu profile's
}


def settings():
    """The rows of the table: the bars of the study with the peers beside them, then fp16, the controls and others."""
    speed = {"micro_batch": 16, "checkpointing": "on", "cap_gib": 14.5}
    planned = {"micro_batch": 0, "cap_gib": 14.5}
    memory = {"micro_batch": 4, "checkpointing": "offload", "fields": {"moment_bits": 8}}
    light = {"galore_weights": "bf16", "moment_bits": 8}
    for method, rows in (("qlora", 6), ("galore", 4), ("hybrid", 4)):
        yield {"name": method, "method": method, **planned}
        packed = {"micro_batch": rows, "cap_gib": 14.5, "steps": 3, "mixed": [["packed", rows]]}
        yield {"name": f"{method}_real_lengths", "method": method, **packed}
    yield {"name": "qlora_lean", "method": "qlora", **speed}
    yield {"name": "qlora_memory", "method": "qlora", **memory, "profile": True}
    yield {"name": "qlora_memory_16", "method": "qlora", **memory, "micro_batch": 16}
    yield {"name": "unsloth", "peer": "unsloth", "micro_batch": 4, "accumulation": 4}
    yield {"name": "galore_lean", "method": "galore", **speed, "refresh": True, "saving": True}
    yield {"name": "galore_memory", "method": "galore", "micro_batch": 8, "checkpointing": "on", "fields": light}
    yield {"name": "hybrid_lean", "method": "hybrid", **speed}
    # What the planner leaves out, to see whether its estimates of speed put the settings in the right order.
    for name, method, rows in (
        ("galore_3_off", "galore", 3),
        ("full_3_cheap", "full", 3),
        ("apollo_3_cheap", "apollo", 3),
    ):
        yield {"name": name, "method": method, "micro_batch": rows, "cap_gib": 14.5, "is_cheap": method != "galore"}
    yield {"name": "galore_layerwise_liger", "peer": "galore_layerwise_liger", "micro_batch": 4, "accumulation": 1}
    yield {"name": "galore8", "peer": "galore8", "micro_batch": 4, "accumulation": 4}
    yield {"name": "qlora_liger_nogc", "peer": "qlora_liger_nogc", "micro_batch": 4, "accumulation": 4}
    for method in ("qlora", "galore", "hybrid", "lora", "full", "apollo", "muon"):  # as on a T4
        steps = 64 if method in MAIN else DEFAULTS["steps"]
        yield {"name": f"{method}_fp16", "method": method, **planned, "precision": "fp16", "steps": steps}
    for method in ("qlora", "galore"):
        yield {"name": f"{method}_no_checkpointing", "method": method, "micro_batch": 4}
    # The planner's constants come from the rows above; these four it has not seen. They run side by side, so they
    # have no speed.
    unseen = {"is_memory_alone": True, "steps": 3}
    yield {"name": "heldout_hybrid", "method": "hybrid", "micro_batch": 4, **unseen}
    yield {"name": "heldout_short", "method": "galore", "micro_batch": 16, "checkpointing": "on", "seq": 512, **unseen}
    yield {"name": "heldout_long", "method": "qlora", "micro_batch": 4, "checkpointing": "on", "seq": 2048, **unseen}
    yield {"name": "heldout_light", "method": "galore", "micro_batch": 2, "fields": light, **unseen}
    for method in ("lora", "rslora", "lora_plus", "pissa", "dora", "full", "apollo", "muon", "hybrid_mlp"):
        yield {"name": method, "method": method, **planned}
    yield from scaling({**planned, "precision": "fp16"})
    yield from peers_at_their_best()


def scaling(planned):
    """Rows of other lengths and ranks than the _fp16 ones, the tokens of a step the same."""
    for method in MAIN:
        for seq in (256, 512, 2048):
            yield {"name": f"{method}_{seq}_tokens", "method": method, **planned, "seq": seq}
    for rank in (8, 64):
        yield {"name": f"qlora_rank_{rank}", "method": "qlora", **planned, "fields": {"lora_rank": rank}}
    for rank in (32, 256):  # of the 1B's narrowest matrix, the most
        yield {"name": f"galore_rank_{rank}", "method": "galore", **planned, "fields": {"galore_rank": rank}}
    for low, high in ((8, 32), (64, 256)):
        fields = {"lora_rank": low, "galore_rank": high}
        yield {"name": f"hybrid_ranks_{low}_{high}", "method": "hybrid", **planned, "fields": fields}


def peers_at_their_best(cap_gib=14.5):
    """The rows of PEER_GRID, all under the same cap, in steps of 16 sequences (32 where the micro-batch is 32)."""
    for peer, (method, grid) in PEER_GRID.items():
        for micro_batch, recompute in grid:
            yield {
                "name": f"{peer}_{micro_batch}_{recompute}",
                "grid": peer,
                "peer": peer if recompute == "on" else f"{peer}_nogc",
                "method": method,
                "micro_batch": micro_batch,
                "accumulation": max(1, SEQUENCES // micro_batch),
                "checkpointing": recompute,
                "cap_gib": cap_gib,
            }


def make_model():
    """A folder with the 1B shape's config and random bf16 weights, made once."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    if not (FOLDER / "config.json").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE_1B)).to(torch.bfloat16)
        model.save_pretrained(FOLDER)
    # Unsloth loads a tokenizer with every model, and kills.py trains on real rows; first_steps.py needs none.
    if os.environ.get("PEERS_TOKENIZER") and not (FOLDER / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(os.environ["PEERS_TOKENIZER"]).save_pretrained(FOLDER)


def choose_plan(setting):
    """The setting with the micro-batch and recomputation that the planner chooses for its cap, where it has none."""
    from peftlib.core import config
    from peftlib.models.shapes import shape_of
    from peftlib.train import memory_model

    if setting["micro_batch"]:
        return setting
    cfg = config.resolve("gpu", max_length=setting["seq"], batch_size=sequences(setting), **setting["fields"])
    plan = memory_model.choose(
        shape_of(str(FOLDER)),
        setting["method"],
        cfg,
        precision=setting["precision"],
        device_bytes=int(setting["cap_gib"] * 2**30),
    )
    names = ("micro_batch", "checkpointing", "recomputed", "is_cheap")
    return {**setting, **{name: getattr(plan, name) for name in names}, "is_planned": True}


def sequences(setting):
    """Of a step: as many as hold its tokens."""
    return SEQUENCES * TOKENS // setting["seq"]
