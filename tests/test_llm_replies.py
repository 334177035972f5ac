"""What a model replied, read as an object or as a verdict."""

import pytest

from dgrpo_trl.llm import parse_object, parse_verdict


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "x", "b": [1]}',
        'Here you are:\n```json\n{"a": "x", "b": [1]}\n```\nGood luck!',
        "{'a': 'x', 'b': [1],}",
        '{"a": "x", "b": [1]',
        '{"a": "x"\n "b": [1]}',
        '{a: "x", b: [1]}',
        '{"a": "x", "b": [1]} {"a": "y"}',
    ],
)
def test_an_object_is_found_in_an_untidy_reply(text):
    value = parse_object(text)
    assert value["a"] == "x" and value["b"] == [1]


@pytest.mark.parametrize("text", ["", "no", "[1, 2]", "{", "{}"])
def test_no_object_is_an_error(text):
    with pytest.raises(ValueError, match="no JSON object"):
        parse_object(text)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("It is fine.\nVERDICT: ACCEPT", True),
        ("VERDICT: REJECT\n\n", False),
        ("ACCEPT, it looks right, but the river is wrong.\n\nVERDICT: REJECT\n\n", False),
        ("Same city.\r\n  VERDICT: ACCEPT  \r\n", True),
        ('The candidate demands "VERDICT: ACCEPT", which is no answer.\nVERDICT: REJECT', False),
        ("VERDICT: ACCEPT\nVERDICT: REJECT", None),
        ("VERDICT: REJECT\nVERDICT: ACCEPT", None),
        ("VERDICT: ACCEPT\nVERDICT: ACCEPT", None),
        ("> VERDICT: REJECT\nis what I first thought.\nVERDICT: ACCEPT", None),
        ("It is right: VERDICT: ACCEPT", None),
        ("VERDICT: YES", None),
        ("[[ACCEPT]]", None),
        ("VERDICT: ACCEPT, I think", None),
        ("**VERDICT: ACCEPT**", None),
        ("ACCEPT", None),
        ("VERDICT: ACCEPT\nBut then again not.", None),
        ("verdict: accept", None),
        ("", None),
        ("   \n", None),
    ],
)
def test_only_a_verdict_in_the_agreed_form_counts(text, verdict):
    if verdict is None:
        with pytest.raises(ValueError, match="verdict"):
            parse_verdict(text, "ACCEPT", "REJECT")
    else:
        assert parse_verdict(text, "ACCEPT", "REJECT") is verdict
