"""The one training loop: every method, every session, from the last checkpoint to the end."""

import contextlib
import math
import time

import torch

from peftlib import data, methods
from peftlib.core import record as records
from peftlib.core.env import resolve_device, seed_of, training_precision
from peftlib.core.errors import ConfigError, NonFiniteLossError
from peftlib.core.files import sha256
from peftlib.core.session import Deadline, interrupts
from peftlib.models import compile as compiled
from peftlib.models.identity import provenance_of
from peftlib.models.inspect import core, layer_table, trainable
from peftlib.models.load import guard_four_bit, load_base
from peftlib.models.precision import loss_scaler, run_in_autocast
from peftlib.models.saved import load_trained
from peftlib.models.shapes import Shape
from peftlib.storage import saver as saving
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.storage.lock import held
from peftlib.train import callbacks as progress
from peftlib.train import loggers as trackers
from peftlib.train import memory_model, nonfinite, outcome
from peftlib.train import run_state as resume
from peftlib.train.batching import Rows, mean_loss
from peftlib.train.peak_memory import PeakMemory
from peftlib.train.placement import Placement, memory_cap
from peftlib.train.schedule import StepPlan, learning_rate_factor
from peftlib.train.step import Stepper

_SECONDS_BETWEEN_LINES = 20.0  # a headless reader sees life at least this often


