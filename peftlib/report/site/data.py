"""The results page's data as plain JSON values. Unknown values are None."""

import math

import numpy as np
import pandas as pd

from peftlib.core.errors import StudyError, reading
from peftlib.core.files import read_json
from peftlib.evaluation import forgetting
from peftlib.evaluation.comparison import unmatched
from peftlib.evaluation.judging import verdicts
from peftlib.evaluation.results import BASE, Run
from peftlib.evaluation.stats import METRICS
from peftlib.methods import study_order
from peftlib.report.answers import SAME, Answers, marked
from peftlib.report.build import scored
from peftlib.report.compare import folder_of, names_of, require_same_rows, study_in
from peftlib.report.figures import smoothed
from peftlib.report.palette import DARK, LIGHT, marker_of
from peftlib.report.tables import COLUMNS, result_frame

_CURVE = 200  # points of a loss curve
# {column: (label, unit, decimals, which is better: 1 more, -1 less, 0 neither)}, in the order of the page's table.
FIGURES = {
    "rougeL": ("ROUGE-L", "", 3, 1),
    "bleu4": ("BLEU-4", "", 3, 1),
    "eval_loss": ("test loss", "nats/token", 3, -1),
    "forgetting": ("forgetting", "% loss on general text", 1, -1),
    "peak_memory_gib": ("peak memory", "GiB", 2, -1),
    "tokens_per_second": ("speed", "tokens/s", 0, 1),
    "hours": ("training time", "h", 3, -1),
    "trainable_params": ("trained parameters", "", 0, 0),
    "train_loss": ("training loss", "nats/token", 3, -1),
    "steps": ("steps", "", 0, 0),
    "learning_rate": ("learning rate", "", None, 0),
    "n_test": ("test rows", "", 0, 0),
}
_BENCH = "bench_"  # columns of benchmarks
_BENCH_FACTS = ("metric", "is_perplexity", "chance")
_SHAPES = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross"}


def site_data(folders):
    """({the page's initial data}, [(key, Answers), ...] in the order of its studies).

    folders: of studies, or names under the output root. StudyError: one is not a study or has no results, the same
    one twice, or studies with different test rows.
    """
    folders = [folder_of(name) for name in folders]
    if len(set(folders)) < len(folders):
        raise StudyError(f"the same study is given twice: {', '.join(map(str, folders))}; give each folder once")
    names = names_of(folders)
    parts = [
        _published(f, n) if not (f / "data" / "manifest.json").exists() else _own(f, n) for f, n in zip(folders, names)
    ]
    require_same_rows({part["study"]["name"]: part["study"]["split_hash"] for part in parts})
    runs = [run for part in parts for run in part["runs"]]
    methods = sorted({run["method"] for run in runs}, key=study_order)
    figures = {name: of for name, of in FIGURES.items() if any(run.get(name) is not None for run in runs)}
    for name in dict.fromkeys(name for run in runs for name in run if name.startswith(_BENCH)):
        task = name.removeprefix(_BENCH)
        known = next((run["benchmarks"][task] for run in runs if task in run["benchmarks"]), {})
        figures[name] = (task.replace("_", " "), known.get("metric") or "", 3, -1 if known.get("is_perplexity") else 1)
    data = {
        "studies": [part["study"] for part in parts],
        "figures": [
            {"key": key, "label": of[0], "unit": of[1], "digits": of[2], "better": of[3]} for key, of in figures.items()
        ],
        "methods": {m: (LIGHT.color_of(m), DARK.color_of(m), _SHAPES.get(marker_of(m), "circle")) for m in methods},
        "runs": runs,
        "intervals": [entry for part in parts for entry in part["intervals"]],
        "sources": [entry for part in parts for entry in part["sources"]],
        "rewound": [entry for part in parts for entry in part["rewound"]],
    }
    return data, [(part["study"]["name"], part["answers"]) for part in parts if part["answers"]]


def _own(folder, name):
    """The data of a study that has its rows: scored again, like its report."""
    study = study_in(folder)
    found, _, _, numbers = scored(study)
    frame = result_frame(found, verdicts.load(study, found)[0], numbers.benchmarks)
    values = [(m, key, vars(of)) for m, known in numbers.intervals.items() for key, of in known.items()]
    for task in numbers.benchmarks:
        values += [(m, f"{_BENCH}{task.task}", vars(task.interval(m))) for m in task.boot.value]
    by_source = [
        (source, m, key, vars(of))
        for source, methods in numbers.per_source.items()
        for m, known in methods.items()
        for key, of in known.items()
    ]
    facts = {"n_test": len(found.test_rows), "sources": found.sources}
    answers = Answers(found) if found.scored else None
    return _part(name, frame, found.runs, values, by_source, facts, numbers.rewound, answers)


