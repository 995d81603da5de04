"""The tables of README and docs, each made from the files of results/ (or from the settings themselves)."""

import dataclasses
import json
import statistics
from pathlib import Path

from peftlib.core.config import PROFILES, Config, resolve
from peftlib.core.files import read_json
from peftlib.models.shapes import SHAPES, card_of_device, find_card, short_name
from peftlib.train import estimate

RESULTS = Path(__file__).resolve().parents[2] / "results"
METRICS = {"bleu4": "BLEU-4", "rougeL": "ROUGE-L"}
# (BLEU-4, ROUGE-L) that others published, by method: an early look at the 270M, and a public study of the 1B.
FIRST_LOOK = {"base": (0.046, 0.097), "qlora": (0.122, 0.400), "galore": (0.150, 0.439)}
PUBLIC_STUDY = {"base": (0.058, 0.163), "qlora": (0.111, 0.233), "galore": (0.106, 0.227)}
T4_GIB = 14.5  # of a T4's memory that training may take


class Results:
    """The parsed files of a results folder. FileNotFoundError: one of them is missing."""

    def __init__(self, folder=RESULTS):
        self.demo = read_json(folder / "demo" / "summary.json")
        self.reference = read_json(folder / "reference" / "summary.json")
        bench = {name: json.loads((folder / "bench" / f"{name}.json").read_text("utf-8")) for name in BENCH}
        self.methods, self.generate, self.resume, self.fp16 = (bench[name] for name in BENCH)

    @property
    def trained(self):
        """{method: its figures} of the reference study, without the untrained model."""
        return {method: known for method, known in self.reference["methods"].items() if method != "base"}


BENCH = ("methods", "generate", "resume", "fp16")


def make_all(results):
    """{marker: Markdown table} of everything that stands between markers in README and docs."""
    return {rows.__name__: _table(list(rows(results))) for rows in _TABLES}


def summary(results):
    """README's table: the reference study in one row a method."""
    yield "method", "peak GiB", "tokens/s", "test loss", "ROUGE-L", "BLEU-4", "loss on general text"
    for method, known in results.reference["methods"].items():
        scores = [f"{known['scores'][metric]['value']:.3f}" for metric in ("rougeL", "bleu4")]
        losses = [f"{statistics.fmean(known[name]):.3f}" for name in ("eval_loss", "general_loss")]
        cost = [_spread(known["peak_memory_gib"], "{:.2f}", False), _spread(_speeds(known), "{:,.0f}", False)]
        label, cost = ("untrained", ("", "")) if method == "base" else (f"`{method}`", cost)
        yield label, *cost, losses[0], *scores, losses[1]


def scores(results):
    yield (
        *("method", "seeds", "ROUGE-L", "gain over base", "BLEU-4", "gain over base"),
        *("test loss", "general text loss", "untrained, in its 4 bits"),
    )
    for method, known in results.reference["methods"].items():
        cells = []
        for metric in ("rougeL", "bleu4"):
            gain = known["over_base"] and ends(known["over_base"][metric])
            cells += [_spread(known["scores"][metric]["seeds"], "{:.3f}"), gain or ""]
        losses = [_spread(known[name], "{:.3f}") for name in ("eval_loss", "general_loss")]
        yield method, str(len(known["seeds"])), *cells, *losses, _number(known["general_loss_nf4"], "{:.3f}")


def sources(results):
    methods = list(results.reference["methods"])
    yield "ROUGE-L by source", *methods
    for source, part in results.reference["sources"].items():
        values = [f"{part['scores'][method]['rougeL']:.3f}" for method in methods]
        yield f"{source} ({part['rows']:,} rows)", *values


def pairs(results):
    yield "difference", "BLEU-4", "verdict", "ROUGE-L", "verdict"
    methods = list(results.trained)
    for at, method in enumerate(methods):
        for other in methods[:at]:
            cells = []
            for metric in METRICS:
                gap = pair_of(results, metric, method, other)
                cells += [
                    ends(gap),
                    "inside the noise" if gap["is_noise"] else "higher" if gap["value"] > 0 else "lower",
                ]
            yield f"{method} − {other}", *cells


def general(results):
    """How the loss on general text rose over the untrained model's, and how much of it rounding to 4 bits explains."""
    yield "method", "rise of the loss on general text", "of it by 4 bits alone, before training"
    base = results.reference["methods"]["base"]["general_loss"][0]
    for method, known in results.trained.items():
        rounded = known["general_loss_nf4"]
        yield (
            method,
            signed(loss_gap(results, "general_loss", method, "base")),
            _number(rounded and rounded - base, "{:+.3f}"),
        )


