import json
import os
import shutil
import signal
import types

import pytest
import torch
from safetensors.torch import load_file

from peftlib import data, methods
from peftlib.core import record as records
from peftlib.core.errors import CheckpointError, ConfigError, NonFiniteLossError, StudyError
from peftlib.core.study import Study
from peftlib.evaluation.evaluate import evaluate
from peftlib.models.inspect import ATTENTION, layer_table, trainable
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.train.batching import Rows, mean_loss
from peftlib.train.callbacks import CallbackList, Stopwatch
from peftlib.train.loop import TrainingRun
from peftlib.train.step import Stepper

# Those of methods.variants are in tests/methods/test_all_methods.py.
METHODS = tuple(name for name, spec in methods.METHODS.items() if not spec.is_counted)


def trained(study, method, **changes):
    run = TrainingRun(study, method, log=lambda line: None)
    return run, run.train(**changes)


def kept_weights(study, method):
    found = {}
    for path in sorted(study.weights_dir(method, study.cfg.seed).glob("*.safetensors")):
        found |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[name], b[name]) for name in a)


FAST = {
    "lora_learning_rate": 3e-3,
    "galore_learning_rate": 1e-2,
    "full_learning_rate": 3e-3,
    "apollo_learning_rate": 3e-3,
    "muon_learning_rate": 3e-3,
}


