"""Rows that hold a piece of an evaluation set leave: otherwise a later evaluation would measure memory.

A piece is `ngram_words` words in a row (`ngram_chars` characters where no space stands between words), or a whole item
of the evaluation set that is shorter. Case, punctuation and forms of the same character make no difference.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ...strict_model import StrictModel
from ...text import IS_UNSPACED, hash_ngram, iter_ngrams, iter_strings, tokenize
from ..records import Drop, Row


STAGE = "decontamination"


class EvaluationSet(StrictModel):
    """One evaluation set, local or on the Hub."""

    name: str = Field(description="Name, for the card and the reasons of drops.")
    path: str | None = Field(None, description="Local file: `.jsonl`, `.parquet`, or text with one item a line.")
    dataset: str | None = Field(None, description="Id on the Hub, instead of `path`.")
    config: str | None = Field(None, description="Configuration on the Hub.")
    split: str = Field("test", description="Split on the Hub.")
    columns: tuple[str, ...] = Field(("question",), description="Columns with the text to look for.")

    @model_validator(mode="after")
    def _check_place(self) -> "EvaluationSet":
        if (self.path is None) == (self.dataset is None):
            raise ValueError(f"The evaluation set {self.name!r} needs `path` or `dataset`, and not both. Give one.")
        return self


class DecontaminationConfig(StrictModel):
    """Section `decontamination`."""

    against: tuple[EvaluationSet, ...] = Field((), description="Evaluation sets to look for.")
    ngram_words: int = Field(13, ge=1, description="Words in a row that are no accident.")
    ngram_chars: int = Field(26, ge=1, description="Characters in a row, for scripts without spaces: two to a word.")
    min_item_words: int = Field(5, ge=1, description="Shorter items (in such scripts: twice this) are not looked for.")
    check_documents: bool = Field(False, description="Look in documents too, not only in what is asked and answered.")


class Decontaminator:
    """Looks for evaluation sets in rows. Its index takes about 150 MB for a million n-grams.

    Raises:
        ValueError: If an evaluation set cannot be read, or lacks a column.
    """

    def __init__(self, config: DecontaminationConfig):
        self.config = config
        # hash of the n-gram -> name of the set; one table for each length
        self._index: dict[int, dict[bytes, str]] = defaultdict(dict)
        for evaluation_set in config.against:
            for text in _texts(evaluation_set):
                for ngram in self._ngrams_of_item(tokenize(text)):
                    self._index[len(ngram)].setdefault(hash_ngram(ngram), evaluation_set.name)

    def _length(self, tokens: list[str]) -> int:
        """Tokens of an n-gram of such a text."""
        unspaced = sum(1 for token in tokens if IS_UNSPACED.match(token))
        return self.config.ngram_chars if 2 * unspaced > len(tokens) else self.config.ngram_words

    def _ngrams_of_item(self, tokens: list[str]) -> Iterator[tuple[str, ...]]:
        length = self._length(tokens)
        if len(tokens) >= length:
            yield from iter_ngrams(tokens, length)
        elif len(tokens) * self.config.ngram_words >= self.config.min_item_words * length:
            yield tuple(tokens)

    def check(self, row: Row, text: str) -> Drop | None:
        """Why a row, whose document is `text`, must leave, or `None`."""
        texts = [row.question, row.answer, *row.responses.values(), f"{row.question} {row.answer}"]
        for candidate in [*texts, text] if self.config.check_documents else texts:
            if found := self.find(candidate):
                return Drop(STAGE, row.source, row.id, "contaminated", f"{found[0]}: {found[1]}")
        return None

    def find(self, text: str) -> tuple[str, str] | None:
        """Name of the set of which a piece is in `text`, and the piece; `None` if there is none."""
        if not self._index:
            return None
        tokens = tokenize(text)
        for length, names in self._index.items():
            for ngram in iter_ngrams(tokens, length):
                if name := names.get(hash_ngram(ngram)):
                    return name, " ".join(ngram)
        return None


def _texts(evaluation_set: EvaluationSet) -> Iterator[str]:
    """The texts to look for. A column may hold a list of texts."""
    num_found = 0
    try:
        for row in _rows(evaluation_set):
            if isinstance(row, str):
                num_found += 1
                yield row
                continue
            for column in evaluation_set.columns:
                if column not in row:
                    raise ValueError(f"it has no column {column!r}; its columns are {sorted(row)}")
                num_found += 1
                yield from iter_strings(row[column])
        if num_found == 0:
            raise ValueError("it holds no row")
    except Exception as error:  # whatever the readers of files and of the Hub raise
        raise ValueError(
            f"The evaluation set {evaluation_set.name!r} cannot be read: {error}. Rows that hold a piece of it would "
            "stay. Check its `path` or `dataset`, its `split` and its `columns`, or take it out."
        ) from error


def _rows(evaluation_set: EvaluationSet) -> Iterable[dict[str, Any] | str]:
    if evaluation_set.dataset is not None:
        from datasets import load_dataset  # takes seconds, and local files do without

        return load_dataset(
            evaluation_set.dataset, name=evaluation_set.config, split=evaluation_set.split, streaming=True
        )
    path = Path(evaluation_set.path or "")  # `_check_place`: it is given where `dataset` is not
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return (row for batch in pq.ParquetFile(path).iter_batches(1024) for row in batch.to_pylist())
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return map(json.loads, lines) if path.suffix == ".jsonl" else lines
