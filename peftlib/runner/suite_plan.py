"""What work costs before it is done: the methods on a card, and each run of a whole study."""

from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError
from peftlib.core.study import Study
from peftlib.methods import BASE
from peftlib.models.shapes import card_at_hand, find_card, shape_of
from peftlib.runner.suite_jobs import DONE
from peftlib.train import estimate


def plan_lines(gpu, given, study=None):
    """Yield which method fits a GPU, in which micro-batch and for how long, as lines of text.

    gpu: a name in shapes.CARDS; None for the one here, or a t4, which is said. given: {field: value} of the config.
    study: a Study whose config and data to plan for. ConfigError: an unknown GPU or setting, or a card on which no
    method fits. ModelError: the model's shape cannot be had.
    """
    name, card = find_card(gpu) if gpu else card_at_hand() or find_card("t4")
    if gpu is None:
        yield f"no --gpu given: planned for a {name}"
    own = {field: value for field, value in given.items() if field != "profile"}
    cfg = study.cfg.replace(**own) if study else resolve(**{"profile": "gpu", **given})  # t4 asks for the same rows
    manifest = study.manifest() if study and study.manifest_path.exists() else None
    found = estimate.forecast(cfg, name, card, shape=shape_of(cfg.model), manifest=manifest)
    if found.refusal:
        raise ConfigError(found.refusal)
    yield from found.lines()


def lines(settings):
    """Yield the runs of a study with the time that training takes and their status, then the total of what is left.

    settings: suite_jobs.Settings. StudyError: the study has no data yet. ModelError: the model's shape cannot be had.
    """
    study = Study.resolve(**settings.given)
    cfg, manifest, (name, card) = study.cfg, study.manifest(), card_at_hand() or find_card("t4")
    costs = estimate.forecast(cfg, name, card, shape=shape_of(cfg.model), manifest=manifest).costs
    hours_of = {BASE: (0.0, 0.0)} | {cost.method: cost.hours for cost in costs}
    n_seen = sum(manifest["counts"]["train"].values()) * cfg.epochs
    jobs, chosen = settings.jobs(study)
    left, words = [(0.0, 0.0)], lambda low, high: estimate.duration(low, high) if high else "none"
    yield f"{'run':<18} {'training':<18}  now"
    for job in jobs:
        times = 3600 * (len(settings.factors) * min(1.0, settings.rows / n_seen) if job.is_sweep else 1)
        status, seconds = job.state()[0], [times * end for end in hours_of[job.method] or ()]
        left += [seconds] if seconds and job in chosen and status != DONE else []
        yield f"{job.name:<18} {words(*seconds) if seconds else 'does not fit':<18}  {status}"
    total = words(*map(sum, zip(*left, strict=True)))
    yield f"left: {total} of training on a {name}, one run at a time; answering the test rows comes on top"
