"""A run and its checkpoint: what is kept of it, how it goes on, and a new run from another's weights."""

import contextlib
import math
from dataclasses import dataclass

import torch

from peftlib import data
from peftlib.core import record as records
from peftlib.core.config import current_names, differences
from peftlib.core.env import generator_states, set_generator_states
from peftlib.core.errors import CheckpointError, NonFiniteLossError, StudyError
from peftlib.data.dedup import prompt_key
from peftlib.models import identity, saved
from peftlib.models.base_weights import BaseWeights
from peftlib.models.inspect import trainable
from peftlib.storage import delta
from peftlib.storage.checkpoint import Checkpoint, CheckpointDir
from peftlib.train import changes, nonfinite

_SAME = "take the same model, method and ranks"
# What a checkpoint's state must have; later versions have added to it.
_STATE = {
    "config": dict,
    "run_hash": str,
    "split_hash": str,
    "progress": dict,
    "history": list,
    "valid_history": list,
    "scaler": dict,
    "layers": list,
}
_UNKNOWN_AT_FIRST = ("first_step_s", "peak_reserved_bytes")


@dataclass
class Progress:
    """What a run has done so far; all of it is in every checkpoint."""

    step: int = 0
    train_tokens: int = 0  # unpadded, scored or not
    train_seconds: float = 0.0  # steps with all waits between them, without loading, validation and saving
    first_step_s: float | None = None
    skipped_steps: int = 0
    peak_memory_bytes: int = 0
    peak_reserved_bytes: int | None = None

    def count(self, tokens, seconds, is_skipped):
        """Take in one more step."""
        if self.step == 0:
            self.first_step_s = seconds
        self.step += 1
        self.train_tokens += tokens
        self.train_seconds += seconds
        self.skipped_steps += is_skipped


def checkpoint_of(run):
    """The Checkpoint of a TrainingRun between two steps; its tensors are the run's own.

    NonFiniteLossError: a weight or a part of the optimizer's state (named) is inf or nan.
    """
    nonfinite.require_finite(
        nonfinite.tensors_of(run.model, run.optimizer), f"the checkpoint of step {run.progress.step}"
    )
    state = {
        "method": run.name,
        "config": run.cfg.fields_of("data", "math"),
        "run_hash": run.cfg.run_hash(run.name),
        "split_hash": run.manifest["split_hash"],
        **_base_of(run),
        "progress": vars(run.progress),
        "history": run.record["history"],
        "valid_history": run.record["valid_history"],
        "scaler": run.scaler.state_dict(),
        "device": run.record["device"],
        "plan": run.placement.description,
        "layers": run.record["layers"],
        "precision": run.precision,
        "rate_factor": run.rate_factor,
        "changes": run.record["changes"],
    }
    weights = {name: p.data for name, p in trainable(run.model).items()}
    return Checkpoint(weights, run.optimizer.state_dict(), state, generator_states())


def begin(run):
    """Take up the newest checkpoint, or start: from another study's weights (cfg.fork), or over after inf or nan.

    Errors as in `go_on` and `fork`.
    """
    if go_on(run):
        return
    if run.cfg.fork:
        fork(run)
    failed = records.load(run.study, run.name, run.cfg.seed) or {}
    is_ours = failed.get("run_hash") == run.cfg.run_hash(run.name) and failed.get("status") == "failed"
    if is_ours and (failed.get("error") or "").startswith(NonFiniteLossError.__name__):
        before = failed.get("rate_factor") or 1.0  # of a run that met inf or nan before its first checkpoint
        run.rate_factor = before
        if before != 1.0:
            changes.note(run, changes.RATE_FACTOR, 1.0, before)
        changes.set_rate_factor(run, before)
    elif run.cfg.resume_rate_factor != 1.0:
        run.log("resume_rate_factor is for runs that go on; this one starts, at the study's learning rates")


