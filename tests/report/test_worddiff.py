"""Marked words are the reference's, in its order, and no text is lost on the way."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlib.evaluation import rouge
from peftlib.report.answers import OTHER, SAME, marked


def same(answer, reference):
    return [text.strip() for kind, text in marked(answer, reference) if kind == SAME]


def test_words_of_the_reference_are_found_whatever_their_case_and_punctuation():
    assert marked("It is: PARIS, of course", "Paris of the kings") == [
        (OTHER, "It is: "),
        (SAME, "PARIS, of "),
        (OTHER, "course"),
    ]


@pytest.mark.parametrize(
    "answer, reference, found",
    [
        ("two one", "one two", ["one"]),  # in its order: never both
        ("a b c x d", "a b c d", ["a b c", "d"]),
        ("no", "yes", []),
        ("", "yes", []),
        ("the the the", "the", ["the"]),
        ("北京是首都", "首都是北京", ["首都"]),
        ("caf\u00e9 noir", "cafe\u0301 blanc", ["caf\u00e9"]),  # composed and decomposed
        ("हिन्दी में", "हिन्दी भाषा", ["हिन्दी"]),
        ("... !", "yes", []),
    ],
)
def test_what_is_shared_is_marked(answer, reference, found):
    assert same(answer, reference) == found


@given(st.text(alphabet=st.sampled_from("ab ,.\n\u0301éß北の")), st.text(alphabet=st.sampled_from("ab ,é北")))
def test_the_parts_join_to_the_answer_and_never_share_more_than_rouge_counts(answer, reference):
    parts = marked(answer, reference)
    assert "".join(text for _, text in parts) == answer
    assert all(one[0] != other[0] for one, other in itertools.pairwise(parts))
    words = [w for kind, text in parts if kind == SAME for w in rouge.words(text)]
    own, wanted = rouge.words(answer), rouge.words(reference)
    assert len(words) <= round(rouge.rouge_l(own, wanted) * (len(own) + len(wanted)) / 2)


@given(st.text(alphabet=st.sampled_from("ab ,.\n\u0301é北の")))
def test_a_text_shares_all_its_words_with_itself(text):
    assert all(kind == SAME for kind, part in marked(text, text) if rouge.words(part))
