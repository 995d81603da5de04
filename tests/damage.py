"""Every way to damage a file of a finished study, and every command that reads one: the cases of test_damaged_studies.

A command that meets a damaged file may end in an error that names the file, or do its work with the result that it has
without the damage; a raw traceback, and another result, are failures.
"""

import contextlib
import io
import json
import shutil
import socket
import sys
from unittest import mock

import psutil

from peftlib.__main__ import main
from peftlib.config import resolve
from peftlib.errors import PeftlibError
from peftlib.files import read_json
from peftlib.study import Study

NAME, OTHER = "damaged", "other"
_QUIET = {"log": lambda line: None}


def build(root, model, data, settings):
    """Make a finished study NAME, its copy OTHER and a base model's folder below `root`; PEFTLIB_ROOT is `root`/runs."""
    from peftlib import judge, judge_cli, judge_verdicts, sweep
    from peftlib.evaluate import evaluate
    from peftlib.train import TrainingRun

    rates = {"lora_learning_rate": 1e-2, "galore_learning_rate": 1e-2}
    cfg = resolve("demo", **{"model": str(model), "study": NAME, **settings, **rates})
    study = Study.open(cfg)
    shutil.copytree(data, study.data_dir)
    study.freeze()
    for method in ("hybrid", "galore"):
        TrainingRun(study, method, **_QUIET).train()
    for method in ("base", "hybrid", "galore"):
        evaluate(study, method, **_QUIET)
    TrainingRun(Study.open(cfg.replace(max_seconds=1e-6)), "apollo", **_QUIET).train()
    sweep.sweep(study, "hybrid", factors=(1.0,), rows=2, **_QUIET)
    names, cases = judge_cli.cases_of_study(study, ("base", "hybrid"), 0, 0)
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
        from peftlib.judge_backends import Reply

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
    with mock.patch("peftlib.report_charts.charts_of", lambda *_: {}):  # drawing takes longer than all the rest
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
    from peftlib.evaluate import evaluate

    record = evaluate(Study.existing(NAME), "hybrid", **_QUIET)
    answers = (root / "runs" / NAME / "predictions" / "hybrid-s0.jsonl").read_text(encoding="utf-8")
    return record["eval_loss"], answers


def _train(method):
    def train(root):
        from peftlib.train import TrainingRun

        cfg = Study.existing(NAME).cfg.replace(precision="fp32", device="cpu", micro_batch=2, log_every=1)
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
_OF_DATA = ("report", "judge", "train, resumed", "data", "plan", "export adapter", "evaluate", "sweep", "reference")
# Files that are damaged by value: one of those that one reader reads, for the others are read in the same way.
_BY_VALUE = (
    "config.json",
    "lock.json",
    "data/manifest.json",
    "records/hybrid-s0.json",
    "predictions/hybrid-s0.jsonl",
    "judge/base-vs-hybrid.jsonl",
    "sweeps/hybrid.json",
    "weights/hybrid-s0/peftlib.json",
    "weights/hybrid-s0/adapter_config.json",
    "weights/galore-s0/config.json",
)
# Which commands read a file, by the beginning of its path; the first that fits.
_READERS = {
    "config.json": tuple(COMMANDS),
    "data/": _OF_DATA,
    "records/": ("report", "compare", "evaluate", "train, finished", "export adapter", "judge", "reference"),
    "checkpoints/": ("train, resumed", "report"),
    "weights/hybrid": ("chat adapter", "export adapter", "train, finished"),
    "weights/galore": ("chat merged", "export merged"),
    "predictions/": ("report", "compare", "judge", "evaluate", "export adapter"),
    "judge/": ("report", "judge"),
    "sweeps/": ("sweep", "reference", "report"),
    "lock.json": ("evaluate", "data", "train, resumed"),
    "": ("report", "compare"),
}


def readers_of(name):
    """Names of the commands that read a file of a study, by its path below the study."""
    return next(commands for start, commands in _READERS.items() if name.startswith(start))


def attempt(command, root):
    """('ok', result), ('error', message) of a PeftlibError, or ('raw', exception)."""
    try:
        return "ok", COMMANDS[command](root)
    except PeftlibError as error:
        return "error", str(error)
    except Exception as error:  # noqa: BLE001 - this is what the matrix looks for
        return "raw", error


def _ways(path, *, by_value):
    """[(name, damage), ...] for a file; damage(path) does it. Deterministic."""
    made = [("truncated", _cut), ("empty", lambda p: p.write_bytes(b"")), ("directory", _folder_instead)]
    made += [(f"flipped at {share:.0%}", _flip(share)) for share in (0.2, 0.5, 0.8)]
    if path.suffix in (".json", ".jsonl"):
        made += [("not UTF-8", _insert(b"\xff\xfe")), ("deep", lambda p: p.write_bytes(b"[" * 200_000))]
        made += [(f"is {text}", lambda p, t=text: p.write_text(t)) for text in ("[]", "null", "7", '{"a": 1}', "{}")]
        made += _json_ways(path) if by_value else []
    return made


