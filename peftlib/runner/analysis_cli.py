"""The commands that do not train: plan, methods, bench, judge, compare and site."""

import math
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from peftlib.core.errors import ConfigError
from peftlib.core.study import Study
from peftlib.runner.console import AnyName, Flag, Name, Profile, Settings, given_settings, say
from peftlib.storage.mirror import open_study

Price = Annotated[float | None, Option(min=0, help="price per million tokens, to estimate the cost")]


def bench(
    study: Name,
    methods: Annotated[list[str] | None, Argument(metavar="METHOD", help="trained methods, or base")] = None,
    path: Annotated[Path | None, Option(metavar="FOLDER", help="an adapter or model trained elsewhere")] = None,
    name: Annotated[str, Option(help="name of the model in FOLDER; default: the folder's name")] = "",
    tasks: Annotated[str, Option(metavar="A,B,...", help="retention, skill, or any lm-eval task")] = "retention",
    data: Annotated[Path | None, Option(metavar="DIR", help="folder with the tasks' files; default: the hub")] = None,
    limit: Annotated[int, Option(min=0, metavar="N", help="use the first N rows of each task; 0: all")] = 0,
    seed: Annotated[int, Option(min=0, help="seed of the run")] = 0,
):
    """Score models on standard benchmarks. Needs lm-evaluation-harness (peftlib[bench]).

    retention is what a model may forget (arc_easy, arc_challenge, piqa, winogrande, boolq, openbookqa, lambada_openai,
    wikitext), skill what it may learn (ifeval, gsm8k). Run it again to resume. `peftlib report` shows the scores.
    """
    if bool(methods) == (path is not None):
        raise ConfigError("give one or more METHODs, or --path FOLDER")
    from peftlib.evaluation.benchmarks.run import bench as score
    from peftlib.methods import BASE, find

    found = open_study(study)
    found = Study(found.folder, found.cfg.replace(seed=seed))
    how: dict = {"data": data, "limit": limit, "log": say}
    if path:
        score(found, None, tasks, path=path, name=name, **how)
    for method in methods or ():
        score(found, method if method == BASE else find(method).name, tasks, **how)


def judge(
    study: Name,
    methods: Annotated[tuple[str, str], Option(metavar="A B", help="such as: base qlora")],
    seed: Annotated[int, Option(min=0, help="seed of the runs")] = 0,
    rows: Annotated[int, Option(min=0, metavar="N", help="number of rows to judge; 0: all")] = 0,
    again: Annotated[int, Option(min=0, metavar="N", help="rows to judge twice, to measure self-agreement")] = 0,
    prompts: Annotated[str, Option(metavar="SET", help="mt_bench or alpaca_eval instead of the test rows")] = "",
    data: Annotated[str | None, Option(metavar="DIR", help="folder with the set's file; default: the hub")] = None,
    endpoint: Annotated[str | None, Option(metavar="URL", help="OpenAI-compatible; usually ends in /v1")] = None,
    model: Annotated[str | None, Option(metavar="M", help="model that the endpoint serves")] = None,
    local: Annotated[str | None, Option(metavar="MODEL", help="local judge: a folder, 'packaged' or a hub id")] = None,
    dry_run: Flag = False,
    price_in: Price = None,
    price_out: Price = None,
    parallel: Annotated[int, Option(min=1, metavar="N", help="concurrent calls")] = 4,
    reply_tokens: Annotated[int, Option(min=1, metavar="N", help="reply limit; a reasoning judge needs more")] = 300,
    timeout: Annotated[float, Option(metavar="SECONDS", help="time limit of one call")] = 60.0,
    retries: Annotated[int, Option(min=0, metavar="N", help="retries of a failed call")] = 5,
):
    """Let a language model compare two methods' answers. Each pair is judged in both orders.

    An endpoint's key is read from the environment variable OPENAI_API_KEY and stored nowhere.
    """
    if not 0 < timeout < math.inf:
        raise ConfigError(f"--timeout {timeout:g} is out of range: give seconds, such as 60")
    if math.inf in (price_in, price_out):
        raise ConfigError("--price-in and --price-out must be finite")
    if (endpoint is None) == (local is None):
        raise ConfigError("give one judge: --endpoint URL --model M, or --local MODEL")
    if data is not None and not prompts:
        raise ConfigError("--data needs a prompt set: add --prompts mt_bench or --prompts alpaca_eval")
    if endpoint is not None and model is None:
        raise ConfigError("--endpoint needs --model, the server's name for its model")
    from peftlib.evaluation.judging.backends import Endpoint, Local
    from peftlib.evaluation.judging.study import judge_study

    backend = Local(local) if local else Endpoint(endpoint, model, timeout_s=timeout, retries=retries)
    how = {"seed": seed, "n_rows": rows, "again": again, "prompts": prompts, "folder": data, "log": say}
    how |= {"reply_tokens": reply_tokens, "parallel": 1 if local else parallel}
    judge_study(open_study(study), methods, backend, prices=(price_in, price_out), dry_run=dry_run, **how)


def plan(
    gpu: Annotated[str | None, Option(help="t4, l4, a100, h100 ...; default: this machine's, else a t4")] = None,
    model: Annotated[str | None, Option(help="'packaged', gemma-3-1b, a folder or a hub id")] = None,
    study: AnyName = None,
    profile: Profile = None,
    settings: Settings = None,
    methods: Annotated[str | None, Option(metavar="A,B,...", help="default: six; see `peftlib methods`")] = None,
):
    """Show which methods fit a GPU. It also gives the micro-batch and the hours of training."""
    given = given_settings(settings, profile=profile, model=model)
    found = open_study(study) if study else None
    from peftlib.runner.suite_plan import plan_lines

    for line in plan_lines(gpu, given, found, methods and methods.replace(",", " ").split()):
        print(line)


def methods(
    names: Annotated[list[str] | None, Argument(metavar="METHOD", help="default: all except peft:FILE.json")] = None,
):
    """List the methods. It shows what trains, the base's precision, the 1B model's memory on a T4, and the paper."""
    from peftlib.runner.suite_plan import method_lines

    for line in method_lines(names or ()):
        print(line)


def compare(studies: Annotated[list[str], Argument(metavar="STUDY", help="two or more names or folders")]):
    """Compare studies that have the same test rows."""
    from peftlib import compare_studies

    print(compare_studies(studies), end="")


def site(
    studies: Annotated[list[str], Argument(metavar="STUDY", help="names or folders with the same test rows")],
    to: Annotated[Path, Option(metavar="DIR", help="a new or empty folder, or one with an earlier page")],
):
    """Write a results page that opens from disk. It has runs, charts, answers, and which methods fit which GPU."""
    from peftlib.report.site.build import build_site

    print(build_site(studies, to))
