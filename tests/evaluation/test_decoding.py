import contextlib
import random
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch

from peftlib.core.config import resolve
from peftlib.core.errors import ModelError
from peftlib.evaluation.evaluate import evaluate
from peftlib.evaluation.inference import decoder as decoding
from peftlib.evaluation.inference import engines, forward
from peftlib.evaluation.inference.cuda_graphs import StepGraphs
from peftlib.evaluation.inference.kv_cache import SlotCache, slot_bytes
from peftlib.methods import qlora
from peftlib.models.inspect import core
from peftlib.models.load import load_base
from peftlib.models.precision import run_in_autocast
from peftlib.models.saved import load_plain

STOPS = (1, 106)
WINDOW = 32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def stopping_model(seed=0, boost=0.9):
    """A tiny model of both layer kinds whose stop tokens are likely enough that answers end at many lengths."""
    kinds = ["sliding_attention", "full_attention"]
    apart = {"tie_word_embeddings": False, "initializer_range": 0.15}  # else a random model repeats its last token
    model = tiny.model(seed, hidden_size=32, layer_types=kinds, sliding_window=WINDOW, **apart)
    bias = torch.zeros(tiny.WORDS)
    bias[list(STOPS)] = boost
    model.lm_head.register_forward_hook(lambda module, args, out: out + bias.to(out.device))
    return model


def uneven(n, seed=0, most=24):
    """(prompts, limits): lengths around the window and far from it, the longest more than three windows."""
    random_ = random.Random(seed)
    lengths = [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5]
    lengths = lengths[:n] + [random_.randrange(2, 70) for _ in range(n - len(lengths))]
    prompts = [[2] + [random_.randrange(107, tiny.WORDS) for _ in range(length - 1)] for length in lengths]
    return prompts, [random_.choice([1, 3, 9, most, most, most]) for _ in prompts]


