"""Checkpoints of the first edition may hold weights as differences from the model's files. They are read, never
written.

The bits of a weight and of its first value were XORed: `high` has the upper halves, compressed, `low` a float32's lower
ones as they are; `start_crc` and `shape` are those of the first value.
"""

import zlib

import torch

from peftlib.core.errors import CheckpointError


def restored(name, parts, start):
    """A weight on the host, bit for bit, from its stored parts.

    start: its first value in the model's files, float32 where parts have 'low', else bfloat16; None: they lack it.
    CheckpointError: the parts are damaged, or the model is not the one that the checkpoint was made with.
    """
    try:
        is_same = start is not None and list(start.shape) == parts["shape"].tolist()
        if is_same and _crc(start) == int(parts["start_crc"]):
            high = torch.frombuffer(bytearray(zlib.decompress(parts["high"].numpy().tobytes())), dtype=torch.int16)
            bits = high.view(start.shape)
            if "low" in parts:
                bits = (bits.to(torch.int32) << 16) | (parts["low"].view(start.shape).to(torch.int32) & 0xFFFF)
            return (bits ^ start.view(bits.dtype)).view(start.dtype)
    except (KeyError, TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise CheckpointError(
            f"the checkpoint's difference of {name} is none ({type(error).__name__}: {error}): delete that checkpoint"
        ) from error
    raise CheckpointError(
        f"{name} of the model is not the one that the checkpoint was made with: take the same model and revision, or "
        "start anew under another study name"
    )


def _crc(tensor):
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())
