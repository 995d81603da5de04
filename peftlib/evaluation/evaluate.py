"""The test rows, once, at the end: loss and answers of the saved weights, the same way for every method.

Beside them the loss on general text, which shows what a method made the model forget.
"""

import contextlib
import gc
import math
import tempfile
from pathlib import Path

import torch

from peftlib import data
from peftlib import methods as registry
from peftlib.core import record as records
from peftlib.core.env import resolve_device
from peftlib.core.errors import PeftlibError, StudyError, writing
from peftlib.core.files import sha256
from peftlib.core.session import Deadline
from peftlib.evaluation import forgetting
from peftlib.evaluation.generate import Predictions, answer_rows
from peftlib.evaluation.inference.engines import require_vllm, resolve_engine
from peftlib.evaluation.results import require_unchanged
from peftlib.models import identity
from peftlib.models.locate import locate
from peftlib.models.saved import export_merged, load_plain, load_rounded, load_trained
from peftlib.storage.lock import held
from peftlib.train.batching import Rows, mean_loss


def evaluate(study, method, *, log=print):
    """Test loss, general text loss and answers of a finished run, or of the untrained model ('base'); returns its record.

    The saved weights are loaded as one plain merged model, in the precision of `evaluation_dtype`.
    What was done before is not done again: losses, answered rows, a finished evaluation.
    StudyError: the run is not finished, its record lacks a field, 01_data has not run, or another session works in the
    study. ModelError: engine='vllm' and there is no vLLM. Stopped: this session ends soon; what is answered is kept.
    """
    run = f"{method}-s{0 if method == 'base' else study.cfg.seed}"
    with held(study.folder, f"answering the test rows with {method}", run=run, log=log):
        study.freeze()
        record = _record_of(study, method)
        done = record["evaluation"]
        predictions_path = study.predictions_path(method, record["seed"])
        if done and done["split_hash"] == record["split_hash"] and predictions_path.exists():
            require_unchanged(predictions_path, record)
            if not _add_rounding(study, record, log=log):
                log(f"{method}: evaluated before, nothing to do")
            return record
        if study.cfg.engine == "vllm":
            require_vllm()
        if done:  # of answers that are gone: it must not stand beside those that come now before they are all there
            record["evaluation"] = None
            records.save(study, record)
        rows = data.load_split(study.data_dir, "test")
        device = resolve_device(study.cfg.device)
        dtype, precision, _ = evaluation_dtype(device)
        model = load_model(study, method, record["seed"], device=device, dtype=dtype, log=log)
        losses = _losses(study, record, model, rows, precision=precision, log=log)
        answers = _answers(study, record, model, rows, log=log)
        record["eval_loss"] = losses["eval_loss"]  # None where it was not finite
        record["evaluation"] = {
            "n_test": len(rows),
            **losses,
            **answers,
            "predictions_sha256": sha256(predictions_path),
            "max_new_tokens": study.cfg.max_new_tokens,
            "precision": precision,
            "device": records.device_name(device),
        }
        records.save(study, record)
        del model
        gc.collect()
        _add_rounding(study, record, log=log)
        return record


def _record_of(study, method):
    """The record to fill: a finished run's, or the untrained model's."""
    split_hash = study.manifest()["split_hash"]
    seed = 0 if method == "base" else study.cfg.seed
    record = records.load(study, method, seed)
    if record is None:
        if method != "base":
            raise StudyError(f"no record of {method} (seed {seed}) in {study.folder}: train it first")
        device = resolve_device(study.cfg.device)
        _, precision, reason = evaluation_dtype(device)
        base = identity.provenance_of(study.cfg.model, study.records(), study=study.folder.name)
        record = records.new_record(
            study, method, provenance=base, device=device, precision=precision, precision_reason=reason
        )
        record["status"] = "ok"
    records.require_fields(record, study.record_path(method, seed))
    records.require_ok(record)
    if record["split_hash"] != split_hash:
        raise StudyError(
            f"{study.record_path(method, seed)} has split_hash {record['split_hash']}, the data {split_hash}: these runs "
            "saw other rows; move the record away and train again, or build the data it was made with"
        )
    return record


def _losses(study, record, model, rows, *, precision, log):
    """Losses on test rows and general text, kept in the record as soon as they are known.

    Those of a session that evaluated in another precision are measured anew: the evaluation names one for all.
    """
    kept = record.get("losses")
    if kept is not None and kept.get("precision") == precision:
        return kept
    device, name = resolve_device(study.cfg.device), record["method"]
    log(f"{name}: loss on {len(rows)} test rows")
    how = {"device": device, "precision": _autocast(precision)}
    loss = mean_loss(model, Rows(rows), **how)
    general = _general_loss(study, model, **how)
    measured = {"eval_loss": loss, **forgetting.record_fields(general)}
    for field, value in measured.items():
        if isinstance(value, float) and not math.isfinite(value):
            log(f"{name}: {field} is {value}: recorded as unknown")
            measured[field] = None
    record["losses"] = {**measured, "precision": precision}
    records.save(study, record)
    return record["losses"]


