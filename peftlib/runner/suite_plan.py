"""How many minutes each run of a reference study is thought to take: written down before it is run."""

from dataclasses import asdict, dataclass

from peftlib import methods
from peftlib.core.files import write_json, write_text
from peftlib.core.markdown import table
from peftlib.models.compile import STEPS_TO_PAY
from peftlib.runner.suite_jobs import BASE, DONE, jobs_of, only, state_of
from peftlib.train import estimate


@dataclass(frozen=True)
class Assumptions:
    """What the minutes rest on. Speeds: one run alone on a GPU. slower: times that each run takes longer beside others."""

    tokens_per_second: float = 35_000  # of training, short rows packed, compiled: bound by launches
    eager_share: float = 0.5  # of that speed, where a run is too short to be compiled (sweeps)
    first_step_s: float = 15.0  # with compiling, of galore, full and apollo
    first_step_adapters_s: float = 75.0  # of qlora, hybrid and lora
    start_s: float = 25.0  # process, libraries, model, data
    answer_tokens_per_second: float = 28_000
    answer_tokens: float = 110.0  # of a test row
    test_loss_s: float = 20.0
    slower: float = 1.25
    gpus: int = 2
    at_once: int = 2


def predict(study, settings, assumed):
    """[{'run', 'method', 'seed', 'train_s', 'evaluate_s', 'minutes'}, ...] of every job of a study whose data stand."""
    cfg, manifest = study.cfg, study.manifest()
    tokens, _, _ = estimate.study_tokens(cfg, manifest)
    n_rows = sum(manifest["counts"]["train"].values())
    sibling = study if settings.checked else None
    jobs = jobs_of(
        study,
        settings.methods,
        settings.seeds,
        sibling=sibling,
        checked=settings.checked,
        has_sweeps=bool(settings.factors),
    )
    found = []
    for at, job in enumerate(jobs):
        is_check = bool(settings.checked) and at >= len(jobs) - len(settings.checked)
        if job.is_sweep:
            share = min(1.0, settings.rows / (n_rows * cfg.epochs))
            train = len(settings.factors) * _train_s(
                job.method, tokens * share, settings.rows / cfg.batch_size, assumed
            )
            evaluate = 0.0
        else:
            train = (
                0.0
                if job.method == BASE
                else _train_s(job.method, tokens, n_rows * cfg.epochs / cfg.batch_size, assumed)
            )
            answers = sum(manifest["counts"]["test"].values()) * assumed.answer_tokens
            evaluate = assumed.test_loss_s + answers / assumed.answer_tokens_per_second
        seconds = assumed.start_s + train + evaluate
        found.append(
            {
                "run": job.name + ("-fp16" if is_check else ""),
                "method": job.method,
                "seed": None if job.is_sweep else job.seed,
                "train_s": round(train, 1),
                "evaluate_s": round(evaluate, 1),
                "minutes": round(seconds / 60, 2),
            }
        )
    return found


def _train_s(method, tokens, steps, assumed):
    if steps < STEPS_TO_PAY:
        return tokens / (assumed.tokens_per_second * assumed.eager_share)
    has_adapters = "adapters" in methods.find(method).trains  # their first step compiles longest
    first = assumed.first_step_adapters_s if has_adapters else assumed.first_step_s
    return first + tokens / assumed.tokens_per_second


def wall_minutes(rows, assumed):
    """Minutes of the whole: the rows' minutes, dealt out to the places in their order, each `slower` beside others."""
    places = [0.0] * (assumed.gpus * assumed.at_once)
    slower = assumed.slower if assumed.at_once > 1 else 1.0
    for row in rows:
        places[places.index(min(places))] += row["minutes"] * slower
    return max(places)


