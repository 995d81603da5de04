import itertools
import json
import math

import pytest

from peftlib.cli import main
from peftlib.core.errors import ConfigError, NonFiniteLossError, Stopped, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.paths import shipped
from peftlib.core.study import Study
from peftlib.train import sweep as module
from peftlib.train.loop import TrainingRun
from peftlib.train.sweep import curve_of, is_at_edge, is_hopeless, kept, next_trial, sweep, verdict

REFERENCE = shipped("results") / "reference"

# Sweeps of a Gemma 3 270M on 72 rows, every trial to its end: (validation loss, training loss of each tenth).
SWEEPS = {
    "qlora": [
        (3.236, [4.09, 3.32, 3.0, 3.46, 2.63, 3.1, 3.32, 2.97, 3.42, 3.7]),
        (3.334, [4.24, 3.4, 3.01, 3.43, 2.57, 3.19, 3.38, 2.99, 3.48, 3.65]),
        (3.637, [4.28, 4.02, 3.59, 3.9, 2.96, 3.43, 3.82, 3.51, 3.99, 4.43]),
    ],
    "galore": [
        (3.142, [3.95, 3.17, 2.8, 3.31, 2.54, 3.01, 3.04, 2.87, 3.3, 3.67]),
        (3.227, [4.09, 3.21, 2.77, 3.42, 2.4, 3.02, 3.12, 2.85, 3.31, 3.6]),
        (3.613, [3.88, 3.59, 3.77, 3.74, 2.86, 3.48, 3.8, 3.4, 3.96, 4.23]),
    ],
    "hybrid": [
        (3.179, [3.99, 3.23, 2.89, 3.38, 2.68, 3.03, 3.21, 2.9, 3.33, 3.75]),
        (3.245, [4.1, 3.24, 2.97, 3.43, 2.63, 3.11, 3.31, 2.92, 3.45, 3.72]),
        (3.31, [4.01, 3.43, 3.22, 3.76, 2.76, 3.28, 3.4, 3.14, 3.61, 4.2]),
        (3.21, [4.02, 3.2, 3.0, 3.57, 2.81, 3.09, 3.29, 3.01, 3.38, 3.66]),
        (3.206, [3.96, 3.35, 3.2, 3.57, 2.67, 3.06, 3.45, 3.01, 3.47, 3.86]),
    ],
    "full": [
        (3.147, [4.07, 3.54, 2.77, 3.35, 2.42, 3.02, 3.08, 2.8, 3.27, 3.56]),
        (3.38, [4.12, 3.39, 3.05, 3.62, 2.81, 3.34, 3.29, 2.97, 3.46, 3.74]),
        (3.185, [3.9, 3.16, 2.89, 3.34, 2.54, 3.09, 3.1, 2.91, 3.35, 3.73]),
    ],
}


def searched(loss_at, n_rates=1, **rules):
    """The trials of a search in which `loss_at(powers)` is what a trial comes to."""
    tried = {}
    while (powers := next_trial(tried, n_rates, **rules)) is not None:
        assert powers not in tried
        tried[powers] = loss_at(powers)
    return tried


@pytest.mark.parametrize("least", [-4, -2, -1, 0, 1, 2, 5])
def test_a_search_widens_until_the_best_rate_lies_between_worse_ones(least):
    tried = searched(lambda powers: abs(powers[0] - least - 0.1))
    assert list(tried)[:3] == [(0,), (-1,), (1,)]
    assert {(least - 1,), (least,), (least + 1,)} <= set(tried) and len(tried) == 3 + max(0, abs(least))


def test_a_search_ends_below_the_first_rate_that_diverges():
    assert list(searched(lambda powers: None if powers[0] > 1 else -powers[0])) == [(0,), (-1,), (1,), (2,)]
    assert list(searched(lambda powers: None if powers[0] > -3 else 1.0 - powers[0])) == [
        (0,),
        (-1,),
        (-2,),
        (-3,),
        (-4,),
    ]
    assert len(searched(lambda powers: None)) == 9
    assert list(searched(lambda powers: -powers[0], is_allowed=lambda powers: powers[0] <= 2))[-1] == (2,)
    assert len(searched(lambda powers: -powers[0], trials=5)) == 5  # the budget


