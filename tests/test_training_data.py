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
    for number, long_row in enumerate(rows):
        long_row["document"] += f" This is document {number // 2}."
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
    documents = {row["document_id"] for row in train if row["document_id"] is not None}
    assert documents.isdisjoint(test["document_id"])
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


# --- Rows to evaluate on


def prompt_rows(first, last):
    return [{"prompt": [{"role": "user", "content": f"Ship {i}?"}], "answer": str(i)} for i in range(first, last)]


def write(kind, folder, **splits):
    """Rows by split, as the kind of data that `dataset_name` may be."""
    sets = {name: Dataset.from_list(rows) for name, rows in splits.items()}
    folder.mkdir()
    if kind == "file":
        sets["train"].to_json(folder / "rows.jsonl")
        return str(folder / "rows.jsonl")
    if kind == "saved":
        sets["train"].save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict(sets).save_to_disk(folder)
    for name, rows in sets.items():
        if kind == "Parquet":
            rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")
        elif kind == "JSONL":
            rows.to_json(folder / f"{name}.jsonl")
    return str(folder)


KINDS = ["file", "saved", "saved splits", "Parquet", "JSONL"]
BY_SPLIT = ["saved splits", "Parquet", "JSONL"]


def load_both(tokenizer, name, **options):
    train, test = load_training_data(LongBlocksArguments(dataset_name=name, **options), tokenizer, with_test=True)
    return [[row["answer"] for row in rows] for rows in (train, test)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_test_split_that_is_not_there_is_no_reason_to_evaluate_on_training_rows(
    tmp_path, tokenizer, kind, streaming
):
    name = write(kind, tmp_path / "rows", train=prompt_rows(0, 10))
    with pytest.raises(ValueError, match="There are no rows to evaluate on: .* has no split 'test'.*") as error:
        load_both(tokenizer, name, dataset_streaming=streaming)
    for way_out in ("`eval_dataset_name`", "`dataset_test_split`", "`test_share`", "`eval_strategy: 'no'`"):
        assert way_out in str(error.value)
    load_training_data(LongBlocksArguments(dataset_name=name), tokenizer)  # nothing is evaluated
    with pytest.raises(ValueError, match="These are the same rows"):
        load_both(tokenizer, name, dataset_streaming=streaming, dataset_test_split="train")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BY_SPLIT)
def test_a_test_split_that_is_there_is_evaluated_on(tmp_path, tokenizer, kind, streaming):
    name = write(kind, tmp_path / "rows", train=prompt_rows(0, 4), test=prompt_rows(4, 6))
    assert load_both(tokenizer, name, dataset_streaming=streaming) == [["0", "1", "2", "3"], ["4", "5"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_may_be_cut_in_two(tmp_path, tokenizer, kind):
    name = write(kind, tmp_path / "rows", train=prompt_rows(0, 5))
    parts = {"dataset_train_split": "train[:80%]", "dataset_test_split": "train[80%:]"}
    assert load_both(tokenizer, name, **parts) == [["0", "1", "2", "3"], ["4"]]
    with pytest.raises(ValueError, match="These are the same rows, in part at least"):
        load_both(tokenizer, name, **{**parts, "dataset_test_split": "train[60%:]"})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_another_data_set_may_be_evaluated_on(tmp_path, tokenizer, kind, streaming):
    train = write("file", tmp_path / "train", train=prompt_rows(0, 4))
    test = write(kind, tmp_path / "test", train=prompt_rows(4, 6))
    options = {"eval_dataset_name": test, "dataset_streaming": streaming}
    assert load_both(tokenizer, train, **options) == [["0", "1", "2", "3"], ["4", "5"]]
    with pytest.raises(ValueError, match="`eval_dataset_name` is .* and `test_share` is 0.5"):
        load_both(tokenizer, train, **options, test_share=0.5)
    with pytest.raises(ValueError, match="There are no rows to evaluate on: .* cannot be read"):
        load_both(tokenizer, train, eval_dataset_name=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="There are no rows to evaluate on"):  # the same, by another name
        load_both(tokenizer, train, eval_dataset_name=str(tmp_path / "test" / ".." / "train" / "rows.jsonl"))


def test_the_test_split_of_another_data_set_goes_before_its_only_one(tmp_path, tokenizer):
    train = write("file", tmp_path / "train", train=prompt_rows(0, 2))
    test = write("Parquet", tmp_path / "test", train=prompt_rows(2, 4), test=prompt_rows(4, 6))
    assert load_both(tokenizer, train, eval_dataset_name=test) == [["0", "1"], ["4", "5"]]
    with pytest.raises(ValueError, match="has no split 'dev'"):
        load_both(tokenizer, train, eval_dataset_name=test, dataset_test_split="dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_rows_are_not_trained_on_in_a_stream_either(tmp_path, tokenizer, streaming):
    rows = [{**row, "id": str(i)} for i, row in enumerate(prompt_rows(0, 40))]
    name = write("file", tmp_path / "rows", train=rows)
    train, test = load_both(tokenizer, name, test_share=0.3, dataset_streaming=streaming)
    assert sorted(map(int, train + test)) == list(range(40)) and len(test) > 3


def test_sft_leaves_out_rows_without_a_completion(tmp_path, tokenizer, caplog):
    rows = [{**row, "answer": answer} for row, answer in zip(prompt_rows(0, 3), ["a", None, " "], strict=True)]
    name = write("file", tmp_path / "rows", train=rows)
    with caplog.at_level(logging.WARNING):
        train, _ = load_training_data(LongBlocksArguments(dataset_name=name), tokenizer, completion_column="answer")
    assert len(train) == 1 and "2 of 3 rows are left out: empty_completion" in caplog.text


@pytest.mark.parametrize("completion", [3, [{"role": "assistant", "content": "3"}]], ids=["number", "messages"])
def test_sft_learns_numbers_as_text_and_messages_as_they_are(tmp_path, tokenizer, completion):
    name = write("file", tmp_path / "rows", train=[{**row, "answer": completion} for row in prompt_rows(0, 2)])
    train, _ = load_training_data(LongBlocksArguments(dataset_name=name), tokenizer, completion_column="answer")
    assert train[0]["completion"] == [{"role": "assistant", "content": "3"}]
