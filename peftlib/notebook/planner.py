"""The study form: what settings cost on a GPU, before anything is trained.

It changes nothing; it shows the lines for the parameters cell, or the command, that apply a choice.
"""

import html
import math
import shlex
from dataclasses import dataclass, field

from peftlib.core.config import PACKAGED_MODEL, PROFILES, Config, describe, resolve
from peftlib.core.errors import ModelError, PeftlibError, StudyError
from peftlib.core.study import Study
from peftlib.models.inspect import PROJECTIONS
from peftlib.models.shapes import CARDS, SHAPES, card_at_hand, find_card, shape_of
from peftlib.notebook.answers import StaticRows
from peftlib.notebook.widgets import bar, can_click, look
from peftlib.report.render import folded, plain
from peftlib.train import estimate

CHOICES: tuple[str, ...] = ("model", "train_rows", "max_length", "epochs", "batch_size")
CHOICES += ("lora_rank", "galore_rank", "moment_bits", "galore_weights")
_WITHOUT_GPU = "t4"  # planned for if this machine has no GPU: the free one of Colab and Kaggle
TRAINED = ("qlora", "galore", "hybrid")  # by 02, 03 and 05; 04 and 05 generate answers with them and with base
# Tokens/s of the engine on an H100 by number of rows: Gemma 3 270M in 16 bits (results/bench/generate.json).
ANSWERED = {192: 9456, 1800: 26418}
OPENING_S = 45.0  # per notebook: loading models, its demonstrations, the first step. An allowance, not measured
_MODELS = (PACKAGED_MODEL, *(f"google/{name}-{kind}" for name in SHAPES for kind in ("it", "pt")))


@dataclass(frozen=True)
class Answer:
    """The form's result for some choices.

    refused: why they are impossible, or ''. cfg: the Config, or None. forecast: estimate.Forecast, or None if the
    model's shape is unknown. remarks: more lines, without the forecast's own notes.
    """

    refused: str = ""
    cfg: Config | None = None
    forecast: estimate.Forecast | None = None
    remarks: list = field(default_factory=list)


def study_form(study, *, is_interactive=None):
    """Show widgets to try settings, or the plan of the study's config in a headless run."""
    if can_click(is_interactive):
        return _widgets(study)
    found = answer(study, {})
    lines = [found.refused, *found.remarks, *(found.forecast.lines() if found.forecast else []), command(found.cfg)]
    return StaticRows([as_html(found)], "\n".join(filter(None, lines)))


def answer(study, choices, card_name=None):
    """The Answer for {field: value} on a card of models.shapes, None for this machine's. ConfigError: no such card."""
    try:
        cfg = study.cfg.replace(**choices)
    except PeftlibError as error:
        return Answer(refused=str(error))
    remarks = []
    cfg = _of_a_free_study(study, cfg, remarks)
    name, card = _card(card_name, remarks)
    try:
        shape = shape_of(cfg.model)
    except ModelError as error:
        return Answer(cfg=cfg, remarks=[*remarks, f"costs unknown: {error}"])
    found = estimate.forecast(cfg, name, card, shape=shape, manifest=_manifest(study, cfg))
    return Answer(refused=found.refusal, cfg=cfg, forecast=found, remarks=remarks)


def notebooks_cost(found):
    """(min seconds, max seconds of 01 to 05, GiB of the largest training) of a Forecast; None: one does not fit."""
    costs = [cost for cost in found.costs if cost.method in TRAINED]
    if not all(cost.fits for cost in costs):
        return None
    low, high = map(sum, zip(*notebooks_parts(found).values(), strict=True))
    return low, high, max(cost.memory_gib for cost in costs)


def notebooks_parts(found):
    """{part of 01 to 05: (shortest, longest) seconds} of a Forecast in which TRAINED fit, without downloads.

    Speeds of other cards are scaled as estimate.scaling_note says.
    """
    cfg, card, source = found.cfg, found.card, CARDS["h100"]
    costs = [cost for cost in found.costs if cost.method in TRAINED]
    n_rows, n_models = cfg.test_rows * len([part for part in cfg.sources.split(";") if part.strip()]), len(TRAINED) + 1
    measured = ANSWERED[max((n for n in ANSWERED if n <= n_rows), default=min(ANSWERED))]
    speeds = answering_speeds(measured, source, card, shape_of(cfg.model))
    # A forward pass is at least as fast as training.
    reads = max(cost.speed.high for cost in costs), min(cost.speed.low for cost in costs)
    shares = 1 / 5, 1.0  # of the longest row and answer, as study_tokens has it
    lengths = [n_rows * cfg.max_length * share + cfg.general_tokens for share in shares]
    return {
        "training": tuple(sum(3600 * cost.hours[end] for cost in costs) for end in (0, 1)),
        "answering": tuple(n_models * n_rows * cfg.max_new_tokens * n / v for n, v in zip(shares, speeds)),
        "reading": tuple(n_models * n / v for n, v in zip(lengths, reads)),
        "opening": ((n_models + 1) * OPENING_S,) * 2,
    }


def answering_speeds(measured, source, card, shape):
    """(fastest, slowest) tokens/s that a model of a Shape answers with on a Card.

    measured: of Gemma 3 270M on the Card `source`.
    """
    speed = measured * _numbers(SHAPES["gemma-3-270m"]) / _numbers(shape)
    ratios = card.tflops / source.tflops, card.gb_per_s / source.gb_per_s
    return speed * max(ratios), speed * min(ratios) / estimate.SLOWER