@pytest.mark.parametrize("least", [(0, 0), (0, 1), (1, 0), (-1, 1), (1, -1)])
def test_two_rates_are_searched_apart_within_nine_trials(least):
    tried = searched(lambda powers: sum((p - c) ** 2 for p, c in zip(powers, least, strict=True)) + 0.1 * powers[0], 2)
    assert min(tried, key=tried.get) == least and len(tried) <= 9
    for axis, by in itertools.product((0, 1), (-1, 1)):  # inside along either rate
        assert tuple(at + by * (axis == i) for i, at in enumerate(least)) in tried
    for before, after in itertools.pairwise(tried):
        best = min(list(tried)[: list(tried).index(after)], key=tried.get)
        assert sum(a != b for a, b in zip(after, best, strict=True)) == 1, (before, after)


def recorded_curves():
    """{run: (training loss of each recorded step, final loss)} of the reference study, all on the same rows."""
    found = {}
    for path in sorted((REFERENCE / "records").glob("*-s0.json")):
        record = read_json(path)
        if record["history"]:
            found[path.stem] = ([step["loss"] for step in record["history"]], record["valid_history"][-1]["valid_loss"])
    return found


@pytest.mark.parametrize(("method", "n_stopped"), [("qlora", 1), ("galore", 1), ("hybrid", 0), ("full", 0)])
def test_early_stopping_spares_the_best_of_recorded_sweeps_in_any_order(method, n_stopped):
    end, best = min(SWEEPS[method])
    for _, other in SWEEPS[method]:
        assert not any(is_hopeless(best[:n], other) for n in range(11))
    stopped = [loss for loss, curve in SWEEPS[method] if any(is_hopeless(curve[:n], best) for n in range(10))]
    assert len(stopped) == n_stopped and all(loss > end + 0.3 for loss in stopped)


def test_early_stopping_never_stops_what_would_end_best():
    curves = recorded_curves()
    assert len(curves) >= 6
    for (losses, end), (others, other_end) in itertools.permutations(curves.values(), 2):
        steps = len(losses)
        if end < other_end:
            assert not any(is_hopeless(curve_of(losses[:n], steps), curve_of(others, steps)) for n in range(steps))
    # The least rate of the sweeps ends 0.4 behind but catches up: slow is not hopeless. Divergence is.
    best = [3 - 1.4 * n / 100 for n in range(100)]
    slow = [3 - 0.2 * n / 100 for n in range(30)] + [2.94 - 1.0 * n / 70 for n in range(70)]
    off = [3 - 1.4 * n / 100 if n < 20 else 3.5 + n / 100 for n in range(100)]
    stopped = [[is_hopeless(curve_of(it[:n], 100), curve_of(best, 100)) for n in range(101)] for it in (slow, off)]
    assert stopped[1].index(True) == 40 and not any(stopped[0][50:])
    assert curve_of([None, *off[1:10]], 100) == [pytest.approx(sum(off[1:10]) / 9)] and curve_of([1.0] * 9, 9) == []


def test_a_search_over_a_fake_trial_writes_its_bracket_and_resumes(make_study, monkeypatch):
    study, calls, lines = make_study(), [], []

    def trial(study, method, cfg, point, best, log):
        calls.append(point)
        if len(calls) == cut:
            raise Stopped("cut")
        high = cfg.lora_learning_rate > 4 * study.cfg.lora_learning_rate
        loss = None if high else 2 - math.log(cfg.lora_learning_rate) / 10
        return {"valid_loss": loss, "train_loss": loss, "curve": [], "stopped_at": 7 if high else None}

    monkeypatch.setattr(module, "_trial", trial)
    cut = 3
    with pytest.raises(Stopped):
        sweep(study, "qlora", rows=6, log=lines.append)
    assert kept(study, "qlora", rows=6) is None
    found = sweep(study, "qlora", rows=6, log=lines.append)
    assert [entry["factor"] for entry in found["tried"]] == [1.0, 1 / 3, 3.0, 9.0] and found["best"]["factor"] == 3.0
    assert found["is_at_edge"] is False and found["max_trials"] == 9
    assert found["diverges_beyond"] == {"lora_learning_rate": pytest.approx(9 * study.cfg.lora_learning_rate)}
    assert "stopped at step 7, clearly worse" in lines[-2]
    assert "best of 4 trials of at most 9 on 6 rows, the next higher rate diverged or was clearly worse" in lines[-1]
    assert kept(study, "qlora", rows=6)["best"] == found["best"] and kept(study, "qlora", rows=8) is None


