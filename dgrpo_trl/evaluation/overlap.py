"""Text that prompts share with training data: an evaluation on it would measure memorization."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..data_loading import load_rows
from ..text import hash_ngram, iter_ngrams, iter_strings, tokenize
from .samples import Sample


def check_overlap(samples: Iterable[Sample], training_data: str, max_tokens_per_pass: int = 10_000_000) -> None:
    """Raises a `ValueError` if prompts share text with the training data: a file, a folder or a Hub id.

    Those of `max_tokens_per_pass` tokens are compared in one pass over these rows; ten million take a gigabyte.
    """
    rows = load_rows(training_data)
    for batch in _batches(samples, max_tokens_per_pass):
        if shared := shared_ngrams(batch, rows):
            raise ValueError(
                f"{len(shared)} prompts of the evaluation share text with `training_data` {training_data!r}: "
                f"{shared[0][0]!r} has {shared[0][1]!r}. The score would count what was memorized. Choose another "
                "haystack, or questions held out by document."
            )


def _batches(samples: Iterable[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """The samples in batches of at most `max_tokens` tokens, or of one sample."""
    batch: list[Sample] = []
    num_tokens = 0
    for sample in samples:
        if batch and num_tokens + sample.num_tokens > max_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(sample)
        num_tokens += sample.num_tokens
    if batch:
        yield batch


def shared_ngrams(samples: Iterable[Sample], training_rows: Iterable[Any], n: int = 13) -> list[tuple[str, str]]:
    """Ids of the samples whose prompts share an n-gram with the training data, each with the first that is shared.

    All text of a training row counts, including that of messages. In scripts without spaces a character counts as a
    word. Case and punctuation make no difference, as in the decontamination of LongBlocks. Takes about 100 bytes for
    each different n-gram of the prompts.
    """
    samples = list(samples)
    hashes = {hash_ngram(ngram) for sample in samples for ngram in _sample_ngrams(sample, n)}
    texts = (text for row in training_rows for text in iter_strings(row))
    found = {
        hashed for text in texts for ngram in iter_ngrams(tokenize(text), n) if (hashed := hash_ngram(ngram)) in hashes
    }
    shared = []
    for sample in samples if found else ():
        first = next((ngram for ngram in _sample_ngrams(sample, n) if hash_ngram(ngram) in found), None)
        if first is not None:
            shared.append((sample.id, " ".join(first)))
    return shared


def _sample_ngrams(sample: Sample, n: int) -> Iterable[tuple[str, ...]]:
    return (ngram for message in sample.messages for ngram in iter_ngrams(tokenize(message["content"]), n))
