"""Our tasks of RULER and those of lm-evaluation-harness: the same questions, the same scores of the same outputs."""

import itertools
import re
from collections import Counter

import pytest


pytest.importorskip("lm_eval")

from test_evaluation_tasks import build_words_tokenizer  # noqa: E402

from dgrpo_trl.evaluation.haystack import NOISE_LINE
from dgrpo_trl.evaluation.ruler import make_samples
from dgrpo_trl.evaluation.scores import string_match_all


NUM_SAMPLES = 4
LENGTHS = (1024, 4096)
# Ours -> the harness's
NAMES = {
    "niah_single_1": "niah_single_1",
    "niah_multikey_2": "niah_multikey_2",
    "vt": "ruler_vt",
    "cwe": "ruler_cwe",
    "fwe": "ruler_fwe",
}
CELLS = [(name, length) for name in NAMES for length in LENGTHS]


# The harness has words of several parts
NEEDLE = re.compile(r"One of the special magic (numbers) for (.+) is: (\S+)\.")
ENTRY = re.compile(r"\d+\. (.+?)(?= \d+\. |$)")


@pytest.fixture(scope="module")
def words_tokenizer():
    """One that knows the harness's words: with too few tokens left for them, it makes empty lists without an error."""
    import wonderwords

    categories = wonderwords.RandomWord()._categories
    return build_words_tokenizer([word for kind in ("noun", "adjective", "verb") for word in categories[kind]])


@pytest.fixture(scope="module")
def harness_tasks(words_tokenizer, tmp_path_factory):
    """The harness's tasks by our names, with a few documents of each length."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    words_tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        import nltk
        import tqdm

        # It would be downloaded on import, and is used for essays alone
        patch.setattr(nltk, "download", lambda *args, **kwargs: True)
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks.ruler import prepare_niah

        # 500 documents of each length are made, each in a loop over `tqdm`
        for module in (tqdm, prepare_niah):
            patch.setattr(module, "tqdm", lambda rows, **kwargs: itertools.islice(rows, NUM_SAMPLES))
        manager = TaskManager(metadata={"max_seq_lengths": list(LENGTHS), "tokenizer": folder})
        loaded = manager.load(list(NAMES.values()))["tasks"]
        return {name: loaded[harness_name] for name, harness_name in NAMES.items()}


def harness_docs(harness_tasks, name: str, length: int) -> list[dict]:
    docs = [doc for doc in harness_tasks[name].test_docs() if doc["max_length"] == length]
    assert len(docs) == NUM_SAMPLES
    return docs


def outputs(references: list[str], prompt: str) -> list[str]:
    """What a model might say: right, in part, wrong, in another case, in other words, nothing."""
    joined = ", ".join(references)
    half = references[: len(references) // 2]
    return [
        joined,
        " ".join(reversed(references)),
        "".join(references),
        f"I looked with care.\n\n**{joined}**, and nothing else.",
        f"<think>{joined}</think> I do not know.",
        joined.upper(),
        joined.lower(),
        joined.title(),
        "\t".join(references) + "\x00\x1f",
        f"  \n{joined}  ",
        ", ".join(half),
        f"x{' '.join(half)}y",
        references[0],
        f"{references[-1]} {references[-1]}",
        " ".join(reference[:-1] for reference in references),
        " ".join(" ".join(reference) for reference in references),
        references[0][::-1],
        "1234567 ABCDE snowlamp ...",
        prompt,
        "",
        " \n",
    ]


@pytest.mark.parametrize(("name", "length"), CELLS)
def test_scores_of_outputs_for_the_documents_of_the_harness_are_the_same(name, length, harness_tasks):
    seen = set()
    for doc in harness_docs(harness_tasks, name, length):
        for output in outputs(doc["outputs"], doc["input"]):
            score = string_match_all(output, doc["outputs"])
            assert score == harness_tasks[name].process_results(doc, [output])[str(length)], output
            seen.add(score)
    assert {0.0, 1.0} < seen or name.startswith("niah")  # those have one reference, and no partial score


@pytest.mark.parametrize(("name", "length"), CELLS)
def test_scores_of_outputs_for_our_samples_are_the_same(name, length, harness_tasks, words_tokenizer):
    for sample in make_samples(name, length, NUM_SAMPLES, words_tokenizer):
        doc = {
            "input": sample.messages[-1]["content"],
            "outputs": list(sample.references),
            "gen_prefix": sample.answer_prefix,
            "max_length": length,
        }
        for output in outputs(doc["outputs"], doc["input"]):
            scores = harness_tasks[name].process_results(doc, [output])
            assert scores[str(length)] == string_match_all(output, sample.references), output


@pytest.mark.parametrize("name", NAMES)
def test_completions_are_as_long(name, harness_tasks, words_tokenizer):
    (sample,) = make_samples(name, 4096, 1, words_tokenizer)
    assert sample.max_new_tokens == harness_tasks[name].config.generation_kwargs["max_gen_toks"]


def pairs(name: str, length: int, harness_tasks, words_tokenizer) -> list[tuple[str, str, list[str]]]:
    """Prompt, beginning of the answer and references: of the harness's documents, then of our samples."""
    theirs = [(doc["input"], doc["gen_prefix"], doc["outputs"]) for doc in harness_docs(harness_tasks, name, length)]
    samples = make_samples(name, length, NUM_SAMPLES, words_tokenizer)
    return theirs + [(s.messages[-1]["content"], s.answer_prefix, list(s.references)) for s in samples]


