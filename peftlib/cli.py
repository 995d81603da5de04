"""The command line: `peftlib COMMAND`, or `python -m peftlib COMMAND`. Each command imports what it needs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from peftlib.core.config import resolve
from peftlib.core.env import output_root
from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.limits import factors_of
from peftlib.core.record import loss_text
from peftlib.core.study import Study
from peftlib.runner import analysis_cli, console, suite_cli
from peftlib.runner.console import (
    AnyName,
    Flag,
    Name,
    Profile,
    Settings,
    Sources,
    examples_of,
    given_settings,
    sized_as_full_study,
    study_of,
)
from peftlib.storage.mirror import open_study
from peftlib.storage.store import PUBLIC

app = typer.Typer(
    help="QLoRA, GaLore and a layer-wise hybrid compared on Gemma 3. `peftlib COMMAND --help` shows examples.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Seed = Annotated[int, Option(min=0, help="seed of the run")]
Method = Annotated[str, Argument(metavar="METHOD", help="qlora, peft:FILE.json, ...; `peftlib methods` lists all")]
Rows = Annotated[int | None, Option(metavar="N", min=0, help="rows per source")]


@app.callback()
def everywhere(public: Annotated[bool, Option("--public", help="allow copies that anyone can read")] = False):
    """Options that go before any command's name."""
    if public:
        os.environ[PUBLIC] = "1"  # for child processes and kernels too


def _command(*examples):
    """Register a function as a command whose --help ends with examples."""
    return app.command(epilog=examples_of(*examples))


@_command("run --profile demo", "run 01 02_qlora --study first -p lora_rank=8", "run --study second --fork first")
def run(
    notebooks: Annotated[list[str] | None, Argument(metavar="NOTEBOOK", help="for example 01 02_qlora")] = None,
    profile: Profile = None,
    study: AnyName = None,
    seed: Annotated[int | None, Option(help="seed of the runs; default: the notebooks'")] = None,
    fork: Annotated[str | None, Option(metavar="STUDY", help="start from the weights of this study's runs")] = None,
    settings: Settings = None,
    folder: Annotated[str | None, Option("--notebooks", metavar="DIR", help="default: peftlib's own")] = None,
):
    """Execute the notebooks in order; skip finished ones."""
    from peftlib.runner import notebooks as runner

    given = given_settings(settings, profile=profile, study=study, seed=seed, fork=fork)
    return runner.run(runner.plan(notebooks or [], given, folder))


@_command("data --study mine --source alpaca=rows.jsonl --train 5000 --test 2000", "data --study first --profile t4")
def data(
    study: Name,
    profile: Profile = None,
    source: Sources = None,
    train: Rows = None,
    valid: Rows = None,
    test: Rows = None,
    split_seed: Annotated[int | None, Option("--split-seed", "--seed", help="another seed draws other rows")] = None,
    settings: Settings = None,
):
    """Build a study's rows and freeze its settings.

    With --train or --test and without --profile, lengths, the share of validation rows, batch size and learning rates
    come from the full study, and the model comes from the hardware's profile.
    """
    sizes = {"train_rows": train, "valid_rows": valid, "test_rows": test, "split_seed": split_seed}
    given = given_settings(settings, source=source, study=study, **sizes)
    is_new = not (output_root() / resolve(profile, study=study).study / "config.json").exists()
    if is_new and profile is None and (train or test):
        given = sized_as_full_study(given)
    found = study_of({"profile": profile, **given})
    from peftlib import build_data
    from peftlib.data.card import summary

    print(f"study {found.cfg.study}, profile {found.cfg.profile}, model {found.cfg.model}, in {found.folder}")
    print("  ".join(f"{name}={value!r}" for name, value in found.cfg.fields_of("data").items()))
    manifest = build_data(found.cfg, found.data_dir)
    found.freeze()
    print(summary(manifest))


