"""Compare studies that answered the same test rows."""

from collections.abc import Iterable
from pathlib import Path

from peftlib.core.config import differences, resolve
from peftlib.core.env import output_root
from peftlib.core.errors import StudyError
from peftlib.core.files import gib
from peftlib.core.study import Study, frozen_of
from peftlib.evaluation import results, stats
from peftlib.evaluation.benchmarks import scores
from peftlib.evaluation.comparison import mean_of
from peftlib.report.render import render
from peftlib.report.tables import benchmark_table


def compare_studies(studies: Iterable[str | Path]) -> str:
    """Markdown that compares two or more studies: scores, differences from the first one, settings that differ.

    studies: folders, or names under the output root. StudyError: a folder that is not a study, the same one twice, one
    without scores, or studies with different test rows.
    """
    folders = [folder_of(name) for name in studies]
    if len(set(folders)) < max(len(folders), 2):
        raise StudyError("compare needs two or more different studies: give their folders, e.g. runs/a runs/b")
    names = names_of(folders)
    opened = {name: study_in(folder) for name, folder in zip(names, folders)}
    found = {name: results.load(study) for name, study in opened.items()}
    require_same_rows({name: study.split_hash for name, study in found.items()})
    empty = [name for name, study in found.items() if not study.scored]
    if empty:
        raise StudyError(f"no scores in {', '.join(empty)}: run 04_eval there first")
    boot = stats.bootstrap(
        {
            f"{name}: {method}": [run.rows for run in runs]
            for name, study in found.items()
            for method, runs in study.scored.items()
        }
    )
    runs = [(name, run.record) for name, study in found.items() for run in study.runs]
    benchmarks = scores.load(
        [(f"{name}: {record['method']}", opened[name], record) for name, record in runs], leaves_out=True
    )
    first, *others = (frozen_of(folder / "config.json")["config"] for folder in folders)
    content = {
        "found": found,
        "boot": boot,
        "stats": stats,
        "benchmark_table": benchmark_table(benchmarks),
        "benchmarks": benchmarks,
        "changed": {name: differences(first, config) for name, config in zip(names[1:], others)},
        "mean_of": mean_of,
        "values": {
            "loss": lambda run: run.eval_loss,
            "gib": lambda run: gib(run.record["peak_memory_bytes"]),
            "minutes": lambda run: None if run.record["train_seconds"] is None else run.record["train_seconds"] / 60,
        },
    }
    return render("compare.md.jinja", **content)


def folder_of(name):
    """The folder of a study, given as a folder or by name. StudyError: no such study."""
    for folder in (Path(name), output_root() / name):
        if (folder / "config.json").exists():
            return folder.resolve()
    raise StudyError(f"{name} is not a study: there is no config.json in {Path(name)} or {output_root() / name}")


def study_in(folder):
    """The Study in a folder, for reading only: its settings are not checked."""
    return Study(folder, resolve("demo", study=folder.name))


def names_of(folders):
    """Folder names, with as much of their paths as makes them unique."""
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def require_same_rows(hashes):
    """StudyError: studies with different test rows. hashes: {name: split_hash}."""
    if len(set(hashes.values())) > 1:
        listed = "; ".join(f"{name} has {value}" for name, value in hashes.items())
        raise StudyError(f"these studies have different test rows and cannot be compared: split_hash differs: {listed}")
