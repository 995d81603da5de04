"""Training speed and memory of the methods on one GPU, on the exact Gemma-3-1B shape with random weights.

    python tests/bench/methods.py OUT.json [--only NAME,...] [--settings FILE] [--warm]   # a process each
    python tests/bench/methods.py --one '{"method": ...}'      # one setting, here and now

Each step is 16,384 random tokens, all scored, as sequences of 1,024 unless `seq` says otherwise, through peftlib's own
Stepper. tok_s is the median over steps after the second. A micro-batch of 0 is the planner's choice for the cap. A cap
imitates a T4's memory on a larger card; its speed is not a T4's. No data, no tokenizer, no network.

--warm first takes one step of each of our settings, several at a time: that fills the compiler's cache and
gives first_step_cold_s (compilers side by side), so that first_step_s is that of a session which has the cache.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
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
PEERS = Path(__file__).with_name("peers.py")
# Peers that count with the best of their settings under the cap: one micro-batch suits none of them all.
PEER_GRID = {
    "unsloth": ("qlora", [(4, "on"), (8, "on"), (16, "on"), (32, "on"), (4, "off"), (8, "off"), (16, "off")]),
    "qlora_liger": ("qlora", [(4, "off"), (8, "off"), (16, "on"), (32, "on")]),
    "galore8_liger": ("galore", [(4, "off"), (4, "on"), (8, "on"), (16, "on"), (32, "on")]),
}
MAIN = ("qlora", "galore", "hybrid")
MIXED, MIXED_STEPS = [["packed", 8], ["packed", 16]], 48
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
    "chunk": 512,
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
    yield {"name": "qlora_speed", "method": "qlora", **speed}
    yield {"name": "qlora_memory", "method": "qlora", **memory, "profile": True}
    yield {"name": "unsloth", "peer": "unsloth", "micro_batch": 4, "accumulation": 4}
    yield {"name": "galore", "method": "galore", **speed, "refresh": True, "saving": True}
    yield {"name": "galore_memory", "method": "galore", "micro_batch": 8, "checkpointing": "on", "fields": light}
    yield {"name": "hybrid", "method": "hybrid", **speed}
    yield {"name": "galore_layerwise_liger", "peer": "galore_layerwise_liger", "micro_batch": 4, "accumulation": 1}
    yield {"name": "galore8", "peer": "galore8", "micro_batch": 4, "accumulation": 4}
    yield {"name": "qlora_liger_nogc", "peer": "qlora_liger_nogc", "micro_batch": 4, "accumulation": 4}
    for method in ("qlora", "galore", "hybrid", "lora", "full", "apollo", "muon"):  # as on a T4
        steps = 64 if method in MAIN else DEFAULTS["steps"]
        yield {"name": f"{method}_fp16", "method": method, **planned, "precision": "fp16", "steps": steps}
    mixed = {"micro_batch": 16, "steps": 3, "mixed": MIXED}
    yield {"name": "mixed_lengths", "method": "galore", **mixed}
    yield {"name": "mixed_lengths_qlora", "method": "qlora", **mixed}
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
        if os.environ.get("PEERS_TOKENIZER"):  # Unsloth loads one with every model
            AutoTokenizer.from_pretrained(os.environ["PEERS_TOKENIZER"]).save_pretrained(FOLDER)


def choose_plan(setting):
    """The setting with the micro-batch and recomputation that the planner chooses for its cap, where it has none."""
    from peftlib.core import config
    from peftlib.models.shapes import shape_of
    from peftlib.train import memory_model

    if setting["micro_batch"]:
        return setting
    cfg = config.resolve("gpu", max_length=setting["seq"], batch_size=_sequences(setting), **setting["fields"])
    plan = memory_model.choose(
        shape_of(str(FOLDER)),
        setting["method"],
        cfg,
        precision=setting["precision"],
        device_bytes=int(setting["cap_gib"] * 2**30),
    )
    names = ("micro_batch", "checkpointing", "recomputed", "is_cheap")
    return {**setting, **{name: getattr(plan, name) for name in names}, "is_planned": True}


def _sequences(setting):
    return SEQUENCES * TOKENS // setting["seq"]


def build(setting, **how):
    """(stepper, model, whether it takes flat rows) of a setting, ready to step. how: the Stepper's other settings."""
    import torch

    from peftlib import methods
    from peftlib.core import config
    from peftlib.models import compile as compiled
    from peftlib.models.kernels.attention import choose_kernel, use_kernel
    from peftlib.models.layers import checkpoint_layers
    from peftlib.models.load import load_base
    from peftlib.models.precision import loss_scaler
    from peftlib.train.batching import longest_row
    from peftlib.train.memory_model import CHEAP_BUDGET
    from peftlib.train.step import Stepper

    if setting["cap_gib"] and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(setting["cap_gib"] * 2**30 / whole)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = config.resolve(
        "gpu", model=str(FOLDER), activation_checkpointing=setting["checkpointing"], **setting["fields"]
    )
    method = methods.find(setting["method"]).resolve(cfg, SHAPE_1B["num_hidden_layers"])
    base = load_base(str(FOLDER), precision=setting["precision"], device=device, four_bit=method.four_bit)
    model = method.prepare(base, cfg)
    checkpoint_layers(model, cfg, setting["recomputed"])
    kernel, why = choose_kernel(model, device=device, precision=setting["precision"])
    if kernel and not setting["masks"]:
        use_kernel(model, kernel, longest=longest_row(setting["seq"], setting["micro_batch"] * setting["seq"]))
    is_compiled, _ = compiled.resolve(setting["compile"], device, 10**6, lambda: (25.0, 1.0))
    if is_compiled:
        compiled.compile_layers(model, activation_budget=CHEAP_BUDGET if setting["is_cheap"] else 1.0)
    model.train()
    stepper = Stepper(
        model,
        method.build_optimizer(model, cfg),
        loss_scaler(device, setting["precision"]),
        device=device,
        precision=setting["precision"],
        chunk=setting["chunk"],
        is_compiled=is_compiled,
        **how,
    )
    print("attention", kernel, why)
    is_flat = kernel is not None and not setting["masks"]
    if is_flat and setting["graphs"]:
        stepper.use_graphs(setting["micro_batch"] * setting["seq"])
    return stepper, model, is_flat