def test_a_real_search_of_two_rates_keeps_each_trial(make_study):
    study, lines = make_study(), []
    found = sweep(study, "hybrid", rows=6, log=lines.append)
    assert 5 <= len(found["tried"]) <= 9 and {"factor", "factor_2"} <= set(found["best"])
    for entry in found["tried"]:
        assert entry["lora_learning_rate"] == study.cfg.lora_learning_rate * entry["factor"]
        assert entry["galore_learning_rate"] == study.cfg.galore_learning_rate * entry["factor_2"]
    (study.folder / "sweeps" / "hybrid.json").unlink()  # as when it was killed before the end
    lines.clear()
    assert sweep(study, "hybrid", rows=6, log=lines.append) == found
    assert not any("step 1/" in line for line in lines)
    assert ("at the edge" in verdict(found)) == found["is_at_edge"] == is_at_edge(found)


def test_a_hopeless_trial_is_stopped_and_not_taken_up_again(make_study, monkeypatch):
    study, lines = make_study(batch_size=1), []
    real, rate = TrainingRun._step, study.cfg.lora_learning_rate

    def step(self):
        real(self)
        self.record["history"][-1]["loss"] += len(self.record["history"]) * (self.cfg.lora_learning_rate > rate)

    monkeypatch.setattr(TrainingRun, "_step", step)
    found = sweep(study, "qlora", rows=10, log=lines.append)
    high = next(entry for entry in found["tried"] if entry["factor"] == 3.0)
    assert high["stopped_at"] == 4 and high["valid_loss"] is None and len(high["curve"]) == 4
    assert high["lora_learning_rate"] == 3 * rate
    (study.folder / "sweeps" / "qlora.json").unlink()
    lines.clear()
    assert sweep(study, "qlora", rows=10, log=lines.append) == found
    assert not any("step 1/" in line for line in lines)


# Of the reference study's first edition, as 0.1 wrote them: {method: [(factor, rates, losses), ...]}.
EARLIER = {
    "galore": [(0.3, (3e-4,), 1.6132, 1.5481), (1.0, (1e-3,), 1.6332, 1.5760), (3.0, (3e-3,), 1.9407, 1.8890)],
    "hybrid": [
        (0.3, (6e-5, 3e-4), 1.8015, 1.7221),
        (1.0, (2e-4, 1e-3), 1.6823, 1.6142),
        (3.0, (6e-4, 3e-3), 1.7430, 1.6898),
    ],
}


def test_sweeps_of_earlier_versions_are_read(make_study):
    study = make_study()
    for method, trials in EARLIER.items():
        names = ("lora_learning_rate", "galore_learning_rate")[-len(trials[0][1]) :]
        tried = [
            {"factor": factor, **dict(zip(names, rates)), "valid_loss": valid, "train_loss": train}
            for factor, rates, valid, train in trials
        ]
        facts = {"method": method, "rows": 1500, "steps": 93, "seed": 0, "tried": tried}
        write_json(module.path_of(study, method), {**facts, "best": min(tried, key=lambda trial: trial["valid_loss"])})
        found = kept(study, method, factors=(0.3, 1.0, 3.0))
        assert is_at_edge(found) == (method == "galore")
        assert verdict(found).startswith("lowest loss" if is_at_edge(found) else "best of 3 trials on 1,500 rows")
        assert kept(study, method) is None  # no search, and nothing was adopted from it
    study.adopt("galore", {"galore_learning_rate": 3e-4}, {})
    assert kept(study, "galore")["best"]["factor"] == 0.3


def test_a_sweep_finds_the_least_validation_loss_and_records_every_trial(make_study):
    study = make_study()
    lines = []
    found = sweep(study, "hybrid", factors=(1e-4, 1.0), rows=6, log=lines.append)
    losses = [entry["valid_loss"] for entry in found["tried"]]
    assert found["steps"] == 3 and found["best"]["valid_loss"] == min(losses) and losses[0] != losses[1]
    assert found["tried"][0]["galore_learning_rate"] == study.cfg.galore_learning_rate * 1e-4
    assert found["tried"][0]["lora_learning_rate"] == study.cfg.lora_learning_rate * 1e-4
    written = json.loads((study.folder / "sweeps" / "hybrid.json").read_text())
    assert written["tried"] == found["tried"]
    assert "at the edge" in lines[-1] and not list(study.folder.glob("sweeps/*/weights/*/*.safetensors"))
    lines.clear()
    assert sweep(study, "hybrid", factors=(1e-4, 1.0), rows=6, log=lines.append) == found
    assert not any("step 1/" in line for line in lines)  # nothing is trained twice