def _general_loss(study, model, **how):
    train = data.load_split(study.data_dir, "train")
    return forgetting.general_loss(model, data.load_tokenizer(study.cfg.model), study.cfg, train, **how)


def _add_rounding(study, record, *, log):
    """Put the general text loss of the untrained model, in the 4 bits that the method holds, into the evaluation.

    Returns whether it did. A part of what such a method seems to forget is this rounding, which is there before the
    first step. It is beside the point of an evaluation: where it cannot be measured as the rest was, that stays as it is.
    """
    done, method = record["evaluation"], record["method"]
    layers = registry.find(method).four_bit if method in registry.METHODS else ()
    device = resolve_device(study.cfg.device)
    dtype, precision, _ = evaluation_dtype(device)
    is_open = forgetting.of_record(record) is not None and forgetting.ROUNDED_FIELD not in done
    if not (layers and is_open and done.get("precision") == precision):
        return False
    loss = _rounding_of_another_seed(study, record)
    if loss is None:
        log(f"{method}: general text loss of its 4 bits alone, untrained")
        try:
            _require_base(study, record, log)
            model = load_rounded(study.cfg.model, layers, precision=record["precision"], device=device, dtype=dtype)
            loss = _general_loss(study, model, device=device, precision=_autocast(precision)).loss
        except (PeftlibError, RuntimeError, OSError) as error:
            log(f"{method}: not measured, and nothing rests on it: {error}")
            return False
    done[forgetting.ROUNDED_FIELD] = loss
    records.save(study, record)
    return True


def _rounding_of_another_seed(study, record):
    """The loss that another seed's evaluation holds for the same matrices, precisions and text, or None."""
    for other in study.records():
        if all(other[name] == record[name] for name in ("method", "precision", "model")) and other["evaluation"]:
            mine, done = record["evaluation"], other["evaluation"]
            is_alike = all(done.get(name) == mine[name] for name in ("precision", "general_text_sha256"))
            if is_alike and done.get(forgetting.ROUNDED_FIELD) is not None:
                return done[forgetting.ROUNDED_FIELD]
    return None


def _autocast(precision):
    """A bf16 model needs no autocast; fp16 matrices beside a float32 residual do."""
    return "fp16" if precision == "fp16" else "fp32"


def _answers(study, record, model, rows, *, log):
    """Answer what is not answered yet; facts on it for the record."""
    cfg, method, split_hash = study.cfg, record["method"], record["split_hash"]
    predictions = Predictions(study.predictions_path(method, record["seed"]), split_hash)
    tokenizer, engine = data.load_tokenizer(cfg.model), resolve_engine(model, cfg.engine)
    deadline = Deadline(cfg.replace(max_seconds=0.0))  # max_seconds is of training
    if engine == "vllm":
        model = None  # vLLM takes the card for itself
        gc.collect()
        torch.cuda.empty_cache()
    is_merged = model is None
    with _merged_folder(study, method, record["seed"]) if is_merged else contextlib.nullcontext(model) as answering:
        seconds, tokens = answer_rows(
            answering,
            tokenizer,
            rows,
            predictions,
            max_new_tokens=cfg.max_new_tokens,
            batch=cfg.eval_batch_size,
            engine=engine,
            deadline=deadline,
            log=lambda line: log(f"{method}: {line}"),
        )
    return {"split_hash": split_hash, "generate_seconds": seconds, "generated_tokens": tokens, "engine": engine}


def evaluation_dtype(device):
    """(torch dtype, its name, reason) of evaluation: float32 wherever 16 bits are slow."""
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

    ModelError: the weights are not those of the run's record, or the base model is not the one it was then.
    """
    if method == "base":
        _require_base_of_study(study, log)
        return load_plain(study.cfg.model, device=device, dtype=dtype)
    record = records.load(study, method, seed)
    if record is not None and record.get("model_sha256"):
        _require_base(study, record, log, is_local=True)  # weights of a whole model are read without their base
    return load_trained(study.weights_dir(method, seed), device=device, dtype=dtype, log=log)


def _require_base_of_study(study, log):
    """ModelError where the untrained model is not the one that the study's runs were made with."""
    found = study.records()
    known = [record for record in found if record.get("model_sha256")]
    for record in known or found[:1]:
        _require_base(study, record, log)


def _require_base(study, record, log, **where):
    what = f"{record['method']} (seed {record['seed']}) in study {study.folder.name}"
    identity.require_base(record, study.cfg.model, what=what, log=log, **where)


@contextlib.contextmanager
def _merged_folder(study, method, seed):
    """A transformers folder (or hub id) of the model that is evaluated, for engines that load it themselves."""
    if method == "base":
        yield locate(study.cfg.model)[0]
        return
    with contextlib.ExitStack() as stack:
        with writing(tempfile.gettempdir()):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peftlib-merged-"))
            merged = export_merged(study.weights_dir(method, seed), Path(folder) / "model")
        yield merged


def trained_methods(study):
    """Names of the methods with a finished run of this session's seed, in the study's order."""
    found = sorted(study.records(), key=lambda record: registry.study_order(record["method"]))
    return [r["method"] for r in found if r["method"] != "base" and r["seed"] == study.cfg.seed and r["status"] == "ok"]
