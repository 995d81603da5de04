"""What every registered method must do, and an adapter_config.json of PEFT that is brought as one."""

import json
import re
import signal
from unittest import mock

import finished_study
import pytest
import torch
from safetensors.torch import load_file

from peftlib import methods
from peftlib.core.errors import ConfigError
from peftlib.export.export import export_model
from peftlib.models.saved import load_trained
from peftlib.report.build import build_report
from peftlib.report.palette import LIGHT, marker_of
from peftlib.runner.suite_plan import method_lines
from peftlib.train.loop import TrainingRun

SLOW = pytest.mark.slow
FILES = {
    "peft:": {"peft_type": "LOHA", "r": 4, "alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    "peft4:": {"peft_type": "VERA", "r": 16, "target_modules": r".*(o|up)_proj", "base_model_name_or_path": None},
}
# tests/train runs those with a module of their own; of the table's, some stand for what is alike in the others.
QUICK = ("lora_fa", "oft", "peft4:")
TABLE = tuple(name for name, spec in methods.METHODS.items() if spec.is_counted)
ALL = [pytest.param(m, marks=() if m in QUICK else SLOW) for m in (*methods.METHODS, *FILES)]
RATES = {name: 3e-3 for name in ("full_learning_rate", "apollo_learning_rate", "muon_learning_rate")}
RATES |= {"lora_learning_rate": 1e-2, "galore_learning_rate": 1e-2, "loraplus_lr_ratio": 2.0}
# Every step has all rows.
REPEATED = {**RATES, "batch_size": 12, "epochs": 6, "lr_scheduler": "constant", "warmup_ratio": 0.0, "max_length": 128}


@pytest.fixture
def named(tmp_path):
    """named(method) -> what a command line would give for it."""

    def made(method):
        if method not in FILES:
            return method
        path = tmp_path / "my config.json"
        path.write_text(json.dumps(FILES[method]))
        return f"{method}{path}"

    return made


def silent(line):
    pass


def stopped_at(run, step):
    """Have a run be interrupted after a step."""
    one = run._step

    def stop_there():
        one()
        if run.progress.step == step:
            signal.raise_signal(signal.SIGINT)

    run._step = stop_there
    return run


@pytest.mark.parametrize("method", ALL)
def test_it_trains_resumes_loads_in_stock_libraries_and_is_exported(make_study, named, tmp_path, no_charts, method):
    study = make_study(study="straight", **REPEATED)
    run = TrainingRun(study, named(method), log=silent)
    frozen = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    record = run.train()
    assert record["status"] == "ok" and run.name == record["method"]
    for name, p in run.model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), name
    losses = [entry["loss"] for entry in record["history"]]
    assert max(losses[3:]) < losses[0] - 0.01, losses

    again = make_study(study="resumed", **REPEATED)
    assert stopped_at(TrainingRun(again, named(method), log=silent), 3).train()["status"] == "stopped"
    torch.manual_seed(99)
    resumed = TrainingRun(again, run.name, log=silent).train()
    assert resumed["weights_sha256"] == record["weights_sha256"], "bit for bit"
    assert [entry["loss"] for entry in resumed["history"]] == losses

    folder = study.weights_dir(run.name, 0)
    assert_stock_logits(folder, run.method, study.cfg.model)
    is_adapter = (folder / "adapter_config.json").exists()
    assert record["placement"].get("adapter_path") == (path_of(run.method) if is_adapter else None)

    made = export_model(study, run.name, to=tmp_path / "out", form="adapter" if is_adapter else "merged", log=silent)
    assert run.method.description.split("(")[0] in made.card
    build_report(study)
    assert run.name in study.report_path.read_text(encoding="utf-8")
    assert marker_of(run.name) == run.method.marker and LIGHT.color_of(run.name) == run.method.colors[0]


def path_of(spec):
    plain = ("qlora", "lora", "hybrid", "hybrid_mlp", "rslora", "pissa", "lora_plus", "lora_fa")
    return "fused" if spec.name in plain else "peft"


