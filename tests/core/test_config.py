import subprocess
import sys

import pytest

from peftlib.core import config
from peftlib.core import record as records
from peftlib.core.errors import ConfigError
from peftlib.core.paths import PACKAGE
from peftlib.core.study import frozen_of


def test_profiles_hold_the_contracts_numbers():
    demo, t4, gpu = (config.resolve(profile) for profile in ("demo", "t4", "gpu"))
    assert (demo.model, demo.max_length, demo.max_new_tokens, demo.batch_size) == ("packaged", 256, 48, 3)
    assert (demo.galore_update_interval, t4.galore_update_interval, gpu.galore_update_interval) == (50, 200, 200)
    for cfg in (t4, gpu):
        assert cfg.model == "google/gemma-3-1b-it"
        assert (cfg.train_rows, cfg.valid_rows, cfg.test_rows) == (5000, 200, 2000)
        assert (cfg.max_length, cfg.max_new_tokens, cfg.batch_size) == (1024, 256, 16)
    for cfg in (demo, t4, gpu):
        assert (cfg.lora_rank, cfg.lora_alpha, cfg.galore_rank, cfg.galore_scale) == (16, 32, 128, 0.25)
        assert (cfg.epochs, cfg.split_seed, cfg.seed) == (1, 0, 0)


def test_quick_asks_for_500_rows_a_source_and_about_100_test_rows_without_a_token():
    quick = config.resolve("quick")
    assert (quick.study, quick.model) == ("quick", "unsloth/gemma-3-270m-it")
    assert (quick.train_rows, 3 * quick.test_rows, quick.max_read_rows) == (500, 102, 10_000)
    assert quick.sources == config.resolve("t4").sources


def test_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'lora_rnk' is not a setting: did you mean lora_rank"):
        config.resolve("demo", lora_rnk=8)


def test_unknown_profile_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"profile='t5' is unknown: use auto, demo, quick, t4, gpu"):
        config.resolve("t5")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("lora_rank", 0, "use 1 or more"),
        ("lora_rank", 8.5, "use a whole number"),
        ("lora_rank", True, "use a whole number"),
        ("lora_learning_rate", 0.0, "use more than 0.0, at most 1.0"),
        ("galore_scale", float("nan"), "out of range"),
        ("lr_scheduler", "exponential", "use cosine, linear, constant"),
        ("study", "../other", "is not a folder name"),
        ("study", "n" * 300, "has 300 bytes: a study name has at most 200"),
        ("study", "\u6f22" * 100, "has 300 bytes"),
        ("study", "two\nlines", "is not a folder name"),
        ("study", "bell\a", "is not a folder name"),
        ("study", "half\ud800", "is not a folder name"),
        ("study", "ends.", "is not a folder name"),
        ("study", "ends ", "is not a folder name"),
        ("study", " begins", "is not a folder name"),
        ("study", "what?", "is not a folder name"),
        ("study", "CON", "Windows reserves it"),
        ("study", "nul.txt", "Windows reserves it"),
        ("fork", "../other", "is not a folder name"),
        ("seed", 2**70, "use 0 or more, at most 4294967295"),
        ("seed", -1, "use 0 or more, at most 4294967295"),
        ("split_seed", 2**70, "use 0 or more, at most 4294967295"),
        ("max_grad_norm", float("inf"), "use a finite number"),
        ("model", "a\0b", "null character"),
    ],
)
def test_bad_value_is_refused_by_name_with_what_is_allowed(field, value, message):
    with pytest.raises(ConfigError, match=f"{field}=.*{message}"):
        config.resolve("demo", **{field: value})


@pytest.mark.parametrize(
    "name", ["first", "my study", "v1.2", "-", "~", "\u6f22\u5b57", "console", "e\u0301", ".hidden", "n" * 200]
)
def test_names_that_folders_can_have_are_taken(name, tmp_path):
    assert config.resolve("demo", study=name).study == name
    (tmp_path / name).mkdir()


def test_none_leaves_the_profiles_value_and_study_defaults_to_the_profile():
    cfg = config.resolve("demo", lora_rank=None)
    assert cfg.lora_rank == 16
    assert cfg.study == "demo"


@pytest.mark.parametrize(
    "name, text, value",
    [("seed", "3", 3), ("galore_scale", "1e-1", 0.1), ("allow_short", "true", True), ("study", "7", "7")],
)
def test_command_line_text_becomes_the_fields_type(name, text, value):
    assert config.from_text(name, text) == value


