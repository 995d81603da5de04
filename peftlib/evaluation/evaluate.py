"""Evaluation of saved weights on the test rows: losses, greedy answers and their scores, the same way for every method.

The loss on general text is also measured: its rise shows forgetting.
"""

import contextlib
import gc
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftlib import data
from peftlib import methods as registry
from peftlib.core import record as records
from peftlib.core.env import resolve_device
from peftlib.core.errors import PeftlibError, StudyError, writing
from peftlib.core.files import sha256
from peftlib.core.session import Deadline
from peftlib.core.study import Study
from peftlib.evaluation import external, forgetting
from peftlib.evaluation.generate import answer_rows
from peftlib.evaluation.inference.engines import require_vllm, resolve_engine
from peftlib.evaluation.predictions import Predictions, read_predictions, require_unchanged
from peftlib.methods import BASE
from peftlib.models import identity
from peftlib.models.saved import load_plain, load_rounded, load_trained
from peftlib.models.shapes import shape_of
from peftlib.storage.lock import held
from peftlib.train.batching import Rows, mean_loss


def evaluate(study: Study, method: str, *, log: Callable[[str], object] = print) -> dict[str, Any]:
    """Evaluate a finished run, or the untrained model ('base'): losses, answers and scores; returns its record.

    The saved weights are loaded as one plain merged model, in the precision of `evaluation_dtype`.
    Existing results are reused: losses, answered rows, a finished evaluation.
    StudyError: the run is not finished, its record lacks a field, 01_data has not run, or another session is using the
    study. ModelError: engine='vllm' without vLLM. Stopped: this session ends soon; the answers so far are kept.
    """
    with opened(study, method, "answering the test rows", log=log) as (record, load):
        return _evaluate(study, record, load, log=log)


def evaluate_path(
    study: Study, folder: str | Path, *, name: str = "", log: Callable[[str], object] = print
) -> dict[str, Any]:
    """Evaluate a model that was trained elsewhere like a run of the study, with its own row in the report.

    folder: a PEFT adapter of the study's model, as save_pretrained writes it, or a whole transformers model with the
    same tokenizer. name: of the row; default: the folder's. Returns the record, which says that the model was trained
    elsewhere, and on which base an adapter was scored; its training figures are None. Existing results are reused, as
    in `evaluate`.
    ConfigError: no such folder, or the name is a method's or not a valid file name. StudyError: as in `evaluate`, or
    the name is used for other weights. ModelError: an adapter of another base model, one that cannot be merged,
    another tokenizer, pickled or damaged files.
    """
    doing = "answering the test rows"
    with opened(study, name, doing, path=Path(folder).expanduser(), log=log) as (record, load):
        return _evaluate(study, record, load, log=log)


@contextlib.contextmanager
def opened(study, method, doing, *, path=None, log):
    """(record, load) of a finished run, of the untrained model, or of a folder by name; the study is locked meanwhile.

    load(device=, dtype=): the plain merged model. doing: describes the work to other sessions. path: of a model that
    was trained elsewhere; `method` is then its name or ''.
    """
    model = path and external.open_folder(path, study.cfg.model, name=method, log=log)
    method = model.name if model else method
    seed = 0 if model or method == BASE else study.cfg.seed
    with held(study.folder, f"{doing} with {method}", run=f"{method}-s{seed}", log=log):
        study.freeze()
        if model and model.scored_on:
            log(f"{method}: scored on {model.scored_on}")
        load = model.load if model else partial(load_model, study, method, seed, log=log)
        yield _record_of(study, method, seed, model), load


