"""What work costs before it is done: the methods on a card, and each run of a whole study."""

from dataclasses import dataclass

from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.study import Study
from peftlib.methods import BASE, METHODS
from peftlib.models.compile import STEPS_TO_PAY
from peftlib.models.shapes import card_at_hand, find_card, shape_of
from peftlib.runner.suite_jobs import DONE, OTHER_PRECISION, only, state_of
from peftlib.train import estimate

_FULL_PROFILE_GIB = 17  # the line that core.env.profile_for_hardware draws


def plan_lines(gpu, given, study=None):
    """Yield which method fits a GPU, in which micro-batch and for how long, as lines of text.

    gpu: a name in shapes.CARDS; None for the one here, or a t4, which is said. given: {field: value} of the config.
    study: a Study whose config and data to plan for. ConfigError: an unknown GPU or setting, or a card on which no
    method fits. ModelError: the model's shape cannot be had.
    """
    name, card = find_card(gpu) if gpu else card_at_hand() or find_card("t4")
    if gpu is None:
        yield f"no --gpu given: planned for a {name}"
    if study is not None:
        cfg = study.cfg.replace(**{field: value for field, value in given.items() if field != "profile"})
    else:
        is_large = card.gib > _FULL_PROFILE_GIB and card.precision == "bf16"
        cfg = resolve(**{"profile": "gpu" if is_large else "t4", **given})
    manifest = study.manifest() if study is not None and study.manifest_path.exists() else None
    found = estimate.forecast(cfg, name, card, shape=shape_of(cfg.model), manifest=manifest)
    if found.refusal:
        raise ConfigError(found.refusal)
    yield from found.lines()


@dataclass(frozen=True)
class Assumptions:
    """What predicted minutes rest on: speeds of one run alone on a GPU, and how much runs slow each other."""

    tokens_per_second: float = 35_000  # of training, short rows packed, compiled: bound by launches
    eager_share: float = 0.5  # of that speed, where a run is too short to be compiled (sweeps)
    first_step_s: float = 15.0  # with compiling, of galore, full and apollo
    first_step_adapters_s: float = 75.0  # of qlora, hybrid and lora
    start_s: float = 25.0  # process, libraries, model, data
    answer_tokens_per_second: float = 28_000
    answer_tokens: float = 110.0  # of a test row
    test_loss_s: float = 20.0
    slower: float = 1.25  # times, beside other runs on the same GPU
    gpus: int = 2
    at_once: int = 2


def predict(study, settings, assumed):
    """{run: minutes} of the jobs of a study with data, in the order in which they start."""
    cfg, manifest = study.cfg, study.manifest()
    tokens, _, _ = estimate.study_tokens(cfg, manifest)
    n_seen = sum(manifest["counts"]["train"].values()) * cfg.epochs
    answers = sum(manifest["counts"]["test"].values()) * assumed.answer_tokens
    evaluate_s = assumed.test_loss_s + answers / assumed.answer_tokens_per_second
    found = {}
    for job in settings.jobs(study):
        seconds = assumed.start_s
        if job.is_sweep:
            share, steps = min(1.0, settings.rows / n_seen), settings.rows / cfg.batch_size
            seconds += len(settings.factors) * _train_s(job.method, tokens * share, steps, assumed)
        elif job.method == BASE:
            seconds += evaluate_s
        else:
            seconds += _train_s(job.method, tokens, n_seen / cfg.batch_size, assumed) + evaluate_s
        found[job.name] = seconds / 60
    for method in settings.checked:
        first = f"{method}-s{settings.seeds[0]}"
        found[f"{first}-{OTHER_PRECISION}"] = found[first]
    return found


def _train_s(method, tokens, steps, assumed):
    if steps < STEPS_TO_PAY:
        return tokens / (assumed.tokens_per_second * assumed.eager_share)
    has_adapters = "adapters" in METHODS[method].trains  # whose first step compiles longest
    first = assumed.first_step_adapters_s if has_adapters else assumed.first_step_s
    return first + tokens / assumed.tokens_per_second


def wall_minutes(minutes, assumed):
    """Minutes by the clock: each run goes to the worker that is free first, and is `slower` beside others."""
    workers = [0.0] * (assumed.gpus * assumed.at_once)
    slower = assumed.slower if assumed.at_once > 1 else 1.0
    for run_minutes in minutes:
        workers[workers.index(min(workers))] += run_minutes * slower
    return max(workers)


def lines(settings, assumed):
    """Yield the runs of a study with predicted minutes and status, then the total of the unfinished ones.

    settings: suite.Settings. StudyError: the study has no data yet.
    """
    study = Study.resolve(**settings.given)
    if not study.manifest_path.exists():
        raise StudyError(
            f"--dry-run counts the rows of study {study.cfg.study!r}, which has no data yet: the command without "
            "--dry-run builds them first, and so does `python -m peftlib data` with the same --study, --source and -p"
        )
    jobs = settings.jobs(study)
    states = {job.name: state_of(job, factors=settings.factors, rows=settings.rows).status for job in jobs}
    chosen = {job.name for job in only(jobs, settings.names)}
    yield f"{'run':<18} {'predicted min':>13}  now"
    left = []
    for name, minutes in predict(study, settings, assumed).items():
        if states.get(name) != DONE and (name in chosen or not settings.names):
            left.append(minutes)
        yield f"{name:<18} {minutes:>13.1f}  {states.get(name, '')}".rstrip()
    gpus, runs = (f"{n} {what}{'s' * (n != 1)}" for n, what in ((assumed.gpus, "GPU"), (assumed.at_once, "run")))
    clock = wall_minutes(left, assumed)
    yield f"left: {sum(left):.0f} minutes of runs, {clock:.0f} by the clock on {gpus} with {runs} on each"
