"""Benchmark scores are compared by rows they share, with intervals that hold; what guessing reaches is no finding."""

import numpy as np
import pytest
from fake_study import column
from fake_study import write_benchmark as write

from peftlib.core import record as records
from peftlib.core.errors import StudyError
from peftlib.core.files import sha256
from peftlib.evaluation import stats
from peftlib.evaluation.benchmarks import scores


def answered(rng, n_rows, skill, ease):
    return column(rng.random(n_rows) < np.clip(skill + ease, 0, 1))


def test_a_ratio_is_that_of_the_sums():
    rows = column([3.0, 1.0, 4.0], [2.0, 1.0, 5.0])
    boot = stats.ratio_bootstrap([{"base": [rows], "qlora": [rows, rows * [2, 1]]}])
    assert boot.value == {"base": {"ratio": 1.0}, "qlora": {"ratio": 1.5}}
    nats = stats.ratio_bootstrap([{"base": [rows]}], is_perplexity=True)
    assert nats.value["base"]["ratio"] == pytest.approx(np.e)


def test_intervals_of_means_are_those_of_the_other_metrics():
    rng = np.random.default_rng(0)
    values = rng.random(80)
    mean = stats.mean_interval(values, resamples=500)
    found = stats.ratio_bootstrap([{"a": [column(values)]}], resamples=500).interval("a", stats.RATIO)
    assert (found.value, found.low, found.high) == pytest.approx((mean.value, mean.low, mean.high), rel=1e-12)


@pytest.mark.parametrize(("n_tasks", "seeds"), [(1, 1), (3, 1), (1, 3)])
def test_paired_intervals_cover_the_true_difference(n_tasks, seeds):
    """Rows share their ease; of the mean over tasks and over seeds, too, whose skill varies."""
    rng, rounds, hits, width, unpaired = np.random.default_rng(7), 200, 0, [], []
    for _ in range(rounds):
        ease = [rng.normal(0, 0.35, 120) for _ in range(n_tasks)]
        luck = rng.normal(0, 0.02, seeds)
        strata = [
            {
                "base": [answered(rng, 120, 0.5, of_rows)],
                "qlora": [answered(rng, 120, 0.5 + by, of_rows) for by in luck],
            }
            for of_rows in ease
        ]
        boot = stats.ratio_bootstrap(strata, resamples=400)
        found = boot.difference("qlora", "base", stats.RATIO)
        hits += found.is_noise  # the true difference is 0
        width.append(found.high - found.low)
        alone = [boot.interval(name, stats.RATIO) for name in ("base", "qlora")]
        unpaired.append(sum((of.high - of.low) ** 2 for of in alone) ** 0.5)
    assert hits / rounds >= 0.925  # 0.95 less two standard errors of 200 rounds
    assert seeds > 1 or np.mean(width) < 0.95 * np.mean(unpaired)  # pairing narrows


@pytest.fixture
def scored(make_study):
    """(study, [base's, qlora's, galore's record]): galore forgets arc_easy; nobody is above guessing on piqa."""
    study, rng = make_study(), np.random.default_rng(3)
    made = [{"method": name, "seed": 0} for name in ("base", "qlora", "galore")]
    for record, skill in zip(made, (0.8, 0.8, 0.5)):
        write(study, record, "arc_easy", rng.random(150) < skill, chance=0.25)
        write(study, record, "piqa", np.arange(150) % 2, chance=0.5)
        nats = {"weights": 10.0, "chance": None, "is_perplexity": True, "metric": "word_perplexity"}
        write(study, record, "wikitext", rng.normal(40 - 10 * skill, 1, 30), **nats)
    return study, made


def loaded(study, made, **how):
    return scores.load([(record["method"], study, record) for record in made], **how)


def test_tasks_at_their_floor_are_no_findings(scored):
    arc, piqa, wikitext = loaded(*scored)
    assert [found.task for found in (arc, piqa, wikitext)] == ["arc_easy", "piqa", "wikitext"]
    assert not any(map(arc.is_at_floor, arc.runs)) and all(map(piqa.is_at_floor, piqa.runs)) and piqa.pairs() == []
    verdicts = {(pair.method, pair.other): pair.verdict for pair in arc.pairs()}
    assert verdicts[("galore", "base")] == "lower" and verdicts[("qlora", "base")] == "inside the noise"
    assert not wikitext.is_at_floor("base") and len(wikitext.pairs()) == 3
    changes, tasks = scores.lost([arc, piqa, wikitext])
    assert tasks == ["arc_easy"] and changes["galore"].high < 0 < changes["qlora"].high
    assert scores.lost([piqa, wikitext]) == ({}, [])


