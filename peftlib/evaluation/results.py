"""A study's runs with their scores: records and predictions read, checked against the test rows, and scored.

Nothing is written here. What does not belong together is refused, naming files and values.
"""

from dataclasses import dataclass, field

from peftlib.core.errors import StudyError
from peftlib.core.files import sha256
from peftlib.core.record import read as read_record
from peftlib.core.record import require_fields
from peftlib.evaluation import forgetting, metrics
from peftlib.evaluation.predictions import lines_of, parsed, wrong
from peftlib.methods import study_order

BASE = "base"
BASE_CUT = "base (cut)"  # base's answers cut at the median reference length
STATUSES = ("ok", "stopped", "failed")


@dataclass(frozen=True)
class Run:
    """One record and, where it was evaluated, its answers in the order of the test rows and their scores."""

    record: dict
    answers: list = field(default=None, repr=False)  # of text
    rows: metrics.RowScores = field(default=None, repr=False)
    truncated_share: float = None  # answers that met the token limit
    chrf: float = None
    n_tokens: list = field(default=None, repr=False)  # of each answer
    finish_reasons: list = field(default=None, repr=False)  # 'stop', or 'length' where it met the limit

    @property
    def name(self):
        return f"{self.record['method']} (seed {self.record['seed']})"

    @property
    def is_scored(self):
        return self.rows is not None

    @property
    def eval_loss(self):
        """Nats per assistant token on the test rows, or None."""
        return self.record["eval_loss"]

    @property
    def general(self):
        """The forgetting.GeneralLoss, or None."""
        return forgetting.of_record(self.record)

    @property
    def rounded(self):
        """The same of the untrained model in the 4 bits that the method holds, or None."""
        return forgetting.rounded_of(self.record)


@dataclass(frozen=True)
class ScoredStudy:
    """test_rows in file order; runs in study order and by seed; base_cut: RowScores or None."""

    test_rows: list
    references: list
    runs: list
    split_hash: str
    tokenizer: str  # of BLEU, chosen from the references
    cut_at_words: int
    base_cut: metrics.RowScores

    @property
    def scored(self):
        """{method: [Run, ...]} of the runs with scores, in order."""
        found = {}
        for run in self.runs:
            if run.is_scored:
                found.setdefault(run.record["method"], []).append(run)
        return found

    @property
    def sources(self):
        """Names of the sources in the order of the test rows."""
        return list(dict.fromkeys(row["source"] for row in self.test_rows))

    def systems(self):
        """{method: [RowScores, ...]} for the bootstrap, base cut at the median reference length included."""
        found = {method: [run.rows for run in runs] for method, runs in self.scored.items()}
        return found if self.base_cut is None else {BASE: found.pop(BASE), BASE_CUT: [self.base_cut], **found}


def load(study):
    """The ScoredStudy of a study folder. StudyError: no data, no records, or any that do not belong together."""
    from peftlib import data

    split_hash = study.manifest()["split_hash"]
    records = read_records(study, split_hash)
    test_rows = list(data.load_split(study.data_dir, "test"))
    references = references_of(test_rows, study.data_dir)
    tokenizer = metrics.bleu_tokenizer(references)
    runs = [_run(study, record, test_rows, references, tokenizer) for record in records]
    cut_at = metrics.median_words(references)
    base = next((run for run in runs if run.record["method"] == BASE and run.is_scored), None)
    base_cut = None
    if base is not None:
        cut = [metrics.cut_words(answer, cut_at) for answer in base.answers]
        base_cut = metrics.row_scores(cut, references, tokenizer=tokenizer)
    return ScoredStudy(test_rows, references, runs, split_hash, tokenizer, cut_at, base_cut)


def references_of(test_rows, folder):
    """[text, ...]: the last turn of each test row. StudyError: a row without one."""
    lacking = [row["id"] for row in test_rows if not _has_reference(row["messages"])]
    if lacking:
        raise StudyError(
            f"{len(lacking)} of {len(test_rows)} test rows in {folder} have no reference, the first {lacking[0]!r}: "
            "nothing was written; build the data again (01_data)"
        )
    return [row["messages"][-1]["content"] for row in test_rows]