def test_a_factor_that_is_not_positive_is_refused(make_study):
    with pytest.raises(ConfigError, match=r"factors=\(0\.0,\): use positive finite numbers"):
        sweep(make_study(), "qlora", factors=(0.0,))
    with pytest.raises(ConfigError, match="use positive finite numbers"):
        sweep(make_study(), "qlora", factors=(math.nan,))
    with pytest.raises(ConfigError, match="rows=0: a trial needs at least one"):
        sweep(make_study(), "qlora", rows=0)


def test_the_command_sweeps_the_named_method_and_later_runs_train_with_its_best_rate(make_study, capsys):
    study = make_study()
    words = ["sweep", "qlora", "--study", study.folder.name, "--rows", "2"]
    assert main([*words, "--factor", "2"]) == 0
    assert "qlora: runs of this study train with it from now on" in capsys.readouterr().out
    rate = 2 * study.cfg.lora_learning_rate
    assert TrainingRun(Study.open(study.cfg), "qlora", log=str).cfg.lora_learning_rate == pytest.approx(rate)
    assert TrainingRun(Study.open(study.cfg), "galore", log=str).cfg == study.cfg
    assert main([*words, "--factor", "2"]) == 0
    assert main([*words, "--factor", "1"]) == 0
    assert "qlora: not adopted, because study 'tiny' already has learning rates" in capsys.readouterr().out


def test_a_rate_that_diverges_is_recorded_and_the_sweep_goes_on(make_study, monkeypatch):
    study, lines = make_study(), []
    real = TrainingRun._step

    def step(self):
        if self.cfg.galore_learning_rate > study.cfg.galore_learning_rate:
            raise NonFiniteLossError("planted")
        real(self)

    monkeypatch.setattr(TrainingRun, "_step", step)
    found = sweep(study, "galore", factors=(1.0, 3.0), rows=4, log=lines.append)
    assert [entry["valid_loss"] is None for entry in found["tried"]] == [False, True] and found["best"]["factor"] == 1.0
    assert not [path for path in study.folder.glob("sweeps/*/*") if path.name in ("data", "weights", "compile")]
    lines.clear()
    assert sweep(study, "galore", factors=(1.0, 3.0), rows=4, log=lines.append) == found
    assert not any("step 1/" in line for line in lines)
    with pytest.raises(NonFiniteLossError, match="none of 1 rates gave a finite loss"):
        sweep(study, "galore", factors=(3.0,), rows=4, log=lines.append)


def test_a_cut_sweep_says_so_and_goes_on(make_study):
    study = make_study(max_seconds=0.0001)
    with pytest.raises(Stopped, match="stopped at factor 1"):
        sweep(study, "qlora", factors=(1.0,), rows=6)
    whole = Study(study.folder, study.cfg.replace(max_seconds=0.0))
    assert kept(study, "qlora", factors=(1.0,), rows=6) is None
    found = sweep(whole, "qlora", factors=(1.0,), rows=6)
    assert kept(study, "qlora", factors=(1.0,), rows=6) == {**found, "schema_version": 1}


def test_rates_are_adopted_once_and_before_the_first_run(make_study):
    study = make_study()
    study.adopt("qlora", {"lora_learning_rate": 6e-4}, {"rows": 6})
    study.adopt("qlora", {"lora_learning_rate": 6e-4}, {"rows": 6})
    with pytest.raises(StudyError, match=r"already has learning rates for qlora: lora_learning_rate: 0.0006 -> 0.0001"):
        study.adopt("qlora", {"lora_learning_rate": 1e-4}, {})
    record = TrainingRun(study, "qlora").train()
    assert record["learning_rate"] == 6e-4 and record["config"]["lora_learning_rate"] == 6e-4
    assert TrainingRun(Study.open(study.cfg), "qlora").finished_record() is not None
    plain = TrainingRun(study, "hybrid")
    assert plain.cfg.lora_learning_rate == study.cfg.lora_learning_rate  # another method's rate is its own
    plain.train()
    with pytest.raises(StudyError, match=r"hybrid \(seed 0\) was trained .* with other rates"):
        study.adopt("hybrid", {"lora_learning_rate": 6e-4, "galore_learning_rate": 1e-3}, {})
