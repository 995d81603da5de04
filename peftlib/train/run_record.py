"""A run's record: what changed between its sessions, and finally the saved weights and the results."""

from collections import Counter
from datetime import UTC, datetime

from peftlib.core import record as records
from peftlib.core.errors import CheckpointError, writing
from peftlib.core.files import sha256
from peftlib.models.inspect import core, count_parameters, trainable
from peftlib.models.precision import DTYPES
from peftlib.models.saved import save_trained, settings_digests
from peftlib.models.shapes import Shape
from peftlib.train import estimate
from peftlib.train.step import require_finite

RATE_FACTOR = "rate_factor"
_LOWER = 0.3  # factor on the learning rates that we suggest after inf or nan


def finished(run):
    """The record of a run that has finished and whose weights are intact, else None."""
    record = records.load(run.study, run.name, run.cfg.seed)
    hashes = {"run_hash": run.cfg.run_hash(run.name), "split_hash": run.manifest["split_hash"]}
    if record is None or record["status"] != "ok" or any(record[name] != kept for name, kept in hashes.items()):
        return None
    paths = {run.weights_dir / name: digest for name, digest in record["weights_sha256"].items()}
    return record if all(path.is_file() and sha256(path) == digest for path, digest in paths.items()) else None


def require_alike(run):
    """ConfigError if the processes of a run differ in code, data, settings or precision."""
    if run.processes.world > 1:
        facts = {"precision": run.precision, "run_hash": run.cfg.run_hash(run.name)}
        facts |= {"split_hash": run.manifest["split_hash"], "peftlib's commit": records.git_state()["commit"]}
        facts |= {"shard_optimizer": run.cfg.shard_optimizer, "cuda_graphs": run.cfg.cuda_graphs}
        facts |= {"eval_steps": run.cfg.eval_steps, "resume_rate_factor": run.cfg.resume_rate_factor}
        run.processes.require_alike(facts | {f"version of {k}": v for k, v in records.versions().items()})


def describe(run):
    """Record and log what trains, at which peak rates, and on how many processes."""
    trained, total = count_parameters(run.model)
    rates = run.peak_rates  # one per parameter group
    run.record.update(
        trainable_params=trained,
        total_params=total,
        planned_steps=run.plan.steps,
        learning_rate=rates[0],
        learning_rate_2=rates[1] if len(rates) > 1 else None,
    )
    step, steps = run.progress.step, run.plan.steps
    start = f"resumes at step {step} of {steps}" if step else f"starts, {steps} steps"
    shown = " and ".join(f"{rate * run.rate_factor:g}" for rate in sorted(set(rates), reverse=True))
    variant = run.method.variant(vars(run.cfg))
    name = f"{run.name} ({variant})" if variant else run.name
    run.log(
        f"{name}, seed {run.cfg.seed}, {start}: {trained:,} of {total:,} parameters train, "
        f"peak rate {shown}, {run.precision} ({run.precision_reason}), {run.record['device']}"
    )
    run.record["processes"] = run.processes.world
    run.record["peft_config"] = run.method.peft_config
    if run.processes.world > 1:
        held = "moments of projected weights are divided among them" if run.optimizer.shares_state() else ""
        run.log(
            f"{run.processes.world} processes divide the rows of each step and exchange "
            f"{run.stepper.exchange.bytes_a_step / 2**20:.2f} MiB{'; ' * bool(held)}{held}"
        )


def advice(run, error, rate):
    """The message after inf or nan: what happened, what is kept, and how to continue."""
    run.saver.wait()
    step, lower = run.saver.saved.step, f"{_LOWER * run.rate_factor:.2g}"
    kept = "There is no checkpoint yet, so the run would start over"
    if step is not None:
        kept = f"The last checkpoint is kept (step {step}), and the run would resume from there"
    return (
        f"{error} ({run.precision}, learning rate {rate:g}). The step was not applied. {kept}: run again with "
        f"lower learning rates: set resume_rate_factor = {lower} in the notebook's parameters or `python -m "
        f"peftlib run --study {run.study.folder.name} -p resume_rate_factor={lower}`, or with precision='fp32'"
    )


def note_change(run, what, before, now):
    """Add a change to the record, with step and time."""
    change = {"step": run.progress.step, "what": what, "from": before, "to": now}
    run.record["changes"].append(change | {"at": datetime.now(UTC).isoformat(timespec="seconds")})


def note_session(run, state):
    """Compare this session with the one that wrote a checkpoint, given its state; record and log differences."""
    ours = {"precision": run.precision, "device": run.record["device"], "plan": run.execution.description}
    state, ours["processes"] = {"processes": 1, **state}, run.processes.world
    for what, now in ours.items():
        before = state.get(what, now)  # older versions did not save this
        if before != now:
            note_change(run, what, before, now)
            run.log(f"the checkpoint was made with {what} {before}, now it is {now}: results will not be bit-identical")
    if state.get("precision", run.precision) != run.precision:
        four_bit = "; 4-bit weights are quantized from that, identically if the model's files have 16 bits"
        run.log(
            f"frozen weights are read in {run.precision}{four_bit if run.method.four_bit else ''}; trained weights and "
            "optimizer state are unchanged"
        )


