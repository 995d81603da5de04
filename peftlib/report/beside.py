"""What a report sets beside its own scores: a language model's verdicts, and the original study's figures."""

from peftlib.evaluation.comparison import mean_of
from peftlib.report.document import Heading, Paragraph, Table
from peftlib.report.notes import UNKNOWN

# What the study this one grew from printed: mean over its 5 samples of each sample's BLEU-4 and ROUGE-L.
_ORIGINAL = {"base": (0.0085, 0.1355), "qlora": (0.0227, 0.1632)}
_ORIGINAL_SAMPLES = 5
_ORIGINAL_HEADER = ("study", "method", "samples", "BLEU-4 per sample", "ROUGE-L per sample")
_JUDGED_HEADER = (
    "pair",
    "judge",
    "win rate (95 %)",
    "rows",
    "won",
    "tied",
    "lost",
    "position bias",
    "first chosen",
    "malformed",
)


def judged_blocks(report):
    """The table of a judge's verdicts and how to read it."""
    rows = []
    for found in report.judged:
        rate = found.win_rate
        wins = UNKNOWN if rate is None else f"{rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f})"
        counts = (found.n_rows, found.wins, found.ties, found.losses)
        known = (found.position_bias, found.first_share)
        shares = [UNKNOWN if share is None else f"{share:.1%}" for share in known]
        rows.append(
            (f"{found.b} against {found.a}", found.judge, wins, *map(str, counts), *shares, str(found.n_malformed))
        )
    if rows:
        yield Table(_JUDGED_HEADER, tuple(rows), n_text=2)
    yield Paragraph(_judged_note(report.n_other_verdicts))


def _judged_note(n_other):
    other = f" {n_other} verdicts on other answers or under another rubric are left out." if n_other else ""
    return (
        "Each row was shown in both orders. Win rate: of the first run of the pair, a tie as a half, interval by "
        "resampling rows; 0.5 inside it means that no difference was found. Position bias: rows whose two verdicts both "
        "took the first answer shown, or both the second. First chosen: of the verdicts that are no tie. Malformed "
        "verdicts are left out with their rows, never guessed. A judge has tastes of its own, and judges its own kind "
        f"kindly.{other}"
    )


def original_blocks(found):
    """Our per-sample scores beside those that the original study printed, quoted and marked as 5 samples."""
    rows = [
        ("original (quoted)", method, f"{_ORIGINAL_SAMPLES} samples", *(f"{value:.4f}" for value in scores))
        for method, scores in _ORIGINAL.items()
    ]
    for method, runs in found.scored.items():
        scores = (
            mean_of(runs, lambda run, name=name: run.rows.scores()[name]) for name in ("sample_bleu4", "sample_rougeL")
        )
        rows.append(("this one", method, f"{len(found.test_rows)} rows", *(f"{value:.4f}" for value in scores)))
    return [
        Heading("Beside the original study"),
        Table(_ORIGINAL_HEADER, tuple(rows), n_text=3),
        Paragraph(
            f"The study this one grew from printed these figures on {_ORIGINAL_SAMPLES} samples. Its smoothing, its "
            "tokenizer and its rows are not known here, so they show the size of such figures and no more."
        ),
    ]
