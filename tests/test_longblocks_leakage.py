"""What a hold-out leaks, measured by runs of words that rows on both sides share."""

import json
import logging
import random

import pytest
from datasets import Dataset

from dgrpo_trl.evaluation.questions import question_samples
from dgrpo_trl.longblocks import STAGES, Builder, load_config, load_longblocks, split_by_id


RUN_WORDS = 30
WORDS = "river stone cloud meadow lantern winter garden shadow bridge silver copper thunder harvest candle".split()


def make_text(rng, num_paragraphs=40):
    def sentence():
        a, b, c = rng.sample(WORDS, 3)
        return f"The {a} stood near the {b}, and in the evening of day {rng.randrange(999)} nobody spoke of the {c}."

    return "\n\n".join(" ".join(sentence() for _ in range(5)) for _ in range(num_paragraphs))


def runs(text):
    words = text.casefold().split()
    return {" ".join(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


def leaked_rows(sides):
    """Test rows more than half of whose runs of words stand in a training row."""
    known = set().union(*(runs(row["document"]) for row in sides["train"]))
    return sum(2 * len((found := runs(row["document"])) & known) > len(found) for row in sides["test"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A set of windows, three or so of each of 24 texts, as the quickstart makes them."""
    folder = tmp_path_factory.mktemp("built")
    documents = [{"id": f"d{n}", "text": make_text(random.Random(n))} for n in range(24)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "name": "test",
                "sources": [
                    {
                        "type": "jsonl",
                        "name": "made",
                        "paths": [str(folder / "documents.jsonl")],
                        "id_column": "id",
                        "language": "en",
                    }
                ],
                "cleaning": {"min_tokens": 100, "identify_language": False},
                "verification": {"language": False},
                "questions": {"engine": "rule", "lengths": [3000], "rows_per_document": 4},
            }
        )
    )
    Builder(load_config(folder / "config.yaml"), folder / "out").run(STAGES)
    return load_longblocks(folder / "out" / "dataset"), {document["text"] for document in documents}


def published_rows():
    """Rows as the published set has them: an id for each, and texts of one document that differ in their form."""
    forms = (str, str.upper, lambda text: text.replace("\n\n", "\n"), lambda text: text.replace(".", " . "))
    for number in range(40):
        text = make_text(random.Random(number), 3)
        for form, change in enumerate(forms):
            yield {"id": f"{number}-{form}", "document": change(text), "question": f"{number}?", "answer": "x"}


def test_windows_of_one_document_are_held_out_together(built):
    rows, _ = built
    assert leaked_rows(split_by_id(rows, 0.3, column="id")) > 10  # what reading by id gives
    sides = split_by_id(rows, 0.3)
    assert len(sides["test"]) > 10 and len(sides["train"]) > 10 and leaked_rows(sides) == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_published_set_are_held_out_by_their_text(streaming, caplog):
    rows = Dataset.from_list(list(published_rows()))
    assert leaked_rows(split_by_id(rows, 0.3, column="id")) > 20
    with caplog.at_level(logging.INFO):
        sides = split_by_id(rows.to_iterable_dataset() if streaming else rows, 0.3)
    assert len(list(sides["test"])) > 20 and leaked_rows(sides) == 0
    assert streaming or "160 rows were merged into 40 groups" in caplog.text
    loaded = split_by_id(load_longblocks(rows, keep_document=False), 0.3)  # the same, without the text
    assert set(loaded["test"]["id"]) == {row["id"] for row in sides["test"]}


def test_a_row_says_which_characters_of_its_document_it_is_made_of(built):
    rows, texts = built
    assert len(set(rows["document_id"])) == 24
    for row in rows:
        sources = [text for text in texts if row["document_id"] in document_ids(text)]
        (source,) = sources
        window = source[row["document_start"] : row["document_end"]]
        shared = runs(window) & runs(row["document"])
        assert window and len(window) <= len(row["document"]) + 2000
        assert row["task"] == "reconstruction" or len(shared) > 0.3 * len(runs(window))


def document_ids(text):
    """Ids that the builder may give a text, whose ends it strips."""
    from dgrpo_trl.longblocks.records import Document

    return {Document(form, "made", "x").id for form in (text, text.strip(), text + "\n")}


def test_samples_of_the_evaluation_name_their_document(built, tokenizer):
    rows, _ = built
    cells = question_samples(rows, [100_000], tokenizer)
    documents = [sample.document for samples in cells.values() for sample in samples]
    assert set(documents) == set(rows["document_id"]) and len(documents) > 24
