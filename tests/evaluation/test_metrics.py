"""Scores equal sacrebleu's, rouge_score's, nltk's and figures worked by hand."""

import math
import random

import numpy as np
import pytest

from peftlib.core.errors import DataError
from peftlib.evaluation import metrics, rouge

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
    found = metrics.score(*BY_HAND)

    # answer 1: the, cat, sat, on, mat = 5 of 6; the cat, cat sat, sat on = 3 of 5; 2 of 4 triples; 1 of 3 quadruples
    matched, total = (5 + 3, 3 + 2, 2 + 1, 1), (6 + 3, 5 + 2, 4 + 1, 3)
    precision = math.prod(m / t for m, t in zip(matched, total)) ** 0.25
    assert found["bleu4"] == pytest.approx(math.exp(1 - 10 / 9) * precision, abs=1e-9)
    # ROUGE-L: 5 of 6 and 5 of 6; 3 of 3 and 3 of 4
    assert found["rougeL"] == pytest.approx((5 / 6 + 2 * 1 * 0.75 / 1.75) / 2, abs=1e-9)
    assert found["rouge1"] == pytest.approx((5 / 6 + 6 / 7) / 2, abs=1e-9)
    assert found["rouge2"] == pytest.approx((3 / 5 + 2 * 1 * (2 / 3) / (5 / 3)) / 2, abs=1e-9)
    assert found["length_ratio"] == pytest.approx(9 / 10)
    assert found["empty_share"] == 0 and found["repetition"] == 0 and found["n"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_chrf_equal_sacrebleu(seed):
    import sacrebleu

    answers, references = corpus(60, seed)
    found = metrics.score(answers, references)
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
    assert metrics.score(answers, references)["bleu4"] == pytest.approx(expected, abs=1e-12)


def test_corpus_bleu_of_many_sums_equals_one_at_a_time():
    rows = metrics.row_scores(*corpus(40, 7))
    sums = np.stack([rows.bleu[:10].sum(0), rows.bleu.sum(0), np.zeros(10)])
    together = metrics.corpus_bleu(sums)
    assert together.shape == (3,)
    assert together.tolist() == [float(metrics.corpus_bleu(row)) for row in sums]


@pytest.mark.parametrize("seed", range(4))
def test_rouge_equals_rouge_score(seed):
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    answers, references = corpus(60, seed)
    theirs = [RougeScorer(names).score(reference, answer) for answer, reference in zip(answers, references)]
    rows = metrics.row_scores(answers, references)
    for name in names:
        expected = [found[name].fmeasure for found in theirs]
        np.testing.assert_allclose(getattr(rows, name), expected, atol=1e-12, rtol=0, err_msg=name)
    np.testing.assert_allclose(rows.sample_rougeL, rows.rougeL, atol=0)


def test_rouge_on_long_repetitive_text_equals_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    rng = random.Random(3)
    lines = [" ".join(rng.choice("abc") for _ in range(rng.randint(1, 90))) for _ in range(12)]
    answer, reference = "\n\n".join(lines[:7]), "\n".join(lines[4:])
    theirs = RougeScorer(["rougeL", "rougeLsum"]).score(reference, answer)
    rows = metrics.row_scores([answer], [reference])
    assert rows.rougeL[0] == pytest.approx(theirs["rougeL"].fmeasure, abs=1e-12)
    assert rows.rougeLsum[0] == pytest.approx(theirs["rougeLsum"].fmeasure, abs=1e-12)


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
    found = metrics.score([text], [text])
    assert found["rougeL"] == found["rouge1"] == 1.0
    assert found["bleu4"] == pytest.approx(1.0)


def test_bleu_tokenizer_follows_the_references_of_the_whole_set():
    assert metrics.bleu_tokenizer(["plain text", "今天"]) == "13a"
    assert metrics.bleu_tokenizer(["今天天气很好 ok"]) == "zh"
    assert metrics.bleu_tokenizer(["おはよう"]) == "char"
    assert "tok:zh" in metrics.score(["今天"], ["今天"])["bleu_signature"]


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
    assert metrics.score(answers, references)["sample_bleu4"] == pytest.approx(expected, abs=1e-12)


def test_repetition_and_empty_answers_are_counted():
    assert metrics.repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert metrics.repeated_share("x x x x x x x x") == pytest.approx(4 / 5)
    assert metrics.repeated_share("too short") == 0
    found = metrics.score(["", " \n", "a b c d", "a"], ["a"] * 4)
    assert found["empty_share"] == 0.5


def test_rows_of_a_subset_score_as_if_alone():
    answers, references = corpus(30, 5)
    part = metrics.row_scores(answers, references).subset(np.arange(30) % 3 == 0).scores()
    alone = metrics.score(answers[::3], references[::3])
    assert part == {name: pytest.approx(alone[name], abs=1e-12) for name in part}


@pytest.mark.parametrize(
    "answers, references, message",
    [
        ([], [], "no predictions"),
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        (["a", None], ["a", "b"], "prediction of row 1 is None"),
        (["a"], [["a"]], "reference of row 0"),
        ("text", "text", "predictions is one text"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(answers, references, message):
    with pytest.raises(DataError, match=message):
        metrics.score(answers, references)


@pytest.mark.parametrize(
    "n, expected", [(0, ""), (1, "  one"), (2, "  one\n two"), (3, "  one\n two three"), (9, "  one\n two three ")]
)
def test_cut_keeps_the_first_words_as_they_stand(n, expected):
    assert metrics.cut_words("  one\n two three ", n) == expected


def test_median_words_of_an_even_number_of_references_is_rounded_up():
    assert metrics.median_words(["a", "a b", "a b c", "a b c d"]) == 3


def test_evaluate_metrics_need_no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from peftlib.evaluation.hf_metrics import AnswerScores, Bleu4, Chrf, Rouge

    expected = metrics.score(*BY_HAND)
    answers, references = BY_HAND
    assert AnswerScores().compute(predictions=answers, references=references) == expected
    for kind in (Bleu4, Rouge, Chrf):
        metric = kind()
        for answer, reference in zip(answers, references):
            metric.add(prediction=answer, reference=reference)
        found = metric.compute()
        assert found == {key: expected[key] for key in kind.keys}
