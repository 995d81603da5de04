"""A decoding step as CUDA graphs, one per shape: a replay costs the host a single launch."""

import gc

import torch


class StepGraphs:
    """Calls step(*shape), one captured graph per shape. The step may keep state in tensors that are not reallocated.

    The first call of a shape runs eagerly, so that libraries initialize outside a capture. If a capture fails (because
    a library synchronizes with the host), all later calls run eagerly.
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
        gc.disable()  # freeing a tensor of another pool would abort the capture
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
