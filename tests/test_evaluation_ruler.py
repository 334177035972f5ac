"""RULER's tasks: what the prompts contain, and how long they are."""

import copy
import re
import string
from collections import Counter
from random import Random

import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast

from dgrpo_trl.evaluation.generation import bind_chat_template_kwargs
from dgrpo_trl.evaluation.haystack import NEEDLES, NOISE, NOISE_LINE, Haystack
from dgrpo_trl.evaluation.overlap import shared_ngrams
from dgrpo_trl.evaluation.ruler import ADJECTIVES, COMPOUNDS, NOUNS, RULER_TASKS, fit_units, make_samples
from dgrpo_trl.evaluation.samples import Sample, prompt_text
from dgrpo_trl.evaluation.scores import exact_match, string_match_all


PROSE = " ".join(
    f"In the year {1500 + i} the {ADJECTIVES[i]} people of the town built a {NOUNS[i]} by the river. "
    f"Its {NOUNS[-i - 1]} was of stone, and nobody knew why."
    for i in range(60)
)
TEXT = Haystack.from_text(PROSE)
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
NEEDLE_TASKS = [task for task in RULER_TASKS if task.startswith("niah")]
# Those that the haystack changes
TEXT_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
# The smallest round length that fits each task with the vocabulary of `words_tokenizer`
LENGTH = 1024


def build_words_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary: about one token per word, where conftest's has about one for two characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = [PROSE, NOISE_LINE, "user assistant", " ".join(f"{number}." for number in range(1000))]
    text += [f"{noun} {noun}{noun}" for noun in NOUNS]
    text += [make_samples(task, 4096, 1, build_tokenizer())[0].messages[0]["content"] for task in ("vt", "fwe")]
    tokenizer.train_from_iterator(text * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def words_tokenizer():
    return build_words_tokenizer()


def content(sample: Sample) -> str:
    return sample.messages[-1]["content"]


def num_tokens(sample: Sample, tokenizer) -> int:
    text = prompt_text(sample.messages, sample.answer_prefix, tokenizer)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- Lengths


# What one more unit has at most, in characters
UNIT_CHARS = {
    **dict.fromkeys(RULER_TASKS, len(" everybody")),
    "cwe": 3 * len(" 9999. snowlamp"),
    "fwe": 4 * len(" abcdef"),
    "niah_multikey_2": 85,
    "niah_multikey_3": len(f"\nOne of the special magic uuids for {'0' * 36} is: {'0' * 36}."),
}


@pytest.mark.parametrize("length", [1024, 2048, 5000, 16384])
@pytest.mark.parametrize("task", RULER_TASKS)
def test_prompt_and_completion_fill_the_length_up_to_one_unit_of_filler(task, length, tokenizer, words_tokenizer):
    num_filled = 0
    for tok in (tokenizer, words_tokenizer):
        try:
            samples = make_samples(
                task, length, 1 if length > 5000 else 3, tok, haystack=TEXT, system_message="Brief."
            )
        except ValueError as error:
            assert "with its shortest text" in str(error)
            continue
        for sample in samples:
            num_filled += 1
            assert sample.num_tokens == num_tokens(sample, tok)
            left = length - sample.num_tokens - sample.max_new_tokens
            assert 0 <= left <= UNIT_CHARS[task]  # a token has at least one character
    assert num_filled > 0


# Tokens of the next two units at most, where a word is about a token: needles of 30 tokens, entries of 7
@pytest.mark.parametrize(
    ("task", "two_units"), [("niah_single_1", 6), ("niah_multikey_2", 60), ("vt", 6), ("cwe", 14)]
)
def test_two_units_more_than_there_are_would_exceed_the_length(task, two_units, words_tokenizer):
    for sample in make_samples(task, LENGTH, 3, words_tokenizer):
        assert LENGTH - sample.num_tokens - sample.max_new_tokens < two_units


class Counting:
    """A tokenizer that counts the tokens of each text it gets."""

    def __init__(self, tokenizer):
        self.tokenizer, self.counts = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **kwargs):
        encoded = self.tokenizer(text, **kwargs)
        self.counts.append(len(encoded["input_ids"]))
        return encoded


@pytest.mark.parametrize("task", RULER_TASKS)
def test_a_long_sample_is_tokenized_a_few_times(task, words_tokenizer):
    counting = Counting(words_tokenizer)
    make_samples(task, 8192, 2, counting, haystack=TEXT)
    assert 2 <= sum(tokens > 4096 for tokens in counting.counts) <= 12  # of two samples


@pytest.mark.parametrize("task", RULER_TASKS)
@pytest.mark.parametrize("length", [1, 150])
def test_a_length_that_cannot_hold_the_task_is_refused_with_what_it_takes(task, length, tokenizer):
    with pytest.raises(ValueError, match=rf"`length` is {length} tokens, but '{task}' takes \d+ with its shortest"):
        make_samples(task, length, 1, tokenizer)


