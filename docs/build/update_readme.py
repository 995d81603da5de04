"""Writes what README says in figures: the parts between its markers, made from results/ alone.

`make readme` calls this. `python -m peftlib.readme --take STUDY` first puts a finished study's results.csv, picture and
summary into results/demo; `--take-reference STUDY` those of the reference study, records and sweeps too, into
results/reference.
"""

import argparse
import json
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

from peftlib.evaluation import forgetting
import readme_bench
import reference_results
from peftlib.core.errors import PeftlibError, StudyError
from peftlib.core.files import read_json, write_json, write_text
from peftlib.report.markdown import number, table
from peftlib.storage.mirror import open_study

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "results"


def sections(results=RESULTS):
    """{name: Markdown} of everything between README's markers. StudyError: a file of results/ is not there."""
    from reference_section import section

    demo, bench = _json(results / "demo" / "summary.json"), _json(results / "bench" / "methods.json")
    return {
        "demo": _demo(demo),
        "reference": section(results / "reference", bench),
        "methods": readme_bench.methods(bench),
        "fp16": _precision(_json(results / "bench" / "fp16.json")),
        "generate": _generate(_json(results / "bench" / "generate.json")),
        "resume": _resume(_json(results / "bench" / "resume.json")),
    }


def with_sections(readme, made):
    """README's text with the parts between `<!-- NAME -->` and `<!-- /NAME -->` written anew.

    StudyError: one of the markers is not there.
    """
    for name, text in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            raise StudyError(f"README.md has no lines <!-- {name} --> and <!-- /{name} -->: put them where it belongs")
        readme = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", readme)
    return readme


def take(study, results=RESULTS):
    """Put a finished study's results.csv, picture of scores and summary into results/demo."""
    from peftlib.report import build as report
    from peftlib.evaluation import stats
    from peftlib.evaluation.results import BASE, BASE_CUT

    built, target = report.build(study), results / "demo"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(study.results_path, target / "results.csv")
    shutil.copyfile(built.figures["scores"], target / "scores.png")
    systems = built.study.systems()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.FewRowsWarning)  # the section says it
        boot = stats.bootstrap(systems)
    trained = [method for method in systems if method not in (BASE, BASE_CUT)]

    def gain(method, over, metric):
        found = boot.difference(method, over, metric)
        return {"value": found.value, "low": found.low, "high": found.high, "is_noise": found.is_noise}

    records = {run.record["method"]: run.record for run in built.study.runs}
    counts = study.manifest()["counts"]
    write_json(
        target / "summary.json",
        {
            "date": time.strftime("%Y-%m-%d"),
            "alt": built.alt["scores"],
            "model_provenance": records[BASE]["model_provenance"],
            "device": records[trained[0]]["device"],
            "steps": records[trained[0]]["steps"],
            "rows": {split: sum(counts[split].values()) for split in counts},
            "scores": {method: boot.value[method] for method in (BASE, *trained)},
            "eval_loss": {method: records[method]["eval_loss"] for method in (BASE, *trained)},
            "general_loss": {method: records[method]["evaluation"].get("general_loss") for method in (BASE, *trained)},
            "general_loss_nf4": {m: records[m]["evaluation"].get(forgetting.ROUNDED_FIELD) for m in (BASE, *trained)},
            "rougeL_over_base": {method: gain(method, BASE, "rougeL") for method in trained},
            "rougeL_over_base_cut": {method: gain(method, BASE_CUT, "rougeL") for method in trained},
        },
    )


def _demo(found):
    methods = list(found["eval_loss"])
    gains, cut = found["rougeL_over_base"], found["rougeL_over_base_cut"]
    clear = [method for method in cut if not cut[method]["is_noise"]]
    rows = [
        ["", *methods],
        ["test loss, nats per token", *(f"{found['eval_loss'][m]:.3f}" for m in methods)],
        ["ROUGE-L", *(f"{found['scores'][m]['rougeL']:.3f}" for m in methods)],
        ["its gain over base, 95 % interval", *(_interval(gains.get(m)) for m in methods)],
        ["BLEU-4", *(f"{found['scores'][m]['bleu4']:.3f}" for m in methods)],
        ["loss on general text", *(number(found["general_loss"][m], "{:.3f}") for m in methods)],
        [
            "of it untrained, in the same 4 bits",
            *(number(found.get("general_loss_nf4", {}).get(m), "{:.3f}") for m in methods),
        ],
    ]
    against = (
        f"against the base cut at the median reference length only {' and '.join(clear)} gained more than the noise"
        if clear
        else "none of the gains is outside the noise against the base cut at the median reference length, so they may be "
        "no more than knowing when to stop"
    )
    about = (
        f"One run of the demo: {found['model_provenance']}; {found['rows']['train']} training and {found['rows']['test']} "
        f"test rows, {found['steps']} steps, one seed, {found['device']}, {found['date']} "
        "([`results/demo/results.csv`](results/demo/results.csv))."
    )
    verdict = (
        f"It shows that the machinery works, not which method is better: with {found['rows']['test']} rows the intervals are "
        f"wide, and {against}."
    )
    return "\n".join([about, "", f"![{found['alt']}](results/demo/scores.png)", "", table(rows), "", verdict])


