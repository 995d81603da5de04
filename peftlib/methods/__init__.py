"""The methods, in study order. To add one, write a module with a MethodSpec and pass it to `register`, or add an entry
to `variants`."""

from peftlib.methods import apollo, full, galore, hybrid, lora, muon, qlora, variants
from peftlib.methods.peft_file import find, keep, known
from peftlib.methods.spec import BASE, METHODS, MethodSpec, default_methods, register, require_rank, study_order
from peftlib.methods.spec import unregister as unregister

for _spec in (*(m.SPEC for m in (qlora, galore, hybrid, lora, full, apollo, muon)), hybrid.MLP_SPEC, *variants.SPECS):
    register(_spec)

__all__ = ["BASE", "METHODS", "MethodSpec", "default_methods", "find", "keep", "known", "register", "require_rank"]
__all__ += ["study_order", "unregister"]