def cost(results):
    yield "method", "trains", "peak GiB", "tokens/s", "training min", "first step s", "learning rate", "swept"
    for method, known in results.trained.items():
        rates = " and ".join(f"{known[name]:g}" for name in ("learning_rate", "learning_rate_2") if known[name])
        yield (
            method,
            f"{known['trainable_params']:,}",
            _spread(known["peak_memory_gib"], "{:.2f}"),
            _spread(_speeds(known), "{:,.0f}"),
            _spread([seconds / 60 for seconds in known["train_seconds"]], "{:.1f}", False),
            _spread(known["first_step_seconds"], "{:.0f}", False),
            rates,
            _swept(known["sweep"]),
        )


def precision(results):
    """One seed of each method that also ran in fp16, beside its run in bf16."""
    forms = {"rougeL": "{:.3f}", "eval_loss": "{:.4f}", "valid_loss": "{:.4f}"}
    forms |= {"general_loss": "{:.4f}", "peak_memory_gib": "{:.2f}"}
    head = ("ROUGE-L", "difference", "test loss", "validation loss", "general text loss", "peak GiB", "skipped steps")
    yield "fp16 / bf16", *head
    for method, both in results.reference["precision"].items():
        cells = [
            " / ".join(_number(both[name][field], form) for name in ("fp16", "bf16")) for field, form in forms.items()
        ]
        gap = ends(both["difference"]["rougeL"]) if both["difference"] else ""
        yield method, cells[0], gap, *cells[1:], str(both["fp16"]["skipped_steps"])


def others(results):
    look = results.reference["first_look"]
    yield (
        "BLEU-4 / ROUGE-L",
        "here",
        f"cut at {look['max_new_tokens']} tokens",
        "first look",
        "a public study of the 1B",
    )
    for method, first in FIRST_LOOK.items():
        here = [results.reference["methods"][method]["scores"][metric]["value"] for metric in METRICS]
        cut = [look["scores"][method][metric] for metric in METRICS]
        rows = (here, cut, first, PUBLIC_STUDY[method])
        yield method, *(f"{bleu:.3f} / {rouge:.3f}" for bleu, rouge in rows)


def t4(results):
    """Memory measured under a T4's cap, and hours a T4 is expected to take for the reference study's tokens."""
    name, card = find_card("t4")
    cfg = resolve("t4", model="google/gemma-3-1b-it", memory_gib=T4_GIB)
    tokens = statistics.fmean(results.reference["train_tokens"])
    rows = one_cards_rows(results.methods)
    forecast = estimate.forecast(cfg, name, card, shape=SHAPES["gemma-3-1b"], rows=rows)
    yield "method", "micro-batch", "planned GiB", "measured GiB", "measured tokens/s", "on", "hours expected on a T4"
    for found in forecast.costs:
        row = max((row for row in rows if row["method"] == found.method), key=lambda row: row["tok_s"], default={})
        measured = _number(row.get("peak_gib"), "{:.2f}"), _number(row.get("tok_s"), "{:,.0f}")
        hours = [tokens / speed / 3600 for speed in (found.speed.high, found.speed.low)] if found.fits else None
        yield (
            f"`{found.method}`",
            f"{found.micro_batch}, recompute {found.checkpointing}" if found.fits else "",
            f"{found.memory_gib:.2f}",
            *measured,
            short_name(row["device"]) if row else "",
            f"{hours[0]:.2f} to {hours[1]:.2f}" if hours else "does not fit",
        )


def one_cards_rows(rows):
    """Our fp16 rows under a T4's cap, of the card that measured the most methods: speeds of two cards do not
    compare."""
    usable = [row for row in rows if _is_t4_like(row)]
    methods = {}
    for row in usable:
        methods.setdefault(row["device"], set()).add(row["method"])
    best = max(methods, key=lambda device: len(methods[device]), default=None)
    return [row for row in usable if row["device"] == best]


def _is_t4_like(row):
    is_capped = row.get("precision") == "fp16" and row.get("cap_gib") == T4_GIB and "peer" not in row
    return is_capped and bool(row.get("method") and row.get("tok_s")) and card_of_device(row["device"]) is not None


def methods(results):
    yield (
        *("card", "setting", "precision", "cap GiB", "micro-batch", "tokens/s", "peak GiB"),
        *("planned GiB", "first step s"),
    )
    for row in results.methods:
        if "error" not in row and "grid" not in row:
            yield (
                ", ".join([short_name(row["device"]), row["date"], *([row["run"]] if "run" in row else [])]),
                row["name"],
                row["precision"],
                f"{row['cap_gib']:g}" if row["cap_gib"] else "none",
                str(row["micro_batch"]),
                _number(row["tok_s"], "{:,.0f}"),
                f"{row['peak_gib']:.2f}",
                _number(row.get("predicted_gib"), "{:.2f}"),
                _number(row.get("first_step_cold_s", row["first_step_s"]), "{:.0f}"),
            )


