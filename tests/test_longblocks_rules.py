"""Blocks, and the rules that make questions over real text."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dgrpo_trl.longblocks import TASKS, Passage, RuleBuilder, split_blocks, split_passages


WORDS = (
    "river stone cloud meadow lantern winter garden shadow bridge silver copper thunder harvest whisper candle".split()
)
TEXT = "\n\n".join(
    " ".join(f"The {a} was near the {b} and no {c} came." for b in WORDS[:4]) for a in WORDS for c in WORDS[4:12]
)
BINS = (320, 480)  # the small vocabulary spells most names out
TOLERANCE = 40


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([TEXT, "How many windows does the church of the town where she lives have?"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def builder(tokenizer):
    return RuleBuilder(split_passages(TEXT, "fixture"), tokenizer, seed=3)


@pytest.fixture(scope="module")
def rows(builder):
    return {split: list(builder.rows(split, 24, BINS, tolerance_tokens=TOLERANCE)) for split in ("train", "test")}


def all_rows(rows):
    return rows["train"] + rows["test"]


def count_word(text, word):
    return len(re.findall(rf"\b{word}\b", text))


def capitalised_words(rows):
    """Names and numbers of the documents: what the fixture's own sentences do not hold."""
    return {word for row in rows for word in re.findall(r"[A-Z][a-z]+|\d+", row["document"])} - {"The"}


def test_a_block_is_the_text_at_its_offsets():
    document = "\n\n one\nstill one \n \n\ntwo\n\n one\nstill one\n"
    blocks = split_blocks(document)
    assert [block.text for block in blocks] == ["one\nstill one", "two", "one\nstill one"]
    assert all(document[block.start : block.end] == block.text for block in blocks)


def test_block_ids_are_unique_and_survive_an_edit_elsewhere():
    before = [block.id for block in split_blocks("one\n\ntwo\n\none")]
    after = [block.id for block in split_blocks("one, edited\n\ntwo\n\none")]
    assert len(set(before)) == 3
    assert before[2] == f"{before[0]}-2"
    assert after[1] == before[1]


@pytest.mark.parametrize("document", ["", " \n\n \n"])
def test_an_empty_document_has_no_blocks(document):
    assert split_blocks(document) == []


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("In 1564 he was born there.", "digit"),
        ("HAMLET.", "a speaker"),
        ("He goes on and on and on and on and on.", "too long"),
        ("A title without an end", "no end"),
    ],
)
def test_a_passage_leaves_out_what_is_no_plain_short_sentence(sentence, reason):
    good = ["One good line stands.", "Two good lines stand."]
    text = f"{good[0]}\n\n{sentence}\n\n{good[1]}"
    (passage,) = split_passages(text, "source", sentences_per_passage=2, max_sentence_chars=30)
    assert passage.sentences == tuple(good), reason


def test_passages_share_no_sentence_position():
    passages = split_passages(TEXT, "fixture", sentences_per_passage=10)
    assert all(len(passage.sentences) == 10 for passage in passages)
    assert len({passage.id for passage in passages}) == len(passages)
    assert " ".join(s for p in passages for s in p.sentences) in " ".join(TEXT.split())


def test_every_pair_of_task_and_length_is_built(rows):
    for split_rows in rows.values():
        assert {(row["task"], row["length_bin"]) for row in split_rows} == {(t, b) for t in TASKS for b in BINS}


def test_prompts_have_the_length_of_their_bin(rows, tokenizer):
    for row in all_rows(rows):
        num_tokens = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        assert num_tokens == row["prompt_tokens"]
        assert row["length_bin"] - TOLERANCE <= num_tokens <= row["length_bin"]


def test_the_answer_stands_once_in_the_document_and_in_the_evidence(rows):
    for row in all_rows(rows):
        evidence = [row["document"][block["start"] : block["end"]] for block in row["evidence"]]
        assert count_word(row["document"], row["answer"]) == 1
        assert count_word(" ".join(evidence), row["answer"]) == 1
        assert count_word(row["question"], row["answer"]) == 0


def test_evidence_names_blocks_of_the_document(rows):
    for row in all_rows(rows):
        blocks = {block.id: (block.start, block.end) for block in split_blocks(row["document"])}
        assert len(row["evidence"]) == (2 if row["task"] == "two_hop" else 1)
        for block in row["evidence"]:
            assert blocks[block["block"]] == (block["start"], block["end"])


