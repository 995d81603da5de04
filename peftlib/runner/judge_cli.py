"""The verb `judge`: two methods' answers, to the test rows or to a known set of prompts, compared by a model."""

from typing import Annotated

from typer import Option

from peftlib.core.errors import ConfigError
from peftlib.runner.console import Flag, Name, require_numbers, say
from peftlib.storage.mirror import open_study

Price = Annotated[float | None, Option(min=0, help="of a million tokens, for the cost")]


def judge(
    study: Name,
    methods: Annotated[tuple[str, str], Option(metavar="A B", help="such as: base qlora")],
    seed: Annotated[int, Option(min=0, help="of the runs")] = 0,
    rows: Annotated[int, Option(min=0, metavar="N", help="so many rows; 0: all")] = 0,
    again: Annotated[int, Option(min=0, metavar="N", help="rows to ask twice: does the judge agree with itself?")] = 0,
    prompts: Annotated[str, Option(metavar="SET", help="instead of test rows: mt_bench or alpaca_eval")] = "",
    data: Annotated[str | None, Option(metavar="DIR", help="that holds the set's file; default: the hub")] = None,
    endpoint: Annotated[str | None, Option(metavar="URL", help="OpenAI-compatible; mostly ends in /v1")] = None,
    model: Annotated[str | None, Option(metavar="M", help="that the endpoint serves")] = None,
    local: Annotated[str | None, Option(metavar="MODEL", help="instead: a folder, 'packaged' or a hub id")] = None,
    dry_run: Flag = False,
    price_in: Price = None,
    price_out: Price = None,
    parallel: Annotated[int, Option(min=1, metavar="N", help="calls at a time")] = 4,
    reply_tokens: Annotated[int, Option(min=1, metavar="N", help="of a reply; more for a judge that thinks")] = 300,
    timeout: Annotated[float, Option(metavar="SECONDS", help="of one call in all")] = 60.0,
    retries: Annotated[int, Option(min=0, metavar="N", help="of a call that failed")] = 5,
):
    """Have a language model compare two methods' answers to the same test rows, in both orders.

    An endpoint's key is read from the environment variable OPENAI_API_KEY and stored nowhere.
    """
    require_numbers({"--timeout": timeout or -1, "--price-in": price_in or 0, "--price-out": price_out or 0})
    if (endpoint is None) == (local is None):
        raise ConfigError("name one judge: --endpoint URL --model M, or --local MODEL")
    if data is not None and not prompts:
        raise ConfigError("--data holds a set of prompts: name it by --prompts mt_bench or alpaca_eval")
    if endpoint is not None and model is None:
        raise ConfigError("--endpoint needs --model, the name under which the server knows its model")
    from peftlib.evaluation.judging.backends import Endpoint, Local
    from peftlib.evaluation.judging.study import judge_study

    backend = Local(local) if local else Endpoint(endpoint, model, timeout_s=timeout, retries=retries)
    how = {"seed": seed, "n_rows": rows, "again": again, "prompts": prompts, "folder": data, "log": say}
    how |= {"reply_tokens": reply_tokens, "parallel": 1 if local else parallel}
    judge_study(open_study(study), methods, backend, prices=(price_in, price_out), dry_run=dry_run, **how)