def peers(results):
    """Each peer at the best of its grid, after ours of the same run and cap."""
    yield "", "micro-batch", "recomputes", "tokens/s", "peak GiB", "first step s", "ours / its speed"
    for ours, best in best_of_grids(results.methods):
        for row in (*ours, *best):
            yield (
                row.get("grid") or f"`{row['name']}` (ours)",
                str(row["micro_batch"]),
                "no" if row["checkpointing"] == "off" else "yes",
                f"{row['tok_s']:,.0f}",
                f"{row['peak_gib']:.2f}",
                f"{row['first_step_s']:.0f}",
                " and ".join(f"{mine['tok_s'] / row['tok_s']:.2f}" for mine in ours) if "grid" in row else "",
            )


def best_of_grids(rows):
    """[(our rows, the fastest row of each peer's grid), ...], one entry a card, run, cap and method."""
    grids = {}
    for row in rows:
        if "grid" in row and row.get("tok_s"):
            key = tuple(row[name] for name in ("device", "date", "run", "cap_gib", "method"))
            grids.setdefault(key, {}).setdefault(row["grid"], []).append(row)
    for key, tried in grids.items():
        of_run = dict(zip(("device", "date", "run", "cap_gib", "method"), key))
        ours = [row for row in rows if "peer" not in row and row.get("tok_s") and of_run.items() <= row.items()]
        yield ours, [max(found, key=lambda row: row["tok_s"]) for found in tried.values()]


def lengths(results):
    """Rows of real lengths, packed against padded, by how many rows a pass holds."""
    [row] = [row for row in results.methods if "mixed_found" in row]
    speed = {way: found["useful_tok_s"] for way, found in row["mixed_found"].items()}
    sizes = sorted(int(way.split("_")[1]) for way in speed if way.startswith("random_"))
    yield "rows of a pass", *map(str, sizes)
    for way, name in (("random", "random order, padded"), ("packed", "packed, as much room")):
        yield name, *(_number(speed.get(f"{way}_{n}"), "{:,.0f}") for n in sizes)
    yield "ratio", *(_number(speed.get(f"packed_{n}", 0) / speed[f"random_{n}"] or None, "{:.2f}") for n in sizes)


def saving(results):
    """What one checkpoint costs a training that goes on beside it."""
    yield "checkpoint of", "card", "GiB", "training waits s", "written after s", "step meanwhile s", "step else s"
    for row in results.methods:
        if "checkpoint_gib" in row:
            card = f"{short_name(row['device'])}, {row['date']}"
            seconds = row["save_stall_s"], row["save_written_s"], row["save_step_s"], 16 * row["seq"] / row["tok_s"]
            forms = ("{:.1f}", "{:.0f}", "{:.2f}", "{:.2f}")
            shown = (form.format(value) for form, value in zip(forms, seconds))
            yield row["name"], card, f"{row['checkpoint_gib']:.2f}", *shown


def fp16(results):
    yield "method", "seed", "bf16", "fp16", "difference", "skipped steps"
    runs = {(r["method"], r["seed"], r["precision"]): r for r in results.fp16["runs"] if "galore_on_refresh" not in r}
    for method, seed in dict.fromkeys(key[:2] for key in sorted(runs)):
        bf16, half = runs[method, seed, "bf16"], runs[method, seed, "fp16"]
        found = [bf16["last_losses"], half["last_losses"]]
        change = f"{found[1] / found[0] - 1:+.2%}"
        yield method, str(seed), *(f"{loss:.4f}" for loss in found), change, str(half["skipped_steps"])


def generate(results):
    yield "device", "engine", "rows at a time", "dtype", "rows", "tokens/s", "against", "ratio"
    for row in results.generate:
        yield (
            short_name(row["device"]) + (" (2 cores)" if "2 cores" in row["device"] else ""),
            row["engine"],
            str(row["batch"] or "its own"),
            row["dtype"],
            f"{row['rows']:,}",
            f"{row['tok_s']:,.1f}",
            row["baseline"],
            f"{row['ratio']:.2f}",
        )


def resume(results):
    yield "method", "device", "seconds to the next step", "saves", "share of the time held up", "checkpoint GiB"
    for row in results.resume:
        seconds, share = f"{row['resume_s']:.0f}", f"{100 * row['stall_share']:.1f} %"
        yield row["method"], row["device"], seconds, str(row["saves"]), share, f"{row['checkpoint_gib']:.2f}"