def assert_stock_logits(folder, spec, base):
    """transformers and PEFT alone give the logits of load_trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.randint(107, 400, (2, 12), generator=torch.Generator().manual_seed(1))
    ours = load_trained(folder, log=silent)(input_ids=ids).logits
    if (folder / "adapter_config.json").exists():
        if spec.four_bit:
            from transformers import BitsAndBytesConfig

            nf4 = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                llm_int8_skip_modules=[*(set(methods.find("qlora").four_bit) - set(spec.four_bit)), "lm_head"],
            )
            stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4)
            stock = stock.dequantize(dtype=torch.float32).float()
        else:
            stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        stock = PeftModel.from_pretrained(stock, folder)
        if (folder / "attention.safetensors").exists():
            stock.load_state_dict(load_file(folder / "attention.safetensors"), strict=False)
    else:
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(stock.eval()(input_ids=ids).logits, ours, atol=2e-5)


@pytest.mark.parametrize("method", [pytest.param(name, marks=SLOW) for name in (*TABLE, *FILES)])
@pytest.mark.parametrize("precision, moments", [("fp16", 8), ("bf16", 32)])
def test_adapters_train_in_16_bits_with_recomputed_activations_and_8_bit_moments(
    make_study, named, method, precision, moments
):
    how = {"activation_checkpointing": "on", "precision": precision, "moment_bits": moments}
    record = TrainingRun(make_study(**{**REPEATED, **how, "epochs": 4}), named(method), log=silent).train()
    losses = [entry["loss"] for entry in record["history"]]
    assert record["skipped_steps"] == 0 and losses[-1] < losses[0] - 0.01


def test_lora_fa_gives_b_the_gradient_of_pefts_optimizer_and_a_none(make_study):
    from peft.optimizers import create_lorafa_optimizer

    run = TrainingRun(make_study(), "lora_fa", log=silent)
    run.method.build_optimizer(run.model, run.cfg)
    theirs = TrainingRun(make_study(), "lora", log=silent).model
    optimizer = create_lorafa_optimizer(theirs, run.cfg.lora_rank, run.cfg.lora_alpha, run.cfg.lora_learning_rate)
    ids = torch.randint(107, 400, (2, 20), generator=torch.Generator().manual_seed(1))
    for model in (run.model, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    with mock.patch("peft.optimizers.lorafa.is_bf16_available", lambda: False):  # else it rounds to bf16
        optimizer.step()
    for name, p in run.model.named_parameters():
        if "lora_B" in name:
            mean = optimizer.state[name.partition("lora_")[0] + "lora"]["exp_avg_B"] / 0.1  # of one step
            assert torch.allclose(p.grad, mean, rtol=1e-3, atol=1e-4 * float(mean.abs().max())), name
        assert "lora_B" in name or p.grad is None


def test_lora_plus_has_pefts_two_rates(make_study):
    run = TrainingRun(make_study(loraplus_lr_ratio=8.0, weight_decay=0.1), "lora_plus", log=silent)
    a, b = run.method.build_optimizer(run.model, run.cfg).param_groups
    names = {p: name for name, p in run.model.named_parameters()}
    assert all("lora_A" in names[p] for p in a["params"]) and all("lora_B" in names[p] for p in b["params"])
    assert (a["lr"], b["lr"]) == (run.cfg.lora_learning_rate, 8 * run.cfg.lora_learning_rate)
    assert a["weight_decay"] == b["weight_decay"] == 0.1


def test_the_list_of_methods_names_all_with_numbers_memory_and_paper():
    _, *rows, _, _ = method_lines()
    assert [row.split()[0] for row in rows] == list(methods.METHODS)
    for row in rows:
        assert re.search(r"  \d[\d.,]* M  +\d+\.\d\d", row), row
        assert "arXiv:" in row or row.startswith("full"), row


def test_a_study_takes_no_more_methods_by_itself():
    assert methods.default_methods() == ("qlora", "galore", "hybrid", "lora", "full", "apollo")


@SLOW
def test_a_study_of_all_methods_has_its_report(make_study, tmp_path, in_this_process):
    study = make_study(study="all", max_steps=2, **RATES)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FILES["peft:"]))
    names = ["base", *methods.METHODS, f"peft:{path}"]
    asked = ("--study", "all", "--profile", "demo", "--methods", ",".join(names))
    finished_study.call("study", "run", *asked, "--seeds", "0", "--factors", "none")
    found = {record["method"]: record for record in study.records()}
    assert {*methods.METHODS} < found.keys() and len(found) == len(methods.METHODS) + 2
    assert all(record["status"] == "ok" and record["evaluation"] for record in found.values())
    report = study.report_path.read_text(encoding="utf-8")
    assert all(name in report for name in found)


def test_a_block_size_that_divides_no_width_is_refused_with_the_nearest(make_study):
    with pytest.raises(ConfigError, match="oft_block_size=7 does not divide all widths of the layers: use 8"):
        TrainingRun(make_study(oft_block_size=7), "oft", log=str)
