import numpy as np
import pytest
import torch
from test_layers import loss_and_gradients, prepared, rows  # noqa: F401

from peftlib import compiled
from peftlib.compiled import CompileCache
from peftlib.errors import ModelError
from peftlib.steps import pack


@pytest.mark.parametrize("method", ["qlora", "hybrid", "galore"])
def test_compiled_layers_have_no_break_one_form_for_all_shapes_and_equal_gradients(prepared, method):  # noqa: F811
    model, _ = prepared(method)
    data = rows(np.random.default_rng(0).integers(5, 60, 40))
    # On a GPU every batch has masks and two sequences at least.
    cuts = [pack(range(k, k + 9), data.lengths, 160 + 30 * k, multiple=8, least=2) for k in (0, 5, 9)]
    cuts = [[bins for bins in cut if len(bins) > 1 and max(map(len, bins)) > 1] for cut in cuts]
    shapes = [[data.batch(bins, "cpu") for bins in cut] for cut in cuts]
    assert len({batch.ids.shape for part in shapes for batch in part}) > 2
    plain = [loss_and_gradients(model, part) for part in shapes]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_layers(model, backend="aot_eager")
    for (loss, gradients), part in zip(plain, shapes, strict=True):
        again, ours = loss_and_gradients(model, part)
        assert abs(again - loss) < 1e-5 * loss
        for name in ours:
            torch.testing.assert_close(ours[name], gradients[name], atol=1e-4, rtol=1e-4, msg=name)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with compiled.uncompiled(model):
        assert all(layer._compiled_call_impl is None for layer in compiled.core(model).model.layers)
    assert all(layer._compiled_call_impl is not None for layer in compiled.core(model).model.layers)
    compiled.release(model)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["qlora", "hybrid", "galore"])
def test_the_graph_of_a_layer_can_be_kept_in_the_compile_cache(prepared, method):  # noqa: F811
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    graphs = []

    def backend(graph, inputs):
        check_cacheable(graph)  # raises BypassAOTAutogradCache where torch would trace it anew in every session
        graphs.append(graph)
        return graph.forward

    model, _ = prepared(method)
    data = rows([20, 30, 25, 21])
    torch._dynamo.reset()
    compiled.compile_layers(model, backend=backend)
    loss_and_gradients(model, [data.batch([[0, 1], [2, 3]], "cpu")])
    assert graphs
    compiled.release(model)
    torch._dynamo.reset()


def test_when_to_compile():
    assert compiled.resolve("off", "cuda", 1000)[0] is False
    assert compiled.resolve("auto", "cpu", 1000) == (False, "no GPU")
    with pytest.raises(ModelError, match="compile='on', but no GPU"):
        compiled.resolve("on", "cpu", 1000)


def test_a_short_run_is_not_compiled_and_no_triton_is_said(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    assert compiled.resolve("auto", "cuda", 1000)[0] is True
    assert compiled.resolve("auto", "cuda", 20) == (False, "20 steps are over before compiling pays")
    assert compiled.resolve("on", "cuda", 20)[0] is True
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert compiled.resolve("auto", "cuda", 1000) == (False, "Triton is not installed")


def test_the_cache_is_one_verified_file_local_first(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"made", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: loaded.append(data) or object())
    cache = CompileCache([tmp_path / "local", tmp_path / "drive"])
    assert cache.load() is None
    assert cache.save() == 36 and all(path.exists() for path in cache.paths)
    assert cache.load() == cache.paths[0] and loaded == [b"made"]
    cache.paths[0].write_bytes(cache.paths[0].read_bytes()[:-1] + b"X")
    assert cache.load() == cache.paths[1]
    cache.paths[1].write_bytes(b"")
    assert cache.load() is None
