"""Trained weights as what differs from the model's own files, bit for bit: about half of a float32 weight's bytes.

Fine-tuning moves a weight little, so sign, exponent and the first bits of the mantissa mostly stay those of the model.
The upper halves of both are XORed, which leaves zeros for zlib; the lower half is as good as random and stays as it is.
"""

import zlib

import torch
from safetensors import safe_open

from peftlib.core.errors import CheckpointError
from peftlib.models.identity import tensor_files

_WHOLE = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class BaseWeights:
    """A model's weights, read from its files one at a time when asked for.

    Always as the files hold them, so that a checkpoint of a card with fp16 can be read on one with bf16.
    model: a config's `model`. OSError: it has no safetensors files.
    """

    def __init__(self, model):
        self._files = tensor_files(model)

    @property
    def names(self):
        """Names of the tensors, as the files have them."""
        return list(self._files)

    def get(self, name, dtype):
        """What a parameter started as, on the host in `dtype`, or None where the files have no tensor of its name."""
        key = name.removeprefix("base_model.model.")
        if key not in self._files:
            return None
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key).to(dtype)

    def shrunk(self, name, weight):
        """`shrunk` of a weight on the host against what it started as; the weight itself where that is not to be had."""
        start = self.get(name, weight.dtype) if weight.dtype in _WHOLE and weight.ndim == 2 else None
        return weight if start is None or start.shape != weight.shape else shrunk(weight, start)

    def grown(self, name, parts):
        """The weight that was shrunk, on the host. CheckpointError: this model is not the one it was shrunk against."""
        start = self.get(name, torch.float32 if "low" in parts else torch.bfloat16)
        try:
            is_same = start is not None and list(start.shape) == parts["shape"].tolist()
            if is_same and _crc(start) == int(parts["start_crc"]):
                return grown(parts, start)
        except (KeyError, TypeError, ValueError, RuntimeError, zlib.error) as error:
            raise CheckpointError(
                f"the checkpoint's difference of {name} is none ({type(error).__name__}: {error}): delete that checkpoint"
            ) from error
        raise CheckpointError(
            f"{name} of the model is not the one that the checkpoint was made with: take the same model and "
            "revision, or start anew under another study name"
        )


def shrunk(weight, start):
    """Plain tensors from which `grown` makes a weight again. weight, start: of one shape and dtype, on the host."""
    whole = _WHOLE[weight.dtype]
    differs = weight.contiguous().view(whole) ^ start.contiguous().view(whole)
    parts = {"start_crc": torch.tensor(_crc(start)), "shape": torch.tensor(weight.shape)}
    if weight.dtype == torch.float32:
        parts["low"] = differs.to(torch.int16)
        differs = (differs >> 16).to(torch.int16)
    parts["high"] = torch.frombuffer(bytearray(zlib.compress(differs.numpy().tobytes(), 1)), dtype=torch.uint8)
    return parts


def grown(parts, start):
    """The weight that was `shrunk` against `start`, on the host."""
    high = torch.frombuffer(bytearray(zlib.decompress(parts["high"].numpy().tobytes())), dtype=torch.int16)
    differs = high.view(start.shape)
    if "low" in parts:
        differs = (differs.to(torch.int32) << 16) | (parts["low"].view(start.shape).to(torch.int32) & 0xFFFF)
    return (differs ^ start.view(_WHOLE[start.dtype])).view(start.dtype)


def _crc(tensor):
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())
