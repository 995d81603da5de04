"""bitsandbytes' optimizers launch on CUDA's default stream: a step on another one has to wait for them, and they for it."""

import contextlib

import torch

from peftlib.optim import adamw_8bit


class Stream:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


def test_the_update_comes_after_what_was_queued_and_before_what_comes_next(monkeypatch):
    calls = []
    side, default = Stream("side", calls), Stream("default", calls)

    @contextlib.contextmanager
    def current(stream):
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", current)
    with adamw_8bit._default_stream(torch.device("cuda")):
        calls.append("update")
    assert calls == ["default waits for side", "on default", "update", "off default", "side waits for default"]


def test_its_step_is_made_there(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def seen(device):
        entered.append(device.type)
        yield

    monkeypatch.setattr(adamw_8bit, "_default_stream", seen)
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = adamw_8bit.adamw_8bit([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.finish_accumulation()
    optimizer.step()
    assert entered == ["cpu"] and (weight < 1).all()
    assert not optimizer.can_capture()  # a graph of another stream would not hold its kernels