def test_runs_are_compared_on_the_rows_that_they_share(scored):
    study, (base, qlora, _) = scored
    write(study, qlora, "arc_easy", np.ones(40), chance=0.25)
    (arc, *_) = loaded(study, [base, qlora])
    assert arc.boot.n_rows == 40 and arc.interval("base").value == pytest.approx(arc.runs["base"][0][:, 0].mean())
    write(study, qlora, "arc_easy", np.ones(40), start=1000)
    with pytest.raises(StudyError, match=r"scores of arc_easy for base \(seed 0\), qlora.* are not on the same rows"):
        loaded(study, [base, qlora])
    assert [found.task for found in loaded(study, [base, qlora], leaves_out=True)] == ["piqa", "wikitext"]
    write(study, qlora, "arc_easy", np.ones(150), metric="acc_norm")
    with pytest.raises(StudyError, match="same rows and metric"):
        loaded(study, [base, qlora])


def test_the_mean_over_tasks_is_of_seeds_that_have_them_all(scored):
    study, made = scored
    write(study, made[0], "boolq", np.ones(60), chance=0.6)
    write(study, made[2], "boolq", np.zeros(60), chance=0.6)
    second = {"method": "galore", "seed": 1}
    write(study, second, "arc_easy", np.ones(150), chance=0.25)
    changes, tasks = scores.lost(loaded(study, [*made, second]))
    assert tasks == ["arc_easy", "boolq"] and list(changes) == ["galore"]
    one_seed = [scored.interval("galore").value - scored.interval("base").value for scored in loaded(study, made)]
    assert changes["galore"].value == pytest.approx((one_seed[0] + one_seed[2]) / 2)


def test_saying_yes_less_often_changes_the_accuracy_alone(scored):
    study, made = scored
    answers = np.array(["yes"] * 60 + ["no"] * 40)
    said = {"base": ["yes"] * 95 + ["no"] * 5, "galore": (["yes"] * 2 + ["no"] * 8) * 10}  # neither looks at the row
    for record in (made[0], made[2]):
        right = answers == np.array(said[record["method"]])
        write(study, record, "boolq", right, chance=0.6, labels=answers)
    plain, balanced = (found for found in loaded(study, made) if found.task.startswith("boolq"))
    assert (plain.interval("base").value, plain.interval("galore").value) == (0.65, 0.44)
    assert not plain.boot.difference("galore", "base", stats.RATIO).is_noise
    assert balanced.task == "boolq_balanced" and balanced.facts["metric"] == "balanced acc" and balanced.chance == 0.5
    assert balanced.interval("base").value == pytest.approx((1.0 + 5 / 40) / 2)
    assert balanced.interval("galore").value == pytest.approx((0.2 + 0.8) / 2) and balanced.is_at_floor("galore")
    assert "boolq_balanced" not in scores.lost(loaded(study, made))[1]


def test_rows_that_are_gone_or_changed_are_named(scored):
    study, made = scored
    path = study.benchmark_path("base", 0, "piqa")
    rows = path.read_text()
    path.write_text(rows.replace("1.0", "0.0", 1))
    with pytest.raises(StudyError, match="piqa.jsonl is not what scoring wrote"):
        loaded(study, made)
    path.unlink()
    with pytest.raises(StudyError, match="piqa.jsonl is missing"):
        loaded(study, made)
    path.write_text(rows.replace('"value"', '"worth"', 1))
    made[0]["benchmarks"]["piqa"]["rows_sha256"] = sha256(path)
    with pytest.raises(StudyError, match="piqa.jsonl is damaged .*lacks 'value'"):
        loaded(study, made)


def test_a_record_with_a_damaged_score_is_refused(finished):
    study = finished("qlora")
    record = records.load(study, "qlora", 0)
    write(study, record, "piqa", [1, 0])
    records.save(study, record)
    assert records.load(study, "qlora", 0)["benchmarks"]["piqa"]["n"] == 2
    del record["benchmarks"]["piqa"]["score"]
    records.save(study, record)
    with pytest.raises(StudyError, match=r"benchmarks.piqa lacks 'score'"):
        records.load(study, "qlora", 0)
