"""Prompt sets for the judge, MT-Bench and AlpacaEval, and a study's answers to them.

The study keeps the questions in prompts/<set>/questions.json and its runs' answers next to them, one file per turn. A
conversation with two turns is answered turn by turn and judged as a whole.
"""

from pathlib import Path

from peftlib.core import record as records
from peftlib.core.config import short_hash
from peftlib.core.env import resolve_device
from peftlib.core.errors import ConfigError, DataError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import require_shape
from peftlib.data.dedup import prompt_sha256
from peftlib.data.readers import read_rows
from peftlib.evaluation.evaluate import answer_into, evaluation_dtype, load_model
from peftlib.evaluation.predictions import OtherAnswersError, Predictions
from peftlib.methods import BASE
from peftlib.storage.lock import held

# {set: (its file, number of questions, where the hub has it)}
SETS = {
    "mt_bench": ("question.jsonl", 80, ("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl")),
    "alpaca_eval": ("alpaca_eval.json", 805, ("tatsu-lab/alpaca_eval", "dataset", "alpaca_eval.json")),
}
_SHAPE = {"questions": [{"id": str, "source": str, "turns": [str]}]}


def rows_of(study, name, folder=None, *, is_kept=True):
    """[row, ...] of a set, in the form of test rows without a reference: source, id, messages, prompt_sha256.

    folder: contains the set's file, or a subfolder with the set's name that does; None: the study's copy, else the hub.
    is_kept: save the questions in the study.
    ConfigError: no such set. DataError: no such file, a file of another set, or the hub is unreachable.
    StudyError: the study has other questions.
    """
    if name not in SETS:
        raise ConfigError(f"prompts {name!r} is unknown: use {' or '.join(SETS)}")
    path = path_of(study, name)
    kept = require_shape(read_json(path), _SHAPE, path)["questions"] if path.exists() else None
    if kept is None or folder is not None:
        questions = _questions(name, folder)
        if kept not in (None, questions):
            raise StudyError(f"{path} holds different questions from {folder}: answers to both cannot be compared")
        if kept is None and is_kept:
            write_json(path, {"questions": questions})
        kept = questions
    return [_row(f"{name}-{of['id']}", of["source"], of["turns"]) for of in kept]


def path_of(study, name):
    """The file of a set's questions in a study."""
    return study.folder / "prompts" / name / "questions.json"


def _questions(name, folder):
    file, n_questions, _ = SETS[name]
    path, found = _fetched(name) if folder is None else Path(folder).expanduser() / file, []
    if not path.exists() and folder is not None:
        path = Path(folder).expanduser() / name / file
    for number, row in read_rows(path):
        turns = row.get("turns", [row.get("instruction")]) if isinstance(row, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise DataError(f"{path}: row {number} has neither 'turns' nor an 'instruction': download the file again")
        of, kind = str(row.get("question_id", number)), str(row.get("category") or row.get("dataset") or name)
        found.append({"id": of, "source": kind, "turns": turns})
    if len(found) != n_questions:
        raise DataError(f"{path} holds {len(found)} questions, {name} has {n_questions}: download the file again")
    return found


def _fetched(name):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    file, _, (repository, kind, path) = SETS[name]
    try:
        return Path(hf_hub_download(repository, path, repo_type=kind))
    except (OSError, HfHubHTTPError) as error:
        said = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"{name} could not be downloaded from {repository} ({said}): use --data DIR with {file}"
        ) from None


def _row(of, source, turns, answers=()):
    """A row up to the turn after `answers`; without answers, as for the judge, all of the user's turns."""
    messages = [{"role": "user", "content": turn} for turn in turns]
    for at, text in enumerate(answers):
        messages.insert(2 * at + 1, {"role": "assistant", "content": text})
    digest = prompt_sha256([turn["content"] for turn in messages])
    messages = [*messages, {"role": "assistant", "content": ""}]
    return {"source": source, "id": of, "messages": messages, "prompt_sha256": digest}


def answers(study, method, seed, name, rows, *, is_asked=True, log=print):
    """{row's id: text} of a run's answers to rows of `rows_of`; is_asked: first generate missing answers.

    Without is_asked, answers from other weights are ignored.
    StudyError: the method is not trained, or the file has answers from other weights. Stopped: this session ends
    soon.
    """
    record = records.load(study, method, seed)
    if record is None and method != BASE:
        raise StudyError(f"no record of {method} (seed {seed}) in {study.folder}: train it first")
    cfg, run = study.cfg, f"{method}-s{seed}"
    made_by = short_hash([(record or {}).get("weights_sha256"), cfg.model, cfg.max_new_tokens])
    turns = [[turn["content"] for turn in row["messages"][:-1]] for row in rows]
    paths = [study.folder / "prompts" / name / f"{run}-{n}.jsonl" for n in range(1, max(map(len, turns)) + 1)]
    try:
        files = [Predictions(path, made_by) for path in paths]
    except OtherAnswersError:
        if not is_asked:
            return {}
        place = study.folder / "prompts" / name
        raise StudyError(
            f"{place} holds answers of {run} from before it was retrained: move {run}-*.jsonl away"
        ) from None
    model = None
    for n, kept in enumerate(files):
        asked = [
            _row(row["id"], row["source"], own[: n + 1], [file.rows[row["id"]]["answer"] for file in files[:n]])
            for row, own in zip(rows, turns)
            if len(own) > n and all(row["id"] in file.rows for file in files[:n])
        ]
        if is_asked and any(row["id"] not in kept.rows for row in asked):
            with held(study.folder, f"answering {name} with {method}", run=run, log=log):
                device = resolve_device(cfg.device)
                dtype = evaluation_dtype(device)[0]
                model = model or load_model(study, method, seed, device=device, dtype=dtype, log=log)
                answer_into(kept, cfg, model, asked, log=log)
    whole = {}
    for row, own in zip(rows, turns):
        said = [file.rows[row["id"]]["answer"] for file in files[: len(own)] if row["id"] in file.rows]
        if len(said) == len(own):
            each = (f"(to turn {n}) {text}" for n, text in enumerate(said, 1))
            whole[row["id"]] = said[0] if len(said) == 1 else "\n\n".join(each)
    return whole
