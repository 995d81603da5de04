"""Runs one setting of bench_settings through peftlib's own Stepper: speed, memory, cost of a refresh and of a save."""

import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import bench_settings
from bench_settings import MIXED_STEPS, SEQUENCES, sequences


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
    from peftlib.train.memory_model import CHEAP_BUDGET, chunk_of
    from peftlib.train.step import Stepper

    if setting["cap_gib"] and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(setting["cap_gib"] * 2**30 / whole)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = config.resolve(
        "gpu", model=str(bench_settings.FOLDER), activation_checkpointing=setting["checkpointing"], **setting["fields"]
    )
    method = methods.find(setting["method"]).resolve(cfg, bench_settings.SHAPE_1B["num_hidden_layers"])
    base = load_base(
        str(bench_settings.FOLDER), precision=setting["precision"], device=device, four_bit=method.four_bit
    )
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
        chunk=setting["chunk"] or chunk_of(setting["checkpointing"]),
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
    cfg = config.resolve("gpu", max_length=setting["seq"], batch_size=sequences(setting), **setting["fields"])
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
        chunk=stepper.loss_settings["chunk"],
    )
    found = {
        "chunk": stepper.loss_settings["chunk"],
        "weights_gib": _allocated(),
        "predicted_gib": predicted.total / 2**30,
    }
    batches, scored, useful = _batches(setting, model.config.vocab_size, stepper.device, is_flat)
    seconds = []
    for step in range(setting["steps"]):
        wait(stepper.device)
        started = time.perf_counter()
        loss = stepper.gradients(batches, scored, seed=step)
        if step == 0:
            found["gradients_gib"] = _peak()
        stepper.update(loss)
        wait(stepper.device)
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
    rows = Rows(random_rows(lengths, vocabulary, prompt_share=0.3), is_flat=is_flat)
    plan = StepPlan(len(rows), SEQUENCES, 1, seed=0)
    found = {}
    for way, micro_batch in setting["mixed"]:
        seconds = useful = padded = 0
        for turn, step in itertools.product(range(2), range(MIXED_STEPS)):
            numbers = plan.rows_of(step)
            if step == 0:
                wait(stepper.device)
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
        wait(stepper.device)
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
        wait(stepper.device)
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

    with tempfile.TemporaryDirectory(dir=bench_settings.FOLDER.parent) as folder:
        saver = Saver(CheckpointDir(folder, keep=1), every=1, stall_share=0.02, is_background=True, log=print)
        weights = {name: p.data for name, p in trainable(model).items()}
        wait(stepper.device)
        started = time.perf_counter()
        saver.save(1, Checkpoint(weights, stepper.optimizer.state_dict(), {}))
        waited, steps = time.perf_counter() - started, []
        while saver.is_writing():
            begun = time.perf_counter()
            stepper.update(stepper.gradients(batches, scored, seed=0))
            wait(stepper.device)
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

    count = sequences(setting)
    rows = Rows(random_rows([setting["seq"]] * count, vocabulary), is_flat=is_flat)
    batches = list(rows.batches(range(count), setting["micro_batch"] * setting["seq"], device))
    return batches, int(rows.scored.sum()), int(rows.lengths.sum())


def random_rows(lengths, vocabulary, *, prompt_share=0.0):
    """Rows of these lengths; the first prompt_share of each is not scored."""
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
        wait(p.device.type)
        started = time.perf_counter()
        optimizer._fit_due()
        wait(p.device.type)
        times.append(time.perf_counter() - started)
        optimizer._full.clear()
    batched = 0.0
    shapes = {}
    for p, _ in optimizer._projected:
        shapes.setdefault(tuple(p.shape), []).append(p)
    for shape, members in shapes.items():
        for p in members:
            optimizer._full[p] = torch.randn(sorted(shape), device=p.device)
        wait(p.device.type)
        started = time.perf_counter()
        optimizer._fit_due()
        wait(p.device.type)
        batched += time.perf_counter() - started
        optimizer._full.clear()
    optimizer.zero_grad()
    return {"refresh_all_s": batched, "refresh_one_by_one_s": sum(times), "refresh_one_s": max(times[1:])}


def _profile(stepper, batches, scored):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        stepper.update(stepper.gradients(batches, scored, seed=0))
        wait(stepper.device)
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


def wait(device):
    """Until the device has done all that was asked of it."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
