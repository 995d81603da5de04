"""CUDA graphs of a training step: forward, loss, backward and update are each launched as one graph.

With rows of realistic length, a step has thousands of short kernels, and without graphs the GPU waits for launches. We
capture a forward and a backward pass per padded length, the loss per number of scored tokens, and the optimizer's two
parts once. Passes of all lengths share a memory pool, because no two of them run at the same time.
"""

import contextlib

import torch

from peftlib.models.inspect import core, head_weight, hidden_states
from peftlib.models.kernels.losses import chunked_loss_sum
from peftlib.models.precision import DTYPES, autocast
from peftlib.train.batching import Batch, padded_size

_WARM_UP = 3  # micro-batches that first run without graphs: torch.compile sees two shapes, libraries load
CAPTURE_PASSES = 5  # passes that take as long as capturing one; we measured 3 to 6 on an H200
_AT_MOST = 64  # maximum captured lengths; each costs a few MiB
_SMALL = 1 << 20  # elements of a weight whose gradient may be in memory twice


class CaptureError(Exception):
    """A part of a step cannot be captured; the error is in __cause__."""


class StepGraphs:
    """Runs a Stepper's micro-batches and its optimizer's update as CUDA graphs.

    model, optimizer, scaler, autocast settings and loss_settings: the Stepper's. tokens: of the largest micro-batch.
    when_warm: called after the last step without graphs, and when `limit` changed what is captured.
    Tensors that a graph reads or writes keep their addresses: parameters, gradients (optimizer.keeps_buffers),
    optimizer state, and the buffers here. The first steps run without graphs and allocate them.
    """

    def __init__(self, stepper, *, tokens, when_warm=lambda: None):
        self._when_warm = when_warm
        self._stepper, self._optimizer = stepper, stepper.optimizer
        self._optimizer.keeps_buffers = True
        self._optimizer.gather_refreshes()
        self._device = device = stepper.device
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._tokens = padded_size(tokens)
        ids = torch.zeros(1, self._tokens, dtype=torch.int64, device=device)
        self._batch = Batch(ids, ids[0].clone(), ids[0].clone(), ids.clone())  # the longest; shorter ones use a slice
        self._cu_seqlens = {}  # {their number: buffer}
        width, dtype = core(stepper.model).config.hidden_size, DTYPES[stepper.precision]
        dtype = torch.float32 if dtype == torch.float16 else dtype  # fp16's residual stream is float32
        self._hidden, self._grad = (torch.zeros(1, self._tokens, width, dtype=dtype, device=device) for _ in range(2))
        self._one, self._share, self.total = (torch.ones((), device=device) for _ in range(3))
        self._rates = torch.zeros(len(self._optimizer.param_groups), 3, device=device)
        self._seen = self._updates = 0
        self._is_warm = False  # whether passes run as graphs; changes between steps only
        self._can_capture_update, self._is_alike, self._is_zeroed = True, False, False
        self.reset()

    def reset(self):
        """Drop all captured graphs and free their memory."""
        torch.cuda.synchronize()
        self._bodies, self._losses, self._finish, self._move = {}, {}, None, None
        self._of_pass, self._discarded = {}, []
        # The loss has its own pool: it runs while a body's activations wait for their backward pass.
        self._pools = {"body": torch.cuda.graph_pool_handle(), "rest": torch.cuda.graph_pool_handle()}
        torch.cuda.empty_cache()

    def limit(self, tokens):
        """Capture no more than `tokens` tokens from now on, after an out-of-memory error."""
        self._tokens = min(self._tokens, padded_size(tokens))
        if self._is_warm:
            self._when_warm()

    @contextlib.contextmanager
    def on_stream(self):
        """Context that queues work on the graphs' stream, after all work queued before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @property
    def captured(self):
        """Number of captured shapes."""
        return len(self._bodies)

    def begin_pass(self):
        """Start a pass over the micro-batches of a step."""
        self.total.zero_()
        self._of_pass = {}

    def forward_backward(self, batch, scored):
        """Add a flat batch's gradients, and its share of the loss to `total`; returns whether it did.

        It does not in the first steps or for a row longer than a micro-batch. CaptureError: nothing has run.
        """
        size = batch.ids.shape[1]
        self._seen += 1
        if size > self._tokens or not self._is_warm:
            return False
        if not self._bodies:
            torch.cuda.empty_cache()  # memory of the first steps; graphs allocate from their own pools
        forward, backward = self._body(size, len(batch.cu_seqlens))
        count = len(batch.positions)
        if count not in self._losses:
            self._losses[count], _ = self._capture("rest", self._run_loss, count)
        self._fill(batch, scored)
        for part in (forward, self._losses[count], backward):
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
        """The forward and backward graphs for a length, kept if every pass is like this one."""
        is_kept = self._optimizer.is_steady()
        # The first micro-batch of a pass that refreshes bases creates the full gradients that the others add to.
        key = (size, edges) if is_kept else (size, edges, bool(self._of_pass))
        found = (self._bodies if is_kept else self._of_pass).get(key)
        if found:
            return found
        if is_kept and not self._bodies and size < self._tokens:
            # Longest first: all others fit into its memory, whereas blocks of shorter ones would not merge.
            with contextlib.suppress(CaptureError):
                self._body(self._tokens, edges)
        if edges not in self._cu_seqlens:
            self._cu_seqlens[edges] = torch.zeros(edges, dtype=torch.int32, device=self._device)
        forward, hidden = self._capture("body", self._run_forward, size, edges)
        backward, _ = self._capture("body", self._run_backward, hidden)
        graphs = forward, backward
        if is_kept and len(self._bodies) < _AT_MOST:
            self._bodies[key] = graphs
            return graphs
        if not is_kept:
            self._of_pass[key] = graphs
        self._discarded.append(graphs)  # keep until the device is done with them
        return graphs

    def _run_forward(self, size, edges):
        batch = self._batch._replace(
            ids=self._batch.ids[:, :size], places=self._batch.places[:, :size], cu_seqlens=self._cu_seqlens[edges]
        )
        with autocast(self._device, self._stepper.precision):
            hidden = hidden_states(self._stepper.model, batch)
        self._hidden[:, :size].copy_(hidden.detach())
        return hidden

    def _run_backward(self, hidden):
        """Backward; adds all small gradients to the existing ones in one kernel instead of one each."""
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
        hidden = self._hidden[:, : self._tokens].detach().requires_grad_()
        positions, targets = self._batch.positions[:count], self._batch.targets[:count]
        with autocast(self._device, self._stepper.precision):
            head = head_weight(self._stepper.model)
            loss = chunked_loss_sum(hidden, head, positions, targets, **self._stepper.loss_settings)
        loss = loss * self._share
        self._grad[:, : self._tokens].copy_(torch.autograd.grad(loss, hidden)[0])
        self.total.add_(loss.detach() / self._stepper.scaler.scale(self._one))

    def _capture(self, pool, call, *args):
        """(graph, the call's result). OutOfMemoryError, CaptureError: nothing has run, and all graphs are dropped."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # Relaxed, because the first use of a kernel loads it.
            graph.capture_begin(pool=self._pools[pool], capture_error_mode="relaxed")
            result = call(*args)
            graph.capture_end()
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # reports the failed capture again
                graph.capture_end()
            self.reset()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CaptureError from error
        return graph, result

    # The optimizer interface that precision.apply_step uses.

    def finish_accumulation(self, scale=1.0):
        """As the optimizer's, captured if every step is like this one."""
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
        """As the optimizer's, captured in the same way."""
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
        """(graph, result) of a part of the update, or None if it cannot be captured; then no part will be."""
        try:
            if self._optimizer.can_capture():
                return self._capture("rest", call)
        except (CaptureError, torch.OutOfMemoryError) as error:
            self._stepper.log(f"the optimizer update runs without CUDA graphs ({brief(error)})")
        self._can_capture_update = False
        return None

    def zero_grad(self):
        """As the optimizer's; a captured update has already done it."""
        if not self._is_zeroed:
            self._optimizer.zero_grad()

    def end_step(self):
        """Count a step, after its update, when the device has finished its passes."""
        self._updates += 1
        if not self._is_warm and self._seen >= _WARM_UP:
            self._is_warm = True
            self._when_warm()
        self._is_zeroed = False
        self._of_pass = {}
        self._discarded.clear()


def brief(error):
    """Why a part of a step could not be captured, in one line."""
    return " ".join(str(error.__cause__ or error).split())[:200] or type(error.__cause__ or error).__name__