def alone(model, prompt, limit):
    """What stock generate answers to one row."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    settings = {"do_sample": False, "top_k": None, "top_p": None, "eos_token_id": list(STOPS), "pad_token_id": 0}
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **settings)
    return made[0, len(prompt) :].tolist()


def margin_where_they_part(model, prompt, plain, ours):
    """How far apart plain generate's two best logits are at the first token in which ours differs."""
    at = next(i for i, (a, b) in enumerate(zip(plain, ours)) if a != b)
    with torch.no_grad():
        best = model(torch.tensor([prompt + plain[:at]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize(
    ("seed", "rows"), [(0, 40), *(pytest.param(seed, 100, marks=pytest.mark.slow) for seed in range(5))]
)
def test_answers_equal_stock_generate_row_by_row(seed, rows):
    model, (prompts, limits) = stopping_model(seed), uneven(rows, seed)
    plain = [alone(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    ours = dict(decoding.generate_by_slots(model, prompts, limits, slots=13))
    assert sorted(ours) == list(range(rows))
    others = [i for i in range(rows) if ours[i] != plain[i]]
    assert len(others) <= 0.005 * rows
    assert all(margin_where_they_part(model, prompts[i], plain[i], ours[i]) <= 1e-3 for i in others)
    assert 0.2 < sum(ids[-1] in STOPS for ids in plain) / rows < 0.8 and len({len(ids) for ids in plain}) > 8


@pytest.mark.parametrize(("rows", "slots"), [(1, 0), (1, 1), (5, 64), (20, 0), (20, 1), (20, 8), (20, 20)])
def test_every_row_is_answered_once_whatever_the_slots(rows, slots):
    model, (prompts, limits) = stopping_model(), uneven(rows)
    made = list(decoding.generate_by_slots(model, prompts, limits, slots=slots))
    assert sorted(number for number, _ in made) == list(range(rows))
    whole = dict(decoding.generate_by_slots(model, prompts, limits, slots=3))
    assert all(ids == whole[number] for number, ids in made)


def test_the_pace_of_a_gpu_makes_the_same_answers(monkeypatch):
    model, (prompts, limits) = stopping_model(), uneven(30)
    by_row = dict(decoding.generate_by_slots(model, prompts, limits, slots=16))
    small = decoding.Pace(prompt_tokens=300, steps=4, places=16, shrink=4)
    monkeypatch.setattr(decoding, "CPU_PACE", small)
    assert dict(decoding.generate_by_slots(model, prompts, limits, slots=16)) == by_row


def test_a_prompt_of_the_window_times_three_is_kept_in_a_ring():
    config = stopping_model().config
    cache = SlotCache(config, 4, 200, dtype=torch.float32, device="cpu")
    assert [kept.shape[2] for kept in cache.keys] == [WINDOW, 200]
    held = sum(kept.numel() * kept.element_size() for kept in (*cache.keys, *cache.values))
    assert held == 4 * slot_bytes(config, 200, 4)


def test_the_model_is_afterwards_as_before():
    model, (prompts, limits) = stopping_model(), uneven(6)
    ids = torch.tensor(prompts[-1:])
    before, attention = model(ids).logits, model.config._attn_implementation
    for _ in decoding.generate_by_slots(model, prompts, limits):
        assert torch.is_grad_enabled()
        break  # a caller that stops early
    assert model.config._attn_implementation == attention
    assert "forward" not in vars(model.model.norm)
    assert torch.equal(model(ids).logits, before)


def run_out_of_memory(monkeypatch, at):
    calls = iter(range(10**6))

    def step(*args, **kwargs):
        if next(calls) in at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward.next_tokens(*args, **kwargs)

    monkeypatch.setattr(decoding, "next_tokens", step)


def test_after_out_of_memory_half_the_slots_go_on_and_nothing_is_lost(monkeypatch):
    model, (prompts, limits) = stopping_model(), uneven(30)
    whole = dict(decoding.generate_by_slots(model, prompts, limits, slots=8))
    run_out_of_memory(monkeypatch, {5, 12})
    said = []
    made = list(decoding.generate_by_slots(model, prompts, limits, slots=8, log=said.append))
    assert sorted(number for number, _ in made) == list(range(30)) and dict(made) == whole
    assert said == [f"out of GPU memory: continuing with {n} rows at a time" for n in (4, 2)]


def test_a_row_that_does_not_fit_alone_is_a_named_error(monkeypatch):
    run_out_of_memory(monkeypatch, range(100))
    with pytest.raises(ModelError, match="one row of 125 tokens does not fit"):
        list(decoding.generate_by_slots(stopping_model(), *uneven(20), slots=4, log=lambda line: None))


def unmerged(tiny_model, precision):
    """A 4-bit model with adapters that say something, as training leaves it."""
    cfg = resolve("demo", lora_rank=4)
    base = load_base(str(tiny_model), precision=precision, device="cpu", four_bit=qlora.SPEC.four_bit)
    model = qlora.prepare(base, cfg)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    run_in_autocast(core(model), "cpu", precision)
    return model.eval()


def test_adapters_beside_a_4_bit_model_answer_alike(tiny_model):
    model, (prompts, limits) = unmerged(tiny_model, "fp32"), uneven(7, most=8)
    ours = dict(decoding.generate_by_slots(model, prompts, limits, slots=4))
    assert [ours[i] for i in range(7)] == [alone(model, p, n) for p, n in zip(prompts, limits, strict=True)]


def test_a_model_in_autocast_keeps_its_cache_in_that_precision(tiny_model):
    model, (prompts, limits) = unmerged(tiny_model, "bf16"), uneven(8, most=12)
    assert decoding._dtype(model) == torch.bfloat16
    ours = dict(decoding.generate_by_slots(model, prompts, limits, slots=4))
    same = [ours[i] == alone(model, p, n) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    assert sum(same) >= 6  # bf16 rounds by neighbours


def test_a_residual_beyond_fp16_does_not_overflow_in_the_slots(tmp_path):
    model = stopping_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight.fill_(4e4)
            layer.post_attention_layernorm.weight.fill_(5e4)
            layer.pre_feedforward_layernorm.weight.fill_(2e3)
    model.save_pretrained(tmp_path / "big")
    prompts, limits = uneven(12)
    exact, half = (load_plain(str(tmp_path / "big"), device="cpu", dtype=t) for t in (torch.float32, torch.float16))
    whole = dict(decoding.generate_by_slots(exact, prompts, limits, slots=4))
    ours = dict(decoding.generate_by_slots(half, prompts, limits, slots=4))
    assert sum(ours[i][0] == whole[i][0] for i in range(12)) >= 9  # fp16 rounds, an overflow would leave no word right


def test_a_model_that_slots_do_not_know_is_answered_by_generate():
    other = types.SimpleNamespace(model=types.SimpleNamespace())
    assert engines.resolve_engine(other, "auto") == "plain"
    assert engines.resolve_engine(stopping_model(), "auto") == "slots"
    with pytest.raises(ModelError, match="engine='slots' knows Gemma 3's text model, not SimpleNamespace"):
        engines.resolve_engine(other, "slots")


def test_plain_batches_end_each_row_at_its_own_limit():
    model, (prompts, limits) = stopping_model(), uneven(20)
    made = dict(engines.generate_rows(model, prompts, limits, engine="plain", batch=7))
    assert [made[i] for i in range(20)] == [alone(model, p, n) for p, n in zip(prompts, limits, strict=True)]


class FakeVllm(types.ModuleType):
    def __init__(self):
        super().__init__("vllm")
        self.asked = []

    def SamplingParams(self, **settings):
        return settings

    def LLM(self, **settings):
        self.asked.append(settings)
        return self

    def generate(self, prompts, settings, use_tqdm):
        self.asked += [prompts, settings]
        output = types.SimpleNamespace(token_ids=[366, 106, 367])
        return [types.SimpleNamespace(outputs=[output]) for _ in prompts]


def test_vllm_gets_dtype_token_ids_limits_and_stop_ids(monkeypatch, tmp_path):
    fake, folder = FakeVllm(), str(tmp_path)
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    monkeypatch.setitem(sys.modules, "vllm", fake)
    made = dict(engines.generate_rows(folder, [[2, 5], [2, 6, 7]], [4, 9], engine="vllm"))
    assert made == {0: [366, 106], 1: [366, 106]}
    model, prompts, settings = fake.asked
    assert 0 < model.pop("gpu_memory_utilization") <= 0.8  # of what is free
    assert model == {"model": folder, "dtype": "float32", "max_model_len": 12, "trust_remote_code": False}
    assert prompts == [{"prompt_token_ids": [2, 5]}, {"prompt_token_ids": [2, 6, 7]}]
    assert [s["max_tokens"] for s in settings] == [4, 9]
    assert all(s["stop_token_ids"] == [1, 106] and s["temperature"] == 0.0 for s in settings)


def test_evaluation_hands_vllm_the_merged_folder(make_study, monkeypatch):
    fake, files = FakeVllm(), set()
    given = fake.LLM
    fake.LLM = lambda **how: (files.update(path.name for path in Path(how["model"]).iterdir()), given(**how))[1]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    study = make_study(engine="vllm")
    evaluate(study, "base", log=lambda line: None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files and not Path(fake.asked[0]["model"]).exists()
    assert fake.asked[0]["dtype"] == "float32"  # a CPU's precision, which the record names
    assert study.predictions_path("base", 0).read_text().count('"answer": "a", "n_tokens": 1') == 6


def test_without_vllm_the_way_out_is_named(make_study, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match="engine='vllm' needs vLLM.*use engine='auto'"):
        evaluate(make_study(engine="vllm"), "base", log=lambda line: None)


@needs_gpu
def test_graphs_on_a_gpu_answer_as_stock_generate_does():
    model, (prompts, limits) = stopping_model().to("cuda"), uneven(60)
    ours = dict(decoding.generate_by_slots(model, prompts, limits, slots=16))
    plain = [alone(model, p, n) for p, n in zip(prompts, limits, strict=True)]
    assert sum(ours[i] == plain[i] for i in range(60)) >= 59


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph: notes what happens to it."""

    fails = False
    seen = None  # a list, once a test begins

    def capture_begin(self, *pool):
        self.seen.append(("begin", *pool))

    def capture_end(self):
        self.seen.append("end")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def pool(self):
        return "pool"

    def replay(self):
        self.seen.append("replay")


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_captured_once_a_shape_and_runs_as_it_is_where_that_fails(monkeypatch, fails):
    FakeGraph.fails, FakeGraph.seen = fails, []
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": FakeGraph, "Stream": lambda: stream, "current_stream": lambda: stream}
    fakes |= {"synchronize": lambda: None, "stream": lambda side: contextlib.nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    steps = []
    run = StepGraphs(lambda *shape: steps.append(shape))
    for shape in ((8, 256), (8, 256), (2, 256), (8, 256)):
        run(*shape)
    if fails:
        assert FakeGraph.seen == [("begin",), "end"]
        assert steps == [(8, 256)] * 3 + [(2, 256), (8, 256)]  # the second is the capture that failed
    else:
        assert FakeGraph.seen == [("begin",), "end", "replay", ("begin", "pool"), "end", "replay"]
        assert steps == [(8, 256), (8, 256), (2, 256), (2, 256)]
