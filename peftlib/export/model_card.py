"""The model card of an export: what the run's record, the data's manifest and the scores say, and nothing else."""

import json

from peftlib.core.config import PACKAGED_MODEL
from peftlib.core.files import read_json, write_text
from peftlib.data.hub import HUB
from peftlib.export.model_card_loading import loading_lines
from peftlib.export.model_card_scores import eval_results, score_lines
from peftlib.export.redact import hub_base, public_model
from peftlib.methods import find
from peftlib.models.packaged import PROVENANCE
from peftlib.models.saved import ATTENTION_FILE, FACTS
from peftlib.report.document import markdown_text
from peftlib.report.notes import UNKNOWN
from peftlib.report.results import gib

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
_LIBRARY = {"adapter": "peft", "merged": "transformers", "gguf": "transformers"}
_RELATION = {"adapter": "adapter", "merged": "finetune", "gguf": "finetune"}
_WHAT = {
    "adapter": "The adapter; the base model is not in it.",
    "merged": "One standalone model in bf16: 4-bit matrices dequantized, adapters merged in float32, then rounded.",
    "gguf": "One GGUF file for llama.cpp and Ollama, converted by llama.cpp's script from the merged model in bf16.",
}
_OWN_FILE = "the user's own file, licence unknown"
_MATCHED = ("batch_size", "epochs", "max_steps", "max_length", "lr_scheduler", "warmup_ratio", "weight_decay")
_MATCHED += ("max_grad_norm", "moment_bits", "seed", "split_seed")