def _precision(found):
    """fp16 against bf16 on a real model, a line a method."""
    lines = [["method", "seed", "bf16", "fp16", "difference", "skipped steps"]]
    by_key = {(r["method"], r["seed"], r["precision"]): r for r in found["runs"] if "galore_on_refresh" not in r}
    for method, seed in dict.fromkeys(key[:2] for key in sorted(by_key)):
        bf16, fp16 = by_key[method, seed, "bf16"], by_key[method, seed, "fp16"]
        losses = [bf16["last_losses"], fp16["last_losses"]]
        part = [f"{loss:.4f}" for loss in losses]
        lines.append([method, str(seed), *part, f"{losses[1] / losses[0] - 1:+.2%}", str(fp16["skipped_steps"])])
    head = (
        f"Mean of the last 20 of {found['runs'][0]['steps']} losses, {found['model']}, "
        f"{found['runs'][0]['device'].removeprefix('NVIDIA ')}, {found['date']}:"
    )
    return "\n".join([head, "", table(lines), "", _energy(found["energy"])])


def _energy(found):
    return (
        f"On the same run's gradients ({found['matrices']} matrices, rank {found['rank']}) GaLore's fast bases hold "
        f"{found['cold_min']:.2%} or more of the exact bases' energy when made anew, {found['warm_min']:.2%} or more when "
        f"refreshed after {found['steps_apart']} steps; a basis left as it was for these steps holds "
        f"{found['stale_min']:.0%} to {found['stale_median']:.0%} (least and median)."
    )


def _generate(rows):
    head = ["device", "engine", "rows at a time", "dtype", "rows", "tokens/s", "against", "ratio"]
    shown = [
        [
            row["device"].removeprefix("NVIDIA ").split(" (")[0] + (" (2 cores)" if "2 cores" in row["device"] else ""),
            row["engine"],
            str(row["batch"] or "its own"),
            row["dtype"],
            f"{row['rows']:,}",
            f"{row['tok_s']:,.1f}",
            row["baseline"],
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return table([head, *shown])


def _resume(rows):
    head = ["method", "device", "seconds to the next step", "saves", "share of the time held up", "checkpoint GiB"]
    shown = [
        [
            row["method"],
            row["device"],
            f"{row['resume_s']:.0f}",
            str(row["saves"]),
            f"{100 * row['stall_share']:.1f} %",
            f"{row['checkpoint_gib']:.2f}",
        ]
        for row in rows
    ]
    return table([head, *shown])


def _interval(gain):
    return f"{gain['low']:+z.3f} to {gain['high']:+z.3f}" if gain else ""


def _json(path):
    if not path.exists():
        raise StudyError(f"{path} is not there: README's figures come from it, see README on how it is made")
    return read_json(path) if path.name == "summary.json" else json.loads(path.read_text(encoding="utf-8"))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m peftlib.readme", description=__doc__)
    parser.add_argument("--take", metavar="STUDY", help="a finished study whose results become results/demo first")
    parser.add_argument("--take-reference", metavar="STUDY", help="the same for results/reference")
    parser.add_argument(
        "--lacking",
        metavar="WHY",
        default="",
        help="why runs that the reference study lacks were not run, or not scored",
    )
    args = parser.parse_args(argv)
    try:
        if args.take:
            take(open_study(args.take))
        if args.take_reference:
            study = open_study(args.take_reference)
            sibling = reference_results.sibling_of(study)
            reference_results.take(study, RESULTS / "reference", sibling=sibling, lacking=args.lacking)
        path = CHECKOUT / "README.md"
        write_text(path, with_sections(path.read_text(encoding="utf-8"), sections()))
    except PeftlibError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
