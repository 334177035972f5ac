import hashlib
import json
import logging
from fractions import Fraction

import datasets
import pytest
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrpo_trl.chat import num_prompt_tokens
from dgrpo_trl.data_loading import DropCounts
from dgrpo_trl.longblocks import BookCache, load_conversations, load_longblocks, mix_short_and_long, split_by_id
from dgrpo_trl.longblocks.read.books import missing_documents
from dgrpo_trl.longblocks.read.mixing import _Proportion


RESPONSE = "response_Qwen3.5-27B"
DOCUMENT = "The mill has 12 wheels.\r\n\r\nΑλφα 😀 beta.\n\nNora owns the mill."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A result that another test cached must not stand in for one that the code makes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def row(**changes):
    """A row of the published set."""
    columns = {
        "id": "a",
        "document": DOCUMENT,
        "source": "Wikipedia",
        "language": "en",
        "question": "How many wheels?",
        "answer": "12",
        RESPONSE: "It has 12.",
    }
    return {**columns, **changes}


def our_row(**changes):
    """A row of a set built here."""
    start = DOCUMENT.index("Nora")
    evidence = [{"block": "c", "start": start, "end": len(DOCUMENT)}, {"block": "a", "start": 0, "end": 23}]
    sha256 = hashlib.sha256(DOCUMENT.encode()).hexdigest()
    return row(**{"task": "two_hop", "evidence": evidence, "document_sha256": sha256, "checks": [], **changes})


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(content):
    return [{"role": "user", "content": content}]


def book(barcode, pages_src=("one", "two"), pages_gen=None, score_src=90, score_gen=None):
    return {
        "barcode_src": barcode,
        "title_src": "t",
        "text_by_page_src": list(pages_src),
        "text_by_page_gen": pages_gen,
        "ocr_score_src": score_src,
        "ocr_score_gen": score_gen,
    }


# --- Reading


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["folder", "parquet", "jsonl", "saved", "rows"])
def test_every_form_of_the_published_set_gives_the_same_training_rows(tmp_path, form, streaming):
    rows = Dataset.from_list([row(), row(id="b", question="Who?", answer="Nora")])
    if form == "folder":
        (tmp_path / "set" / "data").mkdir(parents=True)
        for index in range(2):
            rows.select([index]).to_parquet(tmp_path / "set" / "data" / f"train-0000{index}-of-00002.parquet")
        name = tmp_path / "set"
    elif form == "parquet":
        rows.to_parquet(name := tmp_path / "rows.parquet")
    elif form == "jsonl":
        name = write_jsonl(tmp_path / "rows.jsonl", rows)
    elif form == "saved":
        rows.save_to_disk(name := tmp_path / "saved")
    else:
        name = rows
    made = load_longblocks(name, streaming=streaming)
    assert isinstance(made, IterableDataset if streaming else Dataset)
    assert set(made.column_names) == {*row(), "document_id", "prompt"}
    made = list(made)
    assert [made_row["prompt"] for made_row in made] == [
        user(f"{DOCUMENT}\n\nHow many wheels?"),
        user(f"{DOCUMENT}\n\nWho?"),
    ]
    assert {name: made[0][name] for name in row()} == row()


