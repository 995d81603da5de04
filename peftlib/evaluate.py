"""The test rows, once, at the end: loss and answers of the saved weights, the same way for every method."""

import contextlib
import gc
import tempfile
from pathlib import Path

import torch

from peftlib import data
from peftlib import record as records
from peftlib.engines import require_vllm, resolve_engine
from peftlib.env import resolve_device
from peftlib.errors import StudyError
from peftlib.generate import Predictions, answer_rows
from peftlib.models import locate
from peftlib.rows import Rows, mean_loss
from peftlib.trained import export_merged, load_plain, load_trained


def evaluate(study, method, *, log=print):
    """Test loss and answers of a finished run, or of the untrained model ('base'); returns its record.

    The saved weights are loaded as one plain merged model, in the precision of `evaluation_dtype`.
    Rows that were answered before are not answered again; a finished evaluation is not repeated.
    StudyError: the run is not finished, or 01_data has not run. ModelError: engine='vllm' and there is no vLLM.
    """
    split_hash = study.manifest()["split_hash"]
    seed = 0 if method == "base" else study.cfg.seed
    record = records.load(study, method, seed)
    device = resolve_device(study.cfg.device)
    dtype, precision, reason = evaluation_dtype(device)
    if record is None:
        if method != "base":
            raise StudyError(f"no record of {method} (seed {seed}) in {study.folder}: train it first")
        record = records.new_record(study, method, device=device, precision=precision, precision_reason=reason)
        record["status"] = "ok"
    records.require_ok(record)
    done = record["evaluation"]
    if done and done["split_hash"] == split_hash and study.predictions_path(method, seed).exists():
        log(f"{method}: evaluated before, nothing to do")
        return record
    if study.cfg.engine == "vllm":
        require_vllm()
    rows = data.load_split(study.data_dir, "test")
    tokenizer = data.open_tokenizer(study.cfg.model)
    model = _load(study, method, seed, device=device, dtype=dtype)
    log(f"{method}: loss on {len(rows)} test rows")
    # A bf16 model needs no autocast; fp16 matrices beside a float32 residual do.
    loss = mean_loss(model, Rows(rows), device=device, precision="fp16" if precision == "fp16" else "fp32")
    predictions = Predictions(study.predictions_path(method, seed), split_hash)
    engine = resolve_engine(model, study.cfg.engine)
    if engine == "vllm":
        model = None  # vLLM takes the card for itself
        gc.collect()
        torch.cuda.empty_cache()
    with _merged_folder(study, method, seed) if model is None else contextlib.nullcontext(model) as answering:
        seconds, tokens = answer_rows(
            answering,
            tokenizer,
            rows,
            predictions,
            max_new_tokens=study.cfg.max_new_tokens,
            batch=study.cfg.eval_batch,
            engine=engine,
            log=lambda line: log(f"{method}: {line}"),
        )
    record["eval_loss"] = loss
    record["evaluation"] = {
        "n_test": len(rows),
        "eval_loss": loss,
        "split_hash": split_hash,
        "generate_seconds": seconds,
        "generated_tokens": tokens,
        "engine": engine,
        "max_new_tokens": study.cfg.max_new_tokens,
        "precision": precision,
        "device": records.device_name(device),
    }
    records.save(study, record)
    return record


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


def _load(study, method, seed, *, device, dtype):
    if method == "base":
        return load_plain(study.cfg.model, device=device, dtype=dtype)
    return load_trained(study.weights_dir(method, seed), device=device, dtype=dtype)


@contextlib.contextmanager
def _merged_folder(study, method, seed):
    """A transformers folder (or hub id) of the model that is evaluated, for engines that load it themselves."""
    if method == "base":
        yield locate(study.cfg.model)[0]
        return
    with tempfile.TemporaryDirectory(prefix="peftlib-merged-") as folder:
        yield export_merged(study.weights_dir(method, seed), Path(folder) / "model")


def trained_methods(study):
    """Names of the methods with a finished run of this session's seed, in the study's order."""
    found = study.records()
    return [r["method"] for r in found if r["method"] != "base" and r["seed"] == study.cfg.seed and r["status"] == "ok"]