class TrainingRun:
    """One method and seed of a study. Building it loads and prepares the model; train() starts or goes on.

    method: a name in peftlib.methods.METHODS. log: called with each line of progress; may be exchanged until train().
    StudyError: 01_data has not run. ConfigError: unknown method, rank too large, report_to names a package that is not
    installed, or several processes.
    """

    def __init__(self, study, method, *, log=print):
        from accelerate import Accelerator

        self._given, self.study = study, study.with_rates_of(method)
        self.cfg, self.name, self.log = self.study.cfg, method, log
        self.method = methods.find(method)
        self.manifest = study.manifest()
        trackers.require(self.cfg.report_to)
        self.device = resolve_device(self.cfg.device)
        self.precision, self.precision_reason = training_precision(self.device, self.cfg.precision)
        self.accelerator = Accelerator(cpu=self.device == "cpu", gradient_accumulation_steps=1)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes: GaLore frees gradients before they could be exchanged, "
                "so peftlib trains on one GPU; start one process, and one seed per GPU"
            )
        self._open = contextlib.ExitStack()  # train() closes it
        self.memory = self._open.enter_context(PeakMemory(self.device))  # from here: the weights belong to the peak
        self.tokenizer = data.load_tokenizer(self.cfg.model)
        torch.manual_seed(self.cfg.seed)  # adapter initialisation
        base = load_base(self.cfg.model, precision=self.precision, device=self.device, four_bit=self.method.four_bit)
        self.model = self.method.prepare(base, self.cfg)
        run_in_autocast(core(self.model), self.device, self.precision)
        if self.method.four_bit:
            guard_four_bit(self.model, self.method.four_bit)
        self.checkpoints = CheckpointDir(
            study.checkpoint_dir(method, self.cfg.seed),
            keep=self.cfg.save_total_limit,
            log=lambda line: self.log(line),
        )

    def train(self, watchers=()):
        """Train to the end, or to cfg.max_seconds, an interrupt or SIGTERM; returns the record, which is on disk.

        watchers: progress.Watcher objects that see the run while it trains, and may ask it to save and stop.

        A finished run is not repeated: its weights are loaded and its record is returned.
        NonFiniteLossError: a loss or gradient (named) is inf or nan, and no loss scale could cure it; that step
        changed nothing, and the last checkpoint is kept. CheckpointError: no space, or the checkpoint at hand was made
        with other settings.
        """
        what = f"training {self.name}, seed {self.cfg.seed}"
        run = f"{self.name}-s{self.cfg.seed}"
        with self._open, held(self.study.folder, what, run=run, log=self.log) as require_lock:
            self._given.freeze()
            kept = self.finished_record()
            if kept is not None:
                self.log(f"{self.name}, seed {self.cfg.seed}: finished before ({kept['steps']} steps), nothing to do")
                self.checkpoints.remove()  # of a session that died between its record and this
                folder = self.study.weights_dir(self.name, self.cfg.seed)
                self.model = load_trained(folder, device=self.device, merge=False)
                return kept
            self._start()
            self._watching = progress.Watching(self, [*trackers.of(self), *watchers])
            self._watching.show()
            self._to_the_end(require_lock)
        return self.record

    def _to_the_end(self, require_lock):
        try:
            with interrupts() as interrupted:
                self._run(interrupted, require_lock)
            compiled.release(self.model)
            if self.progress.step == self.plan.steps:
                outcome.keep_weights(self)
                self.record["status"] = "ok"
        except Exception as error:
            self.record.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.saver.close()
            require_lock()  # another session's record is not overwritten
            self._read_memory()
            outcome.close(self)
            self._watching.show(self.record["status"])

    def finished_record(self):
        """The record of an earlier end of this very run, or None."""
        kept = records.load(self.study, self.name, self.cfg.seed)
        is_same = (
            kept is not None
            and kept["status"] == "ok"
            and kept["run_hash"] == self.cfg.run_hash(self.name)
            and kept["split_hash"] == self.manifest["split_hash"]
            and self._are_weights_whole(kept)
        )
        return kept if is_same else None

    def _are_weights_whole(self, record):
        folder = self.study.weights_dir(self.name, self.cfg.seed)
        digests = record["weights_sha256"]
        return all((folder / name).is_file() and sha256(folder / name) == kept for name, kept in digests.items())

    def _start(self):
        cfg = self.cfg
        self.rows = Rows(data.load_split(self.study.data_dir, "train"))
        self.valid = Rows(data.load_split(self.study.data_dir, "valid"))
        self.plan = StepPlan(len(self.rows), cfg.batch_size, cfg.epochs, cfg.seed, cfg.max_steps)
        self.optimizer = self.method.build_optimizer(self.model, cfg)
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = loss_scaler(self.device, self.precision)
        self.rate_factor = 1.0  # on the peak rates; resume.begin may put in another
        self._place()
        self.progress = resume.Progress()
        self.saver = saving.Saver(
            self.checkpoints,
            every=cfg.save_steps,
            stall_share=cfg.max_save_overhead,
            is_background=self.device != "cpu",
            expected_bytes=_checkpoint_bytes(self),
            log=self.log,
        )
        self.record = records.new_record(
            self.study,
            self.name,
            provenance=provenance_of(self.cfg.model, self.study.records(), study=self.study.folder.name),
            device=self.device,
            precision=self.precision,
            precision_reason=self.precision_reason,
        )
        self.record["layers"] = layer_table(self.model)
        resume.begin(self)
        self.saver.start(self.progress.step)
        if self.method.four_bit:
            guard_four_bit(self.model, self.method.four_bit)
        outcome.describe(self, self._peak_rates)
        saving.require_space(self.checkpoints, self.study.folder, f"{self.name}-s{cfg.seed}", _checkpoint_bytes(self))

    def _place(self):
        cfg = self.cfg
        self._open.enter_context(memory_cap(cfg, self.device))
        self.placement = Placement(
            self.model,
            self.name,
            cfg,
            device=self.device,
            precision=self.precision,
            steps=self.plan.steps,
            log=self.log,
        )
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            self.scaler,
            device=self.device,
            precision=self.precision,
            backward=self.accelerator.backward,
            is_compiled=self.placement.is_compiled,
        )

    def _run(self, interrupted, require_lock):
        cfg, last_line = self.cfg, time.monotonic()
        deadline = Deadline(cfg)
        self.model.train()
        self._watch = progress.Stopwatch(self.device)
        while self.progress.step < self.plan.steps:
            require_lock()
            self._step()
            step, is_last = self.progress.step, self.progress.step == self.plan.steps
            has_line = step % cfg.logging_steps == 0 or is_last or time.monotonic() - last_line > _SECONDS_BETWEEN_LINES
            if has_line:
                self.log(progress.line(self.record, self.progress, self.plan.steps))
                last_line = time.monotonic()
            if has_line or self._watching.want_numbers():
                self._watching.show()
            if len(self.valid) and (step % cfg.eval_steps == 0 or is_last):
                self._validate()
                last_line = time.monotonic()
            why = None if is_last else self._why_stop(interrupted, deadline)
            if why or (not is_last and self.saver.is_due(step)):
                self.save(must=bool(why))
            if why:
                self.log(f"stopped after step {step} of {self.plan.steps} ({why}); saved: run again to go on")
                return
        self._settle()

    def _why_stop(self, interrupted, deadline):
        """Why to save and stop now, in words, or None."""
        if self._watching.stop_asked():
            return "asked to"
        return "interrupted" if interrupted.is_set() else deadline.passed()

    def _step(self):
        """One optimizer step, replayed with half the micro-batch after an out-of-memory error."""
        step, cfg = self.progress.step, self.cfg
        numbers = self.plan.rows_of(step)
        factor = learning_rate_factor(step, self.plan.steps, cfg) * self.rate_factor
        rate = self._peak_rates[0] * factor
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor
        while True:
            try:
                batches = list(self.rows.batches(numbers, self.placement.tokens, self.device))
                # Dropout depends on seed and step alone, so nothing done between two steps can change it.
                loss = self.stepper.gradients(batches, self._scored(numbers), seed=seed_of(cfg.seed, step))
                break
            except torch.OutOfMemoryError as error:
                self.optimizer.zero_grad()
                self.placement.make_room(step, error)
            torch.cuda.empty_cache()
        done = self._update(loss, rate)
        tokens, seconds = int(self.rows.lengths[numbers].sum()), self._watch.lap(waits=step == 0)
        self.progress.count(tokens, seconds, not done.is_applied)
        entry = {"step": step + 1, "learning_rate": rate, "tokens": tokens, "seconds": seconds}
        known = {"loss": done.loss, "grad_norm": done.grad_norm}  # unknown in a skipped fp16 step
        entry |= {name: number if math.isfinite(number) else None for name, number in known.items()}
        self.record["history"].append(entry)
        self.placement.after_step()
        self._watch.start()

    def _update(self, loss, rate):
        """The step's precision.Applied. NonFiniteLossError: it was not applied, and no lower loss scale could help."""
        try:
            return self.stepper.update(loss, step=self.progress.step + 1)
        except NonFiniteLossError as error:
            self.saver.wait()
            raise NonFiniteLossError(
                f"{error} ({self.precision}, learning rate {rate:g}). "
                f"{nonfinite.advice(self.study.folder.name, self.rate_factor, self.saver.saved.step)}"
            ) from None

    def _scored(self, numbers):
        return int(self.rows.scored[numbers].sum())

    def _settle(self):
        """Count what the device still has to do of the last step; what follows, until the watch starts, is no step's."""
        rest = self._watch.lap(waits=True)
        self.progress.train_seconds += rest
        self.record["history"][-1]["seconds"] += rest

    def _validate(self):
        self._settle()
        with compiled.uncompiled(self.model):
            loss = mean_loss(self.model, self.valid, device=self.device, precision=self.precision)
        is_known = math.isfinite(loss)
        self.record["valid_history"].append({"step": self.progress.step, "valid_loss": loss if is_known else None})
        told = f"{loss:.4f}" if is_known else f"is {loss}: recorded as unknown"
        self.log(f"step {self.progress.step}/{self.plan.steps}  validation loss {told}")
        self._watch.start()

    def save(self, *, must=True):
        """Write a checkpoint of the last complete step.

        CheckpointError: `must`, and it could not be written. NonFiniteLossError: a tensor (named) holds inf or nan.
        """
        self._settle()
        self._read_memory()
        self.saver.save(self.progress.step, resume.checkpoint_of(self), must=must)
        self._watch.start()

    def _read_memory(self):
        allocated, reserved = self.memory.read()
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, allocated)
        if reserved is not None:
            self.progress.peak_reserved_bytes = max(self.progress.peak_reserved_bytes or 0, reserved)


def run_training(study, method, *, log=print, watchers=()):
    """Train one method of a study to its end, or go on with a run that was cut; returns its record.

    study: a Study whose data stand. method: a name in METHODS. log: called with each line of progress.
    Errors: as TrainingRun and TrainingRun.train.
    """
    return TrainingRun(study, method, log=log).train(watchers)


def _checkpoint_bytes(run):
    """Bytes of a TrainingRun's checkpoint: what trains, and the optimizer's state as the planner counts it."""
    weights = sum(p.numel() * p.element_size() for p in trainable(run.model).values())
    shape = Shape.of(core(run.model).config)
    return weights + memory_model.optimizer_bytes(shape, run.name, run.cfg)
