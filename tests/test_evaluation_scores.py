"""Scores of completions by hand, and their intervals."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgrpo_trl.evaluation.scores import (
    METRICS,
    exact_match,
    mentioned,
    score_interval,
    string_match_all,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("completion", "references", "score"),
    [
        ("It is 1234567.", ["1234567"], 1.0),
        ("It is 123456 7.", ["1234567"], 0.0),
        ("snowLAMP, bearwood", ["snowlamp", "BEARWOOD", "moonmill", "palmrain"], 0.5),
        ("ABC", ["A", "BC"], 1.0),
        ("", ["a"], 0.0),
        ("one\ttwo\n", ["one", "three", "two"], 2 / 3),
    ],
)
def test_string_matches_by_hand(completion, references, score):
    assert string_match_all(completion, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("completion", "references", "score"),
    [
        ("Answer: 412", ["412"], 1.0),
        ("1,000.", ["7", "1000"], 1.0),
        (r"So \boxed{Clara}", ["Clara"], 1.0),
        ("It is 412", ["412"], 0.0),
        ("412 413", ["412"], 0.0),
        ("", ["412"], 0.0),
    ],
)
def test_exact_matches_by_hand(completion, references, score):
    assert exact_match(completion, references) == score


def test_scores_without_references_are_refused():
    for references in ([], "text"):
        with pytest.raises(ValueError, match="`references` is"):
            string_match_all("a", references)
    for references in ([], ["", "..."]):
        with pytest.raises(ValueError, match="None has a letter"):
            exact_match("a", references)


@given(
    st.text(st.characters(codec="utf-8")),
    st.lists(st.text(string.ascii_letters + string.digits, min_size=1), min_size=1),
)
def test_scores_are_shares(completion, references):
    assert all(0 <= metric(completion, references) <= 1 for metric in METRICS.values())
    assert string_match_all(completion + " ".join(references), references) == 1.0


REFERENCES = ["snowlamp", "BEARWOOD", "moonmill", "palmrain"]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("snowlamp, BEARWOOD, moonmill, palmrain", 1.0),
        ("palmrain moonmill BEARWOOD snowlamp", 1.0),
        ("snowlampBEARWOODmoonmillpalmrain", 1.0),
        ("I looked with care.\n\n**snowlamp, BEARWOOD, moonmill, palmrain**, and nothing else.", 1.0),
        ("<think>snowlamp, BEARWOOD, moonmill, palmrain</think> I do not know.", 1.0),
        ("SNOWLAMP, BEARWOOD, MOONMILL, PALMRAIN", 1.0),
        ("snowlamp, bearwood, moonmill, palmrain", 1.0),
        ("Snowlamp, Bearwood, Moonmill, Palmrain", 1.0),
        ("snowlamp\tBEARWOOD\tmoonmill\tpalmrain\x00\x1f", 1.0),
        ("  \nsnowlamp, BEARWOOD, moonmill, palmrain  ", 1.0),
        ("snowlamp, BEARWOOD", 0.5),
        ("xsnowlamp BEARWOODy", 0.5),
        ("snowlamp", 0.25),
        ("palmrain palmrain", 0.25),
        ("snowlam BEARWOO moonmil palmrai", 0.0),
        ("s n o w l a m p B E A R W O O D m o o n m i l l p a l m r a i n", 0.0),
        ("pmalwons", 0.0),
        ("1234567 ABCDE snowlamp ...", 0.25),
        ("Below: snowlamp BEARWOOD moonmill palmrain end.", 1.0),
        ("", 0.0),
        (" \n", 0.0),
    ],
)
def test_scores_of_ruler_are_those_of_the_harness(completion, score):
    """Recorded from `process_results` of its RULER tasks (lm-evaluation-harness 0.4.13)."""
    assert string_match_all(completion, REFERENCES) == score


@pytest.mark.parametrize(
    ("num_correct", "num_rows", "expected"),
    [  # by hand: centre (p + z2/2n) / (1 + z2/n), z2 = 3.8415
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
        (81, 263, (0.2553, 0.3662)),
    ],
)
def test_wilson_interval_of_known_cases(num_correct, num_rows, expected):
    assert wilson_interval(num_correct, num_rows) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval_holds_the_share_itself_at_both_ends():
    for num_rows in range(1, 200):
        assert wilson_interval(num_rows, num_rows)[1] == 1.0 and wilson_interval(0, num_rows)[0] == 0.0


@pytest.mark.parametrize(("num_correct", "num_rows"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_rejects_impossible_counts(num_correct, num_rows):
    with pytest.raises(ValueError, match="num_correct"):
        wilson_interval(num_correct, num_rows)


@pytest.mark.parametrize(
    ("completion", "exact", "is_mentioned"),
    [
        ("412", True, True),
        (" 412.\n", True, True),
        ("The church has 412 windows.", False, True),
        ("4123", False, False),
        ("412 or 413", False, True),
        ("", False, False),
    ],
)
def test_exact_and_mentioned_answers(completion, exact, is_mentioned):
    assert (exact_match(completion, ["412"]) == 1.0, mentioned(completion, ["412"]) == 1.0) == (exact, is_mentioned)


def test_intervals_are_wilsons_of_shares_and_a_bootstrap_of_other_means():
    assert score_interval([1.0] * 5 + [0.0] * 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = score_interval([0.0, 0.5, 1.0] * 100)
    # Standard error of the mean: sqrt(1/6 / 300) = 0.0236
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.0236, 0.5 + 1.96 * 0.0236), abs=0.005)
    assert score_interval([0.5] * 4) == (0.5, 0.5)