def _numbers(shape):
    """Number of weights that each token is multiplied with."""
    return sum(map(math.prod, shape.all_matrices(PROJECTIONS))) + shape.vocabulary * shape.hidden


def parameter_lines(cfg):
    """['NAME = VALUE', ...] for the parameters cell: profile, study, and differences from the profile."""
    return [f"{name} = {value!r}" for name, value in {"profile": cfg.profile, "study": cfg.study, **_set(cfg)}.items()]


def command(cfg):
    """The command that runs all notebooks with this config."""
    fields = [word for name, value in _set(cfg).items() for word in ("-p", f"{name}={value}")]
    return shlex.join(["python", "-m", "peftlib", "run", "--profile", cfg.profile, "--study", cfg.study, *fields])


def as_html(found):
    """An Answer as HTML: its text, the table with memory bars, the resolved config, the lines and the command."""
    parts = []
    if found.refused:
        parts.append(f"<p><b>Not possible:</b> {html.escape(found.refused)}</p>")
    if found.forecast is not None:
        parts += [f"<p>{html.escape(found.forecast.headline)}</p>", _html_table(found.forecast)]
        cost = notebooks_cost(found.forecast)
        parts += [f"<p>All five notebooks: {estimate.duration(*cost[:2])}, without downloads.</p>"] if cost else []
    parts += [f"<p>{html.escape(line)}</p>" for line in found.remarks]
    if found.forecast is not None:
        parts.append(folded("basis of these estimates", "\n".join(found.forecast.notes())))
    if found.cfg is not None:
        lines = "\n".join(parameter_lines(found.cfg))
        parts.append(f"<p>To apply this, copy these lines into the settings cell and run it again:</p>{plain(lines)}")
        parts.append(f"<p>or run this command:</p>{plain(command(found.cfg))}")
        parts.append(folded("resolved config", describe(found.cfg)))
    return "".join(parts)


def _of_a_free_study(study, cfg, remarks):
    """cfg, renamed to a new study (with a remark) if data or runs of this one fix other values."""
    try:
        return Study.open(cfg).cfg
    except StudyError as error:
        remarks.append(str(error))
    number = 2
    while (study.folder.parent / f"{study.cfg.study}-{number}" / "config.json").exists():
        number += 1
    remarks.append(f"so the lines below make a new study, {study.cfg.study}-{number}")
    return cfg.replace(study=f"{study.cfg.study}-{number}")


def _card(name, remarks):
    here = card_at_hand()
    if here is not None and name in (None, here[0]):
        return here
    if here is None and name is None:
        remarks.append(f"this machine has no known GPU, so the plan is for a {_WITHOUT_GPU}")
    return find_card(name or _WITHOUT_GPU)


def _manifest(study, cfg):
    """The manifest of the study's data if cfg would train on them, else None."""
    same = cfg.fields_of("data") == study.cfg.fields_of("data") and cfg.model == study.cfg.model
    return study.manifest() if same and study.manifest_path.exists() and study.config_path.exists() else None


def _set(cfg):
    """{field: value} of the differences from the profile."""
    plain = vars(resolve(cfg.profile, study=cfg.study))
    return {name: value for name, value in vars(cfg).items() if value != plain[name]}


def _html_table(forecast):
    rows = ["".join(f"<th>{name}</th>" for name in estimate.HEADER)]
    for cost in forecast.costs:
        method, fits, memory, *others = map(html.escape, estimate.cells(cost))
        memory += f" of {forecast.gib:.1f}{bar(cost.memory_gib / forecast.gib, height_px=4)}"
        rows.append("".join(f"<td>{cell}</td>" for cell in (method, fits, memory, *others)))
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table style="text-align:left;white-space:nowrap;border-spacing:1em .3em">{lines}</table>'


def _widgets(study):
    import ipywidgets as w

    inputs = {name: _input(w, name, getattr(study.cfg, name)) for name in CHOICES}
    here = card_at_hand()
    names = [(f"{name} (here)" if here and name == here[0] else name, name) for name in CARDS]
    gpu = w.Dropdown(description="GPU", options=names, value=here[0] if here else _WITHOUT_GPU, **look("25em", "12em"))
    shown = w.HTML()

    profiles = [("as set", ""), *((name, name) for name in PROFILES)]
    profile = w.Dropdown(description="profile", options=profiles, value="", **look("25em", "12em"))
    base, is_changing = study, False

    def show(change=None):
        if not is_changing:
            choices = {name: widget.value for name, widget in inputs.items()}
            shown.value = as_html(answer(base, choices, gpu.value))

    def take_profile(change):
        nonlocal base, is_changing
        base, is_changing = study, True  # one answer, not one per widget
        if profile.value:
            base = Study(study.folder.parent / profile.value, resolve(profile.value))
        for name, widget in inputs.items():
            widget.value = getattr(base.cfg, name)
        is_changing = False
        show()

    for widget in (*inputs.values(), gpu):
        widget.observe(show, "value")
    profile.observe(take_profile, "value")
    show()
    return w.VBox([w.HBox([gpu, profile, *inputs.values()], layout={"flex_flow": "row wrap"}), shown])


def _input(w, name, value):
    given = {"description": name, "value": value, **look("25em", "12em")}
    choices = Config.__dataclass_fields__[name].metadata["choices"]
    if choices:
        return w.Dropdown(options=choices, **given)
    if name == "model":
        return w.Combobox(options=tuple(dict.fromkeys((value, *_MODELS))), continuous_update=False, **given)
    return w.IntText(**given)  # unbounded: the config rejects impossible values with its own message
