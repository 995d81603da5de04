"""A run goes on in another precision, on another card, and from nothing but a checkpoint of its own kind."""

import io
import itertools
import json
import pickle
import shutil

import pytest
import tiny
import torch
from trainings import trained

from peftlib import methods
from peftlib.core import files
from peftlib.core.errors import CheckpointError, ModelError
from peftlib.models.inspect import PROJECTIONS, trainable
from peftlib.models.load import load_base
from peftlib.storage import checkpoint
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.train import run_record, run_state
from peftlib.train.loop import TrainingRun

PRECISIONS = ("bf16", "fp16", "fp32")
# Each of the six ordered pairs of precisions follows somewhere.
ROUND = ("bf16", "fp16", "fp32", "bf16", "fp32", "fp16", "bf16")
SLOW = pytest.mark.slow


def one_step(study, method, lines):
    run = TrainingRun(study, method, log=lines.append)
    return run, run.train()


CASES = [
    *(pytest.param(method, ROUND, marks=SLOW) for method in methods.METHODS),
    pytest.param("hybrid", ("bf16", "fp16", "fp32")),
]


@pytest.mark.parametrize("method, precisions", CASES)
def test_a_run_goes_on_in_any_other_precision(make_study, method, precisions):
    fields = {"max_steps": len(precisions), "epochs": 2, "galore_update_interval": 2, "max_seconds": 1e-9}
    lines = []
    for at, precision in enumerate(precisions, start=1):
        run, record = one_step(make_study(precision=precision, **fields), method, lines)
        assert record["steps"] == at and record["precision"] == precision
        assert run.scaler.is_enabled() == (precision == "fp16")
        weights = trainable(run.model)
        assert {p.dtype for p in weights.values()} == {torch.float32}  # as a fresh run of this precision has them
        for name, p in weights.items():
            for part, value in run.optimizer.state[p].items():
                if isinstance(value, torch.Tensor) and part.startswith(("exp_avg", "basis", "update_norm")):
                    assert value.dtype == torch.float32, (name, part)
    assert record["status"] == "ok" and record["skipped_steps"] == 0
    told = [(c["step"], c["from"], c["to"]) for c in record["changes"] if c["what"] == "precision"]
    assert told == [(at, *pair) for at, pair in enumerate(itertools.pairwise(precisions), start=1)]
    assert all(change["at"] for change in record["changes"])
    assert any("made with precision bf16, now it is fp16: results will not be bit-identical" in line for line in lines)
    four_bit = [line for line in lines if "4-bit weights are quantized from that" in line]
    assert bool(four_bit) == bool(methods.find(method).four_bit)
    said = list(run_record.change_sentences(record))
    assert said[0].startswith(f"{method} (seed 0) continued in fp16 from step 1 on (before: bf16)")


def test_light_weights_and_moments_go_on_in_another_precision_as_they_were(make_study):
    fields = {"galore_weights": "bf16", "moment_bits": 8, "max_steps": 2, "max_seconds": 1e-9}
    lines = []
    run, _ = one_step(make_study(precision="bf16", **fields), "galore", lines)
    kept = {name: p.detach().clone() for name, p in trainable(run.model).items()}
    again = TrainingRun(make_study(precision="fp16", **fields), "galore", log=lines.append)
    seen = {}
    one = again._step
    again._step = lambda: (
        seen.update({n: p.detach().clone() for n, p in trainable(again.model).items()}),
        one(),
    )
    assert again.train()["status"] == "ok"
    assert {p.dtype for p in seen.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(seen[name], value) and seen[name].dtype == value.dtype for name, value in kept.items())


def test_four_bit_weights_are_those_of_another_precision_where_the_files_hold_16_bits(tmp_path):
    import tiny

    tiny.model(hidden_size=128).to(torch.bfloat16).save_pretrained(tmp_path)
    found = []
    for precision in PRECISIONS:
        base = load_base(str(tmp_path), precision=precision, device="cpu", four_bit=PROJECTIONS)
        packed = [p for p in base.parameters() if getattr(p, "quant_state", None) is not None]
        found.append([(p.data.clone(), p.quant_state.absmax.clone()) for p in packed])
    for other in found[1:]:
        for (codes, scales), (codes2, scales2) in zip(found[0], other, strict=True):
            assert torch.equal(codes, codes2) and torch.equal(scales, scales2)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder for the checkpoints of a run that has done two steps; filled by the first test that needs them."""
    return tmp_path_factory.mktemp("two") / "steps"


@pytest.fixture
def cut(make_study, two_steps):
    """(study, its CheckpointDir) of a run of the hybrid that has done two steps."""
    study = make_study(max_seconds=1e-9)
    folder = study.checkpoint_dir("hybrid", 0)
    if two_steps.exists():
        shutil.copytree(two_steps, folder)
    else:
        for _ in range(2):
            TrainingRun(study, "hybrid", log=lambda line: None).train()
        shutil.copytree(folder, two_steps)
    return study, CheckpointDir(folder, keep=1)


def rewrite(folder, change):
    """Change what the newest checkpoint holds, with all digests right, as somebody else's program would."""
    path = max(folder.folder.glob("step-*"))
    tensors = torch.load(path / "tensors.pt", weights_only=True)
    state = files.read_json(path / "state.json")
    tensors, state = change(tensors, state) or (tensors, state)
    seal_anew(path, tensors, state)


def seal_anew(path, tensors, state):
    content = tensors
    if not isinstance(tensors, bytes):
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        content = buffer.getvalue()
    listed = {
        "tensors.pt": files.write_stream(path / "tensors.pt", lambda out: out.write(content)),
        "state.json": files.write_stream(
            path / "state.json", lambda out: out.write(json.dumps({"schema_version": 1, **state}).encode())
        ),
    }
    manifest = files.sealed({"written_by": "another program", "files": listed})
    files.write_stream(path / "manifest.json", lambda out: out.write(manifest))


