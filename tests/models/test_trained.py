import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from peftlib.core.errors import ModelError
from peftlib.data import load_split
from peftlib.methods import qlora
from peftlib.models.chat_template import STOP_IDS
from peftlib.models.locate import locate
from peftlib.models.saved import export_merged, load_plain, load_rounded, load_trained
from peftlib.train.batching import Rows, mean_loss
from peftlib.train.loop import TrainingRun

IDS = torch.tensor([[2, 105, 449, 363, 366, 367, 106, 363, 105, 453, 363]])


@pytest.fixture(scope="module")
def trained_before():
    return {}


@pytest.fixture
def trained(make_study, trained_before):
    """trained(method, **fields) -> (model, its folder, study), made once for all tests that ask for the same; to
    read."""

    def train(method, **fields):
        asked = (method, *sorted(fields.items()))
        if asked not in trained_before:
            study = make_study(**{"lora_learning_rate": 1e-2, "galore_learning_rate": 1e-2, **fields})
            run = TrainingRun(study, method, log=lambda line: None)
            run.train()
            trained_before[asked] = run.model.eval(), study.weights_dir(method, 0), study
        return trained_before[asked]

    return train


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def test_the_adapter_loads_with_stock_peft(trained):
    from peft import PeftModel

    ours, folder, study = trained("qlora")
    # the base as QLoRA trained on it: NF4, dequantized
    base = AutoModelForCausalLM.from_pretrained(study.cfg.model, quantization_config=_nf4())
    stock = PeftModel.from_pretrained(base.dequantize(), folder).eval()
    torch.testing.assert_close(logits(stock), logits(ours), atol=1e-4, rtol=0)
    untrained = AutoModelForCausalLM.from_pretrained(study.cfg.model)
    assert (logits(stock) - logits(untrained)).abs().max() > 1e-2


def _nf4():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def test_the_galore_model_loads_with_stock_transformers(trained):
    ours, folder, study = trained("galore")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.dtype == torch.bfloat16
    assert stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock), logits(ours), atol=0.03, rtol=0)  # weights were rounded to bf16
    untrained = load_plain(study.cfg.model, device="cpu")
    assert (logits(stock) - logits(untrained)).abs().max() > 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["qlora", "hybrid"])
def test_a_reloaded_adapter_model_has_equal_logits(trained, method, precision):
    ours, folder, _ = trained(method, precision=precision)
    before = logits(ours)
    assert torch.equal(logits(load_trained(folder, merge=False)), before)
    assert torch.equal(logits(ours), before)  # no forward pass has repacked a 4-bit weight


@pytest.mark.parametrize("method", ["qlora", "hybrid"])
def test_a_merged_model_is_plain_and_agrees(trained, method):
    ours, folder, _ = trained(method)
    merged = load_trained(folder)
    assert not any("lora" in name or "4bit" in type(m).__name__ for name, m in merged.named_modules())
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), logits(ours), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_a_model_in_fp16_keeps_its_vectors_and_answers_as_in_float32(trained, method):
    _, folder, _ = trained(method)
    exact, half = load_trained(folder), load_trained(folder, dtype=torch.float16)
    assert {p.dtype for p in half.parameters() if p.ndim > 1} == {torch.float16}
    assert {p.dtype for p in half.parameters() if p.ndim == 1} == {torch.float32}
    torch.testing.assert_close(logits(half), logits(exact), atol=0.02, rtol=0, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["qlora", "lora", "hybrid", "galore"])