def lines(study, settings, assumed):
    """What is left of the study, and the predicted minutes of it. StudyError: no data yet."""
    made = document(study, settings, assumed)
    jobs = jobs_of(study, settings.methods, settings.seeds, has_sweeps=bool(settings.factors))
    states = {job.name: state_of(job, factors=settings.factors, rows=settings.rows) for job in jobs}
    chosen = {job.name for job in only(jobs, settings.names)}
    yield f"{'run':<18} {'predicted min':>13}  now"
    left = []
    for row in made["runs"]:
        state = states.get(row["run"])
        is_left = (not settings.names or row["run"] in chosen) and (state is None or state.status != DONE)
        left += [row] if is_left else []
        yield f"{row['run']:<18} {row['minutes']:>13.1f}  {state.status if state else ''}".rstrip()
    yield (
        f"left: {sum(row['minutes'] for row in left):.0f} minutes of runs, {wall_minutes(left, assumed):.0f} by the clock "
        f"on {assumed.gpus} GPU{'s' * (assumed.gpus != 1)} with {assumed.at_once} run{'s' * (assumed.at_once != 1)} on each"
    )


def document(study, settings, assumed):
    """The plan as a JSON object."""
    rows = predict(study, settings, assumed)
    return {
        "assumptions": asdict(assumed),
        "tokens": estimate.study_tokens(study.cfg, study.manifest())[2],
        "sweep": {"factors": list(settings.factors), "rows": settings.rows},
        "runs": rows,
        "run_minutes": round(sum(row["minutes"] for row in rows), 1),
        "wall_minutes": round(wall_minutes(rows, assumed), 1),
    }


def keep(study, settings, assumed, folder):
    """Write plan.json and plan.md below a folder."""
    made = document(study, settings, assumed)
    write_json(folder / "plan.json", made)
    write_text(folder / "plan.md", text(made))


def text(plan):
    """plan.json as Markdown."""
    return "\n".join(
        [
            "# Predicted minutes of the reference study",
            "",
            _about(plan),
            "",
            *_table(plan),
            "",
            _together(plan),
            "",
            _basis(plan),
            "",
        ]
    )


def _table(plan):
    by_method = {}
    for row in plan["runs"]:
        kind = "sweep" if row["seed"] is None else "fp16" if row["run"].endswith("-fp16") else f"seed {row['seed']}"
        by_method.setdefault(row["method"], {})[kind] = row["minutes"]
    kinds = list(dict.fromkeys(kind for found in by_method.values() for kind in found))
    kinds.sort(key=lambda kind: (kind == "fp16", kind != "sweep"))
    body = [
        [method, *(f"{found[kind]:.1f}" if kind in found else "" for kind in kinds), f"{sum(found.values()):.1f}"]
        for method, found in by_method.items()
    ]
    return [table([["method", *kinds, "together"], *body])]


def _about(plan):
    return (
        f"Written before it was run, for {plan['tokens']}. Minutes of one run alone on a GPU, start, training, loss and "
        "answers of the test rows together:"
    )


def _together(plan):
    assumed = plan["assumptions"]
    return (
        f"Together {plan['run_minutes']:.0f} minutes of runs; by the clock {plan['wall_minutes']:.0f} minutes on "
        f"{assumed['gpus']} GPUs with {assumed['at_once']} runs on each, each {assumed['slower']:g} times slower than alone."
    )


def _basis(plan):
    assumed, sweep = plan["assumptions"], plan["sweep"]
    return (
        f"Assumed, from what was measured on an H100 with the 1B shape: training at {assumed['tokens_per_second']:,.0f} "
        "useful tokens a second (packed real lengths; the 1B reached 25,800, bound by launches, with 26 layers against "
        f"18), a share of {assumed['eager_share']:g} of it in sweeps, which are too short to be compiled; a first step "
        f"with compiling of {assumed['first_step_s']:.0f} s (galore, full, apollo) or "
        f"{assumed['first_step_adapters_s']:.0f} s (qlora, hybrid, lora); {assumed['start_s']:.0f} s for start and "
        f"loading; answers of {assumed['answer_tokens']:.0f} tokens at {assumed['answer_tokens_per_second']:,.0f} a second; "
        f"{assumed['test_loss_s']:.0f} s for the losses. A sweep is {len(sweep['factors'])} trials on {sweep['rows']:,} rows."
    )
