"""Near-duplicates: exact against brute force, and all of 200 planted pairs found."""

import random

import leaks
import numpy as np
import pytest

from peftlib.data import dedup

WORDS = [f"word{i}" for i in range(3000)]


def conversation(rng, words, turns=2):
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(turns)]


def changed(texts, rng, edits):
    """The turns with `edits` words replaced, left out or put in."""
    turns = [text.split() for text in texts]
    for _ in range(edits):
        turn = rng.choice(turns)
        at = rng.randrange(len(turn))
        turn[at : at + rng.choice([0, 1, 1])] = rng.choice([[], [f"new{rng.random()}"]])
    return [" ".join(turn) for turn in turns]


def as_messages(texts):
    return [{"role": "user", "content": text} for text in texts]


def searched(held_out, others, sample=()):
    """{(i, j)} by the product's index."""
    grams, index = dedup.Grams(sample), dedup.NearIndex()
    for texts in held_out:
        index.add(grams(texts))
    return {(i, j) for j, texts in enumerate(others) for i in index.near(grams(texts))}


def test_all_planted_pairs_are_found_and_nothing_else():
    rng = random.Random(0)
    held_out = [conversation(rng, rng.randrange(40, 120)) for _ in range(600)]
    # One edit touches at most five grams, so of 80 words and more it leaves over 0.8.
    planted = {i: changed(held_out[i], rng, 1) for i in range(0, 600, 3)}
    others = [*planted.values(), *(conversation(rng, 60) for _ in range(600))]
    rng.shuffle(others)
    truth = leaks.near_pairs([as_messages(t) for t in held_out], [as_messages(t) for t in others])
    found = searched(held_out, others)
    assert found == truth
    assert {(i, others.index(texts)) for i, texts in planted.items()} <= truth
    assert len(planted) == 200


@pytest.mark.parametrize("seed", range(4))
def test_search_equals_brute_force_around_the_threshold(seed):
    rng = random.Random(seed)
    held_out = [conversation(rng, rng.randrange(3, 60)) for _ in range(150)]
    others = [changed(texts, rng, rng.randrange(0, 7)) for texts in held_out for _ in range(3)]
    truth = leaks.near_pairs([as_messages(t) for t in held_out], [as_messages(t) for t in others])
    assert searched(held_out, others) == truth
    assert 50 < len(truth) < len(others)


def test_templated_text_is_searched_exactly_too():
    rng = random.Random(1)
    frame = " ".join(rng.choices(WORDS, k=60))
    texts = [[f"{frame} {' '.join(rng.choices(WORDS, k=rng.randrange(1, 40)))}", "yes"] for _ in range(200)]
    truth = leaks.near_pairs([as_messages(t) for t in texts], [as_messages(t) for t in texts])
    assert searched(texts, texts) == truth
    assert searched(texts, texts, sample=texts[:50]) == truth
    assert len(truth) > 1000


def test_rows_that_share_a_template_are_not_compared_one_by_one(monkeypatch):
    rng = random.Random(5)
    frame = " ".join(rng.choices(WORDS, k=60))
    texts = [[f"{frame} {' '.join(rng.choices(WORDS, k=60))}", "yes"] for _ in range(200)]
    compared = []
    real = dedup.jaccard
    monkeypatch.setattr(dedup, "jaccard", lambda a, b: compared.append(1) or real(a, b))
    assert searched(texts, texts, sample=texts[:50]) == {(i, i) for i in range(200)}
    assert len(compared) <= 2 * 200  # each with itself alone, by either reading


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9, 10, 35, 100])
def test_jaccard_of_exactly_the_threshold_is_near(n):
    a = np.arange(9 * n, dtype=np.uint64) * np.uint64(7919)
    shared, own = 8 * n, n  # 8n of 9n + n grams: four fifths
    b = np.concatenate([a[:shared], a[-1] + np.arange(1, own + 1, dtype=np.uint64)])
    index = dedup.NearIndex()
    index.add([a, a])
    assert dedup.jaccard(a, b) == pytest.approx(0.8)
    assert index.near([b, b]) == [0]


def test_short_texts_are_one_gram():
    assert searched([["Yes!", "No."]], [["yes", "no"], ["no", "yes"], ["Yes! ", " No."]]) == {(0, 0), (0, 2)}
    assert searched([["?!", "..."]], [["?!", "..."], ["...", "?!"]]) == {(0, 0)}


def test_a_forgotten_word_cache_changes_nothing(monkeypatch):
    rng = random.Random(2)
    texts = [conversation(rng, 50) for _ in range(20)]
    grams = dedup.Grams()
    whole = [grams(t) for t in texts]
    monkeypatch.setattr(dedup, "_WORDS_REMEMBERED", 10)
    grams = dedup.Grams()
    for before, text in zip(whole, texts, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(before, grams(text), strict=True))


@pytest.mark.parametrize("other", ["hello  WORLD", "Hello\n world ", "ＨＥＬＬＯ world"])
def test_prompts_are_compared_without_case_space_and_width(other):
    for digest in (dedup.prompt_sha256, dedup.prompt_key):
        assert digest(["Hello world"]) == digest([other])
        assert digest(["Hello world"]) != digest(["Hello, world"])


def test_the_digest_in_files_stays_what_it_was():
    known = "323db6db9893f0092855fe9dd73c58724f1c67dd1f5e4e9c1d70b93382664587"
    assert dedup.prompt_sha256(["Say 'so.'", "“No”"]) == known


@pytest.mark.parametrize(
    "one, other",
    [
        ("Define the word 'serendipity.'", "Define the word 'serendipity'."),
        ('Who said "Eureka?"', 'who said "Eureka"?'),
        ("Who said “Eureka?”", 'who said "Eureka?"'),
        ("Explain 'so,' and 'then.'", "Explain ‘so’, and ‘then’."),
    ],
)
def test_prompts_are_compared_without_the_kind_of_quotes_and_their_order_with_stops(one, other):
    assert dedup.prompt_key([one]) == dedup.prompt_key([other])


def test_prompts_with_other_quotes_or_stops_are_others():
    texts = ["say 'so'.", "say so.", "say 'so'", "say 'so'!", "say 's'o.", "say 'so' ."]
    assert len({dedup.prompt_key([text]) for text in texts}) == len(texts)