@pytest.mark.parametrize(("name", "length"), [cell for cell in CELLS if cell[0].startswith("niah")])
def test_needles_and_the_words_around_them_are_the_same(name, length, harness_tasks, words_tokenizer):
    facts = set()
    for prompt, prefix, references in pairs(name, length, harness_tasks, words_tokenizer):
        first, *lines, last = prompt.split("\n")
        needles = [NEEDLE.fullmatch(line) for line in lines]
        (asked,) = [needle for needle in needles if needle and needle[3] in references]
        others = {line for line, needle in zip(lines, needles, strict=True) if needle is None and line in lines[:-1]}
        facts.add(
            (
                first,
                last.replace(asked[2], "KEY"),
                prefix.replace(asked[2], "KEY"),
                asked[1],
                len(references),
                len(references[0]),
                len([needle for needle in needles if needle]) == 1,
                frozenset(others),
            )
        )
    assert len(facts) == 1, facts
    ((*_, is_one_needle, others),) = facts
    assert (is_one_needle, others) == ((True, {NOISE_LINE}) if name == "niah_single_1" else (False, set()))


def assignments(text: str) -> list[tuple[str, str]]:
    return re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text)


@pytest.mark.parametrize("length", LENGTHS)
def test_chains_of_variables_are_the_same(length, harness_tasks, words_tokenizer):
    facts = set()
    for prompt, prefix, references in pairs("vt", length, harness_tasks, words_tokenizer):
        prefix = prefix.replace("assgined", "assigned")
        example, _, asked = prompt.replace("assgined", "assigned").rpartition("Memorize and track")
        chain = assignments(asked)
        assert [name for name, _ in chain] == references
        assert [value for _, value in chain[1:]] == references[:-1]
        assert NOISE_LINE in asked and NOISE_LINE in example
        example_chain = assignments(example)
        assert example.split("they are:")[1].split() == [name for name, _ in example_chain]
        value = chain[0][1]
        facts.add(
            (
                len(references),
                {len(name) for name in references} == {5},
                len(value),
                len(example_chain),
                {len(name) for name, _ in example_chain} == {3},
                asked.strip().split("\n")[0],
                asked.strip().split("\n")[-1].replace(value, "VALUE").strip(),
                prefix.replace(value, "VALUE"),
            )
        )
    assert len(facts) == 1, facts


@pytest.mark.parametrize("length", LENGTHS)
def test_common_words_are_repeated_as_often(length, harness_tasks, words_tokenizer):
    facts = set()
    for prompt, prefix, references in pairs("cwe", length, harness_tasks, words_tokenizer):
        asked = prompt[prompt.rindex("Below is a numbered list") :]
        introduction, words, question = asked.split("\n")
        counts = Counter(ENTRY.findall(words))
        facts.add(
            (
                introduction,
                question,
                prefix,
                frozenset(counts.values()),
                frozenset(counts[word] for word in references),
                list(counts.values()).count(max(counts.values())),
            )
        )
    assert len(facts) == 1, facts


@pytest.mark.parametrize("length", LENGTHS)
def test_the_example_of_common_words_is_the_one_that_the_harness_makes_and_leaves_out(
    length, harness_tasks, words_tokenizer
):
    theirs = [doc["input_example"] for doc in harness_docs(harness_tasks, "cwe", length)]
    samples = make_samples("cwe", length, NUM_SAMPLES, words_tokenizer)
    ours = [prompt[: prompt.rindex("Below is a")] for prompt in (sample.messages[-1]["content"] for sample in samples)]
    facts = set()
    for example in theirs + ours:
        introduction, words, question = example.strip().split("\n")
        counts = Counter(ENTRY.findall(words))
        question, _, answer = question.partition("list are: ")
        if not answer:  # theirs has no space there
            question, _, answer = question.partition("list are:")
        assert {counts[word] for word in ENTRY.findall(answer)} == {max(counts.values())}
        facts.add((introduction, question, frozenset(Counter(counts.values()).items())))
    assert len(facts) == 1, facts


@pytest.mark.parametrize("length", LENGTHS)
def test_coded_words_are_as_frequent(length, harness_tasks, words_tokenizer):
    from scipy.special import zeta

    facts = set()
    for prompt, prefix, references in pairs("fwe", length, harness_tasks, words_tokenizer):
        introduction, _, rest = prompt.partition("coded words. ")
        coded, question = rest.split("\n")
        counts = Counter(coded.split())
        ranked = counts.most_common(5)
        assert ranked[0][0] == "..." and {word for word, _ in ranked[1:4]} == set(references)
        # The counts are those of one number of words, cut down to whole ones: n / zeta(2) / k^2
        num_words = range(int(ranked[0][1] * zeta(2.0)), int((ranked[0][1] + 1) * zeta(2.0)) + 1)
        expected = [[int(n * rank**-2.0 / zeta(2.0)) for rank in range(1, 6)] for n in num_words]
        assert [count for _, count in ranked] in expected
        facts.add((introduction, question, prefix, len(references), frozenset(map(len, references))))
    assert len(facts) == 1, facts
