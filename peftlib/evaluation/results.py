"""A study's runs with their scores: records and predictions are read, checked against the test rows, and scored.

Nothing is written. Files that do not match raise errors with their names and values.
"""

from dataclasses import dataclass, field
from functools import partial

from peftlib import data
from peftlib.core.errors import StudyError
from peftlib.core.record import read as read_record
from peftlib.core.record import require_fields
from peftlib.evaluation import forgetting, metrics
from peftlib.evaluation.predictions import read_predictions, require_unchanged
from peftlib.methods import BASE, study_order

BASE_CUT = "base (cut)"  # base's answers cut at the median reference length


@dataclass(frozen=True)
class Run:
    """One record and, if it was evaluated, its answers in the order of the test rows and their scores."""

    record: dict
    answers: list | None = field(default=None, repr=False)  # of text
    rows: metrics.RowScores | None = field(default=None, repr=False)
    scores: dict | None = field(default=None, repr=False)  # as hf_metrics.score returns
    n_tokens: list | None = field(default=None, repr=False)  # of each answer
    finish_reasons: list | None = field(default=None, repr=False)  # 'stop', or 'length' at the token limit

    @property
    def name(self):
        return f"{self.record['method']} (seed {self.record['seed']})"

    @property
    def is_scored(self):
        return self.rows is not None

    @property
    def is_external(self):
        """Whether its model was trained elsewhere, see evaluate.evaluate_path."""
        return bool(self.record.get("trained_elsewhere"))

    @property
    def truncated_share(self):
        """Share of the answers that reached the token limit, or None."""
        return self.finish_reasons and self.finish_reasons.count("length") / len(self.finish_reasons)

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
        """The GeneralLoss of the untrained model, rounded to the method's 4 bits, or None."""
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
    """The ScoredStudy of a study folder. StudyError: no data, no records, or files that do not match."""
    from peftlib.evaluation.hf_metrics import scored  # imports evaluate, which takes seconds

    split_hash = study.manifest()["split_hash"]
    records = _records_of(study, split_hash)
    test_rows = list(data.load_split(study.data_dir, "test"))
    references = [row["messages"][-1]["content"] for row in test_rows]
    tokenizer = metrics.bleu_tokenizer(references)
    score = partial(scored, references=references, tokenizer=tokenizer)
    runs = [_run(study, record, test_rows, score) for record in records]
    cut_at = metrics.median_words(references)
    base = next((run for run in runs if run.record["method"] == BASE and run.is_scored), None)
    base_cut = base and score([metrics.cut_words(answer, cut_at) for answer in base.answers])[1]
    return ScoredStudy(test_rows, references, runs, split_hash, tokenizer, cut_at, base_cut)


def prompt_text(row):
    """The prompt of a test row: its only turn before the reference, or all of them with their roles."""
    turns = row["messages"][:-1]
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in turns)


def _records_of(study, split_hash):
    """[record, ...], base first. StudyError: none, a missing field, a copy, or one of another split."""
    paths = sorted((study.folder / "records").glob("*.json"))
    if not paths:
        raise StudyError(f"no records in {study.folder / 'records'}: run 04_eval, or train a method, first")
    found = {path: read_record(path) for path in paths}
    for path, record in found.items():
        require_fields(record, path)
        if path != study.record_path(record["method"], record["seed"]):
            raise StudyError(f"{path} duplicates another record: both are {Run(record).name}; delete it")
    hashes = {study.manifest_path: split_hash, **{path: record["split_hash"] for path, record in found.items()}}
    if len(set(hashes.values())) > 1:
        listed = "; ".join(f"{path} has {value}" for path, value in hashes.items())
        raise StudyError(
            f"these runs used different test rows and cannot be compared: split_hash differs: {listed}. "
            "Train and evaluate these methods again on one split, or use another study name."
        )
    return sorted(found.values(), key=lambda record: (study_order(record["method"]), record["seed"]))


def _run(study, record, test_rows, score):
    path = study.predictions_path(record["method"], record["seed"])
    # An interrupted run or incomplete answers have no score, which is not an error.
    if record["status"] != "ok" or record["evaluation"] is None or not path.exists():
        return Run(record)
    require_unchanged(path, record)
    found = read_predictions(path, test_rows, record["split_hash"])
    answers, n_tokens, reasons = ([row[name] for row in found] for name in ("answer", "n_tokens", "finish_reason"))
    scores, rows = score(answers)
    return Run(record, answers, rows, scores, n_tokens, reasons)
