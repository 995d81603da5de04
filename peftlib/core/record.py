"""One JSON a run: what was asked, what ran it, what came out. An unknown is null."""

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

from peftlib.core import paths as places
from peftlib.core.config import current_names
from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import Map, Maybe, require_shape
from peftlib.models import identity

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "sacrebleu", "rouge-score")


# Known when a run ends; a record lists them from the start, as None.
_OUTCOME = (
    "trainable_params",
    "steps",
    "planned_steps",
    "train_tokens",
    "learning_rate",
    "learning_rate_2",
    "train_loss",
    "eval_loss",
    "peak_memory_bytes",
    "peak_reserved_bytes",
    "train_seconds",
    "tokens_per_second",
    "evaluation",
)
_ALSO = (
    "total_params",
    "first_step_s",
    "mfu",
    "matmul_tflops",
    "skipped_steps",
    "saves",
    "save_stall_seconds",
    "forked_from",
    "placement",
    "rate_factor",
)
_NEEDED = (
    "method",
    "seed",
    "status",
    "error",
    "config",
    "split_hash",
    "model",
    "model_provenance",
    "precision",
    "device",
    *_OUTCOME,
    "history",
    "valid_history",
)


_NUMBER, _COUNT, _TEXT = Maybe(float), Maybe(int), Maybe(str)
_STEP = {"step": int, "loss?": _NUMBER, "learning_rate?": _NUMBER, "grad_norm?": _NUMBER, "seconds?": _NUMBER}
_SHAPE = {
    "method": str,
    "seed": int,
    "status?": str,
    "error?": _TEXT,
    "config?": {},
    "run_hash?": str,
    "split_hash?": str,
    "model?": str,
    "model_provenance?": str,
    "precision?": str,
    "precision_reason?": _TEXT,
    "device?": str,
    "trainable_params?": _COUNT,
    "total_params?": _COUNT,
    "steps?": _COUNT,
    "planned_steps?": _COUNT,
    "train_tokens?": _COUNT,
    "skipped_steps?": _COUNT,
    "learning_rate?": _NUMBER,
    "learning_rate_2?": _NUMBER,
    "train_loss?": _NUMBER,
    "eval_loss?": _NUMBER,
    "peak_memory_bytes?": _NUMBER,
    "peak_reserved_bytes?": _NUMBER,
    "train_seconds?": _NUMBER,
    "tokens_per_second?": _NUMBER,
    "evaluation?": Maybe(
        {
            "split_hash": str,
            "n_test?": _COUNT,
            "eval_loss?": _NUMBER,
            "general_loss?": _NUMBER,
            "general_tokens?": _COUNT,
            "general_text_sha256?": _TEXT,
            "general_loss_nf4?": _NUMBER,
            "max_new_tokens?": _COUNT,
            "precision?": str,
            "device?": str,
            "predictions_sha256?": str,
            "generate_seconds?": _NUMBER,
            "generated_tokens?": _NUMBER,
        }
    ),
    "evaluation_error?": _TEXT,
    "losses?": Maybe({"eval_loss": _NUMBER, "general_loss?": _NUMBER, "general_tokens?": _COUNT}),
    "history?": [_STEP],
    "valid_history?": [{"step": int, "valid_loss": _NUMBER}],
    "layers?": [{}],
    "versions?": Map(_TEXT),
    "git?": {"commit?": _TEXT, "is_dirty?": Maybe(bool)},
    "weights_sha256?": Map(str),
    "settings_sha256?": Map(str),
    "model_sha256?": _TEXT,
    "model_revision?": _TEXT,
    "forked_from?": _TEXT,
    "rate_factor?": _NUMBER,
    "changes?": [{"step": int, "what": str}],
    "placement?": Maybe({}),
    "side_by_side?": int,
}


def new_record(study, method, *, device, precision, precision_reason):
    """A record with everything known before training; what is not is None.

    ModelError: the study's other runs were made with another base model of this name.
    """
    from peftlib.models.base import locate

    cfg, manifest = study.cfg, study.manifest()
    for other in study.records():
        if other.get("model_sha256") and other.get("model") == cfg.model:
            what = f"{other['method']} (seed {other['seed']}) in study {study.folder.name}"
            identity.require_base(other, cfg.model, what=what)
    return {
        "method": method,
        "seed": 0 if method == "base" else cfg.seed,  # greedy answers of an untrained model have no seed
        "status": "stopped",
        "error": None,
        "config": asdict(cfg),
        "run_hash": cfg.run_hash(method),
        "split_hash": manifest["split_hash"],
        "model": cfg.model,
        "model_provenance": locate(cfg.model)[1],
        **identity.base_facts(cfg.model),
        "precision": precision,
        "precision_reason": precision_reason,
        "device": device_name(device),
        **dict.fromkeys(_OUTCOME + _ALSO),
        "layers": [],
        "history": [],
        "valid_history": [],
        "changes": [],
        "versions": versions(),
        "git": git_state(),
    }


def device_name(device):
    """The card's name, or the processor's with its number of cores."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    import psutil

    return f"CPU ({_processor()}, {len(psutil.Process().cpu_affinity())} cores)" if _has_affinity() else _processor()


def _has_affinity():
    import psutil

    return hasattr(psutil.Process, "cpu_affinity")


def _processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions():
    """{package: version} of what a result depends on; a package that is absent is None."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(folder=places.PACKAGE):
    """{'commit', 'is_dirty'} of the checkout that a package runs from; None each where there is no git.

    is_dirty: the package differs from the commit; data and results that lie around it do not count. A copy that pip
    installed from the repository's address has the commit that pip noted.
    """
    if folder == places.PACKAGE and places.checkout() is None:
        noted = importlib.metadata.distribution("peftlib").read_text("direct_url.json")
        return {"commit": json.loads(noted or "{}").get("vcs_info", {}).get("commit_id"), "is_dirty": None}
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {
            "commit": commit or None,
            "is_dirty": bool(_git(folder, "status", "--porcelain", "--", ".")) if commit else None,
        }
    except OSError:
        return {"commit": None, "is_dirty": None}


def _git(folder, *words):
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def save(study, record):
    """Write the record to its place in the study folder; returns the path."""
    path = study.record_path(record["method"], record["seed"])
    write_json(path, record)
    return path


def load(study, method, seed):
    """The record of a run, or None where there is none. StudyError: as read."""
    path = study.record_path(method, seed)
    return read(path) if path.exists() else None


def read(path):
    """The record in a file. StudyError: it is damaged, of another schema version, or no record of a run."""
    record = read_json(path)
    if not {"method", "seed"} <= record.keys():
        raise StudyError(f"{path} names no method or seed, so it is no record of a run: move it away")
    require_shape(record, _SHAPE, path)
    return {**record, "config": current_names(record["config"])} if "config" in record else record


def require_fields(record, path):
    """StudyError where a record lacks a field that evaluation or the report reads."""
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        raise StudyError(f"{path} lacks {', '.join(missing)}: delete it and run its notebook again")


def require_ok(record):
    """StudyError unless the run came to its end."""
    if record["status"] != "ok":
        raise StudyError(
            f"{record['method']} (seed {record['seed']}) is {record['status']} at step {record['steps']} of "
            f"{record['planned_steps']}{': ' + record['error'] if record['error'] else ''}. "
            "Run this notebook again: it goes on from the last checkpoint."
        )