def _json_ways(path):
    """Damage by value: each key of the first object, and of the objects in it, dropped or of another type."""
    made = [("version 99", _changed(("schema_version",), 99))]
    places = list(_places(_first(path)))
    made += [(f"{'.'.join(place)} dropped", _changed(place, _DROP)) for place in places]
    made += [(f"{'.'.join(place)} of another type", _changed(place, _RETYPE)) for place in places]
    # As a file looks that was written before files had a seal: what its values are is all there is to go by.
    made += [(f"{'.'.join(place)} dropped, unsealed", _changed(place, _DROP, is_sealed=False)) for place in places]
    made += [(f"{'.'.join(place)} retyped, unsealed", _changed(place, _RETYPE, is_sealed=False)) for place in places]
    numbers = [place for place in places if isinstance(_at(_first(path), place), int | float)][:1]
    texts = [place for place in places if isinstance(_at(_first(path), place), str)][:1]
    for place in numbers:
        for odd in (float("nan"), float("inf")):
            made += [(f"{'.'.join(place)} {odd}", _changed(place, odd, is_sealed=False))]
        made += [(f"{'.'.join(place)} 1e999", _changed(place, "1e999", is_sealed=False, is_raw=True))]
    made += [(f"{'.'.join(place)} lone surrogate", _changed(place, "\ud800", is_sealed=False)) for place in texts]
    return made


_DROP, _RETYPE = object(), object()


def _first(path):
    text = path.read_text(encoding="utf-8")
    found = json.loads((text.split("\n")[0] if path.suffix == ".jsonl" else text) or "null")
    return found if isinstance(found, dict) else {}


def _places(value, depth=2):
    for name, part in value.items():
        if name == "seal":
            continue
        yield (name,)
        if isinstance(part, dict) and depth > 1:
            yield from ((name, *rest) for rest in _places(part, depth - 1))


def _at(value, place):
    for name in place:
        value = value[name]
    return value


def _changed(place, new, *, is_sealed=True, is_raw=False):
    def damage(path):
        value = _first(path)
        parent = _at(value, place[:-1])
        if new is _DROP:
            del parent[place[-1]]
        elif new is _RETYPE:
            parent[place[-1]] = _of_another_type(parent[place[-1]])
        else:
            parent[place[-1]] = new
        if not is_sealed:
            value.pop("seal", None)
        text = json.dumps(value)
        if is_raw:
            text = text.replace(json.dumps(new), new)
        if path.suffix == ".jsonl":
            text = "\n".join([text, *path.read_text(encoding="utf-8").split("\n")[1:]])
        path.write_text(text)

    return damage


def _of_another_type(value):
    if isinstance(value, str):
        return 7
    return {"odd": 1} if isinstance(value, list) or value is None else ["odd"] if isinstance(value, dict) else "odd"


def _cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _folder_instead(path):
    path.unlink()
    path.mkdir()


def _flip(share):
    def damage(path):
        content = bytearray(path.read_bytes())
        if content:
            content[min(int(len(content) * share), len(content) - 1)] ^= 0x01
        path.write_bytes(content)

    return damage


def _insert(odd):
    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3] + odd + content[len(content) // 3 :])

    return damage


def cases_of(folder):
    """[(file below the study, name of the damage, damage, command), ...], all of them."""
    made = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("sweeps/") and name.count("/") > 2:
            continue  # below a trial's folder
        for how, damage in _ways(path, by_value=name in _BY_VALUE):
            # A damage of one value costs one command: the others read the file in the same way.
            is_of_a_value = any(word in how for word in ("dropped", "retyped", "of another type"))
            commands = readers_of(name)[:1] if is_of_a_value else readers_of(name)
            made += [(name, how, damage, command) for command in commands]
    return made


def verdict(case, pristine, root, expected):
    """None where a case ends as it should, else what is wrong, in words. `root` is a fresh folder with PEFTLIB_ROOT."""
    name, how, damage, command = case
    shutil.copytree(pristine, root / "runs")
    file = root / "runs" / NAME / name
    damage(file)
    kind, found = attempt(command, root)
    if kind == "raw":
        return f"{name}, {how}, {command}: RAW {type(found).__name__}: {str(found)[:150]}"
    if kind == "error":
        named = any(part in found for part in (file.name, file.parent.name) if part != NAME)
        return None if named and len(found) > 30 else f"{name}, {how}, {command}: NOT NAMED in {found[:250]}"
    if "unsealed" in how or found == expected[command] or (isinstance(found, str) and _is_told(file, found)):
        return None
    return f"{name}, {how}, {command}: CHANGED"


def _is_told(file, text):
    return file.name in text.replace("\\", "") and "does not count" in text