def set_rate_factor(run, before):
    """Set the factor on the study's learning rates: cfg.resume_rate_factor, or `before` if that is 1.

    It multiplies the study's rates, not the previous session's, so setting it twice has no further effect.
    """
    asked = run.cfg.resume_rate_factor
    run.rate_factor = before if asked == 1.0 else asked
    if run.rate_factor != before:
        note_change(run, RATE_FACTOR, before, run.rate_factor)
        run.log(
            f"learning rates are {run.rate_factor:g} times the study's from step {run.progress.step} on "
            f"(resume_rate_factor); before {before:g}"
        )


def require_same_architecture(kept, ours, where):
    """CheckpointError unless two layer tables agree in names, classes, weight counts, 4-bit layers and what trains.

    Other dtypes may differ, because they depend on the GPU.
    """
    before, now = _architecture(kept), _architecture(ours)
    if before != now:
        missing, new = (", ".join(sorted(a - b)) or "fewer" for a, b in ((before, now), (now, before)))
        raise CheckpointError(
            f"the model has the layers {new}, but the checkpoint in {where} has {missing}: use the model and versions "
            "it was made with"
        )


def _architecture(layers):
    """{a description of each kind of layer}; rows that differ only in dtype are summed."""
    count, weights = Counter(), Counter()
    for row in layers:
        form = "in 4 bits" if row.get("dtype") == "nf4" else "plain"
        kind = f"{row.get('layer')} ({row.get('class')!r}, {form}, {'trains' if row.get('trains') else 'frozen'}"
        count[kind] += row.get("count", 0)
        weights[kind] += row.get("weights", 0)
    return {f"{kind}, {count[kind]} with {weights[kind]:,} weights)" for kind in count}


def change_sentences(record):
    """Yield sentences for the report about a run whose rates or precision changed during training."""
    run = f"{record['method']} (seed {record['seed']})"
    for change in record.get("changes") or ():
        if change["what"] == RATE_FACTOR:
            yield (
                f"{run} was not trained like the others: from step {change['step']} on, its learning rates were "
                f"{change['to']:g} times the study's (before: {change['from']:g} times)."
            )
        elif change["what"] == "precision":
            yield (
                f"{run} continued in {change['to']} from step {change['step']} on (before: {change['from']}), so its "
                "memory and speed mix both."
            )


def save_weights(run):
    """Save the trained weights and add their digests to the record; deletes answers of earlier weights.

    NonFiniteLossError: a trained weight contains inf or nan; nothing is written.
    """
    require_finite(trainable(run.model), "the trained model")
    facts = {
        "method": run.name,
        "description": run.method.description,
        "model": run.cfg.model,
        "model_sha256": run.record["model_sha256"],
        "model_revision": run.record["model_revision"],
        "four_bit": list(run.method.four_bit),
        "precision": run.precision,
        "run_hash": run.cfg.run_hash(run.name),
        "split_hash": run.manifest["split_hash"],
        "seed": run.cfg.seed,
    }
    run.study.predictions_path(run.name, run.cfg.seed).unlink(missing_ok=True)
    with writing(run.weights_dir):
        save_trained(run.model, run.tokenizer, run.weights_dir, facts)
    run.record["weights_sha256"] = {path.name: sha256(path) for path in sorted(run.weights_dir.glob("*.safetensors"))}
    run.record["settings_sha256"] = settings_digests(run.weights_dir)


def finalise(run):
    """Write the final results to the record; the checkpoints of a complete run are deleted. MFU comes last."""
    done, record = run.progress, run.record
    record |= {name: value for name, value in vars(done).items() if name != "step"}
    losses = [entry["loss"] for entry in record["history"][-max(1, run.plan.steps // 10) :]]
    losses = [loss for loss in losses if loss is not None]  # a skipped step may have no loss
    record.update(
        steps=done.step,
        saves=run.saver.saves,  # in this session
        save_stall_seconds=run.saver.stall_seconds,
        placement=run.execution.facts,
        rate_factor=run.rate_factor,
        exchange={"bytes_a_step": run.stepper.exchange.bytes_a_step, "bytes": run.processes.bytes_exchanged},
        train_loss=sum(losses) / len(losses) if losses else None,
        tokens_per_second=done.train_tokens / done.train_seconds if done.train_seconds else None,
    )
    records.save(run.study, record)
    if record["status"] == "ok":
        run.checkpoints.remove()
    if record["tokens_per_second"]:
        try:
            _measure_mfu(run)
        except RuntimeError as error:  # the GPU is full, or failed when the run ended
            run.log(f"MFU was not measured ({type(error).__name__}: {error})")
        else:
            records.save(run.study, record)


def _measure_mfu(run):
    """Model FLOPs utilization: the FLOP/s for useful tokens over what matrix products reach on this device."""
    how = {"length": float(run.rows.lengths.mean()), "rank": run.cfg.galore_rank}
    needed = estimate.flops_per_token(Shape.of(core(run.model).config), run.method, **how)
    ceiling = estimate.matmul_ceiling(run.device, DTYPES[run.precision])
    run.record.update(mfu=run.record["tokens_per_second"] * needed / ceiling, matmul_tflops=ceiling / 1e12)
