"""One JSON file per run: its settings, its environment and its results. Unknown values are null."""

import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

from peftlib.core import paths
from peftlib.core.config import current_names
from peftlib.core.errors import StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import Map, Maybe, require_shape

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "sacrebleu", "rouge-score")
_NUMBER, _COUNT, _TEXT = Maybe(float), Maybe(int), Maybe(str)


def _optional(shape, names):
    return {f"{name}?": shape for name in names.split()}


# Known when a run ends; a record has them from the start, as None.
_OUTCOME = {
    **_optional(_COUNT, "trainable_params steps planned_steps train_tokens"),
    **_optional(_NUMBER, "learning_rate learning_rate_2 train_loss eval_loss peak_memory_bytes peak_reserved_bytes"),
    **_optional(_NUMBER, "train_seconds tokens_per_second"),
    "evaluation?": Maybe(
        {
            "split_hash": str,
            **_optional(_COUNT, "n_test general_tokens max_new_tokens"),
            **_optional(_NUMBER, "eval_loss general_loss general_loss_nf4 generate_seconds generated_tokens"),
            **_optional(_TEXT, "general_text_sha256"),
            **_optional(str, "precision device predictions_sha256"),
        }
    ),
}
_LATER = (
    "total_params first_step_s mfu matmul_tflops skipped_steps saves save_stall_seconds forked_from "
    "placement rate_factor processes exchange peft_config"
)
_OUTCOME_NAMES = [name.removesuffix("?") for name in _OUTCOME]
_AT_START = "method seed status error config split_hash model model_provenance precision device"
_NEEDED = [*_AT_START.split(), *_OUTCOME_NAMES, "history", "valid_history"]
_STEP = {"step": int, **_optional(_NUMBER, "loss learning_rate grad_norm seconds")}
_BENCHMARK = {
    **dict.fromkeys(("n", "shots"), int),
    **dict.fromkeys(("score", "seconds"), float),
    **dict.fromkeys(("metric", "filter", "source", "harness", "precision", "device", "rows_sha256"), str),
    **dict.fromkeys(("is_perplexity", "is_chat"), bool),
    "chance": _NUMBER,
}
_SHAPE = {
    "method": str,
    "seed": int,
    **_OUTCOME,
    **_optional(str, "status run_hash split_hash model model_provenance precision device"),
    **_optional(_TEXT, "error precision_reason evaluation_error model_sha256 model_revision forked_from"),
    **_optional(_COUNT, "total_params skipped_steps processes"),
    **_optional(_NUMBER, "rate_factor"),
    **_optional(Map(str), "weights_sha256 settings_sha256"),
    "config?": {},
    "losses?": Maybe({"eval_loss": _NUMBER, "general_loss?": _NUMBER, "general_tokens?": _COUNT}),
    "history?": [_STEP],
    "valid_history?": [{"step": int, "valid_loss": _NUMBER}],
    "layers?": [{}],
    "versions?": Map(_TEXT),
    "git?": {"commit?": _TEXT, "is_dirty?": Maybe(bool)},
    "changes?": [{"step": int, "what": str}],
    "placement?": Maybe({}),
    "peft_config?": Maybe({}),
    "exchange?": Maybe({"bytes_a_step": int, "bytes": int}),
    "side_by_side?": int,
    "benchmarks?": Map(_BENCHMARK),
}


def new_record(study, method, *, provenance, device, precision, precision_reason):
    """A record with everything known before training; the rest is None.

    provenance: {'model_provenance', 'model_sha256', 'model_revision'} of the base model, from models.identity.
    """
    cfg, manifest = study.cfg, study.manifest()
    return {
        "method": method,
        "seed": 0 if method == "base" else cfg.seed,  # greedy answers of an untrained model do not depend on a seed
        "status": "stopped",
        "error": None,
        "config": asdict(cfg),
        "run_hash": cfg.run_hash(method),
        "split_hash": manifest["split_hash"],
        "model": cfg.model,
        **provenance,
        "precision": precision,
        "precision_reason": precision_reason,
        "device": device_name(device),
        **dict.fromkeys([*_OUTCOME_NAMES, *_LATER.split()]),
        "layers": [],
        "history": [],
        "valid_history": [],
        "changes": [],
        "versions": versions(),
        "git": git_state(),
    }


def device_name(device):
    """The GPU's name, or the CPU's with its number of cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    processor = named or platform.processor() or platform.machine()
    if not hasattr(os, "sched_getaffinity"):  # only on Linux
        return processor
    return f"CPU ({processor}, {len(os.sched_getaffinity(0))} cores)"


def versions():
    """{package: version} of the packages that results depend on; None for a package that is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(folder=paths.PACKAGE):
    """{'commit', 'is_dirty'} of the checkout that the package runs from; both None without git.

    is_dirty: the package differs from the commit; data and results around it do not count. If pip installed it from
    the repository's address, the commit is the one that pip recorded.
    """
    if folder == paths.PACKAGE and paths.checkout() is None:
        noted = importlib.metadata.distribution("peftlib").read_text("direct_url.json")
        return {"commit": json.loads(noted or "{}").get("vcs_info", {}).get("commit_id"), "is_dirty": None}
    commit = _git(folder, "rev-parse", "HEAD") or None
    return {"commit": commit, "is_dirty": bool(_git(folder, "status", "--porcelain", "--", ".")) if commit else None}


def _git(folder, *words):
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def save(study, record):
    """Write the record to the study folder; returns the path."""
    path = study.record_path(record["method"], record["seed"])
    write_json(path, record)
    return path


def load(study, method, seed):
    """The record of a run, or None if there is none. StudyError: see read."""
    path = study.record_path(method, seed)
    return read(path) if path.exists() else None


def read(path):
    """Read a record file. StudyError: it is damaged, has another schema version, or is not a run's record."""
    record = read_json(path)
    if not {"method", "seed"} <= record.keys():
        raise StudyError(f"{path} has no method or seed, so it is not a run's record: move it away")
    require_shape(record, _SHAPE, path)
    if "config" in record:
        record["config"] = current_names(record["config"])
    return record


def require_fields(record, path):
    """StudyError if a record lacks a field that evaluation or the report reads."""
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        raise StudyError(f"{path} lacks {', '.join(missing)}: delete it and run its notebook again")


def loss_text(record):
    """The loss of a scored run for people, in nats per token."""
    return "not finite" if record["eval_loss"] is None else f"{record['eval_loss']:.4f} nats per token"


def require_ok(record):
    """StudyError unless the run finished."""
    if record["status"] != "ok":
        raise StudyError(
            f"{record['method']} (seed {record['seed']}) is {record['status']} at step {record['steps']} of "
            f"{record['planned_steps']}{': ' + record['error'] if record['error'] else ''}. Resume it with its "
            f"notebook or with peftlib train {record['method']}"
        )
