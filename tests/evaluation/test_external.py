"""Models trained elsewhere are scored on a study's test rows, as rows of its report that say so."""

import copy
import json
import shutil

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

from peftlib.core import record
from peftlib.core.errors import ConfigError, ModelError, StudyError
from peftlib.evaluation import external
from peftlib.evaluation.evaluate import evaluate, evaluate_path, trained_methods
from peftlib.report import build as report
from peftlib.report import charts

QUIET = {"log": lambda line: None}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def save_adapter(folder, base, config=LORA, **sizes):
    """A PEFT folder as the library itself writes it, of an adapter that changes the model."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.model(**sizes), copy.deepcopy(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ia3" in name:
                p.normal_(std=3.0)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def changed_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def adapter(tmp_path, tiny_model):
    return save_adapter(tmp_path / "my-adapter", tiny_model)


def test_a_stock_adapter_is_a_row_of_the_report_that_says_where_it_comes_from(make_study, adapter, monkeypatch):
    monkeypatch.setattr(charts, "charts_of", lambda *_: {})
    study, lines = make_study(), []
    base = evaluate(study, "base", **QUIET)
    made = evaluate_path(study, adapter, log=lines.append)

    assert made["trained_elsewhere"]["kind"] == "adapter" and made["method"] == "my-adapter"
    assert str(adapter.parent) not in json.dumps(made)
    assert made["eval_loss"] > 0 and made["eval_loss"] != base["eval_loss"] and made["evaluation"]["n_test"] == 6
    unknown = ("trainable_params", "steps", "train_tokens", "learning_rate", "train_loss", "peak_memory_bytes")
    assert [made[name] for name in unknown] == [None] * 6 and made["config"] == {} and made["history"] == []
    assert any(line.startswith("my-adapter: BLEU-4 ") for line in lines)
    assert trained_methods(study) == []
    # PEFT's files do not say whether it was trained on a 4-bit base: record, log and report say what it was scored on
    scored_on = made["trained_elsewhere"]["scored_on"]
    assert scored_on.startswith("the unquantized base") and lines[0] == f"my-adapter: scored on {scored_on}"

    shown = report.build_report(study)
    row = shown.results.set_index("method").loc["my-adapter"]
    assert row["rougeL"] >= 0 and row.isna()[["train_loss", "steps", "peak_memory_gib", "train_seconds"]].all()
    assert any(f"my-adapter was trained elsewhere and scored on {scored_on}" in note for note in shown.notes)
    assert "my-adapter" in study.report_path.read_text()

    before = study.record_path("my-adapter", 0).read_bytes()
    assert evaluate_path(study, adapter, log=lines.append) == record.load(study, "my-adapter", 0)
    assert lines[-1] == "my-adapter: already evaluated, nothing to do"
    assert study.record_path("my-adapter", 0).read_bytes() == before


@pytest.mark.parametrize(
    "config", [LORA, IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_computes_what_peft_does(tmp_path, tiny_model, config, dtype):
    from peft import PeftModel

    folder = save_adapter(tmp_path / "one", tiny_model, config)
    ours = external.open_folder(folder, str(tiny_model)).load(device="cpu", dtype=dtype)
    theirs = PeftModel.from_pretrained(tiny.model(), folder)
    ids = torch.arange(107, 127)[None]
    with torch.no_grad():
        expected, plain = theirs(ids).logits, tiny.model()(ids).logits
        torch.testing.assert_close(
            ours(ids).logits.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0
        )
    assert (expected - plain).abs().max() > 0.05


def test_a_whole_model_is_scored_under_the_name_that_was_given(make_study, tmp_path):
    folder, study = tiny.model_folder(tmp_path / "model", seed=5), make_study()
    base = evaluate(study, "base", **QUIET)
    made = evaluate_path(study, folder, name="theirs", **QUIET)
    assert made["trained_elsewhere"]["kind"] == "model" and made["model"] == "model" and made["model_sha256"] is None
    assert made["eval_loss"] != base["eval_loss"] and study.predictions_path("theirs", 0).exists()
    evaluate(study, "base", **QUIET)  # the other model does not count as the study's base

    (folder / "tokenizer.json").unlink()  # as model.save_pretrained leaves it
    assert evaluate_path(study, folder, name="bare", **QUIET)["eval_loss"] == made["eval_loss"]


def test_a_trained_folder_of_peftlib_is_taken_too(finished, make_study):
    study = finished("hybrid")
    whole = evaluate(study, "hybrid", **QUIET)
    shutil.copytree(study.weights_dir("hybrid", 0), study.folder / "copied")
    made = evaluate_path(study, study.folder / "copied", **QUIET)
    assert made["eval_loss"] == whole["eval_loss"]  # with what it trained beside the adapter
    assert made["trained_elsewhere"]["scored_on"] == "the base with its 4-bit matrices dequantized, as it was trained"


def test_a_name_stands_for_one_model(make_study, adapter, tmp_path, tiny_model):
    study = make_study()
    evaluate_path(study, adapter, **QUIET)
    torch.manual_seed(3)
    with pytest.raises(StudyError, match="is for other weights than .*give this model another name"):
        evaluate_path(study, tiny.model_folder(tmp_path / "other"), name="my-adapter", **QUIET)
    for name in ("qlora", "base", "base (cut)", "a/b"):
        with pytest.raises(ConfigError, match="name="):
            evaluate_path(study, adapter, name=name, **QUIET)


def test_what_is_no_model_is_named(make_study, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "gone", "is not a folder"), (tmp_path / "empty", "no adapter or model")):
        with pytest.raises(ConfigError, match=message):
            evaluate_path(make_study(), folder, **QUIET)


def test_an_adapter_of_another_base_is_refused_and_the_same_weights_elsewhere_are_not(adapter, tmp_path, tiny_model):
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    changed_config(adapter, base_model_name_or_path=str(moved))
    assert external.open_folder(adapter, str(tiny_model)).scored_on
    for named in ("google/gemma-3-4b-it", str(tiny.model_folder(tmp_path / "other", seed=9))):
        changed_config(adapter, base_model_name_or_path=named)
        with pytest.raises(ModelError, match=f"was trained on {named}, this study's model is .*set base_model_name_or"):
            external.open_folder(adapter, str(tiny_model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "lacks peft_type or base_model_name_or_path"),
        ({"peft_type": 3}, "lacks peft_type"),
        ({"auto_map": {"x": "y"}}, "names code in auto_map"),
    ],
)
def test_a_config_that_does_not_tell_is_refused(adapter, tiny_model, changes, message):
    changed_config(adapter, **changes)
    with pytest.raises(ModelError, match=message):
        external.open_folder(adapter, str(tiny_model))


def test_damaged_or_unfit_files_are_refused(adapter, tmp_path, tiny_model):
    deep = save_adapter(tmp_path / "deep", tiny_model, num_hidden_layers=3)
    prompt = save_adapter(
        tmp_path / "prompt", tiny_model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    cut = shutil.copytree(adapter, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"cut")
    for folder, message in (
        (deep, "does not fit"),
        (prompt, "PROMPT_TUNING.* cannot be merged"),
        (cut, "cannot be read"),
    ):
        with pytest.raises(ModelError, match=message):
            external.open_folder(folder, str(tiny_model)).load(device="cpu", dtype=torch.float32)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        external.open_folder(adapter, str(tiny_model))
    (adapter / "adapter_config.json").write_text("{")
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match="adapter_config.json is damaged"):
        external.open_folder(adapter, str(tiny_model))


def test_a_model_of_another_tokenizer_is_refused(tmp_path, tiny_model):
    folder = tiny.model_folder(tmp_path / "model")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"<0x41>"', '"<0x4G>"'), encoding="utf-8")
    with pytest.raises(ModelError, match="uses another tokenizer"):
        external.open_folder(folder, str(tiny_model))
    small = tmp_path / "small"
    tiny.model(vocab_size=300).save_pretrained(small)
    with pytest.raises(ModelError, match="no embeddings for all"):
        external.open_folder(small, str(tiny_model)).load(device="cpu", dtype=torch.float32)
