"""Copies a finished study's results into results/: small, without weights, rows, answers or private paths."""

import shutil
import time

from reference_summary import compared, interval, median_speed, summary_of

from peftlib import build_report
from peftlib.core.config import current_names, differences
from peftlib.core.errors import StudyError, writing
from peftlib.core.files import read_json, write_json
from peftlib.core.study import Study, frozen_of
from peftlib.evaluation import forgetting, stats
from peftlib.evaluation.results import BASE, BASE_CUT
from peftlib.export.redact import public_config, public_model, without_folders

FIGURES = ("scores", "rougeL_by_source", "rougeL_against_memory", "gain_against_loss", "rewind")
_HISTORY = 60  # entries of a history that are kept
_LEFT_OUT = ("layers", "weights_sha256", "settings_sha256", "losses")  # of records: long, or said twice
_MOST_BYTES = 300_000  # of a picture


def take_demo(study, target):
    """Write results.csv, the picture of scores and summary.json of a demo study to `target`."""
    built = build_report(study)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(study.results_path, target / "results.csv")
    shutil.copyfile(built.figures["scores"], target / "scores.png")
    boot = stats.bootstrap(built.study.systems())
    trained = [method for method in boot.value if method not in (BASE, BASE_CUT)]
    shown = (BASE, *trained)
    records = {run.record["method"]: run.record for run in built.study.runs if run.is_scored}
    evaluated = {method: records[method]["evaluation"] for method in shown}
    counts = study.manifest()["counts"]
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "model_provenance": records[BASE]["model_provenance"],
        "device": records[trained[0]]["device"],
        "steps": records[trained[0]]["steps"],
        "rows": {split: sum(counts[split].values()) for split in counts},
        "scores": {method: boot.value[method] for method in shown},
        "eval_loss": {method: records[method]["eval_loss"] for method in shown},
        "general_loss": {method: evaluated[method].get("general_loss") for method in shown},
        "general_loss_nf4": {method: evaluated[method].get(forgetting.ROUNDED_FIELD) for method in shown},
    }
    for name, other in (("rougeL_over_base", BASE), ("rougeL_over_base_cut", BASE_CUT)):
        summary[name] = {method: interval(boot.difference(method, other, "rougeL")) for method in trained}
    write_json(target / "summary.json", summary)


def take_reference(study, target):
    """Write a study's config, tables, records, sweeps, pictures and summary.json to `target`, old ones removed.

    Studies of the same rows beside it are compared with it method by method: NAME-fp16 as the other precision, any
    other NAME-LABEL as what its config changes.
    StudyError: no run is finished, or as build_report.
    """
    built = build_report(study)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    for folder in (target / "sweeps", target / "figures", *target.glob("records*")):
        shutil.rmtree(folder, ignore_errors=True)
    with writing(target / "results.csv"):
        for path in (study.results_path, study.folder / "pairs.csv"):
            shutil.copyfile(path, target / path.name)
    config = read_json(study.config_path)
    write_json(target / "config.json", {**config, "config": public_config(config["config"])})
    _records(study, target / "records")
    _sweeps(study, target)
    summary = summary_of(study, built)
    summary |= _beside(study, built, target)
    summary["figures"] = _pictures(built, target / "figures")
    write_json(target / "summary.json", summary)


def take_sides(study, target):
    """Write only the comparisons with the studies beside a reference study again; its own results stay.

    study: has the reference's rows and settings. Its runs are a control: the reference's runs with which the studies
    beside it are compared, trained again together with them. Earlier comparisons with studies that are not beside it
    now stay, with their records. Sweeps in its folder are taken too.
    StudyError: its test rows are not those of the reference in `target`, or as build_report.
    """
    built = build_report(study)
    summary = {name: value for name, value in read_json(target / "summary.json").items() if name != "seal"}
    if built.study.split_hash != summary["split_hash"]:
        raise StudyError(
            f"{study.folder} has split {built.study.split_hash}, but {target} is of split {summary['split_hash']}: "
            "build its data from the same files and settings"
        )
    _records(study, target / "records-control")
    _sweeps(study, target)
    found = _beside(study, built, target)
    for side in found["sides"].values():
        side["is_control"] = True
    found["sides"] = {**summary.get("sides", {}), **found["sides"]}
    found["precision"] = found["precision"] or summary.get("precision", {})
    dates = {"date": time.strftime("%Y-%m-%d"), "devices": sorted({run["device"] for run in study.records()})}
    write_json(target / "summary.json", {**summary, **found, "control": dates})


def _beside(study, built, target):
    """{'precision': ..., 'sides': ...} of a summary; the records of the studies beside this one are written."""
    sibling, sides = sibling_of(study), sides_of(study)
    for label, side in {**({"fp16": sibling} if sibling else {}), **sides}.items():
        _records(side, target / f"records-{label}")
    compared_sides = {
        label: {
            "changes": differences(study.cfg.study_fields(), side.cfg.study_fields()),
            "methods": compared(built, side, ("side", "main")),
        }
        for label, side in sides.items()
    }
    return {"precision": compared(built, sibling) if sibling else {}, "sides": compared_sides}


def sibling_of(study):
    """The study NAME-fp16 beside a study, or None."""
    name = f"{study.folder.name}-fp16"
    folder = study.folder.parent / name
    return Study(folder, study.cfg.replace(study=name, precision="fp16")) if folder.is_dir() else None


def sides_of(study):
    """{LABEL: Study} of the studies NAME-LABEL beside a study, but NAME-fp16, whose frozen config is the same."""
    made = {}
    for path in sorted(study.folder.parent.glob(f"{study.folder.name}-*/config.json")):
        label = path.parent.name.removeprefix(f"{study.folder.name}-")
        if label != "fp16":
            fields = {**current_names(frozen_of(path)["config"]), "study": path.parent.name}
            made[label] = Study(path.parent, study.cfg.replace(**fields))
    return made


def _sweeps(study, target):
    for path in sorted((study.folder / "sweeps").glob("*.json")):
        write_json(target / "sweeps" / path.name, read_json(path))


def _records(study, folder):
    """The records of a study in `folder`, without those that were there before."""
    shutil.rmtree(folder, ignore_errors=True)
    for record in study.records():
        kept = {name: value for name, value in record.items() if name not in _LEFT_OUT}
        kept |= {name: without_folders(kept.get(name)) for name in ("error", "evaluation_error") if name in kept}
        kept["config"] = public_config(kept["config"])
        kept["model"] = public_model(kept["model"])
        kept["median_tokens_per_second"] = median_speed(record)
        kept["history"] = thinned([{name: e.get(name) for name in ("step", "loss")} for e in record["history"]])
        write_json(folder / f"{record['method']}-s{record['seed']}.json", kept)


def thinned(entries, most=_HISTORY):
    """At most so many entries at even distances, the first and the last among them."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def _pictures(built, folder):
    """Copy the figures that the docs show; returns [{'file', 'alt'}, ...]."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    made = []
    for path, alt in ((built.figures[name], built.alt[name]) for name in FIGURES if name in built.figures):
        if path.stat().st_size > _MOST_BYTES:
            raise StudyError(
                f"{path} has {path.stat().st_size:,} bytes, more than {_MOST_BYTES:,}: too large to commit"
            )
        with writing(folder / path.name):
            shutil.copyfile(path, folder / path.name)
        made.append({"file": path.name, "alt": alt})
    return made
