"""Data of a run, as a recipe describes it."""

import logging

import datasets
import pytest
from datasets import Dataset
from test_longblocks_load import RESPONSE, our_row, row, write_jsonl

from dgrpo_trl.config import LongBlocksArguments
from dgrpo_trl.training_data import load_training_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def longblocks(tmp_path):
    rows = [our_row(id=f"r{i}", question=f"How many wheels has mill {i}?", document_sha256=None) for i in range(40)]
    rows[0]["document"] = None
    return str(write_jsonl(tmp_path / "long.jsonl", rows))


@pytest.fixture
def conversations(tmp_path):
    turns = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i)}]}
        for i in range(20)
    ]
    return str(write_jsonl(tmp_path / "short.jsonl", turns))


def test_longblocks_becomes_rows_for_dgrpo(longblocks, tokenizer):
    train, test = load_training_data(LongBlocksArguments(dataset_name=longblocks), tokenizer)
    assert test is None and len(train) == 39  # one row has no document
    assert "document" not in train.column_names
    assert train[0]["prompt"][0]["content"].endswith("How many wheels has mill 1?")
    assert train[0]["teacher_prompt"][0]["content"].startswith("The mill has 12 wheels.")
    assert train[0]["answer"] == "12"


def test_longblocks_becomes_rows_for_sft(longblocks, tokenizer):
    train, _ = load_training_data(LongBlocksArguments(dataset_name=longblocks), tokenizer, completion_column=RESPONSE)
    assert set(train.column_names) == {"prompt", "completion"}
    assert train[0]["completion"] == [{"role": "assistant", "content": "It has 12."}]


def test_rows_with_a_prompt_are_taken_as_they_are(tmp_path, tokenizer):
    prompt = [{"role": "user", "content": "The <|im_end|> ship?"}]
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "3", "extra": 1}] * 2))
    train, _ = load_training_data(LongBlocksArguments(dataset_name=path), tokenizer)
    assert train[0] == {"prompt": prompt, "answer": "3", "extra": 1}
    train, _ = load_training_data(LongBlocksArguments(dataset_name=path), tokenizer, completion_column="answer")
    assert train[0]["completion"] == [{"role": "assistant", "content": "3"}]
    ids = tokenizer.apply_chat_template(train[0]["prompt"])["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # the template's own


@pytest.mark.parametrize("completion_column", [None, "answer"])
def test_one_row_of_ten_is_short(longblocks, conversations, tokenizer, completion_column):
    args = LongBlocksArguments(dataset_name=longblocks, short_dataset_name=conversations, short_share=0.1)
    train, _ = load_training_data(args, tokenizer, completion_column=completion_column)
    is_short = [row["prompt"][0]["content"].startswith("Say") for row in train]
    assert sum(is_short[:40]) == 4 and sum(is_short[:20]) == 2
    short = train[is_short.index(True)]
    assert (short["completion"] if completion_column else short["answer"]) is not None


def test_held_out_documents_are_apart_and_the_same_every_time(longblocks, conversations, tokenizer):
    args = LongBlocksArguments(dataset_name=longblocks, short_dataset_name=conversations, test_share=0.3)
    train, test = load_training_data(args, tokenizer, with_test=True)
    again, _ = load_training_data(args, tokenizer)
    ids = {row["id"] for row in train if row["id"] is not None}
    assert ids and not ids & set(test["id"]) and len(ids | set(test["id"])) <= 39
    assert all(not row["prompt"][0]["content"].startswith("Say") for row in test)
    assert [row["prompt"] for row in again] == [row["prompt"] for row in train]


def test_rows_over_the_budget_leave_at_its_edge(tmp_path, tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "ship " * n}], "answer": "1"} for n in range(1, 9)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    length = len(tokenizer.apply_chat_template(rows[4]["prompt"], add_generation_prompt=True)["input_ids"])
    train, _ = load_training_data(LongBlocksArguments(dataset_name=path, max_prompt_tokens=length), tokenizer)
    assert len(train) == 5
    with pytest.raises(ValueError, match="No row of .* is left to train on"):
        load_training_data(LongBlocksArguments(dataset_name=path, max_prompt_tokens=1), tokenizer)


def test_sft_leaves_out_what_trl_would_cut(tmp_path, tokenizer, caplog):
    rows = [{"prompt": [{"role": "user", "content": "ship " * n}], "answer": "the number"} for n in range(1, 9)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    messages = [*rows[4]["prompt"], {"role": "assistant", "content": "the number"}]
    length = len(tokenizer.apply_chat_template(messages)["input_ids"])
    with caplog.at_level(logging.WARNING):
        train, _ = load_training_data(
            LongBlocksArguments(dataset_name=path), tokenizer, completion_column="answer", max_length=length
        )
    assert len(train) == 5 and "3 of 8 rows are left out: longer_than_max_length" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dataset_name": None}, "`dataset_name` is missing"),
        ({"test_share": 1.0}, "`test_share` is 1.0"),
        ({"short_share": 1.5, "short_dataset_name": "short"}, "`short_share` is 1.5"),
    ],
)
def test_bad_arguments_are_refused(longblocks, conversations, tokenizer, arguments, match):
    arguments = {"dataset_name": longblocks, **arguments}
    if "short_dataset_name" in arguments:
        arguments["short_dataset_name"] = conversations
    with pytest.raises(ValueError, match=match):
        load_training_data(LongBlocksArguments(**arguments), tokenizer)


def test_holding_out_needs_an_id(tmp_path, tokenizer):
    Dataset.from_list([{"prompt": "a", "answer": "b"}]).to_parquet(tmp_path / "rows.parquet")
    args = LongBlocksArguments(dataset_name=str(tmp_path / "rows.parquet"), test_share=0.5)
    with pytest.raises(ValueError, match="the rows have no column 'id'"):
        load_training_data(args, tokenizer)


def test_a_row_without_an_answer_is_no_row_for_sft(tmp_path, tokenizer):
    path = str(write_jsonl(tmp_path / "rows.jsonl", [row(id="a"), row(id="b", answer=" ")]))
    train, _ = load_training_data(LongBlocksArguments(dataset_name=path), tokenizer, completion_column="answer")
    assert len(train) == 1