def test_true_and_false_as_papermill_passes_them_on_are_taken():
    assert config.resolve("demo", make_missing="true").make_missing is True
    assert config.resolve("demo", make_missing="false").make_missing is False


def test_text_that_is_no_number_is_refused_by_name():
    with pytest.raises(ConfigError, match="seed='three' is not a whole number"):
        config.from_text("seed", "three")


def test_run_hash_covers_mathematics_and_not_the_machine():
    cfg = config.resolve("demo")
    assert cfg.run_hash("qlora") == cfg.replace(micro_batch_size=1, device="cpu", max_seconds=5).run_hash("qlora")
    assert cfg.run_hash("qlora") != cfg.run_hash("galore")
    for change in ({"seed": 1}, {"lora_rank": 8}, {"train_rows": 32}, {"batch_size": 4}):
        assert cfg.run_hash("qlora") != cfg.replace(**change).run_hash("qlora")


def test_a_study_holds_several_seeds():
    cfg = config.resolve("demo")
    assert cfg.study_fields() == cfg.replace(seed=2).study_fields()


def test_differences_name_each_field_that_differs():
    cfg = config.resolve("demo")
    other = cfg.replace(lora_rank=8, test_rows=4)
    assert config.differences(cfg.study_fields(), other.study_fields()) == ["test_rows: 12 -> 4", "lora_rank: 16 -> 8"]


def test_importing_all_of_core_does_not_load_torch():
    names = ["peftlib", *(f"peftlib.core.{path.stem}" for path in (PACKAGE / "core").glob("[!_]*.py"))]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_editions_names_are_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="'micro_batch' is now called 'micro_batch_size'"):
        cfg = config.resolve("demo", micro_batch=2, sequences_per_step=4)
    assert (cfg.micro_batch_size, cfg.batch_size) == (2, 4)
    with pytest.warns(FutureWarning):
        assert config.from_text("save_every", "7") == 7
    with pytest.warns(FutureWarning):
        assert cfg.replace(schedule="linear").lr_scheduler == "linear"
    with pytest.raises(ConfigError, match="'log_every' is now called 'logging_steps', and both are set"):
        config.resolve("demo", log_every=1, logging_steps=2)


def test_a_study_of_the_first_edition_is_read_under_todays_names():
    folder = PACKAGE.parent / "results" / "reference"
    frozen = frozen_of(folder / "config.json")
    assert frozen["config"]["batch_size"] == 16
    for path in (folder / "records").glob("*.json"):
        assert records.read(path)["config"]["galore_update_interval"] == 200


def test_hashes_are_those_of_the_first_edition():
    """Taken at cab2098, before settings were renamed: a standing study's checkpoints and notebooks are known by
    them."""
    sizes = {"demo": {"train_rows": 64, "valid_rows": 8, "test_rows": 16, "batch_size": 8}, "t4": {}}  # of then
    found = {(p, m): config.resolve(p, **sizes[p]).run_hash(m) for p in sizes for m in ("qlora", "galore")}
    assert found == {
        ("demo", "qlora"): "7b544b7f9108",
        ("demo", "galore"): "0fd0e3a911ed",
        ("t4", "qlora"): "d680d972b6ce",
        ("t4", "galore"): "260ebc7a35f0",
    }


def test_a_setting_added_later_is_part_of_hashes_only_where_it_is_not_at_its_default(monkeypatch):
    cfg, fields = config.resolve("demo"), config.resolve("demo").study_fields()
    before = {name: value for name, value in fields.items() if name != "galore_on_refresh"}
    assert "galore_on_refresh" in config.first_names(fields)
    monkeypatch.setattr(config, "_ADDED_LATER", frozenset({"galore_on_refresh"}))
    assert config.first_names(fields) == config.first_names(before)
    assert config.first_names({**fields, "galore_on_refresh": "project"}) == {
        **config.first_names(before),
        "galore_on_refresh": "project",
    }
    assert cfg.run_hash("galore") != cfg.replace(galore_on_refresh="project").run_hash("galore")
    assert config.current_names(before) == fields, "a file without it had its default"
    assert config.current_names({"galore_on_refresh": "project"}) == {"galore_on_refresh": "project"}