def prompt_text(row):
    """What a test row asks: the text of its only turn before the reference, else all turns with their roles."""
    turns = row["messages"][:-1]
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in turns)


def _has_reference(messages):
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and isinstance(last.get("content"), str) and bool(last["content"].strip())


def read_records(study, split_hash):
    """[record, ...], base first. StudyError: none, a missing field, a twin, or one of another split."""
    paths = sorted((study.folder / "records").glob("*.json"))
    if not paths:
        raise StudyError(f"no records in {study.folder / 'records'}: run 04_eval, or train a method, first")
    found = {}
    for path in paths:
        record = _checked_record(path)
        key = (record["method"], record["seed"])
        if key in found:
            raise StudyError(f"{path} and {found[key][0]} are both {key[0]} of seed {key[1]}: delete one")
        found[key] = path, record
    _same_split({str(study.manifest_path): split_hash, **{str(path): r["split_hash"] for path, r in found.values()}})
    records = [record for _, record in found.values()]
    return sorted(records, key=lambda record: (study_order(record["method"]), record["seed"]))


def _checked_record(path):
    record = read_record(path)
    require_fields(record, path)
    if record["status"] not in STATUSES:
        raise StudyError(f"{path} has status {record['status']!r}: use {', '.join(STATUSES)}")
    return record


def _same_split(hashes):
    if len(set(hashes.values())) > 1:
        listed = "; ".join(f"{path} has {value}" for path, value in hashes.items())
        raise StudyError(
            f"not of the same test rows, so not comparable: split_hash differs: {listed}. "
            "Train and evaluate these methods again on one split, or use another study name."
        )


def _run(study, record, test_rows, references, tokenizer):
    path = study.predictions_path(record["method"], record["seed"])
    # A run that was cut, or answers that are not all there yet, have no score: an unknown, not an error.
    if record["status"] != "ok" or record["evaluation"] is None or not path.exists():
        return Run(record)
    require_unchanged(path, record)
    found = read_predictions(path, test_rows, record["split_hash"])
    answers = [row["answer"] for row in found]
    return Run(
        record,
        answers,
        metrics.row_scores(answers, references, tokenizer=tokenizer),
        sum(row["finish_reason"] == "length" for row in found) / len(found),
        metrics.corpus_chrf(answers, references)[0],
        [row["n_tokens"] for row in found],
        [row["finish_reason"] for row in found],
    )


def require_unchanged(path, record):
    """StudyError where a run's predictions are not those that its evaluation left; older evaluations do not say."""
    known = (record["evaluation"] or {}).get("predictions_sha256")
    if known is not None and sha256(path) != known:
        raise wrong(path, "it is not what the evaluation wrote (its SHA-256 differs)")


def read_predictions(path, test_rows, split_hash):
    """[prediction, ...] in the order of the test rows.

    StudyError: a damaged line, a missing field, another split, a row twice, rows that are missing, unknown, or of
    another prompt.
    """
    found = {}
    for number, line in enumerate(lines_of(path), start=1):
        row = parsed(line)
        if isinstance(row, str):
            raise wrong(path, f"line {number} {row}")
        if row["split_hash"] != split_hash:
            raise wrong(path, f"line {number} has split_hash {row['split_hash']}, the test rows have {split_hash}")
        if row["id"] in found:
            raise wrong(path, f"line {number} answers row {row['id']!r} a second time")
        found[row["id"]] = row
    known = {row["id"]: row["prompt_sha256"] for row in test_rows}
    unknown, missing = [i for i in found if i not in known], [i for i in known if i not in found]
    if unknown:
        raise wrong(path, f"{len(unknown)} of {len(found)} answers are to other rows, the first {unknown[0]!r}")
    if missing:
        raise wrong(path, f"{len(missing)} of {len(known)} test rows are not answered, the first {missing[0]!r}")
    other = [i for i in known if found[i]["prompt_sha256"] != known[i]]
    if other:
        raise wrong(path, f"{len(other)} answers are to another prompt, the first to row {other[0]!r}")
    return [found[row["id"]] for row in test_rows]