def go_on(run):
    """Take up the newest checkpoint that verifies; whether there was one.

    CheckpointError: it was made with other settings (fields named), layers, or schema version, or holds something else
    than a checkpoint of this run.
    """
    found, skipped = run.checkpoints.newest()
    for line in skipped:
        run.log(f"checkpoint not used: {line}")
    if found is None:
        return False
    where, state = run.checkpoints.folder, found.state
    with _other_content(where):
        checked_state(state, run.plan.steps)
    if (state["run_hash"], state["split_hash"]) != (run.cfg.run_hash(run.name), run.manifest["split_hash"]):
        changed = differences(current_names(state["config"]), run.cfg.fields_of("data", "math")) or ["split_hash"]
        raise CheckpointError(
            f"the checkpoint in {where} was made with other settings: {'; '.join(changed)}. "
            "Set them back, choose another study name (with fork = this one, it starts from these weights), or delete "
            "that folder to start over."
        )
    _require_base(state, run, f"the checkpoint in {where}")
    changes.require_same_architecture(state["layers"], run.record["layers"], where)
    weights = _fitting(_whole(found.weights, run), run, f"the checkpoint in {where}")
    with _other_content(where):
        run.optimizer.require_state(found.optimizer)
        run.optimizer.load_state_dict(found.optimizer)
        if state["scaler"] and run.scaler.is_enabled():  # empty: of a session without fp16, so this one's starts anew
            run.scaler.load_state_dict(state["scaler"])
        set_generator_states(found.generators)
    for name, p in trainable(run.model).items():
        p.data.copy_(weights[name])
    run.progress = Progress(**state["progress"])
    run.record.update(history=state["history"], valid_history=state["valid_history"], changes=state.get("changes", []))
    changes.note_session(run, state)
    changes.set_rate_factor(run, state.get("rate_factor", 1.0))
    return True


@contextlib.contextmanager
def _other_content(where):
    """Turns what follows from a checkpoint that is whole but holds other things into a CheckpointError."""
    try:
        yield
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(
            f"the checkpoint in {where} is whole but does not hold what a run of this kind saves "
            f"({type(error).__name__}: {error}): delete that folder to start over, or bring back a copy of it"
        ) from error


def checked_state(state, steps):
    """Raise unless a checkpoint's state has the parts that a run goes on from. steps: of the whole run.

    KeyError, TypeError, ValueError: the part that is missing, of another type, or out of range.
    """
    for name, kind in _STATE.items():
        if not isinstance(state[name], kind):
            raise TypeError(f"{name} is {state[name]!r:.60}")
    Progress(**state["progress"])
    for name, value in state["progress"].items():
        if not (_is_number(value) and value >= 0 or (value is None and name in _UNKNOWN_AT_FIRST)):
            raise ValueError(f"progress: {name} is {value!r:.60}")
    if not (isinstance(state["progress"]["step"], int) and state["progress"]["step"] <= steps):
        raise ValueError(f"progress: step is {state['progress']['step']}, the run has {steps} steps")
    if not _is_number(state.get("rate_factor", 1.0)) or state.get("rate_factor", 1.0) <= 0:
        raise ValueError(f"rate_factor is {state['rate_factor']!r:.60}")
    for entry in [*state["history"], *state["valid_history"], *state["layers"], *state.get("changes", [])]:
        if not isinstance(entry, dict):
            raise TypeError(f"an entry of a list is {entry!r:.60}")
    for entry in state["history"]:
        if not all(_is_number(entry[name]) for name in ("step", "tokens", "seconds", "learning_rate")):
            raise TypeError(f"history: an entry is {entry!r:.120}")
        if not all(entry[name] is None or _is_number(entry[name]) for name in ("loss", "grad_norm")):
            raise TypeError(f"history: an entry is {entry!r:.120}")
    for entry in state["valid_history"]:
        if not (_is_number(entry["step"]) and (entry["valid_loss"] is None or _is_number(entry["valid_loss"]))):
            raise TypeError(f"valid_history: an entry is {entry!r:.120}")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fitting(weights, run, what):
    """`weights`, {name: tensor}, if they are those that train here.

    CheckpointError: other names or shapes, or inf or nan in one of them.
    """
    params = trainable(run.model)
    unlike = [name for name in params if name not in weights] + [name for name in weights if name not in params]
    if unlike:
        raise CheckpointError(f"{what} holds other weights ({', '.join(unlike[:3])}): {_SAME}")
    for name, p in params.items():
        if weights[name].shape != p.shape:
            shapes = f"{tuple(weights[name].shape)}, here it has {tuple(p.shape)}"
            raise CheckpointError(f"{what}: {name} has the shape {shapes}: {_SAME}")
    unfit = nonfinite.first_unfit(weights)
    if unfit is not None:
        raise CheckpointError(f"{what}: {unfit} holds inf or nan, so nothing can go on from it: delete it")
    return weights


