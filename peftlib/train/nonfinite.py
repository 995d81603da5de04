"""Numbers that are inf or nan: which tensor holds them, and what to do about a run that met them."""

import math

import torch

from peftlib.core.errors import NonFiniteLossError
from peftlib.models.inspect import trainable

_LOWER = 0.3  # what the advice multiplies the learning rates by


def cause(model, optimizer, applied, step):
    """What was not finite in a step that was not applied, in words. applied: its precision.Applied."""
    of_step = "" if step is None else f" of step {step}"
    if not math.isfinite(applied.loss):
        return f"the loss{of_step} is {applied.loss}"
    unfit = optimizer.nonfinite_weights()
    if not unfit:
        return f"the norm of the gradients{of_step} is {applied.grad_norm}, though each of them is finite"
    params = trainable(model)
    numbers = {id(p): (i, name) for i, (name, p) in enumerate(params.items())}
    # A backward pass runs from the last layer to the first, so the last weight in the model's order is where it began.
    _, name = max(numbers[id(p)] for p in unfit)
    return f"the gradient of {name}{of_step} is inf or nan ({len(unfit)} of {len(params)} trained weights have such)"


def advice(study, rate_factor, saved_step):
    """What became of a run that met inf or nan, and the ways out.

    study: its name. rate_factor: the one in force. saved_step: of the last checkpoint, or None.
    """
    lower = f"{_LOWER * rate_factor:.2g}"
    kept = "No checkpoint was written yet, so the run would start over"
    if saved_step is not None:
        kept = f"The last checkpoint is kept (step {saved_step}), and the run would go on from there"
    return (
        f"The step was not applied. {kept}: run again with lower learning rates, by resume_rate_factor = {lower} in "
        f"the notebook's parameters or `python -m peftlib run --study {study} -p resume_rate_factor {lower}`, or with "
        "precision='fp32'"
    )


def require_finite(tensors, what):
    """NonFiniteLossError for the first of {name: tensor} that holds inf or nan. what: they are part of, for the message."""
    name = first_unfit(tensors)
    if name is not None:
        raise NonFiniteLossError(f"{name} holds inf or nan, so {what} was not saved; what was saved before is kept")


def first_unfit(tensors):
    """The name of the first tensor in {name: tensor} that holds inf or nan, or None. Waits once for each device."""
    by_device = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, []).append((name, tensor.detach()))
    for named in by_device.values():
        # Least and largest pass a nan on and need no memory, where isfinite() of the whole would make a mask of it.
        ends = torch.stack([torch.stack(torch.aminmax(tensor)).float() for _, tensor in named])
        for (name, _), is_finite in zip(named, torch.isfinite(ends).all(1).tolist(), strict=True):
            if not is_finite:
                return name
    return None


def tensors_of(model, optimizer):
    """{name: tensor} of what a run trains and what its optimizer keeps of it."""
    params = trainable(model)
    found = dict(params)
    for name, p in params.items():
        state = optimizer.state.get(p, {})
        found |= {f"{key} of {name}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return found
