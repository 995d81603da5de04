import hashlib

import numpy as np
import pytest
import torch
from test_layers import loss_and_gradients, prepared, rows  # noqa: F401
from torch.compiler._cache import CacheArtifactFactory, CacheArtifactManager, _serialize_single_cache
from torch.utils._appending_byte_serializer import AppendingByteSerializer

from peftlib.core.errors import ModelError
from peftlib.core.files import write_json
from peftlib.models import compile as compiled
from peftlib.models.compile import CompileCache
from peftlib.models.layers import checkpoint_layers
from peftlib.train.batching import pack
from peftlib.train.loop import TrainingRun

# The hybrid has both kinds of layers, fused 4-bit ones and trained ones: the others say in which of them a fault is.
_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qlora", "galore")]
METHODS = pytest.mark.parametrize("method", ["hybrid", *_SLOW])


@METHODS
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


@pytest.mark.parametrize("checkpointing", ["on", "offload"])
@METHODS
def test_recomputed_layers_are_compiled_too_and_recompute_outside(prepared, method, checkpointing):  # noqa: F811
    graphs = []

    def backend(graph, inputs):
        graphs.append(
            {str(node.target) for module in graph.modules() for node in getattr(module, "graph", graph).nodes}
        )
        return graph.forward

    model, cfg = prepared(method)
    batches = [rows([20, 30, 25, 21]).batch([[0, 1], [2, 3]], "cpu")]
    plain = loss_and_gradients(model, batches)
    checkpoint_layers(model, cfg.replace(activation_checkpointing=checkpointing), 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_layers(model, backend=backend)
    loss, gradients = loss_and_gradients(model, batches)
    assert loss == pytest.approx(plain[0], rel=1e-5)
    for name in gradients:
        torch.testing.assert_close(gradients[name], plain[1][name], atol=1e-4, rtol=1e-4, msg=name)
    assert graphs and not any("checkpoint" in name for names in graphs for name in names)
    assert not torch._dynamo.utils.counters["graph_break"]
    compiled.release(model)
    torch._dynamo.reset()


@METHODS
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


def costs():
    return 25.0, 1.2  # seconds that compiling takes; of a step


def test_when_to_compile():
    assert compiled.resolve("off", "cuda", 1000, costs) == (False, "as set by compile")
    assert compiled.resolve("auto", "cpu", 1000, costs) == (False, "no GPU")
    with pytest.raises(ModelError, match="compile='on', but no GPU"):
        compiled.resolve("on", "cpu", 1000, costs)


def test_only_a_run_with_enough_steps_left_is_compiled_and_no_triton_is_said(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    assert compiled.resolve("auto", "cuda", 300, costs) == (True, "about 25 s, saves about 144 s over 300 steps")
    assert compiled.resolve("auto", "cuda", 30, costs) == (False, "about 25 s, would save about 14 s over 30 steps")
    assert compiled.resolve("auto", "cuda", 0, costs)[0] is False
    assert compiled.resolve("on", "cuda", 30, costs) == (True, "as set by compile")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert compiled.resolve("auto", "cuda", 300, costs) == (False, "Triton is not installed")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A CompileCache whose `loaded` are the artifacts that torch was given and whose `lines` are what it has said."""
    loaded, lines = [], []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (artifacts("pgo", "a/b"), None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: loaded.append(data) or object())
    found = CompileCache(tmp_path / "compile", "qlora", log=lines.append)
    found.loaded, found.lines = loaded, lines
    return found


def artifacts(kind, key):
    """One artifact as torch packs them."""
    CacheArtifactManager._ensure_cache_artifacts_registered()
    writer = AppendingByteSerializer(serialize_fn=_serialize_single_cache)
    writer.extend([(kind, [CacheArtifactFactory.create(kind, key, b"content")])])
    return writer.to_bytes()


def put(cache, content):
    cache.path.parent.mkdir(exist_ok=True)
    cache.path.write_bytes(hashlib.sha256(content).digest() + content)


def test_the_cache_is_one_file_of_this_user_alone(cache):
    assert not cache.load() and not cache.lines  # there is none yet, which is nothing to tell
    assert cache.save() == cache.path.stat().st_size and cache.path.stat().st_mode & 0o777 == 0o600
    assert cache.load() and cache.loaded == [artifacts("pgo", "a/b")] and not cache.lines
    assert [path.name for path in cache.path.parent.iterdir()] == [cache.path.name]
    assert cache.path.name.endswith("-qlora.bin")


def test_what_compiling_takes_is_measured_here_apart_with_and_without_the_cache(cache, tmp_path):
    assert cache.expected_seconds(25.0) == 25.0
    cache.keep_seconds(48)
    assert cache.expected_seconds(25.0) == 48.0
    assert CompileCache(tmp_path / "compile", "galore").expected_seconds(20.0) == 20.0  # another file
    cache.save()
    assert cache.expected_seconds(25.0) == compiled.CACHED_S == 5.0
    cache.load()
    cache.keep_seconds(7.5)
    assert cache.expected_seconds(25.0) == 7.5
    cache.path.unlink()
    assert cache.expected_seconds(25.0) == 48.0 and not cache.lines


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 7}', '{"schema_version": 0, "seconds": {}}'])
def test_measured_seconds_that_are_damaged_are_those_of_nobody(cache, text):
    cache.keep_seconds(48.0)
    kept = cache.path.with_suffix(".json")
    kept.write_text(text)
    assert cache.expected_seconds(25.0) == 25.0
    for seconds in (5, {"anew": "long"}, {"anew": -1.0}):
        write_json(kept, {"seconds": seconds})
        assert cache.expected_seconds(25.0) == 25.0
    cache.keep_seconds(48.0)
    assert cache.expected_seconds(25.0) == 48.0


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 100])
def test_a_damaged_cache_costs_a_line(cache, content):
    cache.save()
    cache.path.write_bytes(content)
    assert not cache.load() and not cache.loaded
    assert len(cache.lines) == 1 and f"{cache.path} is not used (it is damaged): compiling again" in cache.lines[0]


def test_a_cache_that_another_user_may_write_is_not_loaded(cache, monkeypatch):
    cache.save()
    cache.path.chmod(0o620)
    assert not cache.load()
    cache.path.chmod(0o600)
    assert cache.load()
    real = cache.path.with_name("real")
    cache.path.rename(real)
    cache.path.symlink_to(real)
    assert not cache.load()
    real.replace(cache.path)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    assert not cache.load()
    assert len(cache.loaded) == 1 and len(cache.lines) == 3 and "another user owns it" in cache.lines[2]


@pytest.mark.parametrize("key", ["../../../home/me/.bashrc", "/etc/cron.d/x", "a/../../b"])
@pytest.mark.parametrize("kind", ["inductor", "aot_autograd", "autotune", "pgo"])
def test_an_artifact_that_leaves_its_place_is_not_loaded(cache, kind, key):
    put(cache, artifacts(kind, key))
    assert not cache.load() and not cache.loaded
    assert key in cache.lines[0] and "points outside the cache folder" in cache.lines[0]


def test_a_cache_that_torch_cannot_read_or_the_disk_not_take_costs_a_line(cache, monkeypatch, tmp_path):
    put(cache, b"whole, but nothing that torch has written")
    assert not cache.load() and "is not used" in cache.lines.pop()
    put(cache, artifacts("pgo", "k"))

    def fail(*args):
        raise RuntimeError("odd artifacts")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", fail)
    assert not cache.load() and "odd artifacts" in cache.lines.pop()
    (tmp_path / "file").write_text("")
    cache.path = tmp_path / "file" / "compile.bin"
    assert cache.save() == 0 and "could not be written" in cache.lines.pop()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", fail)
    assert cache.save() == 0 and "odd artifacts" in cache.lines.pop()


def test_a_run_loads_no_cache_from_its_study(make_study, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path / "cache"))
    loaded, study = [], make_study()
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: loaded.append(data))
    run = TrainingRun(study, "lora", log=lambda line: None)
    run._build_optimizer()
    mine = run.execution._cache.path
    assert mine.parent == tmp_path / "cache" / "compile"
    content = artifacts("pgo", "k")
    (study.folder / "compile").mkdir()
    (study.folder / "compile" / mine.name).write_bytes(hashlib.sha256(content).digest() + content)
    assert not run.execution._cache.load() and not loaded
