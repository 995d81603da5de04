"""The one training loop: every method, every session, from the last checkpoint to the end."""

import contextlib
import time

import torch

from peftlib import compact, compiled, data, flops, methods, plan, progress, resume, trackers
from peftlib import record as records
from peftlib.checkpoint import CheckpointDir
from peftlib.env import resolve_device, training_precision
from peftlib.errors import ConfigError
from peftlib.files import sha256
from peftlib.interrupts import interrupts
from peftlib.lock import held
from peftlib.losses import chunked_loss_sum
from peftlib.memory import PeakMemory
from peftlib.mirror import running
from peftlib.models import (
    PROJECTIONS,
    core,
    count_parameters,
    guard_four_bit,
    head_weight,
    hidden_states,
    layer_table,
    load_base,
    named_weights,
    trainable,
)
from peftlib.optim.basis import kept_energy
from peftlib.placement import Placement
from peftlib.precision import autocast, loss_scaler, run_in_autocast
from peftlib.rows import Rows, mean_loss
from peftlib.saving import Saver
from peftlib.seeds import seed_of
from peftlib.session import Deadline
from peftlib.stepper import Stepper
from peftlib.steps import StepPlan, learning_rate_factor
from peftlib.trained import load_trained, save_trained

_SECONDS_BETWEEN_LINES = 20.0  # a headless reader sees life at least this often


