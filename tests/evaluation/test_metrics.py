"""Scores equal sacrebleu's, rouge_score's, nltk's and figures worked by hand."""

import math
import random

import evaluate
import numpy as np
import pytest

from peftlib.core.errors import DataError
from peftlib.evaluation import hf_metrics, metrics, rouge

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "Paris",
    "is",
    "42",
    "capital",
    "of",
    "France",
    ".",
    ",",
    "and",
    "code",
    "x=1;",
    "don't",
    "re-read",
]


def corpus(n, seed, *, shared=0.6):
    """n (answer, reference) pairs of 0-40 words and a few lines, part of the words shared."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        reference = [rng.choice(WORDS) for _ in range(rng.randint(1, 40))]
        answer = [w if rng.random() < shared else rng.choice(WORDS) for w in reference[: rng.randint(0, 40)]]
        joined = ["".join(w + rng.choice((" ", " ", " ", "\n")) for w in side) for side in (answer, reference)]
        pairs.append(tuple(joined))
    return [list(side) for side in zip(*pairs)]


BY_HAND = (["the cat sat on a mat", "Paris is lovely"], ["the cat sat on the mat", "Paris is lovely today"])


def test_scores_equal_a_fixture_worked_by_hand():
    found = hf_metrics.score(*BY_HAND)

    # answer 1: the, cat, sat, on, mat = 5 of 6; the cat, cat sat, sat on = 3 of 5; 2 of 4 triples; 1 of 3 quadruples
    matched, total = (5 + 3, 3 + 2, 2 + 1, 1), (6 + 3, 5 + 2, 4 + 1, 3)
    precision = math.prod(m / t for m, t in zip(matched, total)) ** 0.25
    assert found["bleu4"] == pytest.approx(math.exp(1 - 10 / 9) * precision, abs=1e-9)
    # ROUGE-L: 5 of 6 and 5 of 6; 3 of 3 and 3 of 4
    assert found["rougeL"] == pytest.approx((5 / 6 + 2 * 1 * 0.75 / 1.75) / 2, abs=1e-9)
    assert found["length_ratio"] == pytest.approx(9 / 10)
    assert found["empty_share"] == 0 and found["repetition"] == 0 and found["n"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_chrf_equal_sacrebleu(seed):
    import sacrebleu

    answers, references = corpus(60, seed)
    found = hf_metrics.score(answers, references)
    assert found["bleu4"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score / 100, abs=1e-12)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score / 100, abs=1e-12)
    assert "tok:13a" in found["bleu_signature"] and "smooth:exp" in found["bleu_signature"]


@pytest.mark.parametrize(
    "answers, references",
    [
        ([""], ["a b c d"]),
        (["x y z w"], ["a b c d"]),
        (["a x y z"], ["a b c d"]),  # orders 2 to 4 smoothed
        (["a b"], ["a b"]),  # no triple: undefined, 0
        (["", "a b c d e"], ["a b", "a b c d e"]),
        (["Привет, мир! Как дела сегодня?"], ["Привет, мир! Как дела у вас сегодня?"]),
        (["a &quot;b&quot; c-d 1,000.5"], ['a "b" c-d 1,000.5']),
    ],
)
def test_bleu_equals_sacrebleu_at_the_edges(answers, references):
    import sacrebleu

    expected = sacrebleu.corpus_bleu(answers, [references]).score / 100
    assert hf_metrics.score(answers, references)["bleu4"] == pytest.approx(expected, abs=1e-12)


def test_corpus_bleu_of_many_sums_equals_one_at_a_time():
    rows = hf_metrics.scored(*corpus(40, 7))[1]
    sums = np.stack([rows.bleu[:10].sum(0), rows.bleu.sum(0), np.zeros(10)])
    together = metrics.corpus_bleu(sums)
    assert together.shape == (3,)
    assert together.tolist() == [float(metrics.corpus_bleu(row)) for row in sums]


@pytest.mark.parametrize("seed", range(4))
def test_rouge_equals_rouge_score(seed):
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = corpus(60, seed)
    theirs = [RougeScorer(["rougeL"]).score(reference, answer) for answer, reference in zip(answers, references)]
    rows = hf_metrics.scored(answers, references)[1]
    np.testing.assert_allclose(rows.rougeL, [found["rougeL"].fmeasure for found in theirs], atol=1e-12, rtol=0)
    np.testing.assert_allclose(rows.sample_rougeL, rows.rougeL, atol=0)


def test_rouge_on_long_repetitive_text_equals_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    rng = random.Random(3)
    lines = [" ".join(rng.choice("abc") for _ in range(rng.randint(1, 90))) for _ in range(12)]
    answer, reference = "\n\n".join(lines[:7]), "\n".join(lines[4:])
    theirs = RougeScorer(["rougeL"]).score(reference, answer)
    rows = hf_metrics.scored([answer], [reference])[1]
    assert rows.rougeL[0] == pytest.approx(theirs["rougeL"].fmeasure, abs=1e-12)


def test_words_of_ascii_text_equal_rouge_scores_own():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "".join(map(chr, range(128))) + " Don't re-read C++ x_1 3.14\tEND"
    assert rouge.words(text) == DefaultTokenizer(False).tokenize(text) == rouge.ascii_words(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Привет, мир 42!", ["привет", "мир", "42"]),
        ("Café cafe\u0301", ["café", "café"]),
        ("今天天气 good", ["今", "天", "天", "气", "good"]),
        ("おはよう", ["お", "は", "よ", "う"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("…!—", []),
    ],
)
def test_words_of_other_scripts_are_kept(text, expected):
    assert rouge.words(text) == expected


@pytest.mark.parametrize(
    "text", ["Привет мир, как дела?", "今天天气很好。", "สวัสดีชาวโลก", "おはようございます", "नमस्ते दुनिया कैसे हो"]
)
def test_no_script_is_scored_as_zero(text):
    found = hf_metrics.score([text], [text])
    assert found["rougeL"] == 1.0
    assert found["bleu4"] == pytest.approx(1.0)


def test_bleu_tokenizer_follows_the_references_of_the_whole_set():
    assert metrics.bleu_tokenizer(["plain text", "今天"]) == "13a"
    assert metrics.bleu_tokenizer(["今天天气很好 ok"]) == "zh"
    assert metrics.bleu_tokenizer(["おはよう"]) == "char"
    assert "tok:zh" in hf_metrics.score(["今天"], ["今天"])["bleu_signature"]


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("the cat sat on the mat", "the cat sat on the mat"),
        ("the cat sat on a mat", "the cat sat on the mat"),
        ("the the the the the", "the cat"),
        ("one two", "one two three four five"),
        ("a b c", "a b c"),
        ("nothing shared here", "the cat sat"),
        ("", "the cat"),
        ("the cat", ""),
        ("a much longer answer than the reference was", "a much longer answer"),
        ("Case matters", "case matters"),
        ("a b a b a b a b", "a b a b"),
    ],
)
def test_sentence_bleu_equals_nltk(answer, reference):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    expected = sentence_bleu([reference.split()], answer.split(), smoothing_function=SmoothingFunction().method1)
    assert metrics.sentence_bleu(answer, reference) == pytest.approx(expected, abs=1e-12)


def test_sample_bleu_is_the_mean_over_rows():
    answers, references = corpus(30, 11)
    expected = sum(map(metrics.sentence_bleu, answers, references)) / 30
    assert hf_metrics.score(answers, references)["sample_bleu4"] == pytest.approx(expected, abs=1e-12)


def test_repetition_and_empty_answers_are_counted():
    assert metrics.repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert metrics.repeated_share("x x x x x x x x") == pytest.approx(4 / 5)
    assert metrics.repeated_share("too short") == 0
    found = hf_metrics.score(["", " \n", "a b c d", "a"], ["a"] * 4)
    assert found["empty_share"] == 0.5


def test_rows_of_a_subset_score_as_if_alone():
    answers, references = corpus(30, 5)
    part = hf_metrics.scored(answers, references)[1].subset(np.arange(30) % 3 == 0).scores()
    alone = hf_metrics.score(answers[::3], references[::3])
    assert part == {name: pytest.approx(alone[name], abs=1e-12) for name in part}


@pytest.mark.parametrize(
    "answers, references, message",
    [
        ([], [], "no predictions"),
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        (["a", None], ["a", "b"], "prediction of row 1 is None"),
        (["a"], [["a"]], "reference of row 0"),
        ("text", "text", "predictions must be a list of texts"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(answers, references, message):
    with pytest.raises(DataError, match=message):
        hf_metrics.score(answers, references)


@pytest.mark.parametrize(
    "n, expected", [(0, ""), (1, "  one"), (2, "  one\n two"), (3, "  one\n two three"), (9, "  one\n two three ")]
)
def test_cut_keeps_the_first_words_as_they_stand(n, expected):
    assert metrics.cut_words("  one\n two three ", n) == expected


def test_median_words_of_an_even_number_of_references_is_rounded_up():
    assert metrics.median_words(["a", "a b", "a b c", "a b c d"]) == 3


METRICS = (hf_metrics.Bleu4, hf_metrics.RougeL, hf_metrics.Chrf, hf_metrics.PerSample, hf_metrics.AnswerForm)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Neither a network nor a cache folder that can be written to."""

    def refuse(*args, **settings):
        raise AssertionError("a hub was asked, or a folder made")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("evaluate.module.os.makedirs", refuse)


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_added_row_by_row_computes_what_score_returns(kind, no_hub):
    expected, metric = hf_metrics.score(*BY_HAND), kind()
    for answer, reference in zip(*BY_HAND):
        metric.add(prediction=answer, reference=reference)
    found = metric.compute()
    assert found and found == {name: expected[name] for name in found}
    assert metric.info.description and list(metric.info.features) == ["predictions", "references"]


def test_metrics_combine_into_what_score_returns(no_hub):
    answers, references = BY_HAND
    combined = evaluate.combine([kind() for kind in METRICS])
    found = combined.compute(predictions=answers, references=references)
    assert {"n": 2, **found} == hf_metrics.score(answers, references)
    assert "sacrebleu" in hf_metrics.Bleu4().citation and "ROUGE" in hf_metrics.RougeL().citation


def test_scores_follow_from_the_rows_that_were_scored():
    scores, rows = hf_metrics.scored(*corpus(30, 13))
    assert rows.scores() == {name: scores[name] for name in rows.scores()}
    assert {"n", "chrf", "bleu_signature", "chrf_signature", "rouge_variant"} == set(scores) - set(rows.scores())
