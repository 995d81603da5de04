"""The training loop of all methods, from the start or the last checkpoint to the end."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from peftlib import data, methods
from peftlib.core.env import resolve_device, seed_of, training_precision
from peftlib.core.errors import NonFiniteLossError
from peftlib.core.session import Deadline, interrupts
from peftlib.core.study import Study
from peftlib.models import compile as compiled
from peftlib.models.inspect import core, trainable
from peftlib.models.load import guard_four_bit, load_base
from peftlib.models.precision import loss_scaler, run_in_autocast
from peftlib.models.saved import load_trained
from peftlib.models.shapes import shape_of
from peftlib.storage.checkpoint import CheckpointDir
from peftlib.storage.lock import held
from peftlib.train import loggers, run_record, run_state
from peftlib.train.batching import Rows, mean_loss
from peftlib.train.callbacks import Callback, CallbackList, Stopwatch, log_line
from peftlib.train.parallel import processes
from peftlib.train.parallel.exchange import divide
from peftlib.train.placement import ExecutionPlan, PeakMemory, memory_cap
from peftlib.train.step import Stepper, StepPlan, learning_rate_factor

_SECONDS_BETWEEN_LINES = 20.0  # headless runs print a line at least this often


def run_training(
    study: Study, method: str, *, callbacks: Iterable[Callback] = (), log: Callable[[str], object] = print
) -> dict[str, Any]:
    """Train one method and seed of a study, or resume it; returns its record. Arguments and errors: see TrainingRun."""
    return TrainingRun(study, method, log=log).train(callbacks)


class TrainingRun:
    """One method and seed of a study. The constructor loads and prepares the model; train() starts or resumes.

    method: as for methods.find. log: called with each progress line; may be replaced before train().
    StudyError: 01_data has not run. ConfigError: unknown method, rank too large, report_to's package is not installed,
    or processes without a GPU or with different settings. If a launcher started several processes for one run, only
    the main one logs, has callbacks, holds the lock and writes. ParallelError: another process has failed.
    """

    progress: run_state.Progress
    record: dict[str, Any]

    def __init__(self, study: Study, method: str, *, log: Callable[[str], object] = print):
        self.name = methods.find(method).name
        self._given, self.study, self.log = study, study.with_rates_of(self.name), log
        self.cfg, self.manifest = self.study.cfg, study.manifest()
        self.method = methods.find(self.name).resolve(self.cfg, shape_of(self.cfg.model).layers)
        self.weights_dir = study.weights_dir(self.name, self.cfg.seed)
        folder, keep = study.checkpoint_dir(self.name, self.cfg.seed), self.cfg.save_total_limit
        self.checkpoints = CheckpointDir(folder, keep=keep, log=lambda line: self.log(line))
        loggers.require(self.cfg.report_to)
        self.device = resolve_device(self.cfg.device)
        self.processes = processes.join(self.device)
        if not self.processes.is_main:
            self.log = lambda line: None
        self.precision, self.precision_reason = training_precision(self.device, self.cfg.precision)
        self._open = contextlib.ExitStack()  # closed by train()
        self.memory = self._open.enter_context(PeakMemory(self.device))  # from here, to include the weights
        with self.processes.main_first():
            self._load_model()

    def _load_model(self):
        self.tokenizer = data.load_tokenizer(self.cfg.model)
        torch.manual_seed(self.cfg.seed)  # adapter initialisation
        base = load_base(self.cfg.model, precision=self.precision, device=self.device, four_bit=self.method.four_bit)
        self.model = self.method.prepare(base, self.cfg)
        run_in_autocast(core(self.model), self.device, self.precision)
        if self.method.four_bit:
            guard_four_bit(self.model, self.method.four_bit)

    def train(self, callbacks: Iterable[Callback] = ()) -> dict[str, Any]:
        """Train to the end, or until cfg.max_seconds, an interrupt or SIGTERM; returns the record, which is on disk.

        callbacks: callbacks.Callback objects that watch the run and may ask it to save and stop.
        A finished run is not repeated: its weights are loaded and its record is returned.
        NonFiniteLossError: a loss or gradient (named) is inf or nan, and no loss scale can fix it; the step was not
        applied, and the last checkpoint is kept. CheckpointError: no space, or the checkpoint was made with other
        settings.
        """
        with self._open, self.processes.together(), self._locked() as self._require_lock:
            finished = self.processes.from_main(self._begin)
            if finished is not None:
                return self._reload(finished)
            run_record.require_alike(self)
            self._build_optimizer()
            with self.processes.main_first():
                run_state.open_run(self)
            for p in trainable(self.model).values():  # different GPUs may have initialised them differently
                self.processes.broadcast_([p.data])
            run_record.describe(self)
            self._callbacks = CallbackList(self, [*loggers.of(self), *callbacks] if self.processes.is_main else [])
            self._callbacks.show()
            try:
                with self.processes.exchanging(), interrupts(echo_s=self.processes.echo_s) as interrupted:
                    self._loop(interrupted)
                compiled.release(self.model)
                if self.progress.step == self.plan.steps:
                    if self.processes.is_main:
                        run_record.save_weights(self)
                    self.record["status"] = "ok"
            except Exception as error:
                self.record.update(status="failed", error=f"{type(error).__name__}: {error}")
                raise
            finally:
                self._finish()
        return self.record

    def _locked(self):
        what, run = f"training {self.name}, seed {self.cfg.seed}", f"{self.name}-s{self.cfg.seed}"
        if not self.processes.is_main:
            return contextlib.nullcontext(lambda: None)
        return held(self.study.folder, what, run=run, log=self.log)

    def _begin(self):
        self._given.freeze()
        methods.keep(self.name, self.study.folder)
        return self.finished_record()

    def finished_record(self):
        """The record of this run if it has already finished and its weights are intact, else None."""
        return run_record.finished(self)

    def _reload(self, record):
        self.log(f"{self.name}, seed {self.cfg.seed}: already finished ({record['steps']} steps), nothing to do")
        if self.processes.is_main:
            self.checkpoints.remove()  # left by a session that died after writing its record
        self.model = load_trained(self.weights_dir, device=self.device, merge=False)
        return record

    def _build_optimizer(self):
        """Read the rows, build the optimizer, and plan the run on its device."""
        cfg = self.cfg
        self.rows = Rows(data.load_split(self.study.data_dir, "train"))
        self.valid = Rows(data.load_split(self.study.data_dir, "valid"))
        self.plan = StepPlan(len(self.rows), cfg.batch_size, cfg.epochs, cfg.seed, cfg.max_steps)
        self.optimizer = self.method.build_optimizer(self.model, cfg)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rate_factor = 1.0  # factor on the peak rates; a resume may change it
        self.scaler = loss_scaler(self.device, self.precision)
        self._open.enter_context(memory_cap(cfg, self.device))
        how = {"device": self.device, "precision": self.precision, "log": self.log}
        left = max(0, self.plan.steps - self.checkpoints.last_step())
        tokens = float(self.rows.lengths.mean()) * cfg.batch_size / self.processes.world
        self.execution = ExecutionPlan(self.model, self.name, cfg, **how, steps=left, tokens=tokens)
        self.rows.is_flat = self.valid.is_flat = self.execution.attention is not None
        how |= {"processes": self.processes, "is_compiled": self.execution.is_compiled, "chunk": self.execution.chunk}
        self.stepper = Stepper(self.model, self.optimizer, self.scaler, **how)
        self.execution.use_graphs(self.stepper, self.rows, self.plan, self.checkpoints.last_step(), self.processes)

    def _loop(self, interrupted):
        """Step, log, evaluate and save until the last step or until there is a reason to stop."""
        deadline, self._last_line_at = Deadline(self.cfg), time.monotonic()
        self._why_stop = lambda: self._reason_to_stop(interrupted, deadline)
        self.stepper.exchange.ask = lambda: (self._why_stop(), self.saver.is_due(self.progress.step + 1))
        self.model.train()
        self._watch = Stopwatch(self.device)
        while self.progress.step < self.plan.steps:
            self._require_lock()
            self._step()
            step, is_last = self.progress.step, self.progress.step == self.plan.steps
            self._log_step(is_last)
            if len(self.valid) and (step % self.cfg.eval_steps == 0 or is_last):
                self._evaluate()
            why_stop, is_due = (None, False) if is_last else self._wanted()
            if why_stop or is_due:
                self.save(must=bool(why_stop))
            if why_stop:
                self.log(f"stopped after step {step} of {self.plan.steps} ({why_stop}) and saved: run again to resume")
                return
        self._settle()

    def _step(self):
        """One optimizer step, repeated with half the micro-batch after an out-of-memory error."""
        step, cfg = self.progress.step, self.cfg
        numbers = self.plan.rows_of(step)
        factor = learning_rate_factor(step, self.plan.steps, cfg) * self.rate_factor
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        rate = self.peak_rates[0] * factor
        done = self._update(self._gradients(numbers), rate)
        tokens, seconds = int(self.rows.lengths[numbers].sum()), self._watch.lap(waits=step == 0)
        self.progress.count(tokens, seconds, not done.is_applied)
        known = {"loss": done.loss, "grad_norm": done.grad_norm}  # unknown if fp16 skipped the step
        known = {name: number if math.isfinite(number) else None for name, number in known.items()}
        entry = {"step": step + 1, "learning_rate": rate, "tokens": tokens, "seconds": seconds, **known}
        self.record["history"].append(entry)
        with self._watch.aside():
            self.execution.after_step(seconds)

    def _gradients(self, numbers):
        """Accumulate the gradients of these rows; returns their loss, 0-dim on the device."""
        step, rank, made, scored = self.progress.step, self.processes.rank, [], int(self.rows.scored[numbers].sum())
        part = divide(numbers, self.rows.lengths, self.processes.world)[rank]

        def cut():
            if not made:
                made.extend(self.rows.batches(part, self.execution.tokens, self.device))
            return made

        def recover(error):  # errors that the plan cannot handle are re-raised
            self.execution.recover_from(error, step)
            self.stepper.limit(self.execution.tokens)
            made.clear()
            return self.execution.is_compiled

        cut()
        self._watch.launch()
        # Dropout depends only on seed, step and process, so nothing between two steps can change it.
        seed = seed_of(self.cfg.seed, step, *([rank] if rank else []))
        return self.stepper.gradients(cut, scored, seed=seed, recover=recover)

    def _update(self, loss, rate):
        """Apply the step; returns precision.Applied. NonFiniteLossError: a lower loss scale would not help."""
        try:
            return self.stepper.update(loss, step=self.progress.step + 1)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(run_record.advice(self, error, rate)) from None

    def _log_step(self, is_last):
        is_quiet = time.monotonic() - self._last_line_at > _SECONDS_BETWEEN_LINES
        has_line = self.progress.step % self.cfg.logging_steps == 0 or is_last or is_quiet
        with self._watch.aside():
            if has_line:
                self.log(log_line(self.record, self.progress, self.plan.steps))
                self._last_line_at = time.monotonic()
            if has_line or self._callbacks.any("wants_numbers"):
                self._callbacks.show()

    def _evaluate(self):
        """Compute the validation loss."""
        self._settle()
        step = self.progress.step
        with compiled.uncompiled(self.model):
            how = {"device": self.device, "precision": self.precision, "processes": self.processes}
            loss = self.stepper.with_room(lambda: mean_loss(self.model, self.valid, **how))
        is_known = math.isfinite(loss)
        self.record["valid_history"].append({"step": step, "valid_loss": loss if is_known else None})
        shown = f"{loss:.4f}" if is_known else f"is {loss}: recorded as unknown"
        self.log(f"step {step}/{self.plan.steps}  validation loss {shown}")
        self._last_line_at = time.monotonic()
        self._watch.start()

    def _wanted(self):
        """(the reason to save and stop now, as text, or None; whether to save), agreed by all processes."""
        if self.processes.world == 1:
            return self._why_stop(), self.saver.is_due(self.progress.step)
        stop, save = self.stepper.exchange.told
        return (self._why_stop() or "another process was asked to stop") if stop else None, save

    def _reason_to_stop(self, interrupted, deadline):
        asked = self._callbacks.any("stop_asked") and "stop requested"
        return asked or ("interrupted" if interrupted.is_set() else deadline.passed())

    def save(self, *, must=True):
        """Write a checkpoint of the last complete step.

        CheckpointError: `must`, and it could not be written. NonFiniteLossError: a tensor (named) contains inf or nan.
        """
        self._settle()
        self._read_memory()
        if self.processes.is_main:
            self.saver.save(self.progress.step, run_state.checkpoint_of(self), must=must)
        elif self.optimizer.shares_state():
            self.optimizer.whole_state_dict()
        self._watch.start()

    def _settle(self):
        """Wait for the device, add that time to the last step, and stop the clock until it is restarted."""
        rest = self._watch.lap(waits=True)
        self.processes.require()  # nothing may be saved after an abandoned exchange
        self.progress.train_seconds += rest
        self.record["history"][-1]["seconds"] += rest

    def _read_memory(self):
        allocated, reserved = self.memory.read()
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, allocated)
        if reserved is not None:
            self.progress.peak_reserved_bytes = max(self.progress.peak_reserved_bytes or 0, reserved)

    def _finish(self):
        """Close the saver and write the record, however the loop ended."""
        self.saver.close()
        self.execution.captured = self.stepper.release()
        if not self.processes.is_main:
            return
        self._require_lock()  # never overwrite another session's record
        self._read_memory()
        run_record.finalise(self)
        self._callbacks.show(self.record["status"])