def model_card(study, record, form, scores, *, quant=None, to=None):
    """The huggingface_hub.ModelCard of a finished run. quant: of a GGUF file. to: USER/REPO, None for a folder."""
    from huggingface_hub import ModelCard

    data = _header(study, record, form, scores)
    sections = {
        "What it is": _what_lines(record, form),
        "Data": _data_lines(study.manifest()),
        "Training": _training_lines(record),
        "Scores": [*score_lines(scores), "", *_scored_form(form), *_scored_on(study, form)],
        "How to load it": _loading(study, record, form, quant, to),
        "Limits": _limit_lines(record),
        "Licence": _licence_lines(study.manifest()),
    }
    lines = [f"# {markdown_text(data.model_name)}", "", *_notice(study.manifest())]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def name_base_model(path, model):
    """Name the base in an adapter_config.json as others can find it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps({**config, "base_model_name_or_path": _base_name(model)}, indent=2) + "\n")


def _base_name(model):
    return hub_base(model) or public_model(model)


def _header(study, record, form, scores):
    from huggingface_hub import ModelCardData

    model, sources = study.cfg.model, study.manifest()["sources"]
    hub_ids = [inputs["hub"] for inputs in study.manifest()["inputs"]["sources"].values() if "hub" in inputs]
    tags = ["gemma3", record["method"], "peftlib", *(["gguf", "llama.cpp", "ollama"] if form == "gguf" else [])]
    base = hub_base(model)
    return ModelCardData(
        license="gemma",
        license_link=GEMMA_TERMS,
        base_model=base,
        base_model_relation=_RELATION[form] if base else None,
        datasets=hub_ids or None,
        language="en" if set(sources) <= set(HUB) and not _own_files(sources) else None,
        library_name=_LIBRARY[form],
        pipeline_tag="text-generation",
        tags=[*tags, "non-commercial"] if _non_commercial(sources) else tags,
        model_name=f"{_base_name(model).split('/')[-1]} fine-tuned with {record['method']}",
        eval_results=eval_results(scores, record) or None,
    )


def _own_files(sources):
    return [name for name, facts in sources.items() if "not known" in facts["license"]]


def _non_commercial(sources):
    return [name for name, facts in sources.items() if "BY-NC" in facts["license"]]


def _notice(manifest):
    for name in _non_commercial(manifest["sources"]):
        licence = manifest["sources"][name]["license"]
        yield f"> **Not for commercial use:** it learnt from {name}, whose licence is {licence}."
        yield ">"
    yield (
        "> Gemma is provided under and subject to the Gemma Terms of Use found at "
        "[ai.google.dev/gemma/terms](https://ai.google.dev/gemma/terms). This is a changed version of a Gemma model."
    )


def _what_lines(record, form):
    yield f"{_WHAT[form]} Method: {find(record['method']).description}."
    yield ""
    yield f"Base model: {markdown_text(public_model(record['model']))} ({record['model_provenance']})."
    if record["model_provenance"] == PROVENANCE:
        yield ""
        yield (
            "So it was neither trained nor scored on the original release: what is said here holds for weights that 4 "
            "bits had rounded before, as `peftlib.models.packaged.packaged_model()` makes them."
        )
    if record.get("forked_from"):
        yield ""
        study = markdown_text(str(record["forked_from"]))
        yield f"Training started from the weights that another study had reached ({study})."


def _data_lines(manifest):
    yield "| source | rows come from | licence | training rows | test rows |"
    yield "|---|---|---|---|---|"
    counts = manifest["counts"]
    for name, facts in manifest["sources"].items():
        where = markdown_text("; ".join(facts["where"].values()))
        licence = _OWN_FILE if name in _own_files(manifest["sources"]) else facts["license"]
        yield f"| {markdown_text(name)} | {where} | {licence} | {counts['train'][name]:,} | {counts['test'][name]:,} |"
    yield ""
    yield (
        f"Split `{manifest['split_hash']}`. No test prompt is a training prompt, and no two rows are near-duplicates; "
        "every assistant turn of a training row was scored, but for those given a weight of 0."
    )


def _training_lines(record):
    config, peak = record["config"], gib(record["peak_memory_bytes"])
    rates, second = find(record["method"]).rates, record["learning_rate_2"]
    norms = f", other weights {second:g}" if second and len(rates) == 1 else ""
    facts = {
        "steps": f"{record['steps']:,} of {record['planned_steps']:,}",
        "tokens read": _count(record["train_tokens"]),
        "weights that trained": f"{_count(record['trainable_params'])} of {_count(record.get('total_params'))}",
        "learning rates (peak)": ", ".join(f"{name.removesuffix('_learning_rate')} {config[name]:g}" for name in rates)
        + norms,
        "last training loss": _shown(record["train_loss"], ".3f", "nats per token"),
        "precision": f"{record['precision']} ({record.get('precision_reason') or 'reason not recorded'})",
        "hardware": record["device"],
        "seconds": _shown(record["train_seconds"], ",.0f", "of training, evaluation excluded"),
        "peak memory": _shown(peak, ".2f", "GiB"),
    }
    yield "| | |"
    yield "|---|---|"
    for name, value in facts.items():
        yield f"| {name} | {value or UNKNOWN} |"
    yield ""
    matched = ", ".join(f"{name} {config[name]}" for name in _MATCHED if name in config)
    yield f"Settings that every method of the study shares: {matched}."
    own = ", ".join(f"{name} {value}" for name, value in config.items() if name in find(record["method"]).settings)
    if own:
        yield f"The method's own: {own}."
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    yield f"Versions: {versions}. All settings: `study/config.json`; the whole run: `study/record.json`."


def _count(value):
    return UNKNOWN if value is None else f"{value:,}"


def _shown(value, form, unit):
    return UNKNOWN if value is None else f"{value:{form}} {unit}"


def _scored_on(study, form):
    """Which base the scores are of, where the code below cannot name it."""
    if form != "adapter" or study.cfg.model != PACKAGED_MODEL:
        return []
    return [
        "The base was `peftlib.models.packaged.packaged_model()`; on the original release, which the code names, scores differ."
    ]


def _scored_form(form):
    if form == "merged":
        return ["Scores were measured before the merged weights were rounded to bf16."]
    if form == "gguf":
        return ["Scores were measured on the merged model, before it was converted to GGUF."]
    return ["Scores were measured with the adapter merged into the dequantized base, as the code below loads it."]


def _loading(study, record, form, quant, to):
    weights = study.weights_dir(record["method"], record["seed"])
    facts = read_json(weights / FACTS)
    return loading_lines(
        form,
        quant=quant,
        base=_base_name(study.cfg.model),
        four_bit=facts["four_bit"],
        precision=facts["precision"],
        is_split=(weights / ATTENTION_FILE).exists(),
        repository=to,
    )


def _limit_lines(record):
    yield (
        "- One training run, one seed: what chance does to training is not in the intervals.\n"
        "- It can be wrong, biased or harmful as its base model and its data are; nothing was done about safety.\n"
        f"- It learnt conversations of up to {record['config']['max_length']:,} tokens in Gemma's chat format and answers "
        "other formats worse.\n"
        "- Memory and time are those of the hardware above."
    )


def _licence_lines(manifest):
    yield (
        "Gemma is provided under and subject to the [Gemma Terms of Use](https://ai.google.dev/gemma/terms), and its "
        "[prohibited uses](https://ai.google.dev/gemma/prohibited_use_policy) hold for this model too; who passes it on "
        "passes the terms on. The data keep their own licences:"
    )
    yield ""
    for name, facts in manifest["sources"].items():
        words = _OWN_FILE if name in _own_files(manifest["sources"]) else facts["license"]
        limit = ": no commercial use" if name in _non_commercial(manifest["sources"]) else ""
        yield f"- {markdown_text(name)}: {words}{limit}"