@_command("train qlora --study first", "train galore --study first --seed 1 -p max_seconds=3600")
def train(method: Method, study: AnyName = None, profile: Profile = None, seed: Seed = 0, settings: Settings = None):
    """Train one method, or resume an interrupted run.

    On several GPUs: torchrun --nproc-per-node N -m peftlib train METHOD ...
    """
    given = given_settings(settings, profile=profile, study=study, seed=seed)
    from peftlib.train.parallel.processes import join

    processes = join(resolve(**given).device)
    with processes.main_first():
        found = study_of(given, is_copied=processes.is_main)
    from peftlib import run_training

    record = run_training(found, method)
    if not processes.is_main:
        return 0  # with any other code the launcher would kill the main process while it copies the study
    steps = f"{record['steps']} of {record['planned_steps']} steps"
    print(f"{method}, seed {seed}: {record['status']}, {steps}, {(record['train_seconds'] or 0) / 60:.1f} min")
    return 0 if record["status"] == "ok" else console.STOPPED_CODE


@_command(
    "evaluate base --study first",
    "evaluate qlora --study first --rewind 0.25,0.5,0.75 --tasks retention",
    "evaluate --path my-adapter --study first",
)
def evaluate(
    study: Name,
    method: Annotated[str | None, Argument(metavar="METHOD", help="a trained method, or base")] = None,
    path: Annotated[Path | None, Option(metavar="FOLDER", help="an adapter or model trained elsewhere")] = None,
    name: Annotated[str, Option(help="name of the model in FOLDER; default: the folder's name")] = "",
    seed: Seed = 0,
    rewind: Annotated[str, Option(metavar="A,B,...", help="also score models between base (0) and METHOD (1)")] = "",
    tasks: Annotated[str, Option(metavar="A,B,...", help="with --rewind: also score these benchmarks")] = "",
    data: Annotated[
        Path | None, Option(metavar="FOLDER", help="with --tasks: folder of the benchmarks' files; default: the hub")
    ] = None,
):
    """Answer and score a study's test rows. The model is a trained method, base, or one trained elsewhere."""
    if (method is None) == (path is None):
        raise ConfigError("give one model: a METHOD, or --path FOLDER")
    if rewind and path:
        raise ConfigError("--rewind needs a METHOD of the study: the base of a model trained elsewhere is unknown")
    factors = factors_of("--rewind", rewind)
    if tasks and not factors:
        raise ConfigError(f"--tasks {tasks} needs --rewind: use peftlib bench to score a model alone")
    found = open_study(study)
    benchmarks = {"benchmarks": tasks, "benchmark_data": str(data or "")}
    found = Study(found.folder, found.cfg.replace(seed=seed, **benchmarks))
    from peftlib.evaluation import evaluate as evaluation

    if factors:
        from peftlib.evaluation.benchmarks import rewind as rewinding
        from peftlib.evaluation.benchmarks.run import bench
        from peftlib.methods import BASE

        rewinding.require_factors(method, factors)
    record = (
        evaluation.evaluate(found, _name_of(method))
        if method
        else evaluation.evaluate_path(found, path or "", name=name)
    )
    loss = loss_text(record)
    scored_on = (record.get("trained_elsewhere") or {}).get("scored_on")
    base = f", on {scored_on}" if scored_on else ""
    print(f"{record['method']}: loss {loss} on {record['evaluation']['n_test']} test rows{base}")
    if factors:
        for name in (BASE, record["method"]) if tasks else ():  # the ends of the curve
            bench(found, name, tasks, data=data, limit=rewinding.ROWS)
        rewinding.rewind(found, record["method"], factors)


@_command("report --study first")
def report(study: Name):
    """Rebuild a study's report, results.csv and figures."""
    found = open_study(study)
    from peftlib import build_report
    from peftlib.core.files import readable_path

    built = build_report(found)
    pages = (found.results_path, found.report_path, found.report_path.with_suffix(".html"))
    print("\n".join(readable_path(path) for path in (*pages, *built.figures.values())))


_command(
    "judge --study first --methods base qlora --endpoint http://127.0.0.1:8000/v1 --model judge-model --dry-run",
    "judge --study first --methods qlora galore --local packaged --rows 20",
    "judge --study first --methods base qlora --local packaged --prompts mt_bench --data DIR",
)(analysis_cli.judge)