class TrainingRun:
    """One method and seed of a study. Building it loads and prepares the model; train() starts or goes on.

    method: a name in peftlib.methods.METHODS. log: called with each line of progress; may be exchanged until train().
    StudyError: 01_data has not run. ConfigError: unknown method, rank too large, log_to names a package that is not
    installed, or several processes.
    """

    def __init__(self, study, method, *, log=print):
        from accelerate import Accelerator

        self.study = study.with_rates_of(method)
        self.cfg, self.name, self.log = self.study.cfg, method, log
        self.method = methods.find(method)
        self.manifest = study.manifest()
        trackers.require(self.cfg.log_to)
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
        self.tokenizer = data.open_tokenizer(self.cfg.model)
        torch.manual_seed(self.cfg.seed)  # adapter initialisation
        base = load_base(self.cfg.model, precision=self.precision, device=self.device, four_bit=self.method.FOUR_BIT)
        self.model = self.method.prepare(base, self.cfg)
        run_in_autocast(core(self.model), self.device, self.precision)
        if self.method.FOUR_BIT:
            guard_four_bit(self.model, self.method.FOUR_BIT)
        self.checkpoints = CheckpointDir(
            study.checkpoint_dir(method, self.cfg.seed),
            keep=self.cfg.keep_checkpoints,
            log=lambda line: self.log(line),
        )

    def train(self, watchers=()):
        """Train to the end, or to cfg.max_seconds, an interrupt or SIGTERM; returns the record, which is on disk.

        watchers: progress.Watcher objects that see the run while it trains, and may ask it to save and stop.

        A finished run is not repeated: its weights are loaded and its record is returned.
        NonFiniteLossError: the loss is inf or nan; the last checkpoint is kept. CheckpointError: no space, or the
        checkpoint at hand was made with other settings.
        """
        what = f"training {self.name}, seed {self.cfg.seed}"
        run = f"{self.name}-s{self.cfg.seed}"
        with self._open, held(self.study.folder, what, run=run, log=self.log) as require_lock:
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
                self._keep_weights()
                self.record["status"] = "ok"
        except Exception as error:
            self.record.update(status="failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.saver.wait()
            require_lock()  # another session's record is not overwritten
            self._close()
            self._watching.show(self.record["status"])

    def captured_energy(self, layers, *, rows=4):
        """How much of a gradient its best basis keeps, before training.

        layers: layer numbers. Returns [{layer, projection, shape, kept, by_chance}, ...] for the gradients of the first
        `rows` training rows: the share of the squared Frobenius norm inside the leading galore_rank directions, and
        the share r / m that random directions would keep.
        """
        first = Rows(data.load_split(self.study.data_dir, "train")[:rows])
        batch = first.batch([[n] for n in range(rows)], self.device)
        weights = {
            name: p
            for name, p in named_weights(self.model, PROJECTIONS).items()
            if any(f"layers.{layer}." in name for layer in layers)
        }
        with autocast(self.device, self.precision):
            loss = chunked_loss_sum(hidden_states(self.model, batch), head_weight(self.model), batch.labels)
        grads = torch.autograd.grad(loss, list(weights.values()))
        return [
            {
                "layer": int(name.split("layers.")[1].split(".")[0]),
                "projection": name.split(".")[-2],
                "shape": tuple(grad.shape),
                "kept": kept_energy(grad, self.cfg.galore_rank),
                "by_chance": self.cfg.galore_rank / min(grad.shape),
            }
            for name, grad in zip(weights, grads, strict=True)
        ]

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
        self.plan = StepPlan(len(self.rows), cfg.sequences_per_step, cfg.epochs, cfg.seed, cfg.max_steps)
        self.optimizer = self.method.build_optimizer(self.model, cfg)
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = loss_scaler(self.device, self.precision)
        self.placement = Placement(
            self.model,
            self.name,
            cfg,
            device=self.device,
            precision=self.precision,
            steps=self.plan.steps,
            cache_folder=self.study.folder / "compile",
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
        self.progress = resume.Progress()
        self.saver = Saver(
            self.checkpoints,
            every=cfg.save_every,
            stall_share=cfg.save_stall,
            is_background=self.device != "cpu",
            expected_bytes=self._checkpoint_bytes(),
            log=self.log,
        )
        self._pending = progress.Pending()
        self.record = records.new_record(
            self.study,
            self.name,
            device=self.device,
            precision=self.precision,
            precision_reason=self.precision_reason,
        )
        self.record["layers"] = layer_table(self.model)
        if self.saver.is_background:  # a thread has the time for it
            with contextlib.suppress(OSError):  # a model without safetensors files
                self.checkpoints.base = compact.BaseWeights(cfg.model)
        if not resume.go_on(self) and self.cfg.fork:
            resume.fork(self)
        self.saver.start(self.progress.step)
        if self.method.FOUR_BIT:
            guard_four_bit(self.model, self.method.FOUR_BIT)
        self._describe()
        self.checkpoints.require_space(self._checkpoint_bytes())
        mirror = running(self.study.folder)
        if mirror is not None:
            mirror.require_space(f"{self.name}-s{self.cfg.seed}", self._checkpoint_bytes())

    def _describe(self):
        trained, total = count_parameters(self.model)
        rates = sorted(set(self._peak_rates), reverse=True)
        self.record.update(
            trainable_params=trained,
            total_params=total,
            planned_steps=self.plan.steps,
            learning_rate=self._peak_rates[0],
            learning_rate_2=self._peak_rates[1] if len(self._peak_rates) > 1 else None,
        )
        start = f"goes on at step {self.progress.step}" if self.progress.step else "starts"
        self.log(
            f"{self.name}, seed {self.cfg.seed}, {start} of {self.plan.steps}: {trained:,} of {total:,} parameters "
            f"train, peak rate {' and '.join(f'{rate:g}' for rate in rates)}, {self.precision} "
            f"({self.precision_reason}), {self.record['device']}"
        )

    def _checkpoint_bytes(self):
        """What trains, and the optimizer's state as the planner counts it."""
        weights = sum(p.numel() * p.element_size() for p in trainable(self.model).values())
        return weights + plan.optimizer_bytes(plan.Shape.of(core(self.model).config), self.name, self.cfg)

    def _run(self, interrupted, require_lock):
        cfg, last_line = self.cfg, time.monotonic()
        deadline = Deadline(cfg)
        self.model.train()
        while self.progress.step < self.plan.steps:
            require_lock()
            self._step()
            step, is_last = self.progress.step, self.progress.step == self.plan.steps
            has_line = step % cfg.log_every == 0 or is_last or time.monotonic() - last_line > _SECONDS_BETWEEN_LINES
            if has_line or self._watching.want_numbers():
                self._flush()
                if has_line:
                    self.log(progress.line(self.record, self.progress, self.plan.steps))
                    last_line = time.monotonic()
                self._watching.show()
            if len(self.valid) and (step % cfg.valid_every == 0 or is_last):
                self._validate()
                last_line = time.monotonic()
            why = None if is_last else self._why_stop(interrupted, deadline)
            if why or (not is_last and self.saver.is_due(step)):
                self.save(must=bool(why))
            if why:
                self.log(f"stopped after step {step} of {self.plan.steps} ({why}); saved: run again to go on")
                return

    def _why_stop(self, interrupted, deadline):
        """Why to save and stop now, in words, or None."""
        if self._watching.stop_asked():
            return "asked to"
        return "interrupted" if interrupted.is_set() else deadline.passed()

    def _step(self):
        """One optimizer step, replayed with half the micro-batch after an out-of-memory error."""
        step, cfg = self.progress.step, self.cfg
        numbers = self.plan.rows_of(step)
        factor = learning_rate_factor(step, self.plan.steps, cfg)
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor
        started = time.monotonic()
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
        grad_norm, is_skipped = self.stepper.update()
        tokens = int(self.rows.lengths[numbers].sum())
        if step == 0 or self.device == "cpu":
            grad_norm = float(grad_norm)  # waits for the device, so that the first step's time is true
        seconds = time.monotonic() - started
        self.progress.count(tokens, seconds, is_skipped)
        self.placement.after_step()
        entry = {"step": step + 1, "learning_rate": self._peak_rates[0] * factor, "tokens": tokens, "seconds": seconds}
        self._pending.add(entry, loss, grad_norm)

    def _scored(self, numbers):
        return int(self.rows.scored[numbers].sum())

    def _flush(self):
        """Bring pending numbers to the host. NonFiniteLossError: one of the losses is inf or nan."""
        self._pending.bring(self.record["history"], self.precision)

    def _validate(self):
        self._flush()
        with compiled.uncompiled(self.model):
            loss = mean_loss(self.model, self.valid, device=self.device, precision=self.precision)
        self.record["valid_history"].append({"step": self.progress.step, "valid_loss": loss})
        self.log(f"step {self.progress.step}/{self.plan.steps}  validation loss {loss:.4f}")

    def save(self, *, must=True):
        """Write a checkpoint of the last complete step. CheckpointError: `must`, and it could not be written."""
        self._flush()
        self._read_memory()
        self.saver.save(self.progress.step, resume.checkpoint_of(self), must=must)

    def _compare_with_ceiling(self, record):
        """Model FLOPs utilization: the arithmetic that useful tokens need over what this device's products reach."""
        shape = plan.Shape.of(core(self.model).config)
        needed = flops.flops_per_token(shape, self.method, length=float(self.rows.lengths.mean()))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]
        ceiling = flops.matmul_ceiling(self.device, dtype)
        record.update(mfu=record["tokens_per_second"] * needed / ceiling, matmul_tflops=ceiling / 1e12)

    def _read_memory(self):
        allocated, reserved = self.memory.read()
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, allocated)
        if reserved is not None:
            self.progress.peak_reserved_bytes = max(self.progress.peak_reserved_bytes or 0, reserved)

    def _keep_weights(self):
        facts = {
            "method": self.name,
            "model": self.cfg.model,
            "four_bit": list(self.method.FOUR_BIT),
            "precision": self.precision,
            "run_hash": self.cfg.run_hash(self.name),
            "split_hash": self.manifest["split_hash"],
            "seed": self.cfg.seed,
        }
        folder = self.study.weights_dir(self.name, self.cfg.seed)
        self.study.predictions_path(self.name, self.cfg.seed).unlink(missing_ok=True)  # of earlier weights
        save_trained(self.model, self.tokenizer, folder, facts)
        self.record["weights_sha256"] = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}

    def _close(self):
        """Write the record; with the weights safe, the checkpoints have served."""
        self._read_memory()
        done, record = self.progress, self.record
        record.update(vars(done), steps=done.step)
        del record["step"]
        record["saves"], record["save_stall_seconds"] = self.saver.saves, self.saver.stall_seconds  # of this session
        last = record["history"][-max(1, self.plan.steps // 10) :]
        if last:
            record["train_loss"] = sum(entry["loss"] for entry in last) / len(last)
            record["tokens_per_second"] = done.train_tokens / done.train_seconds
            self._compare_with_ceiling(record)
        records.save(self.study, record)
        if record["status"] == "ok":
            self.checkpoints.remove()