@pytest.mark.parametrize("streaming", [False, True])
def test_the_teacher_reads_each_evidence_block_once_in_the_order_of_the_document(streaming):
    blocks = our_row()["evidence"]
    rows = Dataset.from_list([our_row(evidence=[*blocks, blocks[0]]), our_row(id="b", evidence=[])])
    made = list(load_longblocks(rows, streaming=streaming, system_message="Be brief."))
    assert made[0]["teacher_prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The mill has 12 wheels.\n\nNora owns the mill.\n\nHow many wheels?"},
    ]
    assert made[0]["prompt"][1]["content"] == f"{DOCUMENT}\n\nHow many wheels?"
    assert made[1]["teacher_prompt"] is None
    assert made[0]["evidence"][1] == {"block": "a", "start": 0, "end": 23}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_response_column_becomes_the_completion_of_the_cold_start(streaming):
    rows = Dataset.from_list([our_row(), our_row(id="b", **{RESPONSE: None}), our_row(id="c", answer="")])
    counts = DropCounts()
    made = load_longblocks(rows, streaming=streaming, completion_column=RESPONSE, keep_document=False, counts=counts)
    assert set(made.column_names) == {*our_row(), "document_id", "prompt", "completion"} - {"document"}
    made = list(made)
    assert [made_row["id"] for made_row in made] == ["a", "c"]
    assert made[0]["completion"] == [{"role": "assistant", "content": "It has 12."}]
    assert "document" not in made[0] and made[0]["prompt"] == user(f"{DOCUMENT}\n\nHow many wheels?")
    assert counts.reasons == {"empty_response": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_each_row_that_cannot_be_used_leaves_with_its_reason(tokenizer, streaming, caplog):
    length = len(DOCUMENT)
    bad = [(-1, 4), (3, 3), (4, 3), (0, length + 1), (None, 4), (1, None)]
    rows = [
        our_row(id="kept", evidence=[{"block": "a", "start": 0, "end": length}]),
        our_row(id="no_document", document=None),
        our_row(id="also no_document", document=" \n"),
        our_row(id="empty_question", question=" \n"),
        our_row(id="empty_answer", answer=None),
        *(our_row(id=f"bad {span}", evidence=[{"block": "a", "start": span[0], "end": span[1]}]) for span in bad),
        our_row(id="prompt_too_long", document="word " * 400, evidence=[]),
        our_row(id="prompt_too_short", document="x", question="?", evidence=[]),
    ]
    counts = DropCounts()
    with caplog.at_level(logging.INFO):
        made = load_longblocks(
            Dataset.from_list(rows),
            streaming=streaming,
            tokenizer=tokenizer,
            min_prompt_tokens=20,
            max_prompt_tokens=200,
            counts=counts,
        )
        assert [made_row["id"] for made_row in made] == ["kept"]
    assert (counts.num_rows, counts.num_kept) == (13, 1)
    assert counts.reasons == {
        "no_document": 2,
        "empty_question": 1,
        "empty_answer": 1,
        "bad_evidence": 6,
        "prompt_too_long": 1,
        "prompt_too_short": 1,
    }
    assert caplog.text.count("institutional/institutional-books-1.0") == 1
    assert ("bad_evidence                6   46.2%" in caplog.text) is not streaming
    assert "bad_evidence                6   46.2%" in counts.table()


@pytest.mark.parametrize("processes", [None, 2])
def test_reasons_are_counted_whatever_the_number_of_processes_and_from_the_cache(tmp_path, processes):
    path = tmp_path / "rows.parquet"
    Dataset.from_list([row(id=str(i), answer="" if i % 3 == 0 else "x") for i in range(10)]).to_parquet(path)
    for _ in range(2):
        counts = DropCounts()
        made = load_longblocks(path, num_proc=processes, counts=counts)
        assert made["id"][:] == ["1", "2", "4", "5", "7", "8"]
        assert counts.reasons == {"empty_answer": 4}


def test_a_set_of_which_no_row_stays_has_the_columns_of_one_that_has_rows():
    empty = load_longblocks(Dataset.from_list([our_row(question="")]))
    assert len(empty) == 0
    assert empty.features == load_longblocks(Dataset.from_list([our_row()])).features
    assert len(load_longblocks(Dataset.from_list([our_row()]).select([]))) == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("document", ["a short text", "wörd 😀 語 " * 80])
def test_the_token_budget_holds_at_its_edges(tokenizer, document, streaming):
    rows = Dataset.from_list([row(document=document)])
    (kept,) = load_longblocks(rows, tokenizer=tokenizer)
    length = num_prompt_tokens(kept["prompt"], tokenizer)
    rendered = tokenizer.apply_chat_template(kept["prompt"], add_generation_prompt=True, tokenize=False)
    assert length == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    bounds = {(0, length): 1, (0, length - 1): 0, (length, length): 1, (length + 1, None): 0, (length, None): 1}
    for (lowest, highest), number in bounds.items():
        made = load_longblocks(
            rows, streaming=streaming, tokenizer=tokenizer, min_prompt_tokens=lowest, max_prompt_tokens=highest
        )
        assert len(list(made)) == number, (lowest, highest, length)


def test_a_prompt_that_fits_by_its_bytes_is_not_tokenised(tokenizer, monkeypatch):
    monkeypatch.setattr("dgrpo_trl.longblocks.read.rows.num_prompt_tokens", lambda *_, **__: pytest.fail("tokenized"))
    num_bytes = len(f"{DOCUMENT}\n\nHow many wheels?".encode())
    rows = Dataset.from_list([row()])
    assert len(load_longblocks(rows, tokenizer=tokenizer, max_prompt_tokens=num_bytes + 512)) == 1
    with pytest.raises(pytest.fail.Exception):
        load_longblocks(rows, tokenizer=tokenizer, max_prompt_tokens=num_bytes + 511)


def test_special_tokens_in_documents_stay_text_but_the_column_is_not_changed(tokenizer):
    text = "Before <|im_end|> after."
    evidence = [{"block": "a", "start": 7, "end": 24}]
    rows = Dataset.from_list([our_row(document=text, evidence=evidence)])
    (made,) = load_longblocks(rows, tokenizer=tokenizer)
    assert made["document"] == text
    assert made["prompt"] == user("Before <\u200b|im_end|> after.\n\nHow many wheels?")
    assert made["teacher_prompt"] == user("<\u200b|im_end|> after.\n\nHow many wheels?")


def test_braces_in_documents_and_templates_are_text():
    (made,) = load_longblocks(
        Dataset.from_list([row(document="{question} {0}", question="{document}")]),
        prompt_template="{{Read}} {document} | {question}",
    )
    assert made["prompt"] == user("{Read} {question} {0} | {document}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"completion_column": "response_x"}, "no column 'response_x'"),
        ({"max_prompt_tokens": 9}, "`max_prompt_tokens` is 9, but there is no `tokenizer`"),
        ({"prompt_template": "{document}"}, r"`prompt_template` has the fields \['document'\]"),
        ({"prompt_template": "{document} {question} {}"}, r"has the fields \['', 'document', 'question'\]"),
        ({"books": [], "streaming": True}, "`books` cannot be joined with a stream"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_longblocks(Dataset.from_list([row()]), **arguments)


def test_a_stream_of_unknown_columns_is_refused():
    with pytest.raises(ValueError, match="The columns of this stream are not known"):
        load_longblocks(IterableDataset.from_generator(lambda: iter([row()])))


def test_a_path_that_holds_no_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_longblocks(tmp_path / "absent")


# --- Books


def as_given(books, form, path):
    if form == "iterator":
        return iter(books)
    books = Dataset.from_list(books)
    if form == "stream":
        return books.to_iterable_dataset()
    if form == "parquet":
        books.to_parquet(path / "books" / "part.parquet")
        return path / "books"
    return books


@pytest.mark.parametrize("form", ["iterator", "dataset", "stream", "parquet"])
def test_books_are_put_together_again_by_bar_code_from_the_better_transcription(tmp_path, form):
    (tmp_path / "books").mkdir()
    books = [
        book("X"),
        book("B1", ["one", "two"], ["eins", "zwei"], 80, 80),
        book("B2", ["one", "two"], ["eins", "zwei"], 79, 80),
        book("B3", ["one", "two"], None, 10, None),
    ]
    rows = [row(id=f"B{i}", document=None, source="Institutional-Books-1.0") for i in (3, 1, 2, 1)]
    made = load_longblocks(Dataset.from_list([row(), *rows]), books=as_given(books, form, tmp_path))
    assert made["document"][:] == [DOCUMENT, "one\n\ntwo", "one\n\ntwo", "eins\n\nzwei", "one\n\ntwo"]
    assert made[3]["prompt"] == user("eins\n\nzwei\n\nHow many wheels?")


def test_a_book_that_is_missing_or_differs_leaves_with_its_reason(caplog):
    sha256 = hashlib.sha256(b"one\ntwo").hexdigest()
    evidence = [{"block": "b", "start": 4, "end": 7}]
    rows = [
        our_row(id="B1", document=None, document_sha256=sha256, evidence=evidence),
        our_row(id="B2", document=None, document_sha256=sha256, evidence=evidence),
        our_row(id="B3", document=None, document_sha256=None, evidence=evidence),
        our_row(id="B4", document=None, document_sha256=sha256, evidence=evidence),
        our_row(id="B5", document=None, document_sha256=None, evidence=evidence),
    ]
    books = [book("B1"), book("B2", ["one", "too"]), book("B3", ["one", "too"]), book("B5", ["", " "])]
    counts = DropCounts()
    made = load_longblocks(Dataset.from_list(rows), books=books, join_pages="\n", counts=counts)
    assert made["id"][:] == ["B1", "B3"]
    assert made["teacher_prompt"][:] == [user(f"{text}\n\nHow many wheels?") for text in ("two", "too")]
    assert counts.reasons == {"book_differs": 1, "book_not_found": 2}
    assert "1 books are not in `books`, for instance 'B4'." in caplog.text


def test_a_cache_of_books_serves_streams_and_is_only_asked_for_what_it_lacks(tmp_path):
    path = tmp_path / "books.sqlite"
    rows = Dataset.from_list([row(), row(id="B1", document=None), row(id="B2", document=None)])
    stream = rows.to_iterable_dataset()
    assert missing_documents(stream) == missing_documents(rows) == {"B1", "B2"}

    def one_book_then_failure():
        yield book("B1")
        raise OSError("connection lost")

    with pytest.raises(OSError):
        BookCache(path).add(one_book_then_failure(), {"B1", "B2"})
    assert BookCache(path).pages("B1") == ["one", "two"]
    rest = iter([book("B1", ["changed"]), book("B2", ["three"]), book("B3")])
    assert BookCache(path).add(rest, {"B1", "B2"}) == []
    assert next(rest)["barcode_src"] == "B3"  # the pass ends where all are found
    made = list(load_longblocks(stream, books_cache=path))
    assert [made_row["document"] for made_row in made] == [DOCUMENT, "one\n\ntwo", "three"]
    assert BookCache(path).add(iter([]), {"B1", "B9"}) == ["B9"]


def test_other_books_in_the_cache_are_not_mistaken_for_an_earlier_result(tmp_path):
    Dataset.from_list([row(id="B1", document=None)]).to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "books.sqlite"
    for pages in (["one"], ["two"]):
        path.unlink(missing_ok=True)
        BookCache(path).add([book("B1", pages)], {"B1"})
        assert load_longblocks(tmp_path / "rows.parquet", books_cache=path)["document"][:] == pages


def test_books_without_bar_codes_are_refused():
    with pytest.raises(ValueError, match="`books` has no column 'barcode_src'"):
        load_longblocks(Dataset.from_list([row(id="B1", document=None)]), books=Dataset.from_list([{"text": "x"}]))


# --- Short rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("completion", [False, True])
def test_conversations_become_rows_of_the_same_form_and_bad_ones_leave_with_a_reason(streaming, completion):
    def turns(*texts):
        return [{"role": role, "content": text} for role, text in texts]

    good = turns(("system", ""), ("user", "Hi"), ("assistant", "Yes?"), ("user", "2+2?"), ("assistant", "4"))
    conversations = [
        good,
        [],
        None,
        turns(("user", "Hi")),
        turns(("assistant", "Hi")),
        turns(("system", "S"), ("assistant", "Hi")),
        turns(("user", "Hi"), ("assistant", " ")),
        turns(("user", None), ("assistant", "Hi")),
    ]
    rows = Dataset.from_list([{"messages": conversation, "license": "x"} for conversation in conversations])
    counts = DropCounts()
    made = load_conversations(rows, streaming=streaming, completion=completion, counts=counts)
    answer = {"completion": [{"role": "assistant", "content": "4"}]} if completion else {"answer": "4"}
    assert list(made) == [{"prompt": good[1:4], **answer}]
    assert set(made.column_names) == {"prompt", *answer}
    empty = "empty_response" if completion else "empty_answer"
    assert counts.reasons == {"no_messages": 2, "no_answer_turn": 3, empty: 1, "not_text": 1}


def test_the_budget_holds_for_conversations(tokenizer):
    messages = [*user("word " * 300), {"role": "assistant", "content": "ok"}]
    rows = Dataset.from_list([{"messages": messages}])
    length = num_prompt_tokens(messages[:1], tokenizer)
    assert len(load_conversations(rows, tokenizer=tokenizer, max_prompt_tokens=length)) == 1
    assert len(load_conversations(rows, tokenizer=tokenizer, max_prompt_tokens=length - 1)) == 0


# --- Splits and mixtures


def test_a_split_depends_on_id_and_seed_alone():
    rows = Dataset.from_list([{"id": f"row {i}"} for i in range(2000)])
    split = split_by_id(rows, test_share=0.25, seed=3)
    test = set(split["test"]["id"])
    assert set(split["train"]["id"]).isdisjoint(test) and len(split["train"]) + len(test) == 2000
    assert 440 < len(test) < 560
    streamed = split_by_id(rows.select(range(500)).to_iterable_dataset(), test_share=0.25, seed=3)
    assert {r["id"] for r in streamed["test"]} == test & {f"row {i}" for i in range(500)}
    assert len(list(streamed["train"])) + len(list(streamed["test"])) == 500
    assert set(split_by_id(rows, test_share=0.25, seed=4)["test"]["id"]) != test
    # The value must be the same in every version and on every machine
    assert split_by_id(rows.select(range(12)), 0.5)["test"]["id"][:] == GOLDEN_TEST_IDS


GOLDEN_TEST_IDS = [
    f"row {i}" for i in range(12) if int(hashlib.sha256(f"0:row {i}".encode()).hexdigest()[:16], 16) < 2**63
]


def test_rows_of_one_document_can_be_kept_on_one_side():
    rows = Dataset.from_list([{"id": str(i), "document_sha256": str(i // 5)} for i in range(200)])
    split = split_by_id(rows, 0.5, column="document_sha256")
    assert set(split["train"]["document_sha256"]).isdisjoint(split["test"]["document_sha256"])
    assert len(split["train"]) and len(split["test"])


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_shares_that_leave_a_side_empty_are_refused(share):
    rows = Dataset.from_list([{"id": "a"}])
    with pytest.raises(ValueError, match="`test_share` is"):
        split_by_id(rows, share)
    with pytest.raises(ValueError, match="`short_share` is"):
        mix_short_and_long(rows, rows, share)


def short_rows(number):
    return Dataset.from_list([{"id": f"s{i}", "prompt": user("short"), "answer": "a"} for i in range(number)])


def long_rows(number):
    return Dataset.from_list([{"id": f"l{i}", "prompt": user("long"), "task": "t"} for i in range(number)])


def sides(short, long, form):
    if form == "streams":
        return short.to_iterable_dataset(), long.to_iterable_dataset()
    return (short, long.to_iterable_dataset()) if form == "one stream" else (short, long)


def ids(rows):
    return [row["id"] for row in rows]


@pytest.mark.parametrize("form", ["tables", "streams", "one stream"])
def test_a_mixture_has_exactly_one_short_row_in_any_ten(form):
    mixed = mix_short_and_long(*sides(short_rows(30), long_rows(270), form))
    kinds = [name[0] for name in ids(mixed)]
    assert len(kinds) == 300
    assert all(kinds[i : i + 10].count("s") == 1 for i in range(291))
    assert len(set(ids(mixed))) == 300


@pytest.mark.parametrize("form", ["tables", "streams"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.29, 0.77])
def test_shares_that_are_not_one_in_n_are_exact_too(form, share):
    kinds = [name[0] for name in ids(mix_short_and_long(*sides(short_rows(77), long_rows(77), form), share))]
    for n in range(len(kinds) + 1):
        assert abs(kinds[:n].count("s") - n * share) <= 0.5 + 1e-9
    assert kinds[:100].count("s") == round(100 * share)


@pytest.mark.parametrize("form", ["tables", "streams"])
def test_a_mixture_stops_where_a_side_runs_out(form):
    few_short = ids(mix_short_and_long(*sides(short_rows(2), long_rows(100), form)))
    assert sum(name[0] == "s" for name in few_short) == 2 and len(few_short) == 24  # the third would be at place 25
    few_long = ids(mix_short_and_long(*sides(short_rows(100), long_rows(20), form)))
    assert sum(name[0] == "l" for name in few_long) == 20 and len(few_long) == 22


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.1, 0.5, 0.29, 1 / 3, 0.9]))
@settings(max_examples=60, deadline=None)
def test_the_length_of_a_mixture_of_tables_is_that_of_one_of_streams(num_short, num_long, share):
    """Counted one by one, as a stream must, against the closed form."""
    proportion = _Proportion(Fraction(str(share)))
    left, length = {True: num_short, False: num_long}, 0
    while left[proportion.is_short(length)]:
        left[proportion.is_short(length)] -= 1
        length += 1
    assert proportion.num_rows(num_short, num_long) == length


def test_the_seed_orders_the_rows_but_not_the_kinds():
    first, again, other = (ids(mix_short_and_long(short_rows(10), long_rows(90), seed=seed)) for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other)
    assert [name[0] for name in first] == [name[0] for name in other]
    streams = sides(short_rows(10), long_rows(90), "streams")
    assert ids(mix_short_and_long(*streams))[:3] == ["l0", "l1", "l2"]


@pytest.mark.parametrize("form", ["tables", "streams"])
def test_columns_that_one_side_lacks_are_none(form):
    long = long_rows(9).add_column("answer", [None] * 9)  # holds nothing: takes the type of the other side
    mixed = mix_short_and_long(*sides(short_rows(1), long, form))
    assert set(mixed.column_names) == {"id", "prompt", "answer", "task"}
    rows = {row["id"]: row for row in mixed}
    assert rows["s0"] == {"id": "s0", "prompt": user("short"), "answer": "a", "task": None}
    assert rows["l3"] == {"id": "l3", "prompt": user("long"), "answer": None, "task": "t"}


def test_a_mixture_that_cannot_be_made_is_refused(caplog):
    short, long = short_rows(2), long_rows(50)
    with pytest.raises(ValueError, match="2 short and 50 long rows make 24 at a share of 0.1"):
        mix_short_and_long(short, long, num_rows=25)
    with pytest.raises(ValueError, match="`short` is empty"):
        mix_short_and_long(short.select([]), long)
    with pytest.raises(ValueError, match="Column 'id' is .* in `short`"):
        mix_short_and_long(Dataset.from_list([{"id": 1}]), long)
    assert len(ids(mix_short_and_long(*sides(short, long, "streams"), num_rows=25))) == 24
    assert "The mixture ends after 24 of 25 rows: `short` has no more." in caplog.text


def test_a_mixture_of_filtered_streams_counts_what_was_dropped_and_can_go_on_where_it_stopped():
    counts = DropCounts()
    rows = Dataset.from_list([our_row(id=str(i), question="" if i % 2 else "?") for i in range(36)])
    long = load_longblocks(rows, streaming=True, counts=counts, keep_document=False)
    short = load_conversations(
        Dataset.from_list([{"messages": [*user(str(i)), {"role": "assistant", "content": "ok"}]} for i in range(2)]),
        streaming=True,
    )
    mixed = mix_short_and_long(short, long)
    assert [r["answer"] for r in mixed] == ["12"] * 4 + ["ok"] + ["12"] * 9 + ["ok"] + ["12"] * 5
    assert counts.reasons == {"empty_question": 18}
    for position, _ in enumerate(mixed):
        if position == 7:
            state = mixed.state_dict()
            break
    mixed.load_state_dict(state)
    kept = [str(i) for i in range(0, 36, 2)]
    assert ids(mixed) == [*kept[7:13], None, *kept[13:]]


def test_a_json_set_without_any_document_can_be_joined(tmp_path):
    """Its column has no type in the file."""
    path = write_jsonl(tmp_path / "rows.jsonl", [row(id="B1", document=None)])
    assert load_dataset("json", data_files=str(path), split="train").features["document"].dtype == "null"
    assert load_longblocks(path, books=[book("B1")])["document"][:] == ["one\n\ntwo"]
