"""Whose time counts as a step's."""

import types

import pytest
import torch

from peftlib.train.batching import Rows
from peftlib.train.callbacks import CallbackList, Stopwatch
from peftlib.train.loop import TrainingRun
from peftlib.train.step import Stepper


class Late(torch.Tensor):
    """A tensor of a device that is behind: reading it waits until the device has done all that was asked of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__):
            clock.now = max(clock.now, clock.device_until)
        return super().__torch_function__(func, types, args, kwargs or {})


clock = types.SimpleNamespace(now=0.0, device_until=0.0)


class Mark:
    """An event of that device, which notes its time once all that was asked before is done."""

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        self.at = max(clock.now, clock.device_until)

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


@pytest.fixture
def late_device(monkeypatch):
    """A device that works while the host goes on: a step's passes take it 1 s, its update 0.5 s; batches cost 0.25."""
    clock.now = clock.device_until = 0.0
    asked = Stepper.gradients, Stepper.update, Rows.batches

    def launch(seconds):
        clock.device_until = max(clock.device_until, clock.now) + seconds

    def batches(*args):
        clock.now += 0.25
        return asked[2](*args)

    def gradients(*args, **settings):
        loss = asked[0](*args, **settings)
        launch(1.0)
        return loss.as_subclass(Late)

    def update(*args, **settings):
        done = asked[1](*args, **settings)
        launch(0.5)
        return done

    def wait():
        clock.now = max(clock.now, clock.device_until)

    def mean_loss(*args, **settings):
        wait()
        clock.now += 7.0
        return 1.0

    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    monkeypatch.setattr("torch.cuda.synchronize", wait)
    monkeypatch.setattr("torch.cuda.Event", Mark)
    monkeypatch.setattr(Rows, "batches", batches)
    monkeypatch.setattr(Stepper, "gradients", gradients)
    monkeypatch.setattr(Stepper, "update", update)
    monkeypatch.setattr("peftlib.train.loop.mean_loss", mean_loss)
    monkeypatch.setattr("peftlib.train.loop.Stopwatch", lambda device: Stopwatch("cuda"))


@pytest.mark.parametrize("eval_steps", [100, 2])
@pytest.mark.parametrize("line_s", [0.0, 0.125, 0.375, 4.0])  # none, less than the rest of an update, about it, more
def test_the_speed_counts_every_wait_and_depends_on_no_log_line(make_study, late_device, line_s, eval_steps):
    def log(line):
        clock.now += line_s

    records_ = []
    for logging_steps in (1, 50):
        study = make_study(study=f"every{logging_steps}", logging_steps=logging_steps, eval_steps=eval_steps)
        clock.now = clock.device_until = 0.0
        records_.append(TrainingRun(study, "lora", log=log).train())
    often, seldom = records_
    # The device does an update while the host makes batches, but in the first two steps and those after validation.
    batches_s = 0.25 * (4 if eval_steps == 2 else 2)
    assert often["train_seconds"] == pytest.approx(6 * (1.0 + 0.5) + batches_s)
    assert often["train_seconds"] == seldom["train_seconds"]
    assert often["tokens_per_second"] == seldom["tokens_per_second"]
    assert sum(entry["seconds"] for entry in seldom["history"]) == pytest.approx(seldom["train_seconds"])


def test_on_a_cpu_log_lines_callbacks_saving_and_validation_belong_to_no_step(make_study, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def taking(seconds, real):
        def call(*args, **settings):
            now[0] += seconds
            return real(*args, **settings)

        return call

    monkeypatch.setattr("peftlib.train.loop.mean_loss", taking(100.0, lambda *args, **settings: 1.0))
    monkeypatch.setattr("peftlib.storage.saver.Saver.save", taking(1000.0, lambda *args, **settings: None))
    monkeypatch.setattr("peftlib.train.placement.ExecutionPlan.after_step", taking(10.0, lambda *args: None))
    monkeypatch.setattr("peftlib.train.loop.CallbackList.show", taking(10.0, CallbackList.show))
    monkeypatch.setattr(Stepper, "gradients", taking(2.0, Stepper.gradients))
    run = TrainingRun(make_study(eval_steps=2, save_steps=1), "lora", log=taking(0.5, lambda line: None))
    record = run.train()
    assert record["train_seconds"] == pytest.approx(6 * 2.0)