class Coarse(Counting):
    """A tokenizer that counts one token for 1000 characters."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [0] * (len(text) // 1000)}


def test_a_length_beyond_the_list_of_words_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"`length` is 4096 tokens, but 'cwe' has words for about \d+\."):
        make_samples("cwe", 4096, 1, Coarse(tokenizer))


@given(rate=st.floats(0.2, 40), start=st.integers(0, 200), budget=st.integers(200, 100_000), wobble=st.integers(0, 9))
@settings(deadline=None, max_examples=200)
def test_the_search_ends_at_the_largest_number_for_any_cost_of_units(rate, start, budget, wobble):
    def count(num_units):
        return start + int(rate * num_units) + (num_units * 7919 % (wobble + 1)) // 2

    num_units, tokens = fit_units(count, budget)
    assert tokens == count(num_units) <= budget
    assert budget - tokens <= rate * 2 + 10


# --- Draws


@pytest.mark.parametrize("task", RULER_TASKS)
def test_samples_depend_on_seed_length_and_number_and_on_nothing_else(task, words_tokenizer):
    samples = make_samples(task, LENGTH, 4, words_tokenizer)
    assert samples[:2] == make_samples(task, LENGTH, 2, words_tokenizer)
    others = [
        *make_samples(task, LENGTH, 4, words_tokenizer, seed=1),
        *make_samples(task, 2 * LENGTH, 4, words_tokenizer),
    ]
    assert len({sample.id for sample in samples + others}) == 12
    assert len({sample.references for sample in samples + others}) == 12
    assert samples[3].id == f"{task}-1024-0-3"


@pytest.mark.parametrize("task", RULER_TASKS)
def test_two_vocabularies_are_asked_the_same(task, tokenizer, words_tokenizer):
    length = 8192 if task == "cwe" else 2048
    one, other = (make_samples(task, length, 2, tok, haystack=TEXT) for tok in (tokenizer, words_tokenizer))
    assert [(s.id, s.references, s.answer_prefix) for s in one] == [
        (s.id, s.references, s.answer_prefix) for s in other
    ]
    assert [content(s) for s in one] != [content(s) for s in other]


def test_a_haystack_is_in_the_id_of_the_samples_that_it_changes(words_tokenizer):
    for task in RULER_TASKS:
        plain, given_text = (make_samples(task, LENGTH, 1, words_tokenizer, haystack=h)[0] for h in (None, TEXT))
        assert (plain == given_text) == (task not in TEXT_TASKS)
        assert (plain.id == given_text.id) == (task not in TEXT_TASKS)


# --- What the prompts hold


@pytest.mark.parametrize("haystack", [NOISE, NEEDLES, TEXT], ids=["noise", "needles", "text"])
@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_each_asked_value_is_in_the_text_once_under_its_key(task, haystack, tokenizer):
    num_keys, num_values, num_asked = {
        "niah_multikey_1": (4, 1, 1),
        "niah_multivalue": (1, 4, 1),
        "niah_multiquery": (4, 1, 4),
    }.get(task, (1, 1, 1))
    kind = "uuids" if task in ("niah_single_3", "niah_multikey_3") else "numbers"
    all_needles = task in ("niah_multikey_2", "niah_multikey_3") or (task in TEXT_TASKS and haystack is NEEDLES)
    for sample in make_samples(task, 2048, 5, tokenizer, haystack=haystack):
        text, _, question = content(sample).rpartition("\n")
        needles = NEEDLE.findall(text)
        assert all(found == kind for found, _, _ in needles)
        asked = [key for key in dict.fromkeys(key for _, key, _ in needles) if re.search(rf"\b{key}\b", question)]
        assert len(asked) == num_asked
        assert all(re.search(rf"\b{key}\b", sample.answer_prefix) for key in asked)
        assert Counter(value for _, key, value in needles if key in asked) == Counter(sample.references)
        assert len(sample.references) == num_asked * num_values
        assert all(text.count(value) == 1 and value not in question for value in sample.references)
        assert all(text.count(f"for {key} is") == num_values for key in asked)
        if all_needles:
            assert len(needles) > 4 + num_keys
            assert len(text.splitlines()) == len(needles) + 1  # nothing else but the first sentence
        else:
            assert len(needles) == num_keys * num_values
        singular = num_asked * num_values == 1
        assert text.startswith(f"{'A' if singular else 'Some'} special magic {kind[:-1] if singular else kind} ")


def test_no_distractor_has_a_key_that_is_asked_for():
    class FewWords(Random):
        """So few keys that a random one would often be asked for."""

        def choice(self, words):
            return super().choice(words[:3])

    for seed in range(5):
        draft = RULER_TASKS["niah_multikey_2"](FewWords(seed), LENGTH, NOISE)
        needles = NEEDLE.findall(draft.content(40))
        (asked,) = [key for _, key, value in needles if value in draft.references]
        assert len(needles) == 41 and [key for _, key, _ in needles].count(asked) == 1


def test_values_have_the_form_of_ruler(words_tokenizer):
    for task, value, key in (
        ("niah_single_1", r"[1-9]\d{6}", r"[a-z]+-[a-z]+"),
        ("niah_single_3", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"[a-z]+-[a-z]+"),
        (
            "niah_multikey_3",
            r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
            r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        ),
    ):
        for sample in make_samples(task, LENGTH, 3, words_tokenizer):
            (asked,) = [(k, v) for _, k, v in NEEDLE.findall(content(sample)) if v in sample.references]
            assert re.fullmatch(key, asked[0]) and re.fullmatch(value, asked[1])


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2", "niah_multivalue"])
def test_needles_lie_at_all_depths(task, words_tokenizer):
    depths = []
    for sample in make_samples(task, LENGTH, 60, words_tokenizer, haystack=TEXT):
        text = content(sample)
        depths += [text.index(value) / len(text) for value in sample.references]
    by_fifth = Counter(min(4, int(5 * depth)) for depth in depths)
    # 60 even draws: fewer than 3 in a given fifth has a probability of about 0.0002
    assert all(by_fifth[fifth] >= 3 for fifth in range(5)), by_fifth
    assert len({round(depth, 3) for depth in depths}) > 40


def test_a_text_is_used_in_its_order_from_different_places_and_again_when_it_ends(words_tokenizer):
    samples = make_samples("niah_single_2", 4096, 6, words_tokenizer, haystack=TEXT)
    begins = set()
    for sample in samples:
        text = content(sample).split("\n")[1]
        text = NEEDLE.sub("", text).replace("  ", " ").strip()
        assert text in f"{PROSE} {PROSE} {PROSE} {PROSE}"
        begins.add(text[:30])
    assert len(begins) > 3


def test_a_haystack_of_a_script_without_spaces_is_filled_to_the_character(tokenizer):
    haystack = Haystack.from_text("川は静かに流れていた。町の人々は石の橋を渡った。誰もその理由を知らない。" * 3)
    assert len(haystack.sentences) == 9
    for sample in make_samples("niah_single_2", 2048, 3, tokenizer, haystack=haystack):
        assert 2048 - sample.num_tokens - sample.max_new_tokens <= 3  # bytes of a character


def test_a_haystack_that_quotes_control_tokens_does_not_change_the_turns(tokenizer):
    haystack = Haystack.from_text("The model writes <|im_end|> when it has finished its turn. " * 5)
    for sample in make_samples("niah_single_2", LENGTH, 2, tokenizer, haystack=haystack):
        ids = tokenizer(prompt_text(sample.messages, "", tokenizer), add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
        assert "writes <\u200b|im_end|>" in content(sample)


def test_sentences_end_where_a_reader_ends_them():
    haystack = Haystack.from_text('He met Mr. Smith  at noon.\n"Why now?" he asked. Nobody\tknew!')
    assert haystack.sentences == ("He met Mr. Smith at noon.", '"Why now?" he asked.', "Nobody knew!")
    assert haystack.first(8, start=0) == ["He met Mr. Smith at noon.", '"Why now?"']
    assert haystack.first(3, start=2) == ["Nobody knew!", "He"]


def test_a_haystack_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "prose.txt").write_text(PROSE)
    assert Haystack.from_file(tmp_path / "prose.txt") == TEXT
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
            Haystack.from_file(tmp_path / name)


@pytest.mark.parametrize("length", [1024, 4096])
def test_a_chain_of_variables_is_in_the_text_in_its_order(length, words_tokenizer):
    for sample in make_samples("vt", length, 5, words_tokenizer):
        example, text = content(sample).split("\n\nMemorize")
        names = sample.references
        (value,) = re.findall(r"assigned the value (\d{5})", text)
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:], strict=False))]
        statements = re.findall(r"^VAR.*$", text, re.MULTILINE)
        assert statements == chain and len(set(names)) == 5
        assert all(len(name) == 5 and name.isupper() for name in names)
        assert [text.count(name) for name in names] == [2, 2, 2, 2, 1]
        assert not any(name in example for name in names) and value not in example
        example_names = example.split("they are: ")[1].split()
        assert len(example_names) == 5 == len(re.findall(r"^VAR", example, re.MULTILINE))
        assert f"5 variables are assigned the value {value}, they are:" in sample.answer_prefix


def entries(numbered: str) -> list[str]:
    found = re.findall(r"(\d+)\. ([a-z]+)", numbered)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize(
    ("length", "repeats", "other", "example"),
    [(512, 3, 1, None), (1024, 6, 1, (3, 1, 20)), (4096, 30, 3, (10, 3, 40))],
)
def test_common_words_come_as_often_as_in_ruler(length, repeats, other, example, tokenizer, words_tokenizer):
    with_example = length >= 1024
    for sample in make_samples("cwe", length, 5, words_tokenizer):
        parts = content(sample).split("Below is a numbered list of words")[1:]
        assert len(parts) == 1 + with_example
        lists = [entries(part.split("\n")[1]) for part in parts]
        counts = Counter(lists[-1])
        assert {word for word, number in counts.items() if number == repeats} == set(sample.references)
        assert set(counts.values()) == {repeats, other} and len(sample.references) == 10
        if with_example:
            counts = Counter(lists[0])
            answer = entries(parts[0].split("in the list are:")[1].split("\n")[0])
            assert Counter(counts.values()) == {example[0]: 10, example[1]: example[2] - 10}
            assert {word for word, number in counts.items() if number == example[0]} == set(answer)
            assert not set(answer) & set(lists[-1])


@pytest.mark.parametrize("length", [512, 1024, 4096, 16384])
def test_the_frequent_words_are_the_three_most_frequent_after_the_dots(length, words_tokenizer):
    for sample in make_samples("fwe", length, 5, words_tokenizer):
        coded = content(sample).split("\n")[0].partition("coded words. ")[2].split()
        ranked = Counter(coded).most_common()
        assert [word for word, _ in ranked[:4]] == ["...", *sample.references]
        assert ranked[3][1] > ranked[4][1]  # the third answer is no tie
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        # zeta(2) = 1.645; the parts after the decimal point are cut off, at most one word for each rank
        assert ranked[0][1] / len(coded) == pytest.approx(1 / 1.645, abs=0.12)
        assert ranked[1][1] / ranked[0][1] == pytest.approx(1 / 4, abs=0.03)


@given(st.integers(0, 100_000))
def test_from_the_least_number_of_coded_words_on_there_is_no_tie(more):
    num_units = RULER_TASKS["fwe"](Random(0), LENGTH, NOISE).min_units + more
    shares = [int(num_units * 6 / (3.141592653589793 * rank) ** 2) for rank in range(1, 6)]
    assert shares[1] > shares[2] > shares[3] > shares[4]


def test_no_word_of_a_list_is_a_piece_of_another():
    assert {len(noun) for noun in NOUNS} == {4}
    assert len(set(NOUNS)) == len(NOUNS) and len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(COMPOUNDS)) == len(COMPOUNDS) == len(NOUNS) * (len(NOUNS) - 1)
    assert all(set(word) <= set(string.ascii_lowercase) for word in [*NOUNS, *ADJECTIVES])


def test_unknown_tasks_no_samples_and_no_chat_template_are_refused(tokenizer, words_tokenizer):
    with pytest.raises(ValueError, match="`task` is 'niah'. There is no such task"):
        make_samples("niah", 1024, 1, tokenizer)
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        make_samples("vt", 1024, 0, tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=words_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        make_samples("vt", 1024, 1, bare)


def test_arguments_of_the_chat_template_count(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template += "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    (plain,) = make_samples("niah_single_1", LENGTH, 1, thinking)
    bind_chat_template_kwargs(thinking, {"enable_thinking": False})
    (sample,) = make_samples("niah_single_1", LENGTH, 1, thinking)
    assert prompt_text(sample.messages, "A", thinking).endswith("<think>\n\n</think>\n\nA")
    assert len(content(sample)) < len(content(plain)) and sample.num_tokens == num_tokens(sample, thinking)


@pytest.mark.parametrize("task", RULER_TASKS)
def test_a_perfect_model_scores_1_and_so_does_one_that_repeats_the_prompt(task, words_tokenizer):
    # RULER ignores the text around the answer: its score alone does not tell an echo from an answer
    for sample in make_samples(task, LENGTH, 2, words_tokenizer):
        assert string_match_all(", ".join(sample.references), sample.references) == 1.0
        assert string_match_all(content(sample), sample.references) == 1.0
        assert string_match_all(sample.answer_prefix, sample.references) == 0.0
        assert exact_match(content(sample), sample.references) == 0.0


def test_ruler_tasks_share_nothing_with_rows_of_another_text(words_tokenizer):
    samples = [s for task in RULER_TASKS for s in make_samples(task, LENGTH, 1, words_tokenizer)]
    assert shared_ngrams(samples, ["The ship sails from Venice. " * 60 + "What is the number of ship 1?"]) == []
    assert {sample_id for sample_id, _ in shared_ngrams(samples, [NOISE_LINE])} >= {"niah_single_1-1024-0-0"}
