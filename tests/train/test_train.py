import json
import os
import signal

import pytest
import torch
from trainings import CUTS, FAST, METHODS, STUDIED, assert_equal_weights, kept_weights, trained

from peftlib.core import record as records
from peftlib.core.errors import StudyError
from peftlib.evaluation.evaluate import evaluate
from peftlib.models.inspect import ATTENTION, MLP, layer_table, trainable
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.train.batching import Rows, mean_loss
from peftlib.train.loop import TrainingRun


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
            "hybrid_mlp": "lora_" in name or any(f".{leaf}." in name for leaf in MLP),
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
    with pytest.raises(StudyError, match="stopped at step 1 of 6.*or with peftlib train galore"):
        records.require_ok(record)
    with pytest.raises(StudyError, match="stopped at step 1 of 6"):
        evaluate(study, "galore", log=lambda line: None)
    lines = []
    assert TrainingRun(make_study(), "galore", log=lines.append).train()["steps"] == 6
    assert "resumes at step 1 of 6" in lines[0]


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


def test_another_plan_or_device_goes_on_and_says_so(make_study):
    trained(make_study(max_steps=4, max_seconds=1e-9), "qlora")
    lines = []
    study = make_study(max_steps=4, micro_batch_size=1)
    record = TrainingRun(study, "qlora", log=lines.append).train()
    assert record["status"] == "ok"
    assert any(
        "was made with plan micro_batch_size=2" in line and "now it is micro_batch_size=1" in line for line in lines
    )


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
