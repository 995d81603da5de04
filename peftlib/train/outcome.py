"""What a training run leaves: its weights, and its record's numbers."""

from peftlib.core import record as records
from peftlib.core.errors import writing
from peftlib.core.files import sha256
from peftlib.models.inspect import core, count_parameters, trainable
from peftlib.models.precision import DTYPES
from peftlib.models.saved import save_trained, settings_digests
from peftlib.models.shapes import Shape
from peftlib.train import flops, nonfinite


def describe(run, peak_rates):
    """Put into the run's record what trains and how fast at most, and say it in the log. peak_rates: one a group."""
    trained, total = count_parameters(run.model)
    run.record.update(
        trainable_params=trained,
        total_params=total,
        planned_steps=run.plan.steps,
        learning_rate=peak_rates[0],
        learning_rate_2=peak_rates[1] if len(peak_rates) > 1 else None,
    )
    steps, total_steps = run.progress.step, run.plan.steps
    start = f"goes on at step {steps} of {total_steps}" if steps else f"starts, {total_steps} steps"
    rates = " and ".join(f"{rate * run.rate_factor:g}" for rate in sorted(set(peak_rates), reverse=True))
    run.log(
        f"{run.name}, seed {run.cfg.seed}, {start}: {trained:,} of {total:,} parameters train, "
        f"peak rate {rates}, {run.precision} ({run.precision_reason}), {run.record['device']}"
    )


def keep_weights(run):
    """Save what was trained, with its digests in the record. Answers of earlier weights go.

    NonFiniteLossError: a trained weight holds inf or nan; nothing is written then.
    """
    nonfinite.require_finite(trainable(run.model), "the trained model")
    facts = {
        "method": run.name,
        "model": run.cfg.model,
        **{name: run.record[name] for name in ("model_sha256", "model_revision")},
        "four_bit": list(run.method.four_bit),
        "precision": run.precision,
        "run_hash": run.cfg.run_hash(run.name),
        "split_hash": run.manifest["split_hash"],
        "seed": run.cfg.seed,
    }
    folder = run.study.weights_dir(run.name, run.cfg.seed)
    run.study.predictions_path(run.name, run.cfg.seed).unlink(missing_ok=True)
    with writing(folder):
        save_trained(run.model, run.tokenizer, folder, facts)
    run.record["weights_sha256"] = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    run.record["settings_sha256"] = settings_digests(folder)


def close(run):
    """Write the run's record; with the weights safe, its checkpoints have served. What is optional comes after both."""
    done, record = run.progress, run.record
    record.update(vars(done), steps=done.step)
    del record["step"]
    record["saves"], record["save_stall_seconds"] = run.saver.saves, run.saver.stall_seconds  # of this session
    record["placement"], record["rate_factor"] = run.placement.facts, run.rate_factor
    losses = [entry["loss"] for entry in record["history"][-max(1, run.plan.steps // 10) :]]
    losses = [loss for loss in losses if loss is not None]  # a skipped step may have none
    record["train_loss"] = sum(losses) / len(losses) if losses else None
    record["tokens_per_second"] = done.train_tokens / done.train_seconds if done.train_seconds else None
    records.save(run.study, record)
    if record["status"] == "ok":
        run.checkpoints.remove()
    if record["tokens_per_second"]:
        try:
            _compare_with_ceiling(run)
        except RuntimeError as error:  # a card that is full, or broken by what ended the run
            run.log(f"the share of the device's speed was not measured ({type(error).__name__}: {error})")
        else:
            records.save(run.study, record)


def _compare_with_ceiling(run):
    """Model FLOPs utilization: the arithmetic that useful tokens need over what this device's products reach."""
    needed = flops.flops_per_token(Shape.of(core(run.model).config), run.method, length=float(run.rows.lengths.mean()))
    ceiling = flops.matmul_ceiling(run.device, DTYPES[run.precision])
    run.record.update(mfu=run.record["tokens_per_second"] * needed / ceiling, matmul_tflops=ceiling / 1e12)
