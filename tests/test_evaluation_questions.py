"""Questions of held-out rows as samples, and text that prompts share with training data."""

import json
import logging
import re

import pytest

from dgrpo_trl.evaluation.overlap import check_overlap, shared_ngrams
from dgrpo_trl.evaluation.questions import question_samples
from dgrpo_trl.evaluation.samples import Sample, prompt_text


def row(number: int, text: str, task: str = "lookup", **columns) -> dict:
    question = f"What is the number of ship {number}?"
    prompt = [{"role": "user", "content": f"{text}\n\n{question}"}]
    return {"id": f"row{number}", "prompt": prompt, "answer": str(100 + number), "task": task, **columns}


SHORT, LONG = (" ".join(["The ship sails from Venice."] * count) for count in (4, 60))


def test_rows_go_to_the_smallest_length_that_holds_prompt_and_completion(tokenizer):
    prompt = row(1, SHORT)["prompt"]
    exact = len(tokenizer(prompt_text(prompt, "", tokenizer), add_special_tokens=False)["input_ids"]) + 32
    rows = [row(1, SHORT), row(2, LONG), row(3, SHORT, task="count")]
    cells = question_samples(rows, [4096, exact], tokenizer)
    assert {cell: [s.id for s in samples] for cell, samples in cells.items()} == {
        ("count", exact): ["count-row3"],
        ("lookup", exact): ["lookup-row1"],
        ("lookup", 4096): ["lookup-row2"],
    }
    (sample,) = cells["lookup", exact]
    assert sample.num_tokens == exact - 32 and sample.references == ("101",) and sample.max_new_tokens == 32
    assert ("lookup", exact - 1) not in question_samples(rows, [4096, exact - 1], tokenizer)


def test_rows_that_cannot_be_used_are_counted(tokenizer, caplog):
    rows = [row(1, SHORT), row(2, LONG), row(3, SHORT) | {"answer": "..."}, row(4, SHORT) | {"answer": None}]
    with caplog.at_level(logging.WARNING):
        cells = question_samples(rows, [256], tokenizer)
    assert [s.id for s in cells["lookup", 256]] == ["lookup-row1"]
    assert re.search(r"prompt_too_long\s+1 ", caplog.text) and re.search(r"no_answer\s+2 ", caplog.text)
    with pytest.raises(ValueError, match="All 1 rows are dropped: {'prompt_too_long': 1}"):
        question_samples(rows[1:2], [256], tokenizer)
    with pytest.raises(ValueError, match="`lengths` is empty"):
        question_samples(rows, [], tokenizer)


def test_questions_of_one_document_stand_together_and_share_it(tokenizer):
    rows = [row(number, SHORT if number % 2 else LONG, document_sha256=f"doc{number % 2}") for number in range(6)]
    (samples,) = question_samples(rows, [4096], tokenizer).values()
    assert [sample.shared_with for sample in samples] == ["doc0"] * 3 + ["doc1"] * 3
    assert len({sample.id for sample in samples}) == 6
    by_text = [row(number, SHORT, document=SHORT) for number in range(2)]
    (samples,) = question_samples(by_text, [4096], tokenizer).values()
    assert samples[0].shared_with == samples[1].shared_with is not None


def test_questions_before_their_document_share_nothing(tokenizer):
    rows = [row(number, SHORT, document_sha256="doc") for number in range(2)]
    for number, made in enumerate(rows):
        made["prompt"] = [{"role": "user", "content": f"{number}: which ship sails? {SHORT}"}]
    (samples,) = question_samples(rows, [4096], tokenizer).values()
    assert [sample.shared_with for sample in samples] == [None, None]


def test_the_rows_of_a_cell_are_chosen_by_id_whatever_their_order(tokenizer):
    rows = [row(number, SHORT) for number in range(20)]
    chosen = [
        {sample.id for sample in question_samples(some, [4096], tokenizer, num_samples=5)["lookup", 4096]}
        for some in (rows, rows[::-1])
    ]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 5
    assert chosen[0] != {f"lookup-row{number}" for number in range(5)}


def test_rows_with_one_id_or_without_a_task_or_with_several_answers_are_samples_too(tokenizer):
    rows = [row(1, SHORT) | {"answer": ["a", "", "b"]}, row(1, SHORT)]
    for made in rows:
        del made["task"]
    samples = question_samples(rows, [4096], tokenizer)["questions", 4096]
    assert [sample.id for sample in samples] == ["questions-row1", "questions-row1-2"]
    assert [sample.references for sample in samples] == [("a", "b"), ("101",)]


# --- Overlap with training data


def sample(number: int, text: str) -> Sample:
    return Sample(f"s{number}", [{"role": "user", "content": text}], "", ("x",), 8, len(text.split()))


WORDS = "the old mill by the river was built of stone and nobody in the town knew why".split()


def test_an_ngram_of_the_training_data_in_a_prompt_is_found():
    samples = [sample(0, "Nothing of it."), sample(1, " ".join(["Read:", *WORDS, "What was built?"]))]
    ngram = " ".join(WORDS[1:14])
    training = [{"prompt": [{"role": "user", "content": f"Say: {ngram.upper()}!"}], "answer": "yes"}, "nothing else"]
    assert shared_ngrams(samples, training) == [("s1", ngram)]
    assert shared_ngrams(samples, [" ".join(WORDS[1:13])]) == []
    assert shared_ngrams(samples, [" ".join(WORDS[1:13])], n=12) == [("s1", " ".join(WORDS[1:13]))]


@pytest.mark.parametrize("max_tokens_per_pass", [1, 10**9])
def test_every_prompt_is_compared_with_the_training_data(tmp_path, max_tokens_per_pass):
    samples = [sample(i, f"Part {i}. {' '.join(w + str(i) for w in WORDS)}") for i in range(4)]
    path = tmp_path / "training.jsonl"
    for i in (0, 3):
        path.write_text(json.dumps({"prompt": samples[i].messages[0]["content"]}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"1 prompts of the evaluation share text .*'s{i}' has 'part {i} the"):
            check_overlap(iter(samples), str(path), max_tokens_per_pass)
    path.write_text(json.dumps({"prompt": "Nothing of it."}), encoding="utf-8")
    check_overlap(iter(samples), str(path), max_tokens_per_pass)