def test_the_teacher_reads_the_evidence_and_no_near_miss(rows):
    fact_of = {"lookup_number": r" has \d+ ", "lookup_name": r" is [A-Z]", "two_hop": r" has \d+ | lives in "}
    for row in all_rows(rows):
        assert row["prompt"][0] == row["teacher_prompt"][0]
        assert row["prompt"][1]["content"] == f"{row['document']}\n\n{row['question']}"
        context = row["teacher_prompt"][1]["content"].removesuffix(f"\n\n{row['question']}")
        evidence = [row["document"][block["start"] : block["end"]] for block in row["evidence"]]
        assert context == "\n\n".join(evidence)
        assert len(re.findall(fact_of[row["task"]], context)) == len(evidence)
        assert len(re.findall(fact_of[row["task"]], row["document"])) >= len(evidence) + 2


def test_a_chain_names_its_end_only_through_its_middle(rows):
    for row in all_rows(rows):
        if row["task"] == "two_hop":
            person = re.search(r"the town where (\w+) lives", row["question"])[1]
            place = re.search(rf"{person} lives in (\w+)\.", row["document"])[1]
            assert re.search(rf"of {place} has {row['answer']} ", row["document"])
            assert place not in row["question"]


def test_train_and_test_share_no_entity_answer_or_passage(rows, builder):
    train, test = rows["train"], rows["test"]
    assert not capitalised_words(train) & capitalised_words(test) - {"How", "Who"}
    assert not {row["answer"] for row in train} & {row["answer"] for row in test}
    assert not {row["id"] for row in train} & {row["id"] for row in test}
    passages = {split: {passage.id for passage in items} for split, items in builder._passages.items()}
    assert not passages["train"] & passages["test"]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(rows, tokenizer):
    passages = split_passages(TEXT, "fixture")
    again = RuleBuilder(passages, tokenizer, seed=3).rows("train", 24, BINS, tolerance_tokens=TOLERANCE)
    other = RuleBuilder(passages, tokenizer, seed=4).rows("train", 24, BINS, tolerance_tokens=TOLERANCE)
    assert list(again) == rows["train"]
    assert not {row["id"] for row in other} & {row["id"] for row in rows["train"]}


def test_more_rows_begin_with_the_same_rows(rows, builder):
    assert list(builder.rows("train", 30, BINS, tolerance_tokens=TOLERANCE))[:24] == rows["train"]


def test_a_special_token_in_the_text_raises(tokenizer):
    passages = [Passage(str(i), "s", "en", ("This is <|end|> of it.",) * 4) for i in range(20)]
    with pytest.raises(ValueError, match="holds a special token"):
        RuleBuilder(passages, tokenizer)


def test_a_bin_too_short_for_the_facts_raises(builder):
    with pytest.raises(ValueError, match="could be built"):
        next(builder.rows("train", 1, length_bins=(40,)))


def test_an_unknown_split_or_task_raises(builder):
    with pytest.raises(ValueError, match="`split` must be one of"):
        next(builder.rows("validation", 1))
    with pytest.raises(ValueError, match="`task` must be one of"):
        next(builder.rows("train", 1, tasks=("sum",)))


def test_too_little_text_raises(tokenizer):
    with pytest.raises(ValueError, match="No passage falls into"):
        RuleBuilder([], tokenizer)


class WordTokenizer:
    """Counts words and marks: no trained vocabulary, so that lengths are the same with any version of `tokenizers`."""

    added_tokens_decoder = {}
    all_special_tokens = []

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "\n".join(message["content"] for message in messages)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": re.findall(r"\w+|[^\w\s]", text)}


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "10fc9f59a16c2a062713caa262a49d3f9b39f03390acf49f01407156af8cc171"),
        ("test", "a23b2201b0c78cb8d9966bbf39abbb4515267455705012466a560b16210005d2"),
    ],
)
def test_the_rows_of_a_seed_never_change(split, digest):
    """The demo's published curves rest on them. A refactoring must not change a random draw."""
    builder = RuleBuilder(split_passages(TEXT, "fixture"), WordTokenizer(), seed=11)
    rows = list(builder.rows(split, 60, (128, 192, 256)))
    assert hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest() == digest


def test_reading_the_rules_does_not_import_the_trainer():
    code = (
        "import sys, dgrpo_trl.longblocks.rules; sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