@_command("chat galore --study first", "chat base --study first --max-new-tokens 100")
def chat(
    method: Method,
    study: Name,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, Option(help="token limit per answer")] = 256,
):
    """Chat with a trained model or base. /new starts over, /quit ends."""
    found = open_study(study)
    found.cfg.replace(max_new_tokens=max_new_tokens)  # validates the value
    from peftlib.evaluation.chat import main as talk

    return talk(found, _name_of(method), seed=seed, max_new_tokens=max_new_tokens)


@_command("export galore --study first --to exported/", "export qlora --study first --form gguf --to hf://USER/REPO")
def export(
    method: Method,
    study: Name,
    to: Annotated[str, Option(metavar="WHERE", help="a folder, or hf://USER/REPO (created private)")],
    seed: Seed = 0,
    form: Annotated[
        str, Option(help="adapter, lora (from full weights), merged (one model in bf16) or gguf")
    ] = "adapter",
    quant: Annotated[str, Option(help="type of a GGUF file: q8_0, f16 or bf16")] = "q8_0",
    rank: Annotated[int, Option(min=1, help="rank of --form lora")] = 16,
    public: Annotated[bool, Option("--public", help="create the repository public")] = False,
    dry_run: Flag = False,
):
    """Export a trained model to a folder or the hub. The export includes a model card."""
    found = open_study(study)
    from peftlib import export_model
    from peftlib.export.export import lines_of

    how: dict = {
        "seed": seed,
        "to": to,
        "form": form,
        "quant": quant,
        "rank": rank,
        "private": not public,
        "dry_run": dry_run,
    }
    print("\n".join(lines_of(export_model(found, _name_of(method), **how), dry_run=dry_run)))


_command(
    "bench base qlora galore --study first",
    "bench base qlora --study first --tasks arc_easy,piqa --data eval/ --limit 100",
    "bench --path my-adapter --study first --tasks retention,skill",
)(analysis_cli.bench)
_PLANS = "plan --gpu t4", "plan --gpu l4 --model gemma-3-1b -p max_length=2048", "plan --study first"
_command(*_PLANS)(analysis_cli.plan)
_command("methods dora qdora", "methods peft:my_config.json")(analysis_cli.methods)
_command("compare first second", "compare runs/first runs/second")(analysis_cli.compare)
_command("site runs/first runs/second --to page")(analysis_cli.site)


@_command("sweep qlora galore --study first", "sweep hybrid --study first --factor 0.5 --factor 2 --rows 800")
def sweep(
    study: Name,
    methods: Annotated[list[str] | None, Argument(metavar="METHOD", help="default: the study's six")] = None,
    factor: Annotated[list[float] | None, Option(help="multiplies the study's rates; default: a search")] = None,
    rows: Annotated[int, Option(min=1, metavar="N", help="training rows of each trial")] = 1500,
):
    """Try learning rates on a study's validation rows; later runs of the method train with the best ones.

    The search starts at 1/3, 1 and 3 times the study's rates and continues by factors of 3 until the best rate lies
    between worse ones or the next diverges. A method's two rates are searched apart, in at most 9 trials. Run the
    command again to resume.
    """
    found = open_study(study)
    from peftlib.methods import default_methods
    from peftlib.train import sweep as trials

    for method in methods or default_methods():
        result = trials.sweep(found, method, factors=factor or None, rows=rows)
        try:
            trials.adopt(found, result)
            console.say(f"{method}: runs of this study train with it from now on")
        except StudyError as error:
            console.say(f"{method}: not adopted, because {error}")


app.add_typer(suite_cli.app, name="study")


def _name_of(method):
    """The name that a METHOD argument has in files."""
    from peftlib.methods import BASE, find

    return method if method == BASE else find(method).name


def call(argv):
    """Run one command; returns its exit code. Errors propagate; ConfigError: invalid arguments."""
    return console.call(app, argv)


def main(argv=None):
    """Run one command with the process's arguments, or with `argv`; returns its exit code."""
    return console.main(app, sys.argv[1:] if argv is None else argv)