# The controls' long runs are left to `make test-slow`.
STUDIED = [pytest.param(m, marks=() if m in ("qlora", "galore", "hybrid") else pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("method", STUDIED)
def test_frozen_weights_stay_and_the_loss_falls_on_repeated_rows(make_study, method):
    study = make_study(epochs=8, lr_scheduler="constant", **FAST)
    run = TrainingRun(study, method, log=lambda line: None)
    frozen = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    record = run.train()
    for name, p in run.model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    losses = [entry["loss"] for entry in record["history"]]
    assert record["status"] == "ok" and len(losses) == record["steps"] == 48
    assert sum(losses[-6:]) < 0.97 * sum(losses[:6])


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_is_what_the_contract_says(make_study, method):
    run = TrainingRun(make_study(), method, log=lambda line: None)
    trains = {name for name in trainable(run.model)}
    for name, _ in run.model.named_parameters():
        is_attention = any(f".{leaf}." in name for leaf in ATTENTION)
        wanted = {
            "qlora": "lora_" in name,
            "galore": "embed" not in name and "lm_head" not in name,
            "hybrid": "lora_" in name or is_attention,
            "lora": "lora_" in name,
            "full": "embed" not in name and "lm_head" not in name,
            "apollo": "embed" not in name and "lm_head" not in name,
            "muon": "embed" not in name and "lm_head" not in name,
        }[method]
        assert (name in trains) == wanted, name
    assert all(p.dtype == torch.float32 for p in trainable(run.model).values())
    four_bit = {row["layer"].split(".")[0] for row in layer_table(run.model) if row["dtype"] == "nf4"}
    assert four_bit == set(run.method.four_bit)
    assert not any("lm_head" in row["layer"] and row["dtype"] == "nf4" for row in layer_table(run.model))


CUTS = [
    *((method, 4) for method in METHODS),
    *(pytest.param(*method.values, 1, marks=method.marks) for method in STUDIED),
]


@pytest.mark.parametrize("method, stop_at", CUTS)
def test_a_resumed_run_is_bit_equal_to_one_never_stopped(make_study, monkeypatch, method, stop_at):
    fields = {"lora_dropout": 0.1, "epochs": 2, "max_steps": 8, "eval_steps": 2, "save_steps": 3}
    whole = make_study(study="whole", **fields)
    _, straight = trained(whole, method)
    cut = make_study(study="cut", **fields)
    first = TrainingRun(cut, method, log=lambda line: None)
    step = first._step

    def stop_there():
        step()
        if first.progress.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(first, "_step", stop_there)
    assert first.train()["status"] == "stopped"
    torch.manual_seed(99)  # what a new session happens to have drawn must not matter
    _, resumed = trained(make_study(study="cut", **fields), method)
    assert resumed["steps"] == straight["steps"] == 8
    assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in straight["history"]]
    assert resumed["valid_history"] == straight["valid_history"]
    assert_equal_weights(kept_weights(whole, method), kept_weights(cut, method))
    assert not cut.checkpoint_dir(method, 0).exists()


def test_micro_batches_change_nothing_but_rounding(make_study):
    a, b = (
        make_study(study="a", batch_size=4, micro_batch_size=4),
        make_study(study="b", batch_size=4, micro_batch_size=1),
    )
    one, many = trained(a, "galore")[1], trained(b, "galore")[1]
    for x, y in zip(one["history"], many["history"], strict=True):
        assert abs(x["loss"] - y["loss"]) < 1e-4


def test_two_seeds_differ_and_one_seed_repeats(make_study):
    studies = [make_study(study=name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    a, b, c = (trained(study, "qlora") and kept_weights(study, "qlora") for study in studies)
    assert_equal_weights(a, b)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_a_finished_run_is_not_repeated(make_study):
    study = make_study()
    _, first = trained(study, "qlora")
    before = study.record_path("qlora", 0).read_bytes()
    lines = []
    again = TrainingRun(study, "qlora", log=lines.append).train()
    assert "nothing to do" in lines[-1] and again["run_hash"] == first["run_hash"]
    assert study.record_path("qlora", 0).read_bytes() == before


def test_a_time_limit_saves_and_stops_and_the_next_call_goes_on(make_study):
    study = make_study(max_seconds=1e-6)
    _, record = trained(study, "galore")
    assert (record["status"], record["steps"]) == ("stopped", 1)
    with pytest.raises(StudyError, match="stopped at step 1 of 6.*goes on from the last checkpoint"):
        records.require_ok(record)
    with pytest.raises(StudyError, match="stopped at step 1 of 6"):
        evaluate(study, "galore", log=lambda line: None)
    lines = []
    assert TrainingRun(make_study(), "galore", log=lines.append).train()["steps"] == 6
    assert "goes on at step 1 of 6" in lines[0]


def test_a_checkpoint_of_other_settings_is_refused_by_field(make_study, tmp_path):
    study = make_study(max_seconds=1e-6)
    trained(study, "qlora")
    study.config_path.unlink()  # else the study itself refuses first
    other = make_study(lora_alpha=8)
    with pytest.raises(CheckpointError, match=r"lora_alpha: 32 -> 8"):
        TrainingRun(other, "qlora", log=lambda line: None).train()
    assert any(study.checkpoint_dir("qlora", 0).iterdir())


def test_a_study_of_another_config_is_refused_with_its_fields(make_study):
    study = make_study()
    before = study.config_path.read_bytes()
    with pytest.raises(StudyError, match=r"max_new_tokens: 6 -> 7.*choose another study name"):
        Study.open(study.cfg.replace(max_new_tokens=7))
    assert study.config_path.read_bytes() == before
    Study.open(study.cfg.replace(seed=3, micro_batch_size=1))  # seeds and run-time fields are free


def test_training_before_data_is_refused(make_study):
    study = make_study()
    shutil.rmtree(study.data_dir)
    with pytest.raises(StudyError, match="run 01_data first"):
        TrainingRun(study, "qlora", log=lambda line: None)


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("nosuch", {}, "'nosuch' is unknown: use qlora, galore, hybrid, lora, full, apollo, muon"),
        ("qlora", {"lora_rank": 65}, r"lora_rank=65 is larger than a layer: use 1\.\.32"),
        ("galore", {"galore_rank": 65}, r"galore_rank=65, weight \(32, 64\): use 1\.\.32"),
    ],
)
def test_a_method_or_rank_that_cannot_be_is_refused(make_study, method, fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainingRun(make_study(**fields), method, log=lambda line: None).train()


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(make_study, monkeypatch):
    study = make_study(save_steps=2)
    run = TrainingRun(study, "qlora", log=lambda line: None)
    gradients = Stepper.gradients

    def spoil(*args, **kw):
        return gradients(*args, **kw) * (float("nan") if run.progress.step == 3 else 1)

    monkeypatch.setattr(Stepper, "gradients", spoil)
    with pytest.raises(NonFiniteLossError, match="loss of step 4 is nan.*learning rate.*checkpoint is kept"):
        run.train()
    record = records.load(study, "qlora", 0)
    assert record["status"] == "failed" and "NonFiniteLossError" in record["error"]
    assert CheckpointDir(study.checkpoint_dir("qlora", 0), keep=1).newest()[0].state["progress"]["step"] == 2


def test_out_of_memory_halves_the_micro_batch_and_replays_the_step(make_study, monkeypatch):
    plain = make_study(study="plain", batch_size=4, micro_batch_size=2)
    short = make_study(study="short", batch_size=4, micro_batch_size=4)
    trained(plain, "galore")
    lines = []
    run = TrainingRun(short, "galore", log=lines.append)
    forward_backward = Stepper.forward_backward

    def full_card(*args):
        loss = forward_backward(*args)
        if run.execution.micro_batch_size == 4:
            raise torch.OutOfMemoryError("planted")
        return loss

    monkeypatch.setattr(Stepper, "forward_backward", full_card)
    run.train()
    assert any("going on with micro_batch_size=2" in line for line in lines)
    assert_equal_weights(kept_weights(plain, "galore"), kept_weights(short, "galore"))


def test_a_full_disk_is_refused_before_the_first_step(make_study, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="GiB free, save_total_limit=1 needs .* GiB: free some space"):
        TrainingRun(make_study(), "galore", log=lambda line: None).train()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_active_and_learns(make_study, precision):
    study = make_study(precision=precision, epochs=2)
    run = TrainingRun(study, "hybrid", log=lambda line: None)
    seen = []
    layer = next(m for n, m in run.model.named_modules() if n.endswith("self_attn.q_proj"))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    record = run.train()
    assert seen[0] == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert run.scaler.is_enabled() == (precision == "fp16")
    assert record["precision"] == precision and record["history"][-1]["loss"] < record["history"][0]["loss"]


def test_a_planted_fp16_overflow_skips_exactly_one_step(make_study, monkeypatch):
    run = TrainingRun(make_study(precision="fp16"), "hybrid", log=lambda line: None)
    gradients = Stepper.gradients

    def overflow(*args, **settings):
        loss = gradients(*args, **settings)
        if run.progress.step == 2:
            run.optimizer._gather()
            low = next(iter(run.optimizer._low.values()), None)
            (low if low is not None else next(iter(run.optimizer._full.values()))).view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(Stepper, "gradients", overflow)
    record = run.train()
    assert record["skipped_steps"] == 1 and record["status"] == "ok"
    assert record["placement"] == {
        "micro_batch_size": run.execution.micro_batch_size,
        "activation_checkpointing": "off",
        "recomputed_layers": None,
        "is_compiled": False,
        "adapter_path": "fused",
        "attention": "masks",
        "is_graphed": False,
        "captured_lengths": 0,
    }
    assert [entry["grad_norm"] is None for entry in record["history"]].count(True) == 1


def test_mean_loss_does_not_depend_on_the_batch_and_leaves_the_mode(make_study):
    study = make_study()
    run = TrainingRun(study, "hybrid", log=lambda line: None)
    from peftlib.data import load_split

    rows = Rows(load_split(study.data_dir, "valid"))
    run.model.train()
    one, three = (mean_loss(run.model, rows, tokens=b, device="cpu", precision="fp32") for b in (64, 4096))
    assert abs(one - three) < 1e-5 and run.model.training


def test_the_record_is_json_with_every_promised_field(make_study):
    study = make_study(galore_learning_rate=1e-3)
    trained(study, "galore")
    record = json.loads(study.record_path("galore", 0).read_text())
    for name in ("trainable_params", "steps", "train_tokens", "train_loss", "tokens_per_second"):
        assert record[name] is not None and record[name] > 0, name
    assert record["peak_memory_bytes"] >= 0  # a rise: none where earlier tests left the process large
    assert record["eval_loss"] is None and record["evaluation"] is None and record["peak_reserved_bytes"] is None
    assert record["learning_rate"] == 1e-3 and record["learning_rate_2"] == 2.5e-4


def test_a_card_that_one_row_does_not_fit_recomputes_then_names_the_ways_out(make_study, monkeypatch):
    study = make_study(batch_size=2, micro_batch_size=2)
    lines = []
    run = TrainingRun(study, "galore", log=lines.append)

    def full_card(*args):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Stepper, "forward_backward", full_card)
    with pytest.raises(
        ConfigError, match="does not fit this GPU even with micro_batch_size=1 and activation_checkpointing=on: lower"
    ):
        run.train()
    assert ["micro_batch_size=1, activation_checkpointing=off" in line for line in lines].count(True) == 1
    assert ["micro_batch_size=1, activation_checkpointing=on" in line for line in lines].count(True) == 1


def test_a_checkpoint_of_other_layers_is_refused(make_study, monkeypatch):
    study = make_study(save_steps=2, max_seconds=1e-6)
    TrainingRun(study, "hybrid", log=lambda line: None).train()
    run = TrainingRun(study, "hybrid", log=lambda line: None)
    monkeypatch.setattr("peftlib.train.run_state.layer_table", lambda model: [{"layer": "q_proj", "class": "Other"}])
    with pytest.raises(CheckpointError, match="the model's layers are .*'Other'.*take the model and versions"):
        run.train()


def weights_at_start(study, method):
    """What a run's weights are when its first step begins."""
    run = TrainingRun(study, method, log=lambda line: None)
    seen = {}

    def first_step():
        seen.update({name: p.detach().clone() for name, p in trainable(run.model).items()})
        raise KeyboardInterrupt

    run._step = first_step
    with pytest.raises(KeyboardInterrupt):
        run.train()
    return seen, run.record


@pytest.mark.parametrize("method", ["qlora", "galore", "hybrid"])
def test_a_fork_starts_from_the_weights_another_study_has_reached(make_study, method):
    source = make_study(study="source", max_steps=4, max_seconds=1e-9, **FAST)
    run, record = trained(source, method)
    assert record["status"] == "stopped"
    reached = {name: p.detach().clone() for name, p in trainable(run.model).items()}
    start, forked = weights_at_start(make_study(study="fork-a", fork="source", lora_learning_rate=1e-5), method)
    assert_equal_weights(start, reached)
    assert forked["forked_from"] == f"source, {method}-s0, step 1"
    run, record = trained(make_study(study="source", max_steps=4, **FAST), method)
    start, forked = weights_at_start(make_study(study="fork-b", fork="source"), method)
    assert forked["forked_from"] == f"source, {method}-s0, finished" and record["status"] == "ok"
    for name, p in trainable(run.model).items():
        torch.testing.assert_close(start[name], p, atol=0, rtol=2**-8)  # a full model is kept in bf16


def test_a_fork_that_cannot_be_is_refused_with_the_way_out(make_study):
    with pytest.raises(StudyError, match="fork='nowhere': there is no such study"):
        make_study(study="a", fork="nowhere")
    source = make_study(study="b", max_steps=1)
    with pytest.raises(StudyError, match="fork='b': .* train it there first"):
        trained(make_study(study="a", fork="b"), "qlora")
    trained(source, "qlora")
    with pytest.raises(CheckpointError, match="take the same model, method and ranks"):
        trained(make_study(study="c", fork="b", lora_rank=2), "qlora")


def test_a_fork_that_has_learnt_its_test_rows_is_refused(make_study, monkeypatch):
    trained(make_study(study="source", max_steps=1), "qlora")
    forked = make_study(study="forked", fork="source")
    run = TrainingRun(forked, "qlora", log=lambda line: None)
    real = data.load_split
    leaky = {"test": "train", "valid": "valid", "train": "train"}
    monkeypatch.setattr("peftlib.train.run_state.data.load_split", lambda folder, split: real(folder, leaky[split]))
    with pytest.raises(StudyError, match=r"fork='source': 12 of the 12 test rows here were trained on there"):
        run.train()


def test_another_session_in_the_same_study_is_refused_and_nothing_is_lost(make_study):
    from peftlib.storage.lock import StudyLock

    study = make_study(max_steps=2)
    with StudyLock(study.folder, "training galore"), pytest.raises(StudyError, match="is in use by .*training galore"):
        trained(study, "qlora")
    assert trained(study, "qlora")[1]["status"] == "ok"


def test_another_plan_or_device_goes_on_and_says_so(make_study):
    trained(make_study(max_steps=4, max_seconds=1e-9), "qlora")
    lines = []
    study = make_study(max_steps=4, micro_batch_size=1)
    record = TrainingRun(study, "qlora", log=lines.append).train()
    assert record["status"] == "ok"
    assert any(
        "was made with plan micro_batch_size=2" in line and "here it is micro_batch_size=1" in line for line in lines
    )


class Late(torch.Tensor):
    """A tensor of a device that is behind: reading it waits until the device has done all that was asked of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__):
            clock.now = max(clock.now, clock.device_until)
        return super().__torch_function__(func, types, args, kwargs or {})


clock = types.SimpleNamespace(now=0.0, device_until=0.0)


class Mark:
    """An event of that device, which notes its time once all that was asked before is done."""

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        self.at = max(clock.now, clock.device_until)

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


@pytest.fixture
def late_device(monkeypatch):
    """A device that works while the host goes on: a step's passes take it 1 s, its update 0.5 s; batches cost 0.25."""
    clock.now = clock.device_until = 0.0
    asked = Stepper.gradients, Stepper.update, Rows.batches

    def launch(seconds):
        clock.device_until = max(clock.device_until, clock.now) + seconds

    def batches(*args):
        clock.now += 0.25
        return asked[2](*args)

    def gradients(*args, **settings):
        loss = asked[0](*args, **settings)
        launch(1.0)
        return loss.as_subclass(Late)

    def update(*args, **settings):
        done = asked[1](*args, **settings)
        launch(0.5)
        return done

    def wait():
        clock.now = max(clock.now, clock.device_until)

    def mean_loss(*args, **settings):
        wait()
        clock.now += 7.0
        return 1.0

    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr("torch.cuda.synchronize", wait)
    monkeypatch.setattr("torch.cuda.Event", Mark)
    monkeypatch.setattr(Rows, "batches", batches)
    monkeypatch.setattr(Stepper, "gradients", gradients)
    monkeypatch.setattr(Stepper, "update", update)
    monkeypatch.setattr("peftlib.train.loop.mean_loss", mean_loss)
    monkeypatch.setattr("peftlib.train.loop.Stopwatch", lambda device: Stopwatch("cuda"))


@pytest.mark.parametrize("eval_steps", [100, 2])
@pytest.mark.parametrize("line_s", [0.0, 0.125, 0.375, 4.0])  # none, less than the rest of an update, about it, more
def test_the_speed_counts_every_wait_and_depends_on_no_log_line(make_study, late_device, line_s, eval_steps):
    def log(line):
        clock.now += line_s

    records_ = []
    for logging_steps in (1, 50):
        study = make_study(study=f"every{logging_steps}", logging_steps=logging_steps, eval_steps=eval_steps)
        clock.now = clock.device_until = 0.0
        records_.append(TrainingRun(study, "lora", log=log).train())
    often, seldom = records_
    # The device does an update while the host makes batches, but in the first two steps and those after validation.
    batches_s = 0.25 * (4 if eval_steps == 2 else 2)
    assert often["train_seconds"] == pytest.approx(6 * (1.0 + 0.5) + batches_s)
    assert often["train_seconds"] == seldom["train_seconds"]
    assert often["tokens_per_second"] == seldom["tokens_per_second"]
    assert sum(entry["seconds"] for entry in seldom["history"]) == pytest.approx(seldom["train_seconds"])


def test_on_a_cpu_log_lines_callbacks_saving_and_validation_belong_to_no_step(make_study, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def taking(seconds, real):
        def call(*args, **settings):
            now[0] += seconds
            return real(*args, **settings)

        return call

    monkeypatch.setattr("peftlib.train.loop.mean_loss", taking(100.0, lambda *args, **settings: 1.0))
    monkeypatch.setattr("peftlib.storage.saver.Saver.save", taking(1000.0, lambda *args, **settings: None))
    monkeypatch.setattr("peftlib.train.placement.ExecutionPlan.after_step", taking(10.0, lambda *args: None))
    monkeypatch.setattr("peftlib.train.loop.CallbackList.show", taking(10.0, CallbackList.show))
    monkeypatch.setattr(Stepper, "gradients", taking(2.0, Stepper.gradients))
    run = TrainingRun(make_study(eval_steps=2, save_steps=1), "lora", log=taking(0.5, lambda line: None))
    record = run.train()
    assert record["train_seconds"] == pytest.approx(6 * 2.0)


def test_the_record_is_written_before_what_is_optional_and_does_not_depend_on_it(make_study, monkeypatch):
    study, lines = make_study(max_steps=2), []

    def broken(*args):
        kept = records.load(study, "qlora", 0)
        assert kept["status"] == "ok" and kept["weights_sha256"] and not study.checkpoint_dir("qlora", 0).exists()
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("peftlib.train.estimate.matmul_ceiling", broken)
    record = TrainingRun(study, "qlora", log=lines.append).train()
    assert record["status"] == "ok" and record["mfu"] is None
    assert any("was not measured (OutOfMemoryError: planted)" in line for line in lines)


def test_final_weights_are_on_the_disk_with_their_folder_before_a_checkpoint_goes(make_study, monkeypatch):
    study, events = make_study(max_steps=3, save_steps=2), []
    real_sync, real_replace, real_remove = os.fsync, os.replace, CheckpointDir.remove
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (real_replace(a, b), events.append(f"rename {b}")))
    monkeypatch.setattr(CheckpointDir, "remove", lambda self: (events.append("checkpoints"), real_remove(self)))
    trained(study, "hybrid")
    weights, gone = study.weights_dir("hybrid", 0), events.index("checkpoints")
    put = events.index(f"rename {weights}")
    beside = weights.with_name(f".writing-{weights.name}")
    for path in weights.rglob("*"):
        assert str(beside / path.relative_to(weights)) in events[:put], path
    assert str(beside) in events[:put] and str(weights.parent) in events[put:gone]
    assert f"rename {study.record_path('hybrid', 0)}" in events[put:gone]


def test_weights_that_are_no_longer_what_was_trained_are_trained_again(make_study):
    study = make_study(max_steps=2)
    trained(study, "qlora")
    path = study.weights_dir("qlora", 0) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"xxxx")
    run = TrainingRun(study, "qlora", log=lambda line: None)
    assert run.finished_record() is None and run.train()["status"] == "ok"
