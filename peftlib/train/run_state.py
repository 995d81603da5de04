"""A run's checkpoint: what it contains, how a run resumes, and how a run starts from another study's weights."""

import contextlib
import math
from dataclasses import dataclass

import torch

from peftlib import data
from peftlib.core import record as records
from peftlib.core.config import current_names, differences
from peftlib.core.env import generator_states, set_generator_states
from peftlib.core.errors import CheckpointError, NonFiniteLossError, StudyError
from peftlib.core.json_reading import Map, Maybe, fault
from peftlib.data.dedup import prompt_key
from peftlib.models import identity, saved
from peftlib.models.inspect import core, layer_table, trainable
from peftlib.models.load import guard_four_bit
from peftlib.models.shapes import Shape
from peftlib.storage.checkpoint import Checkpoint, CheckpointDir
from peftlib.storage.saver import Saver, require_space
from peftlib.train import memory_model, run_record
from peftlib.train.step import first_nonfinite, require_finite

_SAME = "use the same model, method and ranks"
_STEP = {"step": int, "tokens": float, "seconds": float, "learning_rate": float}
# Shape of a checkpoint's state; fields added by later versions are optional.
_STATE = {
    "config": {},
    "run_hash": str,
    "split_hash": str,
    "progress": Map(Maybe(float)),
    "history": [{**_STEP, "loss": Maybe(float), "grad_norm": Maybe(float)}],
    "valid_history": [{"step": int, "valid_loss": Maybe(float)}],
    "scaler": {},
    "layers": [{}],
    "rate_factor?": float,
    "changes?": [{}],
}
_UNKNOWN_AT_FIRST = ("first_step_s", "peak_reserved_bytes")


@dataclass
class Progress:
    """What a run has done so far; every checkpoint contains all of it."""

    step: int = 0
    train_tokens: int = 0  # without padding, scored or not
    train_seconds: float = 0.0  # steps and waits, excluding loading, log lines, validation and saving
    first_step_s: float | None = None
    skipped_steps: int = 0
    peak_memory_bytes: int = 0
    peak_reserved_bytes: int | None = None

    def count(self, tokens, seconds, is_skipped):
        """Add one step."""
        if self.step == 0:
            self.first_step_s = seconds
        self.step += 1
        self.train_tokens += tokens
        self.train_seconds += seconds
        self.skipped_steps += is_skipped


def checkpoint_of(run):
    """The Checkpoint of a TrainingRun between two steps; it shares the run's tensors.

    NonFiniteLossError: a weight or a part of the optimizer's state (named) is inf or nan.
    """
    params = trainable(run.model)
    moments = {
        f"{key} of {name}": value
        for name, p in params.items()
        for key, value in run.optimizer.state.get(p, {}).items()
        if isinstance(value, torch.Tensor)
    }
    require_finite(params | moments, f"the checkpoint of step {run.progress.step}")
    state = {
        "method": run.name,
        "config": run.cfg.fields_of("data", "math"),
        "run_hash": run.cfg.run_hash(run.name),
        "split_hash": run.manifest["split_hash"],
        **{name: run.record[name] for name in ("model_sha256", "model_revision")},
        "progress": vars(run.progress),
        "history": run.record["history"],
        "valid_history": run.record["valid_history"],
        "scaler": run.scaler.state_dict(),
        "device": run.record["device"],
        "plan": run.execution.description,
        "layers": run.record["layers"],
        "precision": run.precision,
        "processes": run.processes.world,
        "rate_factor": run.rate_factor,
        "changes": run.record["changes"],
    }
    weights = {name: p.data for name, p in params.items()}
    return Checkpoint(weights, run.optimizer.whole_state_dict(), state, generator_states())


def checkpoint_bytes(run):
    """Bytes of a TrainingRun's checkpoint: trained weights, and optimizer state as counted by the memory model."""
    weights = sum(p.numel() * p.element_size() for p in trainable(run.model).values())
    whole = run.cfg.replace(shard_optimizer=False)
    return weights + memory_model.optimizer_bytes(Shape.of(core(run.model).config), run.name, whole)


