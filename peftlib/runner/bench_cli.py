"""The verb `bench`: a study's models on standard benchmarks."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from peftlib.core.errors import ConfigError
from peftlib.core.study import Study
from peftlib.runner.console import Name, say
from peftlib.storage.mirror import open_study

EXAMPLES = (
    "bench base qlora galore --study first",
    "bench base qlora --study first --tasks arc_easy,piqa --data eval/ --limit 100",
    "bench --path my-adapter --study first --tasks retention,skill",
)


def bench(
    study: Name,
    methods: Annotated[list[str] | None, Argument(metavar="METHOD", help="trained methods, or base")] = None,
    path: Annotated[Path | None, Option(metavar="FOLDER", help="instead: an adapter or model made elsewhere")] = None,
    name: Annotated[str, Option(help="of the model in FOLDER; default: the folder's name")] = "",
    tasks: Annotated[str, Option(metavar="A,B,...", help="retention, skill, or any of lm-eval's tasks")] = "retention",
    data: Annotated[Path | None, Option(metavar="DIR", help="with the tasks' files; default: from the hub")] = None,
    limit: Annotated[int, Option(min=0, metavar="N", help="the first N rows of each task; 0: all")] = 0,
    seed: Annotated[int, Option(min=0, help="of the run")] = 0,
):
    """Score models on standard benchmarks through lm-evaluation-harness; needs peftlib[bench].

    retention is what a model may forget (arc_easy, arc_challenge, piqa, winogrande, boolq, openbookqa, lambada_openai,
    wikitext), skill what it may learn (ifeval, gsm8k). Cut, the same command goes on. `peftlib report` shows them.
    """
    if bool(methods) == (path is not None):
        raise ConfigError("name one or more METHODs, or --path FOLDER")
    from peftlib.evaluation.benchmarks.run import bench as score
    from peftlib.methods import BASE, find

    found = open_study(study)
    found = Study(found.folder, found.cfg.replace(seed=seed))
    how: dict = {"data": data, "limit": limit, "log": say}
    if path:
        score(found, None, tasks, path=path, name=name, **how)
    for method in methods or ():
        score(found, method if method == BASE else find(method).name, tasks, **how)
