"""CUDA graphs of a training step: forward, loss, backward and update are each launched as one piece.

On rows of real lengths a step is thousands of short kernels, and without graphs the GPU waits for their launches. A
forward and backward pass is captured for each padded length that comes up, the loss for each number of scored tokens,
the optimizer's two parts once. Passes of all lengths share their memory, for no two of them ever run at once.
"""

import contextlib

import torch

from peftlib.models.inspect import core, head_weight, hidden_states
from peftlib.models.kernels.losses import chunked_loss_sum
from peftlib.models.precision import DTYPES, autocast
from peftlib.train.batching import Batch, padded_size

_WARM_UP = 3  # micro-batches that run kernel by kernel first: torch.compile sees two shapes, libraries load
_AT_MOST = 64  # lengths that stay captured; each costs some MiB
_SMALL = 1 << 20  # numbers of a weight whose gradient may lie in memory twice


class CaptureError(Exception):
    """A part of a step cannot be captured; what failed is its cause."""


class StepGraphs:
    """Runs a Stepper's micro-batches and its optimizer's update by CUDA graphs.

    model, optimizer, scaler, autocast settings and loss_settings: of the Stepper. tokens: of the largest micro-batch.
    What a graph reads and writes stays where it is: parameters, gradients (optimizer.keeps_buffers), the optimizer's
    state, and the buffers here. The first steps run kernel by kernel: those tensors are made there.
    """

    def __init__(self, stepper, *, tokens):
        self._stepper, self._optimizer = stepper, stepper.optimizer
        self._optimizer.keeps_buffers = True
        self._optimizer.gather_refreshes()
        self._device = device = stepper.device
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._tokens = padded_size(tokens)
        ids = torch.zeros(1, self._tokens, dtype=torch.int64, device=device)
        self._batch = Batch(ids, ids[0].clone(), ids[0].clone(), ids.clone())  # the longest; each length takes a part
        self._cu_seqlens = {}  # {their number: buffer}
        width, dtype = core(stepper.model).config.hidden_size, DTYPES[stepper.precision]
        dtype = torch.float32 if dtype == torch.float16 else dtype  # fp16's residual stream is float32
        self._hidden, self._grad = (torch.zeros(1, self._tokens, width, dtype=dtype, device=device) for _ in range(2))
        self._one, self._share, self.total = (torch.ones((), device=device) for _ in range(3))
        self._rates = torch.zeros(len(self._optimizer.param_groups), 3, device=device)
        self._seen = self._updates = 0
        self._can_capture_update, self._is_alike, self._is_zeroed = True, False, False
        self.reset()

    def reset(self):
        """Forget what was captured, and free its memory."""
        torch.cuda.synchronize()
        self._bodies, self._losses, self._finish, self._move, self._discarded = {}, {}, None, None, []
        # The loss has a pool of its own: it runs while a body's activations wait for their backward pass.
        self._pools = {"body": torch.cuda.graph_pool_handle(), "rest": torch.cuda.graph_pool_handle()}
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def on_stream(self):
        """Within it work is queued on the graphs' stream, after all that was queued before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @property
    def captured(self):
        """How many lengths have graphs."""
        return len(self._bodies)

    def forward_backward(self, batch, scored):
        """Add a flat batch's gradients, and its share of the loss to `total`; returns whether that was done.

        It is not in the first steps, and for a row longer than a micro-batch. CaptureError: nothing was run.
        """
        size = batch.ids.shape[1]
        self._seen += 1
        if size > self._tokens or self._seen <= _WARM_UP or not self._updates:
            return False
        if not self._bodies:
            torch.cuda.empty_cache()  # of the first steps: graphs take their memory from pools of their own
        forward, backward = self._body(size, len(batch.cu_seqlens))
        loss = self._losses.get(len(batch.positions))
        if loss is None:
            loss, _ = self._capture("rest", self._run_loss, len(batch.positions))
            self._losses[len(batch.positions)] = loss
        self._fill(batch, scored)
        for part in (forward, loss, backward):
            part.replay()
        return True

    def _fill(self, batch, scored):
        for name in ("ids", "places"):
            getattr(self._batch, name)[:, : batch.ids.shape[1]].copy_(getattr(batch, name))
        for name in ("positions", "targets"):
            getattr(self._batch, name)[: len(batch.positions)].copy_(getattr(batch, name))
        self._cu_seqlens[len(batch.cu_seqlens)].copy_(batch.cu_seqlens)
        torch.div(self._stepper.scaler.scale(self._one), scored, out=self._share)

    def _body(self, size, edges):
        """The graphs of the forward and the backward pass at a length, kept where every pass is like this one."""
        is_kept = self._optimizer.is_steady()
        if is_kept and (size, edges) in self._bodies:
            return self._bodies[size, edges]
        if is_kept and not self._bodies and size < self._tokens:
            # The longest first: all others find room in its memory, where pieces of shorter ones would not join.
            with contextlib.suppress(CaptureError):
                self._body(self._tokens, edges)
        if edges not in self._cu_seqlens:
            self._cu_seqlens[edges] = torch.zeros(edges, dtype=torch.int32, device=self._device)
        forward, hidden = self._capture("body", self._run_forward, size, edges)
        backward, _ = self._capture("body", self._run_backward, hidden)
        if is_kept and len(self._bodies) < _AT_MOST:
            self._bodies[size, edges] = forward, backward
        else:
            self._discarded.append((forward, backward))  # until the device is done with it
        return forward, backward

    def _run_forward(self, size, edges):
        batch = self._batch._replace(
            ids=self._batch.ids[:, :size], places=self._batch.places[:, :size], cu_seqlens=self._cu_seqlens[edges]
        )
        with autocast(self._device, self._stepper.precision):
            hidden = hidden_states(self._stepper.model, batch)
        self._hidden[:, :size].copy_(hidden.detach())
        return hidden

    def _run_backward(self, hidden):
        """Backward; small gradients are added to what is there by one kernel instead of one for each."""
        plain = [p for p in self._optimizer.leaves() if p.grad is not None and p.numel() <= _SMALL]
        sums = [p.grad for p in plain]
        for p in plain:
            p.grad = None
        try:
            hidden.backward(self._grad[:, : hidden.shape[1]].to(hidden.dtype))
            if plain:
                torch._foreach_add_(sums, [p.grad for p in plain])
        finally:
            for p, total in zip(plain, sums, strict=True):
                p.grad = total

    def _run_loss(self, count):
        hidden = self._hidden.detach().requires_grad_()
        positions, targets = self._batch.positions[:count], self._batch.targets[:count]
        with autocast(self._device, self._stepper.precision):
            head = head_weight(self._stepper.model)
            loss = chunked_loss_sum(hidden, head, positions, targets, **self._stepper.loss_settings)
        loss = loss * self._share
        self._grad.copy_(torch.autograd.grad(loss, hidden)[0])
        self.total.add_(loss.detach() / self._stepper.scaler.scale(self._one))

    def _capture(self, pool, call, *args):
        """(graph, what the call returned). OutOfMemoryError, CaptureError: nothing was run, and all is forgotten."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # Relaxed: the first use of a kernel loads it.
            graph.capture_begin(pool=self._pools[pool], capture_error_mode="relaxed")
            result = call(*args)
            graph.capture_end()
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # says again that the capture has failed
                graph.capture_end()
            self.reset()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CaptureError from error
        return graph, result

    # What precision.apply_step asks of an optimizer.

    def finish_accumulation(self, scale=1.0):
        """As the optimizer's, captured where every step is like this one."""
        self._is_alike = self._can_capture_update and self._updates > 0 and scale == 1.0 and self._optimizer.is_steady()
        if self._is_alike and self._finish is None:
            captured = self._capture_update(self._optimizer.finish_accumulation)
            self._finish = captured and (*captured, self._optimizer.last_norms)
        if not (self._is_alike and self._finish):
            return self._optimizer.finish_accumulation(scale)
        graph, found, norms = self._finish
        graph.replay()
        self._optimizer.last_norms = norms
        return found

    def step(self):
        """As the optimizer's, captured likewise."""
        self._is_zeroed = self._is_alike and self._can_capture_update
        if not self._is_zeroed:
            self._optimizer.step()
            return
        groups = self._optimizer.param_groups
        counts = [1 + self._optimizer.count_of(group["params"][0]) for group in groups]
        rates = [self._optimizer.rates_of(group, n) for group, n in zip(groups, counts, strict=True)]
        self._rates.copy_(torch.stack(rates))
        if self._move is None:
            self._move = self._capture_update(self._run_moves)
        if self._move:
            self._move[0].replay()
        else:
            self._run_moves()
        self._optimizer.begin_step()  # while the device works

    @torch.no_grad()
    def _run_moves(self):
        for group, rates in zip(self._optimizer.param_groups, self._rates, strict=True):
            self._optimizer.move(group, group["params"], rates)
        self._optimizer.zero_grad()

    def _capture_update(self, call):
        """(graph, result) of a part of the update, or None where it cannot be captured; then none of it will be."""
        try:
            if self._optimizer.can_capture():
                return self._capture("rest", call)
        except CaptureError as error:
            self._stepper.log(f"the optimizer's update is not captured ({brief(error)})")
        self._can_capture_update = False
        return None

    def zero_grad(self):
        """As the optimizer's; a captured update has done it."""
        if not self._is_zeroed:
            self._optimizer.zero_grad()

    def end_step(self):
        """Count a step, after its update; the device has gone through its passes."""
        self._updates += 1
        self._is_zeroed = False
        self._discarded.clear()


def brief(error):
    """What kept a part of a step from being captured, in one line."""
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error.__cause__ or error).__name__