def test_a_model_trained_in_fp16_runs_in_every_precision(trained, method, dtype):
    ours, folder, _ = trained(method, precision="fp16")
    merged = load_trained(folder, dtype=dtype)
    torch.testing.assert_close(logits(merged), logits(ours), atol=0.05, rtol=0, check_dtype=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_untrained_model_is_rounded_as_a_method_holds_it(trained, precision, dtype):
    _, folder, study = trained("qlora", precision=precision, lora_learning_rate=1e-30)
    rounded = load_rounded(study.cfg.model, qlora.SPEC.four_bit, precision=precision, device="cpu", dtype=dtype)
    assert torch.equal(logits(rounded), logits(load_trained(folder, dtype=dtype)))  # adapters that did not move


@pytest.mark.parametrize("method", ["qlora", "hybrid", "galore"])
def test_an_exported_model_is_standalone_and_scores_like_the_unmerged_one(trained, method, tmp_path):
    ours, folder, study = trained(method)
    out = export_merged(folder, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert stock.dtype == torch.bfloat16 and not hasattr(stock, "peft_config")
    assert not any("4bit" in type(module).__name__ for module in stock.modules())
    assert GenerationConfig.from_pretrained(out).eos_token_id == list(STOP_IDS)
    assert AutoTokenizer.from_pretrained(out).chat_template
    rows = Rows(load_split(study.data_dir, "test"))
    settings = {"device": "cpu", "precision": "fp32"}
    merged, unmerged = mean_loss(stock.float(), rows, **settings), mean_loss(ours, rows, **settings)
    assert abs(merged - unmerged) < 2e-3 * unmerged  # what rounding to bf16 costs
    with pytest.raises(ModelError, match="already exists"):
        export_merged(folder, out)


def test_the_hybrids_attention_is_saved_beside_the_adapter(trained, tmp_path):
    _, folder, study = trained("hybrid")
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")  # without the record, which would tell
    (elsewhere / "attention.safetensors").unlink()
    lost = logits(load_trained(elsewhere))
    ours = logits(TrainingRun(study, "hybrid", log=lambda line: None).model)
    assert (lost - ours).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["qlora", "galore", "hybrid"])
def test_saved_folders_carry_template_and_stop_ids(trained, method):
    _, folder, _ = trained(method)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert shown == "<bos><start_of_turn>user\nhi<end_of_turn>\n"
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == list(STOP_IDS) == [1, 106]


def test_stock_generate_stops_at_the_end_of_turn(trained):
    _, folder, _ = trained("galore")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():  # a model that always says <end_of_turn>
        stock.lm_head.weight = torch.nn.Parameter(torch.zeros_like(stock.lm_head.weight))
    stock.lm_head.register_forward_hook(lambda m, a, out: out.index_fill_(-1, torch.tensor([106]), 9.0))
    made = stock.generate(IDS, max_new_tokens=5)
    assert made[0, IDS.shape[1] :].tolist() == [106]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no trained model in .*run the method's notebook first"):
        load_trained(tmp_path)


def test_a_local_folder_is_named_without_its_place(tiny_model):
    folder, provenance = locate(str(tiny_model))
    assert folder == str(tiny_model) and str(tiny_model.parent) not in provenance


def test_a_model_that_cannot_be_had_names_the_ways_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing.*check the network and the name.*model='packaged'"):
        load_plain("nobody/nothing", device="cpu")


def test_a_gated_model_without_a_token_names_licence_and_mirror(no_token):
    with pytest.raises(ModelError, match="HF_TOKEN.*accept its licence.*public mirror"):
        load_plain("google/gemma-3-1b-it", device="cpu")


def test_a_refused_token_names_the_licence():
    from huggingface_hub.errors import GatedRepoError

    from peftlib.models.locate import hub_errors

    response = SimpleNamespace(headers={}, request=None)
    wanted = "is gated.*accept its licence at https://huggingface.co/google/gemma-3-1b-it"
    with pytest.raises(ModelError, match=wanted), hub_errors("google/gemma-3-1b-it"):
        raise GatedRepoError("403 Client Error", response=response)


def test_loading_and_dequantizing_say_nothing(make_study, capfd):
    study = make_study(max_steps=1)
    TrainingRun(study, "qlora", log=lambda line: None).train()
    capfd.readouterr()
    load_trained(study.weights_dir("qlora", 0), merge=True)
    assert capfd.readouterr() == ("", "")