def open_run(run):
    """Open the record of a TrainingRun, and restore the newest checkpoint if there is one."""
    run.progress = Progress()
    how = {"device": run.device, "precision": run.precision, "precision_reason": run.precision_reason}
    run.record = identity.new_record(run.study, run.name, **how)
    run.record["layers"] = layer_table(run.model)
    size = checkpoint_bytes(run)
    run.saver = Saver(
        run.checkpoints,
        every=run.cfg.save_steps if run.processes.is_main else math.inf,  # the main process decides
        stall_share=run.cfg.max_save_overhead,
        is_background=run.device != "cpu",
        expected_bytes=size,
        log=run.log,
    )
    resume_or_start(run)
    run.saver.start(run.progress.step)
    if run.method.four_bit:
        guard_four_bit(run.model, run.method.four_bit)
    if run.processes.is_main:
        require_space(run.checkpoints, run.study.folder, f"{run.name}-s{run.cfg.seed}", size)


def resume_or_start(run):
    """Resume from the newest checkpoint, or start: from another study's weights (cfg.fork), or over after inf or nan.

    Errors: see `resume_from_checkpoint` and `init_from_study`.
    """
    if resume_from_checkpoint(run):
        return
    if run.cfg.fork:
        init_from_study(run)
    failed = records.load(run.study, run.name, run.cfg.seed) or {}
    is_ours = failed.get("run_hash") == run.cfg.run_hash(run.name) and failed.get("status") == "failed"
    if is_ours and (failed.get("error") or "").startswith(NonFiniteLossError.__name__):
        run.rate_factor = failed.get("rate_factor") or 1.0  # inf or nan came before the first checkpoint
        if run.rate_factor != 1.0:
            run_record.note_change(run, run_record.RATE_FACTOR, 1.0, run.rate_factor)
        run_record.set_rate_factor(run, run.rate_factor)
    elif run.cfg.resume_rate_factor != 1.0:
        run.log("resume_rate_factor applies only to resumed runs: this run starts with the study's learning rates")


def resume_from_checkpoint(run):
    """Restore the newest valid checkpoint; returns whether there was one.

    CheckpointError: it was made with other settings (fields named), layers or schema version, or it is not a
    checkpoint of this run.
    """
    found, skipped = run.checkpoints.newest()
    for line in skipped:
        run.log(f"checkpoint not used: {line}")
    if found is None:
        return False
    where, state = run.checkpoints.folder, found.state
    what = f"the checkpoint in {where}"
    with _refusing_other_content(where):
        _require_state(state, run.plan.steps)
    if (state["run_hash"], state["split_hash"]) != (run.cfg.run_hash(run.name), run.manifest["split_hash"]):
        changed = differences(current_names(state["config"]), run.cfg.fields_of("data", "math")) or ["split_hash"]
        raise CheckpointError(
            f"{what} was made with other settings: {'; '.join(changed)}. Change them back, choose another study name "
            "(with fork = this study, it starts from these weights), or delete that folder to start over."
        )
    run_record.require_same_architecture(state["layers"], run.record["layers"], where)
    weights = _fitting_weights(found.weights, state, run, what)
    with _refusing_other_content(where):
        run.optimizer.require_state(found.optimizer)
        run.optimizer.load_state_dict(found.optimizer)
        if state["scaler"] and run.scaler.is_enabled():  # empty if that session was not fp16
            run.scaler.load_state_dict(state["scaler"])
        set_generator_states(found.generators)
    _load_weights(run, weights)
    run.progress = Progress(**state["progress"])
    run.record.update(history=state["history"], valid_history=state["valid_history"], changes=state.get("changes", []))
    run_record.note_session(run, state)
    run_record.set_rate_factor(run, state.get("rate_factor", 1.0))
    return True


def init_from_study(run):
    """Start with a fresh optimizer from the weights of cfg.fork's run of the same method and seed.

    StudyError: that study has neither a checkpoint nor final weights of this run, or was trained on rows that are
    test or validation rows here. CheckpointError: the weights do not fit.
    """
    other = run.study.folder.parent / run.cfg.fork
    _refuse_leaked_rows(other, run)
    weights, where, made_with = _weights_reached(other, run)
    what = f"fork={run.cfg.fork!r}: what its {run.name} trained"
    _load_weights(run, _fitting_weights(weights, made_with, run, what))
    run.record["forked_from"] = where
    run.log(f"starting from the weights of {where}")


