"""Training speed and memory of the methods on one GPU, on the exact Gemma-3-1B shape with random weights.

    python tests/bench/methods.py OUT.json              # all settings below, a process each
    python tests/bench/methods.py --one '{"name": ...}' # one setting, here and now

Each step is 16 sequences of 1,024 random tokens, all scored. tok_s is the median over steps after the second. A cap
imitates a T4's memory on a larger card; its speed is not a T4's. No data, no tokenizer, no network.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OVERRIDES = {}  # config fields beside the gpu profile's
SEQUENCES, TOKENS, STEPS = 16, 1024, 6
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


def settings():
    """The rows of the table: every method in bf16 and, under the cap, in fp16, with and without checkpointing."""
    for method in ("qlora", "galore", "hybrid"):
        for precision, cap_gib in (("bf16", 0.0), ("bf16", 14.5), ("fp16", 14.5)):
            for micro_batch, checkpointing in ((4, False), (8, True)):
                yield {
                    "name": method,
                    "precision": precision,
                    "cap_gib": cap_gib,
                    "micro_batch": micro_batch,
                    "checkpointing": checkpointing,
                    "seq": TOKENS,
                }


def make_model():
    """A folder with the 1B shape's config and random bf16 weights, made once."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    if not (FOLDER / "config.json").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE_1B)).to(torch.bfloat16)
        model.save_pretrained(FOLDER)


def measure(setting):
    """The setting with tok_s, first_step_s, peak_gib and reserved_gib; 'error' where it does not fit."""
    import torch

    from peftlib import config, methods, models
    from peftlib.losses import chunked_loss_sum
    from peftlib.precision import apply_step, autocast, loss_scaler

    if setting["cap_gib"]:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(setting["cap_gib"] * 2**30 / whole)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = config.resolve("gpu", model=str(FOLDER), **OVERRIDES)
    method = methods.find(setting["name"])
    base = models.load_base(str(FOLDER), precision=setting["precision"], device=device, four_bit=method.FOUR_BIT)
    model = method.prepare(base, cfg)
    optimizer = method.build_optimizer(model, cfg)
    scaler = loss_scaler(device, setting["precision"])
    if setting["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(5, model.config.vocab_size - 5, (SEQUENCES, setting["seq"]), device=device)
    seconds = []
    for _ in range(STEPS):
        _wait(device)
        started = time.perf_counter()
        for part in ids.split(setting["micro_batch"]):
            with autocast(device, setting["precision"]):
                loss = chunked_loss_sum(models.hidden_states(model, part), models.head_weight(model), part)
            scaler.scale(loss / ids.numel()).backward()
        apply_step(optimizer, scaler)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    later = sorted(seconds[2:])
    found = {
        "tok_s": ids.numel() / later[len(later) // 2],
        "first_step_s": seconds[0],
        "loss": float(loss.detach()) / part.numel(),
    }
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        found["device"] = torch.cuda.get_device_name()
    return found


def _wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def main(argv):
    if argv[0] == "--one":
        setting = json.loads(argv[1])
        try:
            found = measure(setting)
        except RuntimeError as error:  # out of memory is a result too
            found = {"error": str(error).split("\n")[0][:200]}
        print("RESULT " + json.dumps({**setting, **found}), flush=True)
        return
    make_model()
    rows = []
    for setting in settings():
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(setting)], capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        rows.append(json.loads(lines[0][7:]) if lines else {**setting, "error": done.stderr[-300:]})
        Path(argv[0]).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(_line(rows[-1]), flush=True)


def _line(row):
    head = f"{row['name']:<8}{row['precision']:<6}cap {row['cap_gib']:<6}mb {row['micro_batch']:<3}ckpt {row['checkpointing']!s:<6}"
    if "error" in row:
        return f"{head}{row['error']}"
    return f"{head}{row['tok_s']:>9,.0f} tok/s{row.get('peak_gib', 0):>7.2f} GiB  first {row['first_step_s']:.1f} s"


if __name__ == "__main__":
    main(sys.argv[1:])