class Stranger:
    """What only an unpickler that runs code could read."""


def state_without(name):
    return lambda tensors, state: (tensors, {key: value for key, value in state.items() if key != name})


def wider(tensors, state):
    name = next(name for name in tensors["weights"] if "lora_A" in name)
    tensors["weights"][name] = tensors["weights"][name][:1]  # would be broadcast over the rows


def with_nan(tensors, state):
    next(iter(tensors["weights"].values())).view(-1)[0] = float("nan")


def moment_of_one_row(tensors, state):
    part = next(part for part in tensors["optimizer"]["state"].values() if "basis" in part)
    part["exp_avg"] = part["exp_avg"][:1]


def state_with(**parts):
    return lambda tensors, state: (tensors, {**state, **parts})


ODD = {
    "a pickle with code": (lambda t, s: (pickle.dumps(Stranger()), s), "cannot be loaded as a checkpoint"),
    "no pickle": (lambda t, s: (b"no pickle", s), "cannot be loaded as a checkpoint"),
    "a list": (lambda t, s: ([1, 2], s), "cannot be loaded as a checkpoint .*list"),
    "no weights": (
        lambda t, s: ({k: v for k, v in t.items() if k != "weights"}, s),
        "cannot be loaded as a checkpoint .*'weights'",
    ),
    "one part more": (lambda t, s: ({**t, "more": {}}, s), "'more'"),
    "a weight of text": (lambda t, s: ({**t, "weights": dict.fromkeys(t["weights"], "x")}, s), "is not a tensor"),
    "optimizer of text": (lambda t, s: ({**t, "optimizer": "x"}, s), "does not contain what this kind of run saves"),
    "groups of another number": (
        lambda t, s: ({**t, "optimizer": {**t["optimizer"], "param_groups": []}}, s),
        "does not contain what this kind of run saves .*groups",
    ),
    "no generators": (lambda t, s: ({**t, "generators": {}}, s), "does not contain what .*KeyError: 'python'"),
    "a broadcastable shape": (wider, r"lora_A.* has the shape \(1, .*here it has \(4, .*same model"),
    "a broadcastable moment": (moment_of_one_row, r"exp_avg of weight .* should have the shape \(8, .*but is \(1, "),
    "a nan": (with_nan, "contains inf or nan, so no run can continue from it"),
    "no config hash": (state_without("run_hash"), "does not contain what .*lacks 'run_hash'"),
    "no progress": (state_without("progress"), "does not contain what .*lacks 'progress'"),
    "progress of text": (state_with(progress="x"), 'progress is "x", not an object'),
    "unknown progress": (state_with(progress={"steps": 1}), "progress lacks 'step'"),
    "step of text": (state_with(progress={"step": "2"}), 'progress.step is "2", not a number'),
    "a step beyond the end": (state_with(progress={"step": 900}), "progress.step is 900, but the run has 6 steps"),
    "history of numbers": (state_with(history=[1, 2]), "history.0 is 1, not an object"),
    "history without loss": (
        state_with(history=[{"step": 1, "tokens": 1, "seconds": 1.0, "learning_rate": 1.0}]),
        "lacks 'loss'",
    ),
    "layers of text": (state_with(layers=["x"]), 'layers.0 is "x", not an object'),
    "a rate factor of text": (state_with(rate_factor="x"), 'rate_factor is "x", not a number'),
}


@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_that_is_whole_but_odd_is_refused_by_name_and_stays(cut, name):
    study, folder = cut
    change, message = ODD[name]
    rewrite(folder, change)
    before = sorted(path.read_bytes() for path in folder.folder.rglob("*") if path.is_file())
    with pytest.raises(CheckpointError, match=message) as caught:
        TrainingRun(study, "hybrid", log=lambda line: None).train()
    assert str(folder.folder) in str(caught.value)
    assert sorted(path.read_bytes() for path in folder.folder.rglob("*") if path.is_file()) == before


def test_a_checkpoint_of_the_first_edition_still_goes_on(cut):
    study, folder = cut
    younger = ("precision", "rate_factor", "changes")
    rewrite(folder, lambda t, s: (t, {name: value for name, value in s.items() if name not in younger}))
    record = TrainingRun(study, "hybrid", log=lambda line: None).train()
    assert record["steps"] == 3 and record["changes"] == []


def test_a_fork_takes_no_nan_over(cut, make_study):
    study, folder = cut
    rewrite(folder, with_nan)
    forked = make_study(study="forked", fork=study.folder.name)
    with pytest.raises(CheckpointError, match="fork='tiny': what its hybrid trained: .* contains inf or nan"):
        TrainingRun(forked, "hybrid", log=lambda line: None).train()


def test_a_checkpoint_that_memory_does_not_hold_is_not_called_odd(cut, monkeypatch):
    def full(*args, **settings):
        raise MemoryError

    monkeypatch.setattr(checkpoint.torch, "load", full)
    with pytest.raises(CheckpointError, match="could not be read .*MemoryError.*free memory"):
        cut[1].newest()


def test_what_a_state_must_have_is_what_is_saved(cut):
    assert {name.removesuffix("?") for name in run_state._STATE} <= set(cut[1].newest()[0].state)


def test_a_checkpoint_of_another_model_is_refused(make_study, tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    study = make_study(model=str(folder), max_seconds=1e-9)
    trained(study, "galore")
    tiny.model_folder(folder, seed=1)
    with pytest.raises(ModelError, match="is not the base model of galore"):
        trained(study, "galore")
