"""Cost estimates before training: the methods on a GPU, and each run of a whole study."""

import re

from peftlib.core.config import resolve
from peftlib.core.errors import ConfigError
from peftlib.core.study import Study
from peftlib.methods import BASE, METHODS, default_methods, find
from peftlib.models.shapes import card_at_hand, find_card, shape_of
from peftlib.runner.suite_jobs import DONE
from peftlib.train import estimate, memory_model
from peftlib.train.sweep import TRIALS

_HOW = {"adapters": "by adapters", "galore": "by GaLore", "full": "whole", "apollo": "by APOLLO", "muon": "by Muon"}
_PAPER = re.compile(r"arXiv:[0-9.]*[0-9]")


def plan_lines(gpu, given, study=None, names=None):
    """Yield lines on which methods fit a GPU, with which micro-batch and for how long.

    gpu: a name in shapes.CARDS; None for this machine's, else a t4, which a line says. given: {field: value} of the
    config. study: a Study whose config and data to plan for. names: methods; None for the default methods.
    ConfigError: an unknown GPU or setting, or no method fits the card. ModelError: the model's shape is unknown.
    """
    name, card = find_card(gpu) if gpu else card_at_hand(is_strict=True) or find_card("t4")
    if gpu is None:
        yield f"no --gpu given: planning for a {name}"
    # Where and how fast a study runs is up to the card, not to the machine that built its data.
    kept = {**study.cfg.fields_of("data", "math"), "study": study.cfg.study} if study else {}
    cfg = resolve(**{"profile": "gpu", **kept, **given})  # t4 asks for the same rows
    manifest = study.manifest() if study and study.manifest_path.exists() else None
    found = estimate.forecast(cfg, name, card, shape=shape_of(cfg.model), manifest=manifest, names=names)
    if found.refusal:
        raise ConfigError(found.refusal)
    yield from found.lines()


def method_lines(names=()):
    """Yield `method_rows` as aligned lines, with two lines of explanation."""
    rows = list(method_rows(names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"A study without a list of methods runs {', '.join(default_methods())}."
    yield "Any other PEFT adapter: peft:FILE.json with its adapter_config.json, or peft4:FILE.json on the NF4 base."


def method_rows(names=()):
    """Yield the header and a row of texts for each method: what trains, how the base is held, memory, paper.

    Numbers are for the profile t4, the 1B model on a T4. names: as for methods.find, empty for all. ConfigError:
    unknown method.
    """
    (name, card), cfg = find_card("t4"), resolve("t4")
    shape = shape_of(cfg.model)
    yield "method", "name", "projections that train", "bits", "trained", "GiB on a T4", "paper"
    for cost in estimate.forecast(cfg, name, card, shape=shape, names=names or tuple(METHODS)).costs:
        spec = find(cost.method).resolve(cfg, shape.layers)
        trains = ", ".join(f"{len(leaves)} {_HOW.get(how, how)}" for how, leaves in spec.trains.items())
        bits = f"4 ({len(spec.four_bit)} of 7)" if spec.four_bit else "16"
        n_trained = memory_model.trained_numbers(shape, spec.name, cfg) if cost.memory_gib else 0  # 0: it is refused
        memory = f"{cost.memory_gib:.2f}" if cost.fits else cost.mark
        papers = ", ".join(dict.fromkeys(_PAPER.findall(spec.description)))
        yield spec.name, spec.label, trains, bits, f"{n_trained / 1e6:,.2f} M", memory, papers


def lines(settings):
    """Yield the runs of a study with training time and status, then the total of the remaining runs.

    settings: suite_jobs.Settings. Without data, rows are assumed, which a line says. ModelError: the model's shape is
    unknown.
    """
    study = Study.resolve(**settings.given)
    cfg, (name, card) = study.cfg, card_at_hand() or find_card("t4")
    manifest = study.manifest() if study.manifest_path.exists() else None
    names = [method for method in settings.methods if method != BASE]
    costs = estimate.forecast(cfg, name, card, shape=shape_of(cfg.model), manifest=manifest, names=names).costs
    hours_of = {BASE: (0.0, 0.0)} | {cost.method: cost.hours for cost in costs}
    trial = cfg.replace(max_steps=max(1, settings.rows // cfg.batch_size))
    of_a_trial, of_a_run = (estimate.study_tokens(one, manifest)[0] for one in (trial, cfg))
    jobs, chosen = settings.jobs(study)
    left, words = [(0.0, 0.0)], lambda low, high: estimate.duration(low, high) if high else "none"
    if manifest is None:
        yield f"no data yet: assuming {estimate.study_tokens(cfg)[2].removesuffix(' (no data yet)')}"
    yield f"{'run':<18} {'training':<18}  now"
    for job in jobs:
        n_trials = TRIALS if settings.factors is None else len(settings.factors)  # at most
        times = 3600 * (n_trials * of_a_trial / of_a_run if job.is_sweep else 1)
        status, seconds = job.state()[0], [times * end for end in hours_of[job.method] or ()]
        left += [seconds] if seconds and job in chosen and status != DONE else []
        yield f"{job.name:<18} {words(*seconds) if seconds else 'does not fit':<18}  {status}"
    total = words(*map(sum, zip(*left, strict=True)))
    yield f"left: {total} of training on a {name}, one run at a time, plus the time to answer the test rows"
