"""A model's weights, read from its files one tensor at a time."""

from safetensors import safe_open

from peftlib.models.locate import tensor_files


class BaseWeights:
    """The tensors of a config's `model`, as its files hold them. OSError: it has no safetensors files."""

    def __init__(self, model):
        self._files = tensor_files(model)

    @property
    def names(self):
        """Names of the tensors, as the files have them."""
        return list(self._files)

    def get(self, name, dtype):
        """A parameter's first value, on the host in `dtype`, or None where the files have no tensor of its name."""
        key = name.removeprefix("base_model.model.")
        if key not in self._files:
            return None
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key).to(dtype)
