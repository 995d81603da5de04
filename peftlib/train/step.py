"""One optimizer step over a list of micro-batches: what training and its benchmark run."""

import torch

from peftlib.core.errors import NonFiniteLossError
from peftlib.models.inspect import head_weight, hidden_states
from peftlib.models.losses import CHUNK, chunked_loss_sum
from peftlib.models.precision import apply_step, autocast
from peftlib.train import nonfinite


class Stepper:
    """Backward passes and update of one step; the model is in training mode.

    backward: called with each scaled loss. is_compiled: also fuse the loss. The host waits for the device once a step,
    between the backward passes and the update.
    """

    def __init__(self, model, optimizer, scaler, *, device, precision, backward=torch.Tensor.backward, **loss_settings):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.device, self.precision, self.backward = device, precision, backward
        self.loss_settings = {"chunk": CHUNK, "is_compiled": False, **loss_settings}

    def gradients(self, batches, scored, *, seed):
        """Accumulate over all batches; returns nats per scored token, a 0-dim tensor on the device.

        batches: rows.Batch, on the device. scored: tokens that count in the loss, over all batches. seed: of dropout;
        set anew for each pass over the batches, so that every pass sees the same gradients.
        """
        for _ in self.optimizer.basis_passes():
            self._accumulate(batches, scored, seed)
        return self._accumulate(batches, scored, seed)

    def _accumulate(self, batches, scored, seed):
        torch.manual_seed(seed)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with autocast(self.device, self.precision):
                hidden = hidden_states(self.model, batch)
                loss = chunked_loss_sum(
                    hidden, head_weight(self.model), batch.labels, positions=batch.positions, **self.loss_settings
                )
                loss = loss / scored
            self.backward(self.scaler.scale(loss))
            total += loss.detach()
        return total

    def update(self, loss, *, step=None):
        """The precision.Applied of the step. loss: what `gradients` returned. step: its number, for the message.

        NonFiniteLossError: loss, a gradient (named) or their norm is inf or nan, and no loss scale could cure it;
        weights and optimizer are as they were. With fp16 such a step is skipped instead.
        """
        done = apply_step(self.optimizer, self.scaler, loss)
        if not done.is_applied and not self.scaler.is_enabled():
            raise NonFiniteLossError(nonfinite.cause(self.model, self.optimizer, done, step))
        return done
