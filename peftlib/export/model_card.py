"""The model card of an export, made only from the run's record, the data's manifest and the scores."""

import json
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.files import gib, read_json, write_text
from peftlib.core.paths import TORCHAO_MIN
from peftlib.data.sources import HUB
from peftlib.evaluation import forgetting, results, stats
from peftlib.export.gguf import MODELFILE, TEMPLATES, gguf_name
from peftlib.export.redact import hub_base, public_model
from peftlib.methods import BASE, find
from peftlib.models.inspect import PROJECTIONS, in_layers
from peftlib.models.packaged import PROVENANCE
from peftlib.models.precision import DTYPES
from peftlib.models.saved import ATTENTION_FILE, FACTS
from peftlib.models.shapes import shape_of
from peftlib.report.render import UNKNOWN, interval_text, render, shown

_OWN_FILE = "the user's own file, licence unknown"
_SHARED: tuple[str, ...] = ("batch_size", "epochs", "max_steps", "max_length", "lr_scheduler", "warmup_ratio")
_SHARED += ("weight_decay", "max_grad_norm", "moment_bits", "seed", "split_seed")
_TORCH_NAMES = {name: str(dtype) for name, dtype in DTYPES.items()}
_METRIC_TYPES = {"bleu4": "bleu", "rougeL": "rouge"}  # the hub's names


@dataclass(frozen=True)
class Scores:
    """run, base: results.Run of this model and of the untrained one, or None. boot: of both; None without answers."""

    run: results.Run
    base: results.Run
    boot: stats.Bootstrap
    n_test: int
    sources: tuple
    cut_at_words: int

    def rows(self):
        """(what, base, this model, change) of each score and loss, as texts."""
        method, form = self.run.record["method"], ".3f"
        for metric, name in stats.METRICS.items():
            base = gain = UNKNOWN
            if self.base is not None:
                base = interval_text(self.boot.interval(BASE, metric), form)
                gain = interval_text(self.boot.difference(method, BASE, metric), "+z.3f")
            yield f"{name}, 0-1", base, interval_text(self.boot.interval(method, metric), form), gain
        before, after = (None if run is None else run.eval_loss for run in (self.base, self.run))
        change = UNKNOWN if None in (before, after) else f"{after - before:+z.3f}, no interval"
        yield "test loss, nats per token", shown(before, form), shown(after, form), change
        general = [None if run is None else run.general for run in (self.base, self.run)]
        moved = forgetting.change(*general)
        losses = (shown(found and found.loss, form) for found in general)
        change = UNKNOWN if moved is None else f"{moved:+.1%}, no interval"
        yield f"loss on general text ({forgetting.TEXT_NAME.split(',')[0]})", *losses, change


def scores_of(study, method, seed):
    """The Scores of one run. StudyError: its records and predictions do not belong together."""
    found = results.load(study)
    run = next(r for r in found.runs if (r.record["method"], r.record["seed"]) == (method, seed))
    base = next((r for r in found.runs if r.record["method"] == BASE and r.is_scored), None)
    runs = {r.record["method"]: [r.rows] for r in (base, run) if r is not None}
    boot = stats.bootstrap(runs) if run.is_scored else None
    return Scores(run, base, boot, len(found.test_rows), tuple(found.sources), found.cut_at_words)