def fork(run):
    """Start from the weights that the run of the same method and seed reached in study cfg.fork, with a fresh optimizer.

    StudyError: that study has neither a checkpoint nor finished weights of it, or learnt rows that are tested or
    validated here. CheckpointError: the weights do not fit.
    """
    other = run.study.folder.parent / run.cfg.fork
    _refuse_learnt_rows(other, run)
    weights, where, made_with = _reached(other, run)
    _require_base(made_with, run, f"fork={run.cfg.fork!r} ({where})")
    weights = _fitting(_whole(weights, run), run, f"fork={run.cfg.fork!r}: what its {run.name} trained")
    for name, p in trainable(run.model).items():
        p.data.copy_(weights[name])
    run.record["forked_from"] = where
    run.log(f"starts from the weights of {where}")


def _prompt_keys(folder, split):
    conversations = data.load_split(folder, split).column("messages")
    return [prompt_key([message["content"] for message in messages[:-1]]) for messages in conversations]


def _refuse_learnt_rows(other, run):
    learnt = set(_prompt_keys(other / "data", "train"))
    for split in ("test", "valid"):
        rows = _prompt_keys(run.study.data_dir, split)
        known = sum(key in learnt for key in rows)
        if known:
            raise StudyError(
                f"fork={run.cfg.fork!r}: {known} of the {len(rows)} {split} rows here were trained on there, so scores would "
                "mean nothing: give this study the same sources, split_seed and numbers of rows"
            )


def _whole(weights, run):
    """A checkpoint's weights, those that are kept as differences made whole."""
    if not any(isinstance(kept, dict) for kept in weights.values()):
        return weights
    base = BaseWeights(run.cfg.model)

    def whole(name, kept):
        if not isinstance(kept, dict):
            return kept
        return delta.restored(name, kept, base.get(name, torch.float32 if "low" in kept else torch.bfloat16))

    return {name: whole(name, kept) for name, kept in weights.items()}


def _reached(folder, run):
    """({name: tensor}, where they come from in words, what names the base model they were made with)."""
    place = f"{run.name}-s{run.cfg.seed}"
    checkpoints = CheckpointDir(folder / "checkpoints" / place, keep=1, log=run.log)
    found, _ = checkpoints.newest()
    if found is not None:
        with _other_content(checkpoints.folder):
            return found.weights, f"{folder.name}, {place}, step {found.state['progress']['step']}", found.state
    trained = folder / "weights" / place
    files = sorted(trained.glob("*.safetensors"))
    if not files:
        raise StudyError(
            f"fork={run.cfg.fork!r}: {folder} holds neither a checkpoint nor weights of {place}: train it there first"
        )
    identity.require_weights(trained, saved.record_of(trained), log=run.log)
    tensors = {name: tensor for path in files for name, tensor in saved.tensors_of(path).items()}
    # PEFT leaves the adapter's name out of what it saves.
    names = {name.replace(".default", ""): name for name in trainable(run.model)}
    found = {names.get(name, name): tensor for name, tensor in tensors.items()}
    chosen = {name: found[name] for name in trainable(run.model) if name in found}
    return chosen, f"{folder.name}, {place}, finished", saved.facts_of(trained)


def _base_of(run):
    """What tells the base model of a run from another of its name and shapes."""
    return {name: run.record[name] for name in ("model_sha256", "model_revision")}


def _require_base(kept, run, what):
    identity.require_base(kept, run.cfg.model, what=what, log=run.log, error=CheckpointError)