def measure(setting):
    """The setting with what was found; 'error' where it does not fit."""
    import torch

    from peftlib import methods
    from peftlib.core import config
    from peftlib.models.shapes import Shape
    from peftlib.train import estimate
    from peftlib.train import memory_model as plan

    stepper, model, is_flat = build(setting)
    shape = Shape.of(model.config)
    cfg = config.resolve("gpu", max_length=setting["seq"], batch_size=_sequences(setting), **setting["fields"])
    predicted = plan.estimate(
        shape,
        setting["method"],
        cfg,
        precision=setting["precision"],
        micro_batch=setting["micro_batch"],
        checkpointing=setting["checkpointing"],
        recomputed=setting["recomputed"],
        is_cheap=setting["is_cheap"],
        is_compiled=stepper.loss_settings["is_compiled"],
        is_graphed=stepper.graphs is not None,
        chunk=setting["chunk"],
    )
    found = {"weights_gib": _allocated(), "predicted_gib": predicted.total / 2**30}
    batches, scored, useful = _batches(setting, model.config.vocab_size, stepper.device, is_flat)
    seconds = []
    for step in range(setting["steps"]):
        _wait(stepper.device)
        started = time.perf_counter()
        loss = stepper.gradients(batches, scored, seed=step)
        if step == 0:
            found["gradients_gib"] = _peak()
        stepper.update(loss)
        _wait(stepper.device)
        seconds.append(time.perf_counter() - started)
        if step == 0:
            found.update(first_step_s=seconds[0], first_peak_gib=_peak(), held_gib=_allocated(), **_cache_counts())
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if setting.get("only_first_step"):
                return found
    later = sorted(seconds[2:])
    found.update(loss=float(loss), later_peak_gib=_peak(), steps_s=[round(s, 4) for s in seconds])
    found["peak_gib"] = max(found["first_peak_gib"], found["later_peak_gib"])
    if stepper.device == "cuda":
        found.update(reserved_gib=torch.cuda.max_memory_reserved() / 2**30, device=torch.cuda.get_device_name())
    if setting.get("is_memory_alone"):
        return found
    found["tok_s"] = useful / later[len(later) // 2]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[setting["precision"]]
    ceiling = estimate.matmul_ceiling(stepper.device, dtype)
    needed = estimate.flops_per_token(
        shape, methods.find(setting["method"]), length=setting["seq"], rank=cfg.galore_rank
    )
    found.update(mfu=found["tok_s"] * needed / ceiling, matmul_tflops=ceiling / 1e12)
    if setting.get("refresh"):
        found.update(_refresh_seconds(stepper.optimizer))
    if setting.get("saving"):
        found.update(_saving(stepper, model, batches, scored))
    if setting.get("mixed"):
        found.update(_mixed(setting, stepper, model.config.vocab_size, is_flat))
    if setting.get("profile"):
        _profile(stepper, batches, scored)
    return found


def _mixed(setting, stepper, vocabulary, is_flat):
    """Useful tokens a second over steps of 16 rows of real lengths: packed, or in random order padded to the longest.

    A pass holds at most micro_batch x seq tokens. Steps are taken twice and timed the second time, for the first sight
    of a shape costs what a long run pays once.
    """
    from peftlib.train.batching import Rows
    from peftlib.train.step import StepPlan

    lengths = json.loads(Path(os.environ["BENCH_LENGTHS"]).read_text())["lengths"]
    rows = Rows(_random_rows(lengths, vocabulary, prompt_share=0.3), is_flat=is_flat)
    plan = StepPlan(len(rows), SEQUENCES, 1, seed=0)
    found = {}
    for way, micro_batch in setting["mixed"]:
        seconds = useful = padded = 0
        for turn, step in itertools.product(range(2), range(MIXED_STEPS)):
            numbers = plan.rows_of(step)
            if step == 0:
                _wait(stepper.device)
                started = time.perf_counter()
            if way == "packed":
                batches = list(rows.batches(numbers, micro_batch * setting["seq"], stepper.device))
            else:
                cut = [numbers[i : i + micro_batch] for i in range(0, len(numbers), micro_batch)]
                batches = [rows.batch([[n] for n in part], stepper.device) for part in cut]
            stepper.update(stepper.gradients(batches, int(rows.scored[numbers].sum()), seed=step))
            if turn:
                useful += int(rows.lengths[numbers].sum())
                padded += sum(batch.ids.numel() for batch in batches)
        _wait(stepper.device)
        seconds = time.perf_counter() - started
        kernels = _kernel_seconds(stepper, batches, int(rows.scored[numbers].sum()))
        found[f"{way}_{micro_batch}"] = {
            "useful_tok_s": useful / seconds,
            "padded_share": 1 - useful / padded,
            "step_s": seconds / MIXED_STEPS,
            "kernels_s": kernels,  # of the last step alone
        }
    return {"mixed_found": found}


def _kernel_seconds(stepper, batches, scored):
    """(seconds of kernels, of the wall) of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        started = time.perf_counter()
        stepper.update(stepper.gradients(batches, scored, seed=0))
        _wait(stepper.device)
        wall = time.perf_counter() - started
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6, wall


def _cache_counts():
    """What torch.compile found in its caches: hits, misses, and what it would not keep."""
    import torch

    counters = torch._dynamo.utils.counters
    return {
        f"compile_{name}": n
        for kind in ("aot_autograd", "inductor")
        for name, n in counters[kind].items()
        if "cache" in name
    }


def _saving(stepper, model, batches, scored):
    """What a checkpoint costs: its bytes, how long training waits for it, and how long a thread then writes."""
    from peftlib.models.inspect import trainable
    from peftlib.storage.checkpoint import Checkpoint, CheckpointDir
    from peftlib.storage.saver import Saver

    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as folder:
        saver = Saver(CheckpointDir(folder, keep=1), every=1, stall_share=0.02, is_background=True, log=print)
        weights = {name: p.data for name, p in trainable(model).items()}
        _wait(stepper.device)
        started = time.perf_counter()
        saver.save(1, Checkpoint(weights, stepper.optimizer.state_dict(), {}))
        waited, steps = time.perf_counter() - started, []
        while saver.is_writing():
            begun = time.perf_counter()
            stepper.update(stepper.gradients(batches, scored, seed=0))
            _wait(stepper.device)
            steps.append(time.perf_counter() - begun)
        saver.wait()
        written = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "checkpoint_gib": size / 2**30,
        "save_stall_s": waited,
        "save_written_s": written,
        "save_step_s": sum(steps) / max(1, len(steps)),
    }


def _batches(setting, vocabulary, device, is_flat):
    """(batches, scored tokens, useful tokens) of one step."""
    from peftlib.train.batching import Rows

    sequences = _sequences(setting)
    rows = Rows(_random_rows([setting["seq"]] * sequences, vocabulary), is_flat=is_flat)
    batches = list(rows.batches(range(sequences), setting["micro_batch"] * setting["seq"], device))
    return batches, int(rows.scored.sum()), int(rows.lengths.sum())


def _random_rows(lengths, vocabulary, *, prompt_share=0.0):
    import numpy as np

    random = np.random.default_rng(0)
    return [
        {"input_ids": random.integers(5, vocabulary - 5, n), "is_scored": np.arange(n) >= max(1, n * prompt_share)}
        for n in lengths
    ]


def _refresh_seconds(optimizer):
    """Seconds to make warm bases of all projected weights, and of the one whose basis takes longest."""
    import torch

    times = []
    for p, _ in optimizer._projected:
        optimizer._full[p] = torch.randn(sorted(p.shape), device=p.device)
        _wait(p.device.type)
        started = time.perf_counter()
        optimizer._fit_due()
        _wait(p.device.type)
        times.append(time.perf_counter() - started)
        optimizer._full.clear()
    batched = 0.0
    shapes = {}
    for p, _ in optimizer._projected:
        shapes.setdefault(tuple(p.shape), []).append(p)
    for shape, members in shapes.items():
        for p in members:
            optimizer._full[p] = torch.randn(sorted(shape), device=p.device)
        _wait(p.device.type)
        started = time.perf_counter()
        optimizer._fit_due()
        _wait(p.device.type)
        batched += time.perf_counter() - started
        optimizer._full.clear()
    optimizer.zero_grad()
    return {"refresh_all_s": batched, "refresh_one_by_one_s": sum(times), "refresh_one_s": max(times[1:])}


def _profile(stepper, batches, scored):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        stepper.update(stepper.gradients(batches, scored, seed=0))
        _wait(stepper.device)
    events = profiled.key_averages()
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    total = sum(event.self_device_time_total for event in on_device)
    print(f"PROFILE device {total / 1e3:.0f} ms in {sum(event.count for event in on_device)} launches")
    for event in sorted(on_device, key=lambda e: -e.self_device_time_total)[:10]:
        print(f"PROFILE {event.self_device_time_total / 1e3:8.1f} ms {event.count:6d}  {event.key[:100]}")
    on_host = [event for event in events if event.device_type.name == "CPU"]
    print("PROFILE host")
    for event in sorted(on_host, key=lambda e: -e.self_cpu_time_total)[:15]:
        print(f"PROFILE {event.self_cpu_time_total / 1e3:8.1f} ms {event.count:6d}  {event.key[:100]}")


def _allocated():
    import torch

    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def _peak():
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def _wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def main(argv):
    if argv[0] == "--one":
        setting = {**DEFAULTS, **json.loads(argv[1])}
        try:
            setting = choose_plan(setting)
            found = measure(setting)
        except RuntimeError as error:  # out of memory is a result too
            found = {"error": str(error).split("\n")[0][:300]}
        print("RESULT " + json.dumps({**setting, **found}), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="names of rows, with commas between")
    parser.add_argument("--settings", type=Path, help="JSON file with a list of rows to run instead of the table's")
    parser.add_argument("--warm", action="store_true", help="fill the compiler's cache first")
    args = parser.parse_args(argv)
    chosen = json.loads(args.settings.read_text()) if args.settings else list(settings())
    if args.only:
        unknown = set(args.only.split(",")) - {setting["name"] for setting in chosen}
        if unknown:
            parser.error(f"no rows named {', '.join(sorted(unknown))}")
        chosen = [setting for setting in chosen if setting["name"] in args.only.split(",")]
    make_model()
    rows, end = [], time.time() + float(os.environ.get("BENCH_SECONDS", "1e9"))
    cold = _side_by_side(chosen, is_warming=args.warm)
    for setting in chosen:
        if setting.get("is_memory_alone"):
            rows.append(cold[setting["name"]])
        elif time.time() > end:
            print("no time for", setting)
            continue
        else:
            rows.append(_in_own_process(setting))
            if "error" not in cold.get(setting["name"], {"error": "not run"}):
                rows[-1]["first_step_cold_s"] = cold[setting["name"]]["first_step_s"]
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _side_by_side(chosen, *, is_warming):
    """{name: row} of the settings that have no speed, and of one step of each of the others; eight at once."""
    from concurrent.futures import ThreadPoolExecutor

    started, ours = time.time(), [setting for setting in chosen if "peer" not in setting]
    ours = [
        setting if setting.get("is_memory_alone") else {**setting, "only_first_step": True}
        for setting in ours
        if is_warming or setting.get("is_memory_alone")
    ]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(_in_own_process, ours))
    print(f"side by side: {len(rows)} settings in {time.time() - started:.0f} s", flush=True)
    return {row["name"]: row for row in rows}


def _in_own_process(setting):
    started, where = time.time(), dict(os.environ)
    if "peer" in setting:
        sizes = [setting[name] for name in ("micro_batch", "accumulation")]
        sizes += [DEFAULTS["steps"], setting.get("cap_gib", 0.0)]
        command = [sys.executable, str(PEERS), setting["peer"], str(TOKENS), *map(str, sizes)]
        where["PEERS_DIR"] = str(FOLDER)
        where["PYTHONPATH"] = where.get("BENCH_PEER_PATH") or where.get("PYTHONPATH", "")
    else:
        command = [sys.executable, __file__, "--one", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=where)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[0][7:]) if lines else {"error": done.stderr[-600:]}
    row = {**DEFAULTS, **setting, **found, "workload": "uniform", "gpus": 1, "date": time.strftime("%Y-%m-%d")}
    row["recompute"] = row["checkpointing"]
    if "peer" in setting and lines and "error" not in found:
        row.update(first_step_s=row["first"], peak_gib=row["peak_alloc"], reserved_gib=row["peak_res"])
    for line in done.stdout.splitlines():
        if line.startswith("PROFILE"):
            print(line)
    if not setting.get("only_first_step"):
        print(_line(row), f"({time.time() - started:.0f} s)", flush=True)
    return row


def _line(row):
    head = (
        f"{row['name']:<23}{row['precision']:<6}cap {row['cap_gib']:<5}mb {row['micro_batch']:<3}"
        f"ckpt {row['checkpointing']:<8}chunk {row['chunk']:<5}"
    )
    if "error" in row:
        return f"{head}{row['error']}"
    parts = [f"{key[:-4]} {row[key]:.2f}" for key in ("weights_gib", "held_gib", "first_peak_gib") if key in row]
    return (
        f"{head}{row.get('tok_s', 0):>8,.0f} tok/s {row['peak_gib']:6.2f} GiB ({', '.join(parts)}) "
        f"first {row['first_step_s']:.1f} s"
        + "".join(f" {key} {row[key]:.4f}" for key in row if key.startswith(("refresh_", "save_", "checkpoint_")))
        + "".join(f" {way} {got['useful_tok_s']:,.0f}" for way, got in row.get("mixed_found", {}).items())
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv[1:])
