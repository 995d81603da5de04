"""What is there to look at: charts, the marked rows, the browser; and the command line."""

import re

import pytest

from peftlib import cli, data
from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.files import read_json
from peftlib.notebook import dataset
from peftlib.runner.console import sized_as_full_study


@pytest.fixture(scope="module")
def opened(built_data, tiny_model):
    return data.load_split(built_data, "train"), data.load_tokenizer(str(tiny_model))


def test_marked_text_is_the_row_with_the_answers_marked(opened):
    rows, tokenizer = opened
    for row in rows:
        text = dataset.mask_text(row, tokenizer)
        marked = re.findall("⟦(.*?)⟧", text, flags=re.DOTALL)
        assert marked == [m["content"] + "<end_of_turn>" for m in row["messages"] if m["role"] == "assistant"]
        assert text.replace("⟦", "").replace("⟧", "") == tokenizer.decode(row["input_ids"])


def test_html_is_escaped(opened):
    rows, tokenizer = opened
    made = dataset.mask_html(rows[0], tokenizer)
    assert "&lt;start_of_turn&gt;" in made and "<start_of_turn>" not in made
    assert made.count("<span") == made.count("</span>") >= 2


def test_headless_browsing_is_a_static_table_with_rows_of_each_source(opened):
    rows, tokenizer = opened
    shown = dataset.browse(rows, tokenizer).data  # no notebook: nobody is there
    assert all(shown.count(f"{name}  {name}-") == 2 for name in ("alpaca", "tulu", "ultrachat"))
    assert "<script" not in shown


def test_widgets_show_the_row_that_is_picked(opened):
    rows, tokenizer = opened
    box = dataset.browse(rows, tokenizer, is_interactive=True)
    (source, number), shown = box.children[0].children, box.children[1]
    source.value, number.value = "ultrachat", 2
    third = [row for row in rows if row["source"] == "ultrachat"][2]
    assert third["id"] in shown.value
    number.value = 99  # beyond the last
    assert number.value == 3
    source.value = "alpaca"
    assert "alpaca  alpaca-" in shown.value


def test_charts_say_what_they_show(built_data, tmp_path):
    manifest = read_json(built_data / "manifest.json")
    manifest["rejected"]["tulu"] = {"duplicate": 3, "too_long": 2}
    for name, chart in {
        "lengths": dataset.length_chart(built_data),
        "kept": dataset.kept_chart(manifest),
        "nothing": dataset.kept_chart({**manifest, "rejected": {s: {} for s in manifest["sources"]}}),
    }.items():
        chart.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert all(source in chart.alt for source in ("alpaca", "tulu", "ultrachat"))
    assert "tulu: 104 read, 7 kept, 5 rejected" in dataset.kept_chart(manifest).alt


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


def arguments(tiny_model, *more):
    sizes = ["--train", "12", "--valid", "2", "--test", "4", "--seed", "5", "-p", "workers", "1"]
    return ["data", "--study", "mine", "-p", "model", str(tiny_model), *sizes, "--source", "alpaca=sample", *more]


def test_the_command_writes_the_study_and_freezes_it(root, tiny_model, capsys):
    assert cli.call(arguments(tiny_model)) == 0
    said = capsys.readouterr().out
    manifest = read_json(root / "mine" / "data" / "manifest.json")
    assert f"split {manifest['split_hash']}" in said and "alpaca: train 12, valid 2, test 4" in said
    frozen = read_json(root / "mine" / "config.json")["config"]
    assert (frozen["sources"], frozen["split_seed"], frozen["max_length"]) == ("alpaca=sample", 5, 1024)
    for name in ("train.parquet", "valid.parquet", "test.parquet", "rejects.jsonl", "README.md"):
        assert (root / "mine" / "data" / name).exists()
    assert cli.call(arguments(tiny_model)) == 0
    assert "data already built" in capsys.readouterr().out


def test_the_command_refuses_a_study_made_otherwise_and_unknown_settings(root, tiny_model):
    cli.call(arguments(tiny_model))
    with pytest.raises(StudyError, match="train_rows: 12 -> 13"):
        cli.call(arguments(tiny_model, "--train", "13"))
    with pytest.raises(ConfigError, match="'lenght' is not a setting"):
        cli.call(arguments(tiny_model, "-p", "lenght", "3"))


def test_row_counts_on_the_command_line_bring_the_full_studys_other_settings():
    cfg = resolve("demo", **sized_as_full_study({"study": "x", "train_rows": 5000, "test_rows": 2000}))
    assert (cfg.valid_rows, cfg.max_length) == (200, 1024)
    assert sized_as_full_study({"train_rows": 500})["valid_rows"] == 20
    assert sized_as_full_study({"train_rows": 10})["valid_rows"] == 1
    full = resolve("t4")
    for name in ("batch_size", "lora_learning_rate", "galore_learning_rate", "galore_update_interval"):
        assert getattr(cfg, name) == getattr(full, name) != getattr(resolve("demo"), name)


def test_a_profile_brings_its_own_sizes(root, tiny_model):
    cli.call(
        ["data", "--study", "mine", "--profile", "demo", "-p", f"model={tiny_model}", "-p", "workers=1", "--train=3"]
    )
    frozen = read_json(root / "mine" / "config.json")["config"]
    assert (frozen["train_rows"], frozen["valid_rows"], frozen["max_length"]) == (3, 4, 256)