def _evaluate(study, record, load, *, log):
    """The stages of an evaluation. load(device=, dtype=): the plain merged model."""
    name, cfg = record["method"], study.cfg
    path = study.predictions_path(name, record["seed"])
    done = record["evaluation"]
    if done and path.exists():
        require_unchanged(path, record)
        if not _add_rounding(study, record, log=log):
            log(f"{name}: already evaluated, nothing to do")
        return record
    if cfg.engine == "vllm":
        require_vllm()
    if done:  # its answers are missing, so it must not coexist with incomplete new ones
        record["evaluation"] = None
        records.save(study, record)

    rows = data.load_split(study.data_dir, "test")
    device = resolve_device(cfg.device)
    dtype, precision, _ = evaluation_dtype(device)
    model = load(device=device, dtype=dtype)
    losses = _losses(study, record, model, rows, precision=precision, log=log)
    engine = resolve_engine(model, cfg.engine)
    with contextlib.ExitStack() as stack:
        if engine == "vllm":  # it reads a folder and uses the whole GPU
            model = stack.enter_context(_written(model, data.load_tokenizer(cfg.model)))
            gc.collect()
            torch.cuda.empty_cache()
        answers = _answers(study, record, model, rows, engine=engine, log=log)
    _log_scores(study, record, rows, log=log)
    record["eval_loss"] = losses["eval_loss"]  # None if it was not finite
    record["evaluation"] = {
        "n_test": len(rows),
        **losses,
        **answers,
        "predictions_sha256": sha256(path),
        "max_new_tokens": cfg.max_new_tokens,
        "precision": precision,
        "device": records.device_name(device),
    }
    records.save(study, record)
    del model
    gc.collect()
    _add_rounding(study, record, log=log)
    return record


def _record_of(study, name, seed, model=None):
    """The record to fill: a finished run's, or the untrained model's or an External's, which may be new."""
    path, split_hash = study.record_path(name, seed), study.manifest()["split_hash"]
    record = records.load(study, name, seed)
    if record is None:
        if name != BASE and model is None:
            raise StudyError(f"no record of {name} (seed {seed}) in {study.folder}: train it first")
        record = _new_record(study, name, model)
    elif model is not None and (record.get("trained_elsewhere") or {}).get("files") != model.files:
        raise StudyError(f"{path} is for other weights than {model.folder}: give this model another name")
    records.require_fields(record, path)
    records.require_ok(record)
    if record["split_hash"] != split_hash:
        raise StudyError(
            f"{path} has split_hash {record['split_hash']}, the data {split_hash}: this run "
            "used other rows; move the record away and train again, or build the data it was trained on"
        )
    return record


def _new_record(study, name, model):
    """A finished record without any training."""
    device = resolve_device(study.cfg.device)
    _, precision, reason = evaluation_dtype(device)
    how = {"device": device, "precision": precision, "precision_reason": reason}
    record = {**identity.new_record(study, name, **how), "status": "ok"}
    if model is not None:
        record |= {"seed": 0, "config": {}, **model.record_fields()}
        del record["run_hash"]  # its settings are unknown
    return record


def _losses(study, record, model, rows, *, precision, log):
    """Losses on test rows and general text, saved in the record immediately.

    Losses from a session with another precision are measured again: an evaluation has one precision.
    """
    kept = record.get("losses")
    if kept is not None and kept.get("precision") == precision:
        return kept
    log(f"{record['method']}: measuring the loss on {len(rows)} test rows")
    how = {"device": resolve_device(study.cfg.device), "precision": autocast_of(precision)}
    measured = {"eval_loss": mean_loss(model, Rows(rows), **how)}
    measured |= forgetting.record_fields(general_loss(study, model, **how))
    for field, value in measured.items():
        if isinstance(value, float) and not math.isfinite(value):
            log(f"{record['method']}: {field} is {value}: recorded as unknown")
            measured[field] = None
    record["losses"] = {**measured, "precision": precision}
    records.save(study, record)
    return record["losses"]


def general_loss(study, model, **how):
    """The forgetting.GeneralLoss of a model on text that does not overlap with the study's training rows, or None."""
    train = data.load_split(study.data_dir, "train")
    return forgetting.general_loss(model, data.load_tokenizer(study.cfg.model), study.cfg, train, **how)


def _answers(study, record, model, rows, *, engine, log):
    """Answer the remaining rows; returns the answer fields of the record's evaluation."""
    cfg, split_hash = study.cfg, record["split_hash"]
    kept = Predictions(study.predictions_path(record["method"], record["seed"]), split_hash)
    seconds, tokens = answer_into(
        kept, cfg, model, rows, engine=engine, log=lambda line: log(f"{record['method']}: {line}")
    )
    return {"split_hash": split_hash, "generate_seconds": seconds, "generated_tokens": tokens, "engine": engine}


def answer_into(kept, cfg, model, rows, *, engine="auto", log=print):
    """Answer the rows missing in `kept`, a Predictions, with a study's settings; returns the result of answer_rows."""
    deadline = Deadline(cfg.replace(max_seconds=0.0))  # max_seconds limits training
    how = {"max_new_tokens": cfg.max_new_tokens, "batch": cfg.eval_batch_size, "engine": engine, "deadline": deadline}
    return answer_rows(model, data.load_tokenizer(cfg.model), rows, kept, **how, log=log)


