"""Export a trained model: adapter, LoRA, merged model or GGUF file with its model card, to a folder or the hub."""

import html
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftlib import methods
from peftlib.core import record as records
from peftlib.core.errors import ConfigError, ModelError, StudyError, writing
from peftlib.core.files import copy_tree, read_json, sha256, size_text, write_json, write_text
from peftlib.core.study import Study
from peftlib.export import gguf, lora, model_card
from peftlib.export.redact import public_config, public_model
from peftlib.export.targets import MARKER, target_of
from peftlib.models import identity
from peftlib.models.saved import ADAPTER, FACTS, export_merged
from peftlib.report.render import folded

FORMS = ("adapter", "lora", "merged", "gguf")
_CONFIG, _RECORD, _README = "study/config.json", "study/record.json", "README.md"
_LORA = "study/lora.json"


@dataclass(frozen=True)
class Exported:
    """address: the folder or the hub's URL, also of a dry run. files: {name: bytes}. card: its text. notes: lines on
    what the form lost."""

    address: str
    files: dict
    card: str
    notes: tuple = ()


def export_model(
    study: Study,
    method: str,
    *,
    to: str | Path,
    seed: int = 0,
    form: str = "adapter",
    quant: str = "q8_0",
    rank: int = 16,
    private: bool = True,
    dry_run: bool = False,
    api: Any = None,
    log: Callable[[str], object] = print,
) -> Exported:
    """Export one finished run with its model card, the study's config and the run's record; returns the Exported.

    to: a folder, or hf://USER/REPO, which gets one commit and is private unless private=False. A folder or repository
    that is not empty is refused, unless it is an earlier export of the same run in the same form, which is replaced.
    form: 'adapter' as stock PEFT loads it (methods with adapters), 'lora' (full weights as an adapter of `rank`,
    see lora.write_lora), 'merged' (one model in bf16), 'gguf' (for llama.cpp and Ollama). quant: of the GGUF file, see
    gguf.QUANTS. dry_run: make everything, but keep and upload nothing.
    api: a huggingface_hub.HfApi. log: receives messages about leftovers of a killed export.
    ConfigError: unknown method, form or quant, no adapter, a rank above a matrix, no repository name. StudyError: the
    run is not finished.
    LockedError: another process is exporting to the same folder.
    ModelError: no weights, or not the record's; the target is not free; no token; the hub or the converter fails.
    """
    record, weights = _finished_run(study, method, seed)
    _check_form(weights, method, form, quant)
    target = target_of(to, private=private, api=api)
    identity = {"run_hash": record["run_hash"], "method": method, "seed": seed, "form": form}
    what = f"{method} (seed {seed}) of study {study.cfg.study}"
    with target.workspace(f"exporting {what}", is_dry=dry_run, log=log) as folder, writing(target):
        if not dry_run:
            target.require_free(identity)
        kept = _fill(study, record, weights, folder, form, quant, rank)
        scores = model_card.scores_of(study, method, seed)
        card = str(model_card.model_card(study, record, form, scores, quant=quant, kept=kept, to=target.repository))
        write_text(folder / _README, card)
        frozen = read_json(study.config_path)
        write_json(folder / _CONFIG, {**frozen, "config": public_config(frozen["config"])})
        public = {"config": public_config(record["config"]), "model": public_model(record["model"])}
        own = {"weights_sha256": {ADAPTER: sha256(folder / ADAPTER)}} if kept else {}
        write_json(folder / _RECORD, {**record, **public, **own})
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_json(folder / MARKER, {**identity, "files": [*files, MARKER]})
        files[MARKER] = (folder / MARKER).stat().st_size
        address = str(target) if dry_run else target.put(folder, what)
    return Exported(address, files, card, tuple(kept.lines()) if kept else ())