def _published(folder, name):
    """The data of a study with only records, results.csv and possibly summary.json."""
    study, path = study_in(folder), folder / "results.csv"
    if not path.exists():
        raise StudyError(f"no results in {folder}: run `peftlib report --study {folder.name}`, or 04_eval, first")
    records = {(record["method"], record["seed"]): record for record in study.records()}
    with reading(path):
        frame = pd.read_csv(path)
        lacking = [column for column in COLUMNS if column not in frame]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        unlike = set(zip(frame["method"], frame["seed"])) ^ set(records)
        hashes = sorted({record["split_hash"] for record in records.values()})
        if unlike or len(hashes) != 1:
            raise ValueError(f"it does not match its records: {unlike or hashes}")
    runs = [Run(records[row.method, row.seed]) for row in frame.itertuples()]
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    scores = {method: known.get("scores") or {} for method, known in summary.get("methods", {}).items()}
    known = [(method, key, of) for method, found in scores.items() for key, of in found.items()]
    for task, found in summary.get("benchmarks", {}).get("tasks", {}).items():
        known += [(method, f"{_BENCH}{task}", of) for method, of in found["methods"].items()]
    values = [(method, key, {name: of[name] for name in ("value", "low", "high")}) for method, key, of in known]
    by_source = [
        (source, method, key, {"value": value})
        for source, known in summary.get("sources", {}).items()
        for method, of in known["scores"].items()
        for key, value in of.items()
    ]
    n_test = max(map(int, frame["n_test"].dropna()), default=None)
    facts = {"n_test": n_test, "sources": list(summary.get("sources", {}))}
    return _part(name, frame, runs, values, by_source, facts, summary.get("rewound", {}), answers=None)


def _part(name, frame, runs, values, by_source, facts, rewound, answers):
    """A study's part of the page. values: [(method, key, {value, low, high}), ...]; by_source: with its source."""
    study = {
        "name": name,
        "split_hash": runs[0].record["split_hash"],
        **facts,
        "models": [of for of in dict.fromkeys(run.record["model_provenance"] for run in runs) if of],
        "devices": sorted({run.record["device"] for run in runs if run.record["device"]}),
        "notes": unmatched(runs),
    }
    return {
        "study": study,
        "runs": _runs(name, frame, runs),
        "intervals": [{"study": name, "method": m, "key": key, **of} for m, key, of in values],
        "sources": [{"source": s, "study": name, "method": m, "key": key, **of} for s, m, key, of in by_source],
        "rewound": [{"study": name, "method": m, "points": of} for m, of in rewound.items()],
        "answers": answers,
    }


def _runs(study, frame, runs):
    """[{column: value}, ...] of the rows of results.csv plus fields from the records."""
    base = next((run.general for run in runs if run.record["method"] == BASE), None)
    rows = []
    for row, run in zip(frame.astype(object).where(frame.notna(), None).to_dict("records"), runs):
        changed = None if run.record["method"] == BASE else forgetting.change(base, run.general)
        benchmarks, seconds = run.record.get("benchmarks") or {}, row["train_seconds"]
        row |= {f"{_BENCH}{task}": facts["score"] for task, facts in benchmarks.items()}
        row |= {
            "study": study,
            "forgetting": None if changed is None else 100 * changed,
            "hours": None if seconds is None else seconds / 3600,
            "benchmarks": {task: {n: of.get(n) for n in _BENCH_FACTS} for task, of in benchmarks.items()},
            "curve": _curve(run.record["history"]),
            "valid": _points(run.record["valid_history"], "valid_loss"),
        }
        rows.append({name: _plain(value) for name, value in row.items()})
    return rows


def _curve(history):
    """[(step, loss, smoothed loss), ...], at most _CURVE of them, including the first and the last."""
    points = _points(history, "loss")
    points = [
        (step, loss, round(mean, 5)) for (step, loss), mean in zip(points, smoothed([loss for _, loss in points]))
    ]
    last = len(points) - 1
    return points if last < _CURVE else [points[round(i * last / (_CURVE - 1))] for i in range(_CURVE)]


def _points(entries, key):
    known = ((entry["step"], entry.get(key)) for entry in entries)
    return [(step, round(value, 5)) for step, value in known if value is not None and math.isfinite(value)]


def _plain(value):
    """A JSON value; None for a number that is not finite."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def row_data(answers):
    """The test rows that every run was asked."""
    rows = [[str(row["id"]), row["source"]] for row in answers.rows]
    return {"rows": rows, "prompts": answers.prompts, "references": answers.references}


def answer_data(answers, name):
    """One run's answers with scores and marks: lengths of parts in UTF-16 units, alternating between other words and
    the reference's words, see answers.marked."""
    run = answers.runs[name]
    return {
        "answers": run.answers,
        "marks": [_lengths(*pair) for pair in zip(run.answers, answers.references)],
        **{key: [round(float(value), 6) for value in answers.scores(name, key)] for key in METRICS},
        "tokens": run.n_tokens,
        "cut": [int(reason == "length") for reason in run.finish_reasons],
    }


def _lengths(answer, reference):
    parts = marked(answer, reference)
    lengths = [len(text.encode("utf-16-le", "surrogatepass")) // 2 for _, text in parts]
    return [0, *lengths] if parts and parts[0][0] == SAME else lengths