def _log_scores(study, record, rows, *, log):
    from peftlib.evaluation.hf_metrics import score  # imports evaluate, which takes seconds

    path = study.predictions_path(record["method"], record["seed"])
    answers = [row["answer"] for row in read_predictions(path, rows, record["split_hash"])]
    found = score(answers, [row["messages"][-1]["content"] for row in rows])
    scores = f"BLEU-4 {found['bleu4']:.4f}, ROUGE-L {found['rougeL']:.4f}"
    log(f"{record['method']}: {scores} on {len(answers)} test rows")


def _add_rounding(study, record, *, log):
    """Record the general text loss of the untrained model in the method's 4 bits; returns whether it was new.

    Part of the apparent forgetting of a 4-bit method is this rounding. Optional: skipped if it cannot be measured in
    the same precision as the rest.
    """
    done, method = record["evaluation"], record["method"]
    spec = registry.known(method)
    layers = spec.resolve(study.cfg, shape_of(study.cfg.model).layers).four_bit if spec and spec.four_bit else ()
    device = resolve_device(study.cfg.device)
    dtype, precision, _ = evaluation_dtype(device)
    is_open = forgetting.of_record(record) is not None and forgetting.ROUNDED_FIELD not in done
    if not (layers and is_open and done.get("precision") == precision):
        return False
    log(f"{method}: measuring the loss on general text of the untrained model in NF4")
    try:
        _require_base(study, record, log)
        model = load_rounded(study.cfg.model, layers, precision=record["precision"], device=device, dtype=dtype)
        how = {"device": device, "precision": autocast_of(precision)}
        done[forgetting.ROUNDED_FIELD] = general_loss(study, model, **how).loss
    except (PeftlibError, RuntimeError, OSError) as error:
        log(f"{method}: skipped, it is optional: {error}")
        return False
    records.save(study, record)
    return True


def autocast_of(precision):
    """A bf16 model needs no autocast; fp16 matrices with a float32 residual do."""
    return "fp16" if precision == "fp16" else "fp32"


def evaluation_dtype(device):
    """(torch dtype, its name, reason) of evaluation: float32 if 16 bits are slow."""
    if device != "cuda":
        return torch.float32, "fp32", "CPUs decode faster in float32"
    major, minor = torch.cuda.get_device_capability()
    if major >= 8:
        return torch.bfloat16, "bf16", "this card has bf16"
    if major == 7:
        return torch.float16, "fp16", f"compute capability {major}.{minor} has no bf16 but fp16; the residual is fp32"
    return torch.float32, "fp32", f"compute capability {major}.{minor} has fast matrix products in float32 alone"


def load_model(study, method, seed, *, device, dtype, log=print):
    """The saved weights of a run as one plain merged model, or the untrained model of 'base', in eval mode.

    ModelError: the weights are not those of the run's record, or the base model has changed.
    """
    if method == BASE:
        found = study.records()
        for record in [record for record in found if record.get("model_sha256")] or found[:1]:
            _require_base(study, record, log)
        return load_plain(study.cfg.model, device=device, dtype=dtype)
    record = records.load(study, method, seed)
    if record is not None and record.get("model_sha256"):
        _require_base(study, record, log, is_local=True)  # full weights are loaded without their base
    return load_trained(study.weights_dir(method, seed), device=device, dtype=dtype, log=log)


def _require_base(study, record, log, **where):
    what = f"{record['method']} (seed {record['seed']}) in study {study.folder.name}"
    identity.require_base(record, study.cfg.model, what=what, log=log, **where)


@contextlib.contextmanager
def _written(model, tokenizer):
    """A temporary transformers folder of a model for engines that load it; vLLM refuses fp16, so it becomes float32."""
    with tempfile.TemporaryDirectory(prefix="peftlib-merged-") as folder:
        with writing(folder):
            (model if model.dtype == torch.bfloat16 else model.float()).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        del model  # deleting the last reference frees GPU memory
        yield folder


def trained_methods(study):
    """Names of the methods with a finished run of this session's seed, in the study's order."""
    found = sorted(study.records(), key=lambda record: registry.study_order(record["method"]))
    runs = [r for r in found if r["method"] != BASE and not r.get("trained_elsewhere")]
    return [r["method"] for r in runs if r["seed"] == study.cfg.seed and r["status"] == "ok"]
