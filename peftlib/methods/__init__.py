"""The methods, in study order. A new one is a module with a MethodSpec, passed to `register`."""

from peftlib.methods import apollo, full, galore, hybrid, lora, muon, qlora
from peftlib.methods.spec import BASE, METHODS, MethodSpec, find, register, require_rank, study_order, unregister

for _module in (qlora, galore, hybrid, lora, full, apollo, muon):
    register(_module.SPEC)

__all__ = ["BASE", "METHODS", "MethodSpec", "find", "register", "require_rank", "study_order", "unregister"]
