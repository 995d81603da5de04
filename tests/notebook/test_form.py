"""The study form: what a choice costs, what cannot be and why, and lines and a command that give just that config."""

import html
import json
import shlex

import pytest
from front_end import INSTALLED

from peftlib import cli, methods
from peftlib.core.config import resolve
from peftlib.core.study import Study
from peftlib.models import shapes as cards
from peftlib.models.shapes import CARDS, SHAPES
from peftlib.notebook import planner as form
from peftlib.notebook import session as notebook
from peftlib.runner import notebooks as runner
from peftlib.train import estimate
from peftlib.train import memory_model as plan


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A study of the t4 profile of which nothing stands yet."""
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "runs"))
    return Study.resolve(profile="t4")


def test_every_method_has_memory_time_and_a_mark_and_they_are_the_planners(fresh):
    found = form.answer(fresh, {}, "l4")
    how = {"precision": "bf16", "device_bytes": int(CARDS["l4"].gib * plan.GIB)}
    rows = [dict(zip(estimate.HEADER, estimate.cells(cost))) for cost in found.forecast.costs]
    assert [row["method"] for row in rows] == list(methods.default_methods())
    for row in rows:
        planned = plan.best_plan(SHAPES["gemma-3-1b"], row["method"], fresh.cfg, **how)
        assert row["memory GiB"] == f"{planned.total / plan.GIB:.2f}"
        assert f"<td>{row['memory GiB']} of 22.0<div" in form.as_html(found)
        assert row["micro-batch"] == str(planned.micro_batch) and row["fits"] == "yes"
        assert row[""] == "estimate" and " to " in row["time"]
    assert found.refused == "" and any("no data yet" in line for line in found.forecast.notes())


def test_a_choice_moves_the_numbers_it_should(fresh):
    def costs_of(**choices):
        return {cost.method: cost for cost in form.answer(fresh, choices, "t4").forecast.costs}

    plain = costs_of()
    same = costs_of(micro_batch_size=2)  # a plan of its own would fill what is saved
    assert costs_of(micro_batch_size=2, galore_weights="bf16")["galore"].memory_gib < same["galore"].memory_gib
    assert costs_of(micro_batch_size=2, moment_bits=8)["galore"].memory_gib < same["galore"].memory_gib
    assert costs_of(micro_batch_size=2, lora_rank=64)["qlora"].memory_gib > same["qlora"].memory_gib
    assert costs_of(lora_rank=64)["galore"].memory_gib == plain["galore"].memory_gib
    assert costs_of(micro_batch_size=2, galore_rank=256)["hybrid"].memory_gib > same["hybrid"].memory_gib
    assert costs_of(epochs=2)["qlora"].hours[1] == pytest.approx(2 * plain["qlora"].hours[1])
    assert costs_of(train_rows=500)["qlora"].hours[1] == pytest.approx(plain["qlora"].hours[1] / 10)
    assert costs_of(model="packaged")["full"].hours[1] < plain["full"].hours[1]


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"lora_rank": 0}, "lora_rank=0 is out of range: use 1 or more (rank of each adapter)"),
        ({"moment_bits": 16}, "moment_bits=16 is not allowed: use 8, 32"),
        ({"train_rows": "many"}, "train_rows='many' is a str: use a whole number (rows per source)"),
        ({"max_length": 32768, "model": "google/gemma-3-1b-it", "memory_gib": 1.0}, "the smallest is"),
    ],
)
def test_what_cannot_be_is_refused_in_words(fresh, choices, words):
    found = form.answer(fresh, choices, "t4")
    assert words in found.refused
    assert f"<b>Not possible:</b> {html.escape(words)[:20]}" in form.as_html(found) or "the smallest is" in words


def test_a_rank_larger_than_a_layer_refuses_the_methods_that_need_it_by_the_trainings_own_words(fresh):
    found = form.answer(fresh, {"lora_rank": 300}, "t4").forecast
    refused = {cost.method: cost.refused for cost in found.costs if not cost.fits}
    words = "lora_rank=300 is larger than a layer: use 1..256"
    assert refused == {"qlora": words, "lora": words}, "the hybrid's adapters are on the wider MLP alone"
    assert {cost.method: cost.mark for cost in found.costs}["qlora"] == words


def test_where_nothing_fits_it_says_what_to_change(fresh):
    small = CARDS["t4"].__class__(2.0, 65, 320, "fp16", "Small")
    found = estimate.forecast(resolve("t4", micro_batch_size=16), "small card", small, shape=SHAPES["gemma-3-1b"])
    assert not any(cost.fits for cost in found.costs)
    assert "on a small card with 2.0 GiB: the smallest is" in found.refusal
    assert "Set micro_batch_size to 0, lower max_length (now 1024), or use a smaller model" in found.refusal
    too_wide = resolve("t4", lora_rank=10**6, galore_rank=10**6, apollo_rank=10**6)
    found = estimate.forecast(too_wide, "t4", CARDS["t4"], shape=SHAPES["gemma-3-1b"])
    assert [cost.method for cost in found.costs if cost.fits] == ["full"]


def test_a_set_micro_batch_is_what_is_planned_for():
    shape, cfg = SHAPES["gemma-3-1b"], resolve("t4", micro_batch_size=2, activation_checkpointing="on")
    found = estimate.forecast(cfg, "t4", CARDS["t4"], shape=shape)
    set_plan = plan.estimate(shape, "qlora", cfg, precision="fp16", micro_batch=2, checkpointing="on")
    assert found.costs[0].memory_gib == set_plan.total / plan.GIB and found.costs[0].micro_batch == 2
    assert any("0 lets the planner choose" in note for note in found.notes())


def test_a_model_that_is_not_to_be_had_leaves_the_rest_of_the_form(fresh):
    found = form.answer(fresh, {"model": "nobody/no-such-model"}, "t4")
    assert found.refused == "" and found.forecast is None
    assert any(line.startswith("costs unknown: model='nobody/no-such-model'") for line in found.remarks)
    assert "model = &#x27;nobody/no-such-model&#x27;" in form.as_html(found)


@pytest.mark.parametrize(
    "choices", [{}, {"train_rows": 12, "galore_weights": "bf16", "epochs": 3}, {"sources": "a b=x;c=y"}]
)
def test_lines_and_command_give_just_that_config(fresh, choices, monkeypatch):
    cfg = form.answer(fresh, choices).cfg
    assert cfg == fresh.cfg.replace(**choices)
    assert resolve(**notebook.literals("\n".join(form.parameter_lines(cfg)))) == cfg
    planned = []
    monkeypatch.setattr(runner, "run", planned.extend)
    assert cli.main(shlex.split(form.command(cfg))[3:]) == 0
    assert planned[0].study.cfg == cfg


def test_where_data_stand_they_give_the_hours_and_a_choice_they_fix_makes_a_new_study(make_study):
    study = make_study()
    same = form.answer(study, {"epochs": study.cfg.epochs}, "t4")
    assert any("from the study's data" in line for line in same.forecast.notes())
    other = form.answer(study, {"train_rows": 5}, "t4")
    assert other.cfg.study == "tiny-2" and other.cfg.train_rows == 5
    assert any("was made with another config: train_rows: 4 -> 5" in line for line in other.remarks)
    assert any("no data yet" in line for line in other.forecast.notes())
    make_study(study="tiny-2", train_rows=5)
    assert form.answer(study, {"train_rows": 6}, "t4").cfg.study == "tiny-3"
    assert form.answer(study, {"memory_gib": 9.0}, "t4").cfg.study == "tiny", "a choice of the run alone needs none"


def test_the_card_at_hand_is_this_machines(fresh, monkeypatch):
    import torch

    seen = type("Seen", (), {"name": "Tesla T4", "total_memory": int(14.7 * plan.GIB)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: seen)
    name, card = cards.card_at_hand()
    assert name == "t4" and card.gib == pytest.approx(14.7) and card.tflops == CARDS["t4"].tflops
    assert form.answer(fresh, {}).forecast.gib == pytest.approx(14.7)
    assert form.answer(fresh, {}, "l4").forecast.gib == CARDS["l4"].gib
    seen.name = "Unheard X1"
    assert cards.card_at_hand() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any("no known GPU" in line for line in form.answer(fresh, {}).remarks)


def test_without_somebody_to_click_it_is_a_table(fresh):
    shown = form.study_form(fresh)
    for text in (repr(shown), html.unescape(shown._repr_html_())):
        assert "google/gemma-3-1b-it on a t4: 14.6 GiB" in text and form.command(fresh.cfg) in text
        assert all(method in text for method in methods.default_methods())


def test_widgets_answer_at_once_and_leave_the_study_alone(fresh):
    box, shown = form.study_form(fresh, is_interactive=True).children
    widgets = {widget.description: widget for widget in box.children}
    assert set(widgets) == {"GPU", "profile", *form.CHOICES}
    assert "on a t4" in shown.value
    widgets["GPU"].value = "h100"
    assert "on a h100" in shown.value
    widgets["lora_rank"].value = 0
    assert "Not possible:" in shown.value and "lora_rank=0" in shown.value and "<pre" not in shown.value
    widgets["lora_rank"].value = 32
    assert "Not possible" not in shown.value and "-p lora_rank=32" in shown.value
    widgets["model"].value = "somewhere/else"
    assert "costs unknown" in shown.value
    assert fresh.cfg == resolve("t4") and not fresh.folder.exists()


@pytest.mark.parametrize(
    "seconds, words",
    [
        ((20, 24), "20 to 24 s"),
        ((50, 200), "50 s to 3.3 min"),
        ((7200, 7201), "about 2 h"),
        ((0.05, 1.7), "1 to 1.7 s"),
        ((600, 9000), "10 min to 2.5 h"),
    ],
)
def test_times_have_a_unit_that_fits(seconds, words):
    assert estimate.duration(*seconds) == words


def test_a_live_kernel_gets_widgets_and_papermill_does_not(kernel_of):
    source = (
        "from peftlib import Study\nfrom peftlib.notebook import study_form\nstudy_form(Study.resolve(profile='demo'))"
    )
    _, client = kernel_of(INSTALLED)
    for is_watched, kind in ((True, "application/vnd.jupyter.widget-view+json"), (False, "text/html")):
        shown = []
        hear = {"output_hook": lambda message, shown=shown: shown.append(message["content"])}
        client.execute_interactive(source, allow_stdin=is_watched, timeout=120, **hear)
        kinds = {kind for content in shown for kind in content.get("data", {})}
        assert kind in kinds, shown
        assert is_watched or not any("widget" in kind for kind in kinds)


def cost_of(profile, card_name="t4"):
    cfg, (name, card) = resolve(profile), cards.find_card(card_name)
    found = estimate.forecast(cfg, name, card, shape=cards.shape_of(cfg.model), names=form.TRAINED)
    return found, form.notebooks_cost(found)


def test_quick_fits_ten_minutes_of_a_t4_at_the_slow_end_and_the_full_study_does_not():
    found, (low, high, gib) = cost_of("quick")
    assert low < high <= 600 and gib < 0.86 * CARDS["t4"].gib
    # The sum by hand: three trainings, four models that read and answer 102 rows, five openings.
    training = sum(3600 * cost.hours[1] for cost in found.costs)
    reading = (102 * 512 + 4096) / min(cost.speed.low for cost in found.costs)
    answering = 102 * 128 / (9456 * (65 / 989) / 1.5)
    assert high == pytest.approx(training + 4 * (reading + answering) + 5 * 45)
    assert cost_of("t4")[1][1] > 3600 and cost_of("quick", "h100")[1][1] < high


def test_speeds_of_answering_are_the_measured_ones():
    rows = json.loads((form.estimate.MEASURED.parent / "generate.json").read_text(encoding="utf-8"))
    ours = {r["rows"]: r["tok_s"] for r in rows if r["engine"] == "slots" and "H100" in r["device"]}
    assert {n: round(speed) for n, speed in ours.items()} == form.ANSWERED


def test_where_a_method_does_not_fit_there_is_no_sum():
    cfg, (name, card) = resolve("t4", memory_gib=1.0), cards.find_card("t4")
    assert form.notebooks_cost(estimate.forecast(cfg, name, card, shape=SHAPES["gemma-3-1b"])) is None


def test_another_profile_is_one_choice_and_its_lines_name_it(fresh):
    box, shown = form.study_form(fresh, is_interactive=True).children
    widgets = {widget.description: widget for widget in box.children}
    widgets["profile"].value = "quick"
    assert widgets["train_rows"].value == 500 and widgets["model"].value == "unsloth/gemma-3-270m-it"
    assert "profile = &#x27;quick&#x27;" in shown.value and "--profile quick --study quick" in shown.value
    assert "All five notebooks: 4.4 to 9.5 min" in shown.value
    widgets["profile"].value = "t4"
    assert "profile = &#x27;t4&#x27;" in shown.value and widgets["train_rows"].value == 5000