def _finished_run(study, method, seed):
    """(record, folder of its weights), checked to match."""
    methods.find(method)
    record, weights = records.load(study, method, seed), study.weights_dir(method, seed)
    if record is None:
        raise StudyError(f"no record of {method} (seed {seed}) in {study.folder}: train it first")
    records.require_fields(record, study.record_path(method, seed))
    records.require_ok(record)
    if not (weights / FACTS).exists():
        raise ModelError(f"no trained model in {weights}: run the method's notebook again")
    identity.require_weights(weights, record)
    what = f"{method} (seed {seed}) in study {study.folder.name}"
    identity.require_base(record, record["model"], what=what, is_local=True)
    return record, weights


def _check_form(weights, method, form, quant):
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is unknown: use {', '.join(FORMS)}")
    if form == "adapter" and not read_json(weights / FACTS)["is_adapter"]:
        raise ConfigError(f"form='adapter': {method} trains full weights and has no adapter: use lora, merged or gguf")
    if form == "lora":
        lora.require_whole_weights(weights, method)
    if form == "gguf":
        gguf.require_converter(quant)


def _fill(study, record, weights, folder, form, quant, rank):
    """Write the model; an adapter names its base so that others can find it, not by a local path.

    Returns the lora.Kept if form is 'lora', else None.
    """
    cfg, kept = study.cfg, None
    if form in ("adapter", "lora"):
        facts = {**read_json(weights / FACTS), "is_adapter": True}
        left_out = [_README, FACTS] if form == "adapter" else [_README, "*.safetensors*", "config.json", "adapter_*"]
        copy_tree(weights, folder, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
        if form == "lora":
            layers = lora.write_lora(weights, folder, rank)
            write_json(folder / FACTS, facts)
            kept = lora.Kept(rank, *layers, lora.losses_of(study, weights, folder))
            write_json(folder / _LORA, asdict(kept))
        write_json(folder / FACTS, {**facts, "model": public_model(facts["model"])})
        model_card.name_base_model(folder / "adapter_config.json", cfg.model)
        return kept
    merged = export_merged(weights, folder / "merged")
    if form == "gguf":
        gguf.write_gguf(merged, folder, quant=quant, name=f"{cfg.study} {record['method']}")
    else:
        copy_tree(merged, folder, copy_function=os.replace, dirs_exist_ok=True)
    shutil.rmtree(merged)
    return None


def lines_of(exported, *, dry_run=False):
    """Lines to print about an export."""
    yield from _sizes(exported)
    yield from exported.notes
    if dry_run:
        yield f"dry run: nothing was written to {exported.address}; the model card:"
        yield exported.card
    else:
        yield exported.address if "://" in exported.address else str(Path(exported.address))


def _sizes(exported):
    return [f"  {name}  {size_text(n_bytes)}" for name, n_bytes in exported.files.items()]


class Preview:
    """Shows in a notebook the files and the card that export_model would write. Nothing is kept.

    An unfinished run gives a note instead of an error; other errors as in export_model.
    """

    def __init__(self, study, method, *, seed=0, **how):
        record = records.load(study, method, seed)
        self.is_finished = record is not None and record.get("status") == "ok"
        self._exported = export_model(study, method, seed=seed, dry_run=True, **how) if self.is_finished else None
        self._name = f"{method} (seed {seed})"

    def __repr__(self):
        if self._exported is None:
            return f"{self._name} can be exported once its training has finished"
        n_lines = len(self._exported.card.splitlines())
        shown = [f"would be written to {self._exported.address}; README.md is a model card of {n_lines} lines:"]
        return "\n".join([*shown, *_sizes(self._exported)])

    def _repr_html_(self):
        if self._exported is None:
            return f"<p>{html.escape(repr(self))}</p>"
        cells = (
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{size_text(n_bytes)}</td></tr>"
            for name, n_bytes in self._exported.files.items()
        )
        address = html.escape(self._exported.address)
        card = folded("the model card", self._exported.card)
        return f"<p>Would be written to {address}:</p><table>{''.join(cells)}</table>{card}"