@contextlib.contextmanager
def _refusing_other_content(where):
    """Convert errors caused by an intact checkpoint with unexpected content into a CheckpointError."""
    try:
        yield
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(
            f"the checkpoint in {where} is undamaged but does not contain what this kind of run saves "
            f"({type(error).__name__}: {error}): delete that folder to start over, or restore a copy of it"
        ) from error


def _require_state(state, steps):
    """ValueError, TypeError: a part of a checkpoint's state is missing, invalid, or out of range. steps: of the
    full run."""
    found = fault(state, _STATE) or fault(state["progress"], {"step": int}, "progress")
    if found:
        raise ValueError(found)
    progress = Progress(**state["progress"])
    for name, value in vars(progress).items():
        if (value is None and name not in _UNKNOWN_AT_FIRST) or (value is not None and value < 0):
            raise ValueError(f"progress.{name} is {value}")
    if progress.step > steps:
        raise ValueError(f"progress.step is {progress.step}, but the run has {steps} steps")
    if state.get("rate_factor", 1.0) <= 0:
        raise ValueError(f"rate_factor is {state['rate_factor']}")


def _fitting_weights(weights, made_with, run, what):
    """`weights` as {name: tensor}, checked to match the weights that train here. made_with: identifies their base
    model.

    CheckpointError: another base model, other names or shapes, or inf or nan in one of them.
    """
    identity.require_base(made_with, run.cfg.model, what=what, log=run.log, error=CheckpointError)
    params = trainable(run.model)
    unlike = [name for name in params if name not in weights] + [name for name in weights if name not in params]
    if unlike:
        raise CheckpointError(f"{what} contains other weights ({', '.join(unlike[:3])}): {_SAME}")
    for name, p in params.items():
        if weights[name].shape != p.shape:
            shapes = f"{tuple(weights[name].shape)}, but here it has {tuple(p.shape)}"
            raise CheckpointError(f"{what}: {name} has the shape {shapes}: {_SAME}")
    unfit = first_nonfinite(weights)
    if unfit is not None:
        raise CheckpointError(f"{what}: {unfit} contains inf or nan, so no run can continue from it: delete it")
    return weights


def _load_weights(run, weights):
    for name, p in trainable(run.model).items():
        p.data.copy_(weights[name])


def _refuse_leaked_rows(other, run):
    learnt = set(_prompt_keys(other / "data", "train"))
    for split in ("test", "valid"):
        rows = _prompt_keys(run.study.data_dir, split)
        known = sum(key in learnt for key in rows)
        if known:
            raise StudyError(
                f"fork={run.cfg.fork!r}: {known} of the {len(rows)} {split} rows here were training rows there, so "
                "scores would be meaningless: give this study the same sources, split_seed and numbers of rows"
            )


def _prompt_keys(folder, split):
    conversations = data.load_split(folder, split).column("messages")
    return [prompt_key([message["content"] for message in messages[:-1]]) for messages in conversations]


def _weights_reached(folder, run):
    """({name: tensor}, a description of their origin, facts that identify their base model)."""
    name = f"{run.name}-s{run.cfg.seed}"
    checkpoints = CheckpointDir(folder / "checkpoints" / name, keep=1, log=run.log)
    found, _ = checkpoints.newest()
    if found is not None:
        with _refusing_other_content(checkpoints.folder):
            return found.weights, f"{folder.name}, {name}, step {found.state['progress']['step']}", found.state
    trained = folder / "weights" / name
    files = sorted(trained.glob("*.safetensors"))
    if not files:
        raise StudyError(
            f"fork={run.cfg.fork!r}: {folder} has neither a checkpoint nor weights of {name}: train it there first"
        )
    identity.require_weights(trained, saved.record_of(trained), log=run.log)
    # PEFT omits the adapter's name when saving.
    ours = {weight.replace(".default", ""): weight for weight in trainable(run.model)}
    found = {ours.get(w, w): tensor for path in files for w, tensor in saved.tensors_of(path).items()}
    chosen = {weight: found[weight] for weight in trainable(run.model) if weight in found}
    return chosen, f"{folder.name}, {name}, finished", saved.facts_of(trained)
