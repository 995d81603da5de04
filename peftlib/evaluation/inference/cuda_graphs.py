"""A decoding step as CUDA graphs, one for each of its shapes: replayed, it costs the host a single launch."""

import gc

import torch


class StepGraphs:
    """Calls of step(*shape), captured by shape. The step may keep state in tensors that stay where they are.

    A shape's first call runs as it is, and what it does counts; it also lets libraries set up outside a capture.
    Where a capture fails (a library that asks the host something), all later calls run as they are.
    """

    def __init__(self, step):
        self.step, self.graphs, self.pool, self.works = step, {}, None, True

    def __call__(self, *shape):
        graph = self.graphs.get(shape)
        if graph is not None:
            graph.replay()
            return
        self.step(*shape)
        if self.works:
            self._capture(shape)

    def _capture(self, shape):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        collects = gc.isenabled()
        gc.disable()  # a tensor of another pool that is freed meanwhile would end the capture
        try:
            with torch.cuda.stream(side):
                graph.capture_begin(*([self.pool] if self.pool else []))
                try:
                    self.step(*shape)
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.works = False
            return
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(side)
        self.pool = self.pool or graph.pool()
        self.graphs[shape] = graph