def model_card(study, record, form, scores, *, quant=None, kept=None, to=None):
    """The huggingface_hub.ModelCard of a finished run.

    form: one of export.FORMS. scores: Scores. quant: of a GGUF file. kept: lora.Kept of that form. to: USER/REPO, None
    for a folder.
    """
    manifest, weights = study.manifest(), study.weights_dir(record["method"], record["seed"])
    facts, sources = read_json(weights / FACTS), _sources(manifest)
    by_layer = any("." in name for name in facts["four_bit"])
    known = in_layers(range(shape_of(study.cfg.model).layers)) if by_layer else PROJECTIONS
    skipped = [name for name in known if name not in facts["four_bit"]]
    content = {
        "data": _header(study.cfg.model, manifest, record, form, scores, sources),
        "record": {"total_params": None, "precision_reason": None, "forked_from": None, **record},
        "form": form,
        "method": find(record["method"]),
        "description": facts.get("description", find(record["method"]).description),
        "scores": scores,
        "sources": sources,
        "shared": _SHARED,
        "base_name": public_model(record["model"]),
        "is_packaged": study.cfg.model == PACKAGED_MODEL,
        "is_packaged_base": record["model_provenance"] == PROVENANCE,
        "peak_gib": gib(record["peak_memory_bytes"]),
        "few_rows_note": stats.few_rows_note(scores.n_test) if scores.n_test < stats.FEW_ROWS else "",
        # for the code that loads it
        "repository": to,
        "base": _base_name(study.cfg.model),
        "four_bit": facts["four_bit"],
        "skipped": [*skipped, "lm_head"] if skipped else [],
        "dtype": _TORCH_NAMES[facts["precision"]],
        "is_split": form == "adapter" and (weights / ATTENTION_FILE).exists(),
        "kept": kept,
        "torchao": TORCHAO_MIN,
        "file": quant and gguf_name(quant),
        "modelfile": MODELFILE,
        "literal": _literal,
    }
    return ModelCard(render("model_card.md.jinja", TEMPLATES, **content))


def name_base_model(path, model):
    """Set the base in an adapter_config.json to a name that others can find."""
    config = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps({**config, "base_model_name_or_path": _base_name(model)}, indent=2) + "\n")


def _base_name(model):
    return hub_base(model) or public_model(model)


def _literal(text):
    """A text as a one-line Python literal, without characters that would end the code block."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")


def _sources(manifest):
    """[{name, where, licence, is_own, is_non_commercial, n_train, n_test}, ...] of the data."""
    counts = manifest["counts"]
    return [
        {
            "name": name,
            "where": "; ".join(facts["where"].values()),
            "licence": _OWN_FILE if "not known" in facts["license"] else facts["license"],
            "is_own": "not known" in facts["license"],
            "is_non_commercial": "BY-NC" in facts["license"],
            "n_train": counts["train"][name],
            "n_test": counts["test"][name],
        }
        for name, facts in manifest["sources"].items()
    ]


def _header(model, manifest, record, form, scores, sources):
    tags = ["gemma3", record["method"], "peftlib"]
    tags += ["gguf", "llama.cpp", "ollama"] if form == "gguf" else []
    tags += ["non-commercial"] if any(source["is_non_commercial"] for source in sources) else []
    is_english = all(source["name"] in HUB and not source["is_own"] for source in sources)
    base = hub_base(model)
    return ModelCardData(
        license="gemma",
        license_link="https://ai.google.dev/gemma/terms",
        base_model=base,
        base_model_relation=("adapter" if form in ("adapter", "lora") else "finetune") if base else None,
        datasets=[found["hub"] for found in manifest["inputs"]["sources"].values() if "hub" in found] or None,
        language="en" if is_english else None,
        library_name="peft" if form in ("adapter", "lora") else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=f"{_base_name(model).split('/')[-1]} fine-tuned with {record['method']}",
        eval_results=_eval_results(scores, record) or None,
    )


def _eval_results(scores, record):
    """[huggingface_hub.EvalResult, ...]; none without answers."""
    if scores.boot is None:
        return []
    found = []
    for metric, name in stats.METRICS.items():
        score = scores.boot.interval(record["method"], metric)
        words = f"{name} (0-1), 95 % interval {score.low:.3f} to {score.high:.3f}"
        found.append((_METRIC_TYPES[metric], words, score.value))
    if scores.run.eval_loss is not None:
        found.append(("loss", "test loss, nats per token, no interval", scores.run.eval_loss))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="peftlib-study",
            dataset_name=f"test rows of the study ({', '.join(scores.sources)})",
            dataset_split="test",
            dataset_args={"n_test": scores.n_test, "split_hash": record["split_hash"]},
            metric_type=kind,
            metric_name=f"{words}, {scores.n_test} rows",
            metric_value=round(value, 4),
        )
        for kind, words, value in found
    ]
