"""RULER's tasks are those of lm-evaluation-harness 0.4.13: recorded from its prompts of 1024 and 4096 tokens."""

import re
from collections import Counter

import pytest
from test_evaluation_ruler import NEEDLE, NEEDLE_TASKS, build_words_tokenizer, content, entries

from dgrpo_trl.evaluation.haystack import NOISE_LINE
from dgrpo_trl.evaluation.ruler import make_samples
from dgrpo_trl.evaluation.samples import Sample


MEMORIZE = "Make sure to memorize it. I will quiz you about the {kind} afterwards."
HARNESS = {
    # First line, last line, beginning of the answer, longest completion in tokens
    "one needle": (
        f"A special magic {{kind}} is hidden within the following text. {MEMORIZE}",
        "What is the special magic {kind} for {query} mentioned in the provided text?",
        "The special magic {kind} for {query} mentioned in the provided text is",
        128,
    ),
    "needles": (
        f"Some special magic {{kind}} are hidden within the following text. {MEMORIZE}",
        "What are all the special magic {kind} for {query} mentioned in the provided text?",
        "The special magic {kind} for {query} mentioned in the provided text are",
        128,
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.",
        "Question: Find all variables that are assigned the value {value} in the text above.",
        # The harness writes "assgined"
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        "value {value}, they are:",
        30,
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.",
        "Question: What are the 10 most common words in the above list?",
        "Answer: The top 10 words that appear most often in the list are:",
        120,
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {words}",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        50,
    ),
}
RECORDED_LENGTHS = (1024, 4096)


@pytest.fixture(scope="module")
def words_tokenizer():
    return build_words_tokenizer()


def assert_recorded(name: str, sample: Sample, text: str, **values: str) -> list[str]:
    """The lines between the first and the last one, which are those recorded."""
    first, *lines, last = text.split("\n")
    expected = [part.format(**values) if isinstance(part, str) else part for part in HARNESS[name]]
    assert [first, last, sample.answer_prefix, sample.max_new_tokens] == expected
    return lines


@pytest.mark.parametrize("length", RECORDED_LENGTHS)
@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needle_prompts_are_those_of_the_harness(task, length, words_tokenizer):
    kind = "uuids" if task in ("niah_single_3", "niah_multikey_3") else "numbers"
    for sample in make_samples(task, length, 4, words_tokenizer):
        keys = [key for found, key, value in NEEDLE.findall(content(sample)) if value in sample.references]
        if len(sample.references) == 1:
            lines = assert_recorded("one needle", sample, content(sample), kind=kind[:-1], query=keys[0])
        else:
            keys = list(dict.fromkeys(keys))
            order = sorted(keys, key=sample.answer_prefix.index)
            query = order[0] if len(order) == 1 else f"{', '.join(order[:-1])}, and {order[-1]}"
            lines = assert_recorded("needles", sample, content(sample), kind=kind, query=query)
        assert all(len(value) == (36 if kind == "uuids" else 7) for value in sample.references)
        num_needles = sum(bool(NEEDLE.fullmatch(line)) for line in lines)
        if task in ("niah_multikey_2", "niah_multikey_3"):
            assert num_needles == len(lines)
        elif task == "niah_single_1":
            assert num_needles == 1  # the last line is cut to fit
            assert {line for line in lines[:-1] if not NEEDLE.fullmatch(line)} == {NOISE_LINE}


@pytest.mark.parametrize("length", RECORDED_LENGTHS)
def test_chains_of_variables_are_those_of_the_harness(length, words_tokenizer):
    def assignments(text: str) -> list[tuple[str, str]]:
        return re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text)

    for sample in make_samples("vt", length, 4, words_tokenizer):
        example, asked = content(sample).split("\n\nMemorize and track")
        chain = assignments(asked)
        lines = assert_recorded("vt", sample, f"Memorize and track{asked}", value=chain[0][1])
        assert NOISE_LINE in lines and NOISE_LINE in example
        assert [name for name, _ in chain] == list(sample.references) and len(sample.references) == 5
        assert [value for _, value in chain[1:]] == list(sample.references[:-1])
        assert {len(name) for name in sample.references} == {5} == {len(chain[0][1])}
        example_chain = assignments(example)
        assert example.split("they are:")[1].split() == [name for name, _ in example_chain]
        assert len(example_chain) == 5 and {len(name) for name, _ in example_chain} == {3}


# From the length to how often a common word and another occurs, in the list, and in its example with how many others
COMMON_WORDS = {1024: ((6, 1), (3, 1, 10)), 4096: ((30, 3), (10, 3, 30))}


@pytest.mark.parametrize("length", RECORDED_LENGTHS)
def test_lists_of_common_words_and_their_examples_are_those_of_the_harness(length, words_tokenizer):
    (common, other), (example_common, example_other, num_others) = COMMON_WORDS[length]
    for sample in make_samples("cwe", length, 4, words_tokenizer):
        example, asked = (f"Below is{part}".rstrip() for part in content(sample).split("Below is")[1:])
        (words,) = assert_recorded("cwe", sample, asked)
        counts = Counter(entries(words))
        assert {counts[word] for word in sample.references} == {common} and set(counts.values()) == {common, other}
        assert list(counts.values()).count(common) == 10
        question, _, answer = example.partition(f" {sample.answer_prefix} ")
        (words,) = assert_recorded("cwe", sample, question)
        counts = Counter(entries(words))
        assert Counter(counts.values()) == {example_common: 10, example_other: num_others}
        assert {counts[word] for word in entries(answer)} == {example_common}


@pytest.mark.parametrize("length", RECORDED_LENGTHS)
def test_coded_words_are_as_frequent_as_in_the_harness(length, words_tokenizer):
    zeta_2 = 3.141592653589793**2 / 6
    for sample in make_samples("fwe", length, 4, words_tokenizer):
        coded = content(sample).partition("coded words. ")[2].split("\n")[0]
        assert assert_recorded("fwe", sample, content(sample), words=coded) == []
        ranked = Counter(coded.split()).most_common(5)
        assert ranked[0][0] == "..." and {word for word, _ in ranked[1:4]} == set(sample.references)
        assert {len(word) for word in sample.references} == {6} and len(sample.references) == 3
        # The counts are those of one number of words, cut down to whole ones: n / zeta(2) / k^2
        numbers = range(int(ranked[0][1] * zeta_2), int((ranked[0][1] + 1) * zeta_2) + 1)
        expected = [[int(n * rank**-2.0 / zeta_2) for rank in range(1, 6)] for n in numbers]
        assert [count for _, count in ranked] in expected