def demo(results):
    found = results.demo
    known = list(found["eval_loss"])
    yield "", *known
    yield "test loss, nats per token", *(f"{found['eval_loss'][m]:.3f}" for m in known)
    yield "ROUGE-L", *(f"{found['scores'][m]['rougeL']:.3f}" for m in known)
    gains = found["rougeL_over_base"]
    yield "its gain over base, 95 % interval", *(ends(gains[m]) if m in gains else "" for m in known)
    yield "BLEU-4", *(f"{found['scores'][m]['bleu4']:.3f}" for m in known)
    yield "loss on general text", *(_number(found["general_loss"][m], "{:.3f}") for m in known)
    yield "of it untrained, in the same 4 bits", *(_number(found["general_loss_nf4"][m], "{:.3f}") for m in known)


def settings(results):
    """Every field of the config with its default in each profile."""
    yield "setting", "default", "governs", "meaning"
    profiles = {name: resolve(name) for name in PROFILES}
    for field in dataclasses.fields(Config):
        values = {name: getattr(cfg, field.name) for name, cfg in profiles.items()}
        if field.name == "profile":
            continue
        shown = {name: f"`{value!r}`".replace("'", '"') for name, value in values.items() if field.name != "study"}
        default = next(iter(shown.values()), "the profile's name")
        if len(set(shown.values())) > 1:
            default = ", ".join(f"{name} {value}" for name, value in shown.items())
        meaning = field.metadata["unit"].replace("|", "\\|")
        choices = field.metadata["choices"]
        listed = f" ({', '.join(f'`{choice}`' for choice in choices if choice != '')})" if choices else ""
        yield f"`{field.name}`", default, _SCOPES[field.metadata["scope"]], meaning + listed


_SCOPES = {"data": "rows", "math": "what is learned", "run": "where and how fast"}
_TABLES = (summary, scores, sources, pairs, general, cost, precision, others, t4, methods, peers, lengths, saving, fp16)
_TABLES += (generate, resume, demo, settings)


def pair_of(results, metric, method, other):
    """{'value', 'low', 'high', 'is_noise'} of score(method) - score(other) in the reference study."""
    for pair in results.reference["pairs"]:
        if pair["metric"] == metric and {pair["method"], pair["other"]} == {method, other}:
            gap = {"value": pair["difference"], "low": pair["low"], "high": pair["high"]}
            gap = gap if pair["method"] == method else _turned(gap)
            return {**gap, "is_noise": gap["low"] <= 0.0 <= gap["high"]}
    raise KeyError(f"no {metric} of {method} against {other}")


def loss_gap(results, what, method, other):
    """The same of 'eval_loss' or 'general_loss', an interval over seeds."""
    for gap in results.reference["losses"]:
        if gap["what"] == what and {gap["method"], gap["other"]} == {method, other}:
            return gap if gap["method"] == method else {**gap, **_turned(gap)}
    raise KeyError(f"no {what} of {method} against {other}")


def _turned(gap):
    return {"value": -gap["value"], "low": -gap["high"], "high": -gap["low"]}


def signed(gap):
    """'value (low to high)' of a difference."""
    return f"{gap['value']:+z.{_digits(gap)}f} ({ends(gap)})"


def ends(gap):
    """'low to high' of a difference."""
    return f"{gap['low']:+z.{_digits(gap)}f} to {gap['high']:+z.{_digits(gap)}f}"


def _digits(gap):
    """Three, or as many as show on which side of 0 each end of the interval lies."""
    return next((n for n in (3, 4, 5) if all(round(gap[end], n) for end in ("low", "high"))), 3)


def _speeds(known):
    return known["median_tokens_per_second"]


def _spread(values, form, has_spread=True):
    """'mean ± standard deviation' over seeds; '' where no value is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {form.format(statistics.stdev(known))}" if has_spread and len(known) > 1 else ""
    return form.format(statistics.fmean(known)) + spread


def _swept(sweep):
    if not sweep:
        return "no"
    trials = sweep["from"]["tried"]
    best = min((t for t in trials if t["valid_loss"] is not None), key=lambda trial: trial["valid_loss"])
    edge = ", at the edge" if sweep["from"].get("is_at_edge") else ""
    tried = ", ".join(f"{trial['factor']:g}: {_number(trial['valid_loss'], '{:.3f}', 'inf')}" for trial in trials)
    return f"factor {best['factor']:g}{edge} ({tried})"


def _number(value, form, unknown=""):
    return unknown if value is None else form.format(value)


def _table(rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
