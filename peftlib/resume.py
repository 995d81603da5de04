"""A run and its checkpoint: what is kept of it, how it goes on, and a new run from another's weights."""

from dataclasses import dataclass

from peftlib import compact, data, identity, trained_files
from peftlib.checkpoint import Checkpoint, CheckpointDir
from peftlib.config import differences
from peftlib.errors import CheckpointError, StudyError
from peftlib.models import trainable
from peftlib.seeds import generator_states, set_generator_states


@dataclass
class Progress:
    """What a run has done so far; all of it is in every checkpoint."""

    step: int = 0
    train_tokens: int = 0  # unpadded, scored or not
    train_seconds: float = 0.0  # steps alone: no loading, validation or saving
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
    """The Checkpoint of a TrainingRun between two steps; its tensors are the run's own."""
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
    }
    weights = {name: p.data for name, p in trainable(run.model).items()}
    return Checkpoint(weights, run.optimizer.state_dict(), state, generator_states())


def go_on(run):
    """Take up the newest checkpoint that verifies; whether there was one.

    CheckpointError: it was made with other settings (fields named), layers, or schema version.
    """
    found, skipped = run.checkpoints.newest()
    for line in skipped:
        run.log(f"checkpoint not used: {line}")
    if found is None:
        return False
    state = found.state
    if (state["run_hash"], state["split_hash"]) != (run.cfg.run_hash(run.name), run.manifest["split_hash"]):
        changed = differences(state["config"], run.cfg.fields_of("data", "math")) or ["split_hash"]
        raise CheckpointError(
            f"the checkpoint in {run.checkpoints.folder} was made with other settings: {'; '.join(changed)}. "
            "Set them back, choose another study name (with fork = this one, it starts from these weights), or delete "
            "that folder to start over."
        )
    _require_base(state, run, f"the checkpoint in {run.checkpoints.folder}")
    if state["layers"] != run.record["layers"]:
        raise CheckpointError(
            f"the model's layers are {run.record['layers']}, those of the checkpoint in {run.checkpoints.folder} "
            f"{state['layers']}: take the model and versions it was made with"
        )
    for what, now in (("device", run.record["device"]), ("plan", run.placement.description)):
        if state[what] != now:
            run.log(f"the checkpoint was made with {what} {state[what]}, here it is {now}: going on, not bit for bit")
    weights = _whole(found.weights, run)
    for name, p in trainable(run.model).items():
        p.data.copy_(weights[name])
    run.optimizer.load_state_dict(found.optimizer)
    run.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])
    run.record.update(history=state["history"], valid_history=state["valid_history"])
    set_generator_states(found.generators)
    return True


def fork(run):
    """Start from the weights that the run of the same method and seed reached in study cfg.fork, with a fresh optimizer.

    StudyError: that study has neither a checkpoint nor finished weights of it, or learnt rows that are tested or
    validated here. CheckpointError: the weights do not fit.
    """
    other = run.study.folder.parent / run.cfg.fork
    _refuse_learnt_rows(other, run)
    weights, where, made_with = _reached(other, run)
    _require_base(made_with, run, f"fork={run.cfg.fork!r} ({where})")
    params, weights = trainable(run.model), _whole(weights, run)
    unlike = [name for name, p in params.items() if name not in weights or weights[name].shape != p.shape]
    if unlike or len(weights) != len(params):
        raise CheckpointError(
            f"fork={run.cfg.fork!r}: its {run.name} trained other weights ({unlike[:3] or 'more of them'}): "
            "take the same model, method and ranks"
        )
    for name, p in params.items():
        p.data.copy_(weights[name])
    run.record["forked_from"] = where
    run.log(f"starts from the weights of {where}")


def _refuse_learnt_rows(other, run):
    learnt = {row["prompt_sha256"] for row in data.load_split(other / "data", "train")}
    for split in ("test", "valid"):
        rows = data.load_split(run.study.data_dir, split)
        known = sum(row["prompt_sha256"] in learnt for row in rows)
        if known:
            raise StudyError(
                f"fork={run.cfg.fork!r}: {known} of the {len(rows)} {split} rows here were trained on there, so scores would "
                "mean nothing: give this study the same sources, split_seed and numbers of rows"
            )


def _whole(weights, run):
    """A checkpoint's weights, those that are kept as differences made whole."""
    if not any(isinstance(kept, dict) for kept in weights.values()):
        return weights
    base = compact.BaseWeights(run.cfg.model)
    return {name: base.grown(name, kept) if isinstance(kept, dict) else kept for name, kept in weights.items()}


def _reached(folder, run):
    """({name: tensor}, where they come from in words, what names the base model they were made with)."""
    place = f"{run.name}-s{run.cfg.seed}"
    found, _ = CheckpointDir(folder / "checkpoints" / place, keep=1, log=run.log).newest()
    if found is not None:
        return found.weights, f"{folder.name}, {place}, step {found.state['progress']['step']}", found.state
    trained = folder / "weights" / place
    files = sorted(trained.glob("*.safetensors"))
    if not files:
        raise StudyError(
            f"fork={run.cfg.fork!r}: {folder} holds neither a checkpoint nor weights of {place}: train it there first"
        )
    identity.require_weights(trained, trained_files.record_of(trained), log=run.log)
    tensors = {name: tensor for path in files for name, tensor in trained_files.tensors_of(path).items()}
    # PEFT leaves the adapter's name out of what it saves.
    names = {name.replace(".default", ""): name for name in trainable(run.model)}
    found = {names.get(name, name): tensor for name, tensor in tensors.items()}
    chosen = {name: found[name] for name in trainable(run.model) if name in found}
    return chosen, f"{folder.name}, {place}, finished", trained_files.facts_of(trained)


def _base_of(run):
    """What tells the base model of a run from another of its name and shapes."""
    return {name: run.record[name] for name in ("model_sha256", "model_revision")}


def _require_base(kept, run, what):
    identity.require_base(kept, run.cfg.model, what=what, log=run.log, error=CheckpointError)
