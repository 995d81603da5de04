"""GaLore from its authors' package, galore_torch (Zhao et al. 2024, arXiv:2403.03507), in our training loop."""

import torch

from peftlib.core.errors import ConfigError
from peftlib.optim.adamw import Accumulating


def galore_torch_adamw(groups, *, lr, weight_decay=0.0, max_grad_norm=0.0):
    """galore_torch's GaLoreAdamW, accumulating full gradients; every basis is fitted in the same step.

    groups: as in galore_torch. Clipping uses the norm of the full gradients. Its state dict contains only tensors.
    ConfigError, later: several processes would share its steps, and their bases could differ.
    """
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    class AccumulatingGaLoreAdamW(Accumulating, GaLoreAdamW):
        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            for state in self.state.values():
                if "projector" in state:  # as a resume will load it, so that resuming is bit-identical
                    state["projector"].ortho_matrix = state["projector"].ortho_matrix.contiguous()

        def use_flat_buffer(self, extra):
            raise ConfigError(
                "galore_engine='galore_torch' trains on one process: start it without torchrun, or set "
                "galore_engine='peftlib'"
            )

        def state_dict(self):
            found = super().state_dict()
            return {**found, "state": {number: _as_tensors(state) for number, state in found["state"].items()}}

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state.get(p, {})
                    if "basis" in state:
                        names = ("rank", "update_proj_gap", "scale", "proj_type")
                        state["projector"] = GaLoreProjector(**{name: group[name] for name in names})
                        state["projector"].ortho_matrix = state.pop("basis")
                    if "step" in state:
                        state["step"] = int(state["step"])

        def _state_shapes(self, p, group):
            if "rank" not in group:
                return super()._state_shapes(p, group)
            (rows, columns), rank = p.shape, group["rank"]
            low, basis = ((rows, rank), (rank, columns)) if rows >= columns else ((rank, columns), (rows, rank))
            return {"step": (), "exp_avg": low, "exp_avg_sq": low, "basis": basis}

    optimizer = AccumulatingGaLoreAdamW(groups, lr=lr, weight_decay=weight_decay, no_deprecation_warning=True)
    optimizer.max_grad_norm = max_grad_norm
    return optimizer


def _as_tensors(state):
    """A weight's state with its step and basis as tensors."""
    plain = {name: value for name, value in state.items() if name != "projector"}
    basis = {"basis": state["projector"].ortho_matrix} if "projector" in state else {}
    return {**plain, **basis, "step": torch.tensor(float(state["step"]))}
