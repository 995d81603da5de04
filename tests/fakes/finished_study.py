"""A finished study of everything there can be in one, and the commands that read it: what damage is tried on."""

import contextlib
import io
import json
import shutil
import socket
import sys
from unittest import mock

import psutil

from peftlib.cli import main
from peftlib.core.config import resolve
from peftlib.core.errors import PeftlibError
from peftlib.core.files import read_json
from peftlib.core.study import Study

NAME, OTHER = "damaged", "other"
_QUIET = {"log": lambda line: None}


def build(root, model, data, settings):
    """Make a finished study NAME and its copy OTHER below `root`/runs, where PEFTLIB_ROOT leads; returns its folder."""
    from peftlib.evaluation.evaluate import evaluate
    from peftlib.evaluation.judging import judge
    from peftlib.evaluation.judging import verdicts as judge_verdicts
    from peftlib.train import sweep
    from peftlib.train.loop import TrainingRun

    rates = {"lora_learning_rate": 1e-2, "galore_learning_rate": 1e-2}
    cfg = resolve("demo", **{"model": str(model), "study": NAME, **settings, **rates, "max_steps": 2})
    study = Study.open(cfg)
    shutil.copytree(data, study.data_dir)
    study.freeze()
    for method in ("hybrid", "galore"):
        TrainingRun(study, method, **_QUIET).train()
    for method in ("base", "hybrid", "galore"):
        evaluate(study, method, **_QUIET)
    TrainingRun(Study.open(cfg.replace(max_seconds=1e-6)), "apollo", **_QUIET).train()
    sweep.sweep(study, "hybrid", factors=(1.0,), rows=2, **_QUIET)
    names, cases = judge.cases_of_study(study, ("base", "hybrid"), 0, 0)
    verdicts = judge_verdicts.Verdicts(judge_verdicts.path_of(study, ("base", "hybrid")), names)
    judge.run(cases, verdicts, Judge(), **_QUIET)
    _report(root)
    shutil.copytree(study.folder, root / "runs" / OTHER)
    gone = {
        "host": socket.gethostname(),
        "boot": psutil.boot_time(),
        "pid": 2**22 - 1,
        "started": 1.0,
        "what": "a test",
    }
    (study.folder / "lock.json").write_text(json.dumps({**gone, "token": "t", "since": 2.0, "heartbeat": 3.0}))
    return study.folder


class Judge:
    """A judge that always takes the second answer."""

    name, counts = "http://127.0.0.1:1|m", {}

    def ask(self, messages, *, max_tokens):
        from peftlib.evaluation.judging.backends import Reply

        return Reply("VERDICT: 2", 3, 2)


def call(*words):
    """What a command printed; its error as PeftlibError."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code:
        raise PeftlibError(err.getvalue().strip() or out.getvalue().strip())
    return out.getvalue()


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _report(root):
    with mock.patch("peftlib.report.charts.charts_of", lambda *_: {}):  # drawing takes longer than all the rest
        call("report", "--study", NAME)
    folder = root / "runs" / NAME
    return (folder / "results.csv").read_text() + (folder / "report.md").read_text()


def _compare(root):
    return call("compare", NAME, OTHER)


def _export(method, form):
    def export(root):
        call("export", "--study", NAME, "--method", method, "--form", form, "--to", root / "out")
        return _files(root / "out")

    return export


def _judged(root):
    words = ("--study", NAME, "--methods", "base", "hybrid", "--endpoint", "http://127.0.0.1:1", "--model", "m")
    return call("judge", *words, "--dry-run")


def _chat(method):
    def chat(root):
        with mock.patch.object(sys, "stdin", io.StringIO("hello\n")):
            return call("chat", "--study", NAME, "--method", method, "--max-new-tokens", 3)

    return chat


def _evaluate(root):
    from peftlib.evaluation.evaluate import evaluate

    record = evaluate(Study.existing(NAME), "hybrid", **_QUIET)
    answers = (root / "runs" / NAME / "predictions" / "hybrid-s0.jsonl").read_text(encoding="utf-8")
    return record["eval_loss"], answers


def _train(method):
    def train(root):
        from peftlib.train.loop import TrainingRun

        cfg = Study.existing(NAME).cfg.replace(precision="fp32", device="cpu", micro_batch_size=2, logging_steps=1)
        record = TrainingRun(Study.open(cfg), method, **_QUIET).train()
        return record["status"], record["steps"], [entry["loss"] for entry in record["history"]], record["train_loss"]

    return train


def _sweep(root):
    said = call("sweep", "--study", NAME, "--method", "hybrid", "--factor", "1", "--rows", "2")
    found = read_json(root / "runs" / NAME / "sweeps" / "hybrid.json")
    return said.splitlines()[-1], found["best"]


def _data(root):
    call("data", "--study", NAME, "--profile", "demo")
    return {name: content for name, content in _files(root / "runs" / NAME / "data").items() if name != "README.md"}


def _plan(root):
    return call("plan", "--study", NAME, "--gpu", "t4")


def _reference(root):
    return call("reference", "--study", NAME, "--profile", "demo", "--dry-run", "--factors", "1", "--sweep-rows", 2)


COMMANDS = {
    "report": _report,
    "compare": _compare,
    "export adapter": _export("hybrid", "adapter"),
    "export merged": _export("galore", "merged"),
    "judge": _judged,
    "chat adapter": _chat("hybrid"),
    "chat merged": _chat("galore"),
    "evaluate": _evaluate,
    "train, finished": _train("hybrid"),
    "train, resumed": _train("apollo"),
    "sweep": _sweep,
    "data": _data,
    "plan": _plan,
    "reference": _reference,
}


def attempt(command, root):
    """('ok', result), ('error', message) of a PeftlibError, or ('raw', exception)."""
    try:
        return "ok", COMMANDS[command](root)
    except PeftlibError as error:
        return "error", str(error)
    except Exception as error:  # noqa: BLE001 - this is what the matrix looks for
        return "raw", error
