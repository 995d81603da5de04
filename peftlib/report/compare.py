"""`python -m peftlib compare A B ...`: the same test rows answered in several studies, side by side."""

import argparse
import warnings
from pathlib import Path

from peftlib.core.config import differences, resolve
from peftlib.core.env import output_root
from peftlib.core.errors import StudyError
from peftlib.core.study import Study, frozen_of
from peftlib.evaluation import results as scored
from peftlib.evaluation import stats
from peftlib.evaluation.comparison import mean_of
from peftlib.report.document import Bullets, Heading, Paragraph, Table, to_markdown
from peftlib.report.results import gib

_UNKNOWN = "n/a"


def main(argv):
    """Print the comparison of the named studies as Markdown; returns the exit code 0.

    StudyError: a folder that is no study, the same one twice, one without scores, or studies of other test rows.
    """
    parser = argparse.ArgumentParser(
        prog="python -m peftlib compare", description="Compare studies that were evaluated on the same test rows."
    )
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="folder of a study, or its name under the root")
    folders = [_folder(name) for name in parser.parse_args(argv).studies]
    if len(set(folders)) < max(len(folders), 2):
        raise StudyError("compare needs two or more different studies: name the folders, e.g. runs/a runs/b")
    print(to_markdown(blocks_of(folders), None).replace("-&gt;", "->"), end="")
    return 0


def blocks_of(folders):
    """The comparison of study folders as document blocks. Errors as in `main`."""
    names = _names(folders)
    found = {name: scored.load(_study(folder)) for name, folder in zip(names, folders)}
    _same_rows(found)
    systems = {
        f"{name}: {method}": [run.rows for run in runs]
        for name, study in found.items()
        for method, runs in study.scored.items()
    }
    with warnings.catch_warnings():  # few rows are said below
        warnings.simplefilter("ignore", stats.FewRowsWarning)
        boot = stats.bootstrap(systems)
    blocks = [Heading(f"Studies {', '.join(names)}", 1), Paragraph(_rows_note(next(iter(found.values()))))]
    blocks += [Heading("Scores"), _score_table(found, boot)]
    blocks += [Heading("Differences"), _difference_table(found, boot)]
    return [*blocks, Heading("Settings that differ"), Bullets(tuple(_settings(names, folders)))]


def _folder(name):
    for folder in (Path(name), output_root() / name):
        if (folder / "config.json").exists():
            return folder.resolve()
    raise StudyError(f"{name} is no study: there is no config.json in {Path(name)} or {output_root() / name}")


def _names(folders):
    """Folder names, with as much of the path before them as tells them apart."""
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def _study(folder):
    return Study(folder, resolve("demo", study=folder.name))


def _same_rows(found):
    hashes = {name: study.split_hash for name, study in found.items()}
    if len(set(hashes.values())) > 1:
        listed = "; ".join(f"{name} has {value}" for name, value in hashes.items())
        raise StudyError(f"not of the same test rows, so not comparable: split_hash differs: {listed}")
    empty = [name for name, study in found.items() if not study.scored]
    if empty:
        raise StudyError(f"no scores in {', '.join(empty)}: run 04_eval there first")


def _rows_note(study):
    n_rows = len(study.test_rows)
    few = f" Caution, {stats.few_rows_note(n_rows)}." if n_rows < stats.FEW_ROWS else ""
    return f"{n_rows} test rows, split {study.split_hash}. Intervals: 95 %, paired bootstrap.{few}"


def _score_table(found, boot):
    rows = []
    for name, study in found.items():
        for method, runs in study.scored.items():
            intervals = (boot.interval(f"{name}: {method}", metric) for metric in stats.METRICS)
            seconds = mean_of(runs, lambda run: run.record["train_seconds"])
            rows.append(
                (
                    name,
                    method,
                    str(len(runs)),
                    *(f"{i.value:.4f} ({i.low:.4f} to {i.high:.4f})" for i in intervals),
                    _number(mean_of(runs, lambda run: run.eval_loss), ".3f"),
                    _number(mean_of(runs, lambda run: gib(run.record["peak_memory_bytes"])), ".2f"),
                    _number(None if seconds is None else seconds / 60, ".1f"),
                )
            )
    header = ("study", "method", "seeds", "BLEU-4", "ROUGE-L", "test loss", "peak memory GiB", "training min")
    return Table(header, tuple(rows), n_text=2)


def _difference_table(found, boot):
    """Each method of a later study less the same method of the first one."""
    first, *others = found
    rows = []
    for name in others:
        for method in found[name].scored:
            if method not in found[first].scored:
                continue
            for metric, label in stats.METRICS.items():
                gap = boot.difference(f"{name}: {method}", f"{first}: {method}", metric)
                verdict = "inside the noise" if gap.is_noise else "higher" if gap.value > 0 else "lower"
                interval = f"{gap.low:+.4f} to {gap.high:+.4f}"
                rows.append((f"{method}: {name} - {first}", label, f"{gap.value:+.4f}", interval, verdict))
    return Table(("difference", "score", "value", "95 % interval", "verdict"), tuple(rows), n_text=2)


def _settings(names, folders):
    configs = [frozen_of(folder / "config.json")["config"] for folder in folders]
    for name, config in zip(names[1:], configs[1:]):
        changed = differences(configs[0], config)
        yield f"{names[0]} -> {name}: {'; '.join(changed) or 'none'}"


def _number(value, form):
    return _UNKNOWN if value is None else format(value, form)
