"""Optimizer steps: the rows and learning rate of each, its passes and update, and the check that all is finite.

Rows and rates are pure functions of the step, so resuming needs no data-loader state.
"""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from peftlib.core.errors import NonFiniteLossError
from peftlib.models.inspect import trainable
from peftlib.models.kernels.adapters import drop_waiting
from peftlib.models.kernels.losses import batch_loss_sum
from peftlib.models.precision import apply_step, autocast
from peftlib.train.graphs import CaptureError, StepGraphs, brief
from peftlib.train.memory_model import chunk_of
from peftlib.train.parallel.alone import OneProcess
from peftlib.train.parallel.exchange import Exchange

_ALONE = OneProcess()
_CAPTURE_FAILURES = 8  # per run; after this many, CUDA graphs are disabled


@dataclass(frozen=True)
class StepPlan:
    """Row numbers of every optimizer step; the same for all methods of a study.

    rows: number of training rows. The last step of an epoch takes the remainder. max_steps: 0 means all epochs.
    """

    rows: int
    batch_size: int
    epochs: int
    seed: int
    max_steps: int = 0

    @property
    def steps_per_epoch(self):
        return -(-self.rows // self.batch_size)

    @property
    def steps(self):
        total = self.steps_per_epoch * self.epochs
        return min(total, self.max_steps) if self.max_steps else total

    def rows_of(self, step):
        """Row numbers of a step, counted from 0. IndexError: no such step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        start = within * self.batch_size
        return order[start : start + self.batch_size].tolist()


def learning_rate_factor(step, steps, cfg):
    """Fraction of the peak rate at a step, from 0: linear warm-up over warmup_ratio, then cfg.lr_scheduler to 0."""
    warmup = round(cfg.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[cfg.lr_scheduler]


class Stepper:
    """Runs training steps of a model. The host waits for the device once per step.

    loss_settings: for losses.chunked_loss_sum; is_compiled also fuses the loss. log: called if CUDA graphs fail.
    processes: of parallel.processes; they share the rows of each step.
    """

    def __init__(self, model, optimizer, scaler, *, device, precision, log=print, processes=_ALONE, **loss_settings):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.exchange = Exchange(processes, optimizer)
        self.device, self.precision = device, precision
        self.loss_settings = {"chunk": chunk_of("off", device), "is_compiled": False, **loss_settings}
        self.graphs, self.log, self._failures = None, log, 0

    def use_graphs(self, tokens, *, when_warm=lambda: None):
        """Run flat batches of at most `tokens` tokens as CUDA graphs, except in the first steps.

        when_warm: as for StepGraphs.
        """
        self.graphs = StepGraphs(self, tokens=tokens, when_warm=when_warm)

    def limit(self, tokens):
        """Capture CUDA graphs of at most `tokens` tokens from now on."""
        if self.graphs:
            self.graphs.limit(tokens)

    def start_over(self, *, is_compiled):
        """Drop gradients and graphs of a failed step. is_compiled: whether the loss is compiled from now on."""
        self.loss_settings["is_compiled"] = is_compiled
        if self.graphs:
            self.graphs.reset()  # first, because it waits for work that the failed step queued
        self.optimizer.drop_gradients()
        drop_waiting(self.model)
        torch.cuda.empty_cache()

    def with_room(self, call):
        """Return `call()`; if it runs out of memory, free the CUDA graphs and call it again."""
        try:
            return call()
        except torch.OutOfMemoryError:
            if not self.graphs or not self.graphs.captured:
                raise
        self.graphs.reset()  # here the error no longer references the failed tensors
        return call()

    def release(self):
        """Free the CUDA graphs after the last step. Returns how many micro-batch lengths were captured."""
        captured = self.graphs.captured if self.graphs else 0
        if self.graphs:
            with contextlib.suppress(RuntimeError):  # the device already failed
                self.graphs.reset()
            self.graphs = None
        return captured

    def gradients(self, batches, scored, *, seed, recover=None):
        """Accumulate gradients over all batches; returns nats per scored token, a 0-dim tensor on the device.

        batches: batching.Batch on the device: a list, or a function that divides this process's rows again.
        scored: tokens that count in the loss, over all batches of all processes. seed: for dropout; reset for each
        pass over the batches, so that every pass has the same gradients. recover(error): called before a failed pass
        is repeated; returns whether the loss is compiled from then on, or raises. Other processes wait in the
        meantime, because every pass ends with one exchange.
        """
        cut = batches if callable(batches) else lambda: batches
        with self._stream():
            for _ in self.optimizer.basis_passes():
                self._accumulate(cut, scored, seed, recover)
                self.exchange.whole_gradients()
            return self.exchange.gradients(self._accumulate(cut, scored, seed, recover))

    def _accumulate(self, cut, scored, seed, recover):
        """One pass over the batches, repeated until it succeeds."""
        is_captured = True
        while True:
            try:
                return self._pass(cut(), scored, seed, is_captured)
            except CaptureError as error:
                self._count_failure(error)
                is_captured = False
                self.optimizer.drop_gradients()
                continue
            except Exception as error:
                if recover is None:
                    raise
                is_compiled = recover(error)
            self.start_over(is_compiled=is_compiled)  # here the error no longer references the failed tensors

    def _count_failure(self, error):
        """Count a failed capture. A shape new to torch.compile cannot be captured until a step has run with it."""
        self._failures += 1
        if self._failures > _CAPTURE_FAILURES:
            self.graphs = None
            self.log(f"CUDA graphs are disabled ({brief(error)}): training continues without them")

    def _stream(self):
        return self.graphs.on_stream() if self.graphs else contextlib.nullcontext()

    def _pass(self, batches, scored, seed, is_captured):
        torch.manual_seed(seed)
        total = torch.zeros((), device=self.device)
        if self.graphs:
            self.graphs.begin_pass()
        for batch in batches:
            if not (is_captured and self.graphs and self.graphs.forward_backward(batch, scored)):
                total += self.forward_backward(batch, scored)
        return total + self.graphs.total if self.graphs else total

    def forward_backward(self, batch, scored):
        """Add one micro-batch's gradients; returns its share of the step's loss, detached."""
        with autocast(self.device, self.precision):
            loss = batch_loss_sum(self.model, batch, **self.loss_settings) / scored
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self, loss, *, step=None):
        """Apply the accumulated gradients; returns precision.Applied. loss: from `gradients`. step: for the message.

        NonFiniteLossError: the loss, a gradient (named) or their norm is inf or nan, and no loss scale could cure it;
        weights and optimizer are unchanged. With fp16 such a step is skipped instead.
        """
        # GradScaler tracks the optimizer object itself.
        optimizer = self.graphs if self.graphs and not self.scaler.is_enabled() else self.optimizer
        with self._stream():
            done = apply_step(optimizer, self.scaler, loss)
        if self.graphs:
            self.graphs.end_step()
        if not done.is_applied and not self.scaler.is_enabled():
            raise NonFiniteLossError(_cause(self.model, self.optimizer, done, step))
        return done


def _cause(model, optimizer, applied, step):
    """Describe what was not finite in a step that was not applied."""
    of_step = "" if step is None else f" of step {step}"
    if not math.isfinite(applied.loss):
        return f"the loss{of_step} is {applied.loss}"
    unfit = optimizer.nonfinite_weights()
    if not unfit:
        return f"the norm of the gradients{of_step} is {applied.grad_norm}, though each of them is finite"
    params = trainable(model)
    numbers = {id(p): (i, name) for i, (name, p) in enumerate(params.items())}
    # Backward runs from the last layer to the first, so it started at the last weight in the model's order.
    _, name = max(numbers[id(p)] for p in unfit)
    return f"the gradient of {name}{of_step} is inf or nan ({len(unfit)} of {len(params)} gradients are not finite)"


def first_nonfinite(tensors):
    """Name of the first tensor in {name: tensor} that contains inf or nan, or None. Synchronises once per device."""
    by_device = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, []).append((name, tensor.detach()))
    for named in by_device.values():
        # Minimum and maximum propagate nan and need no memory; isfinite() would allocate a mask of the same shape.
        ends = torch.stack([torch.stack(torch.aminmax(tensor)).float() for _, tensor in named])
        for (name, _), is_finite in zip(named, torch.isfinite(ends).all(1).tolist(), strict=True):
            if not is_finite:
                return name
    return None


def require_finite(tensors, what):
    """NonFiniteLossError for the first of {name: tensor} that contains inf or nan. what: their owner, for the
    message."""
    name = first_nonfinite(tensors)
    if name is not None:
        raise NonFiniteLossError(f"{name} contains inf or nan, so {what} was not saved; earlier files are kept")
