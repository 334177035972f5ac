"""Whether a server answers usably at all: noticed after a few replies, not after all of them were paid for."""

import re
from collections import Counter
from collections.abc import Sequence

from .failures import ServerRefused, ServerUnavailable


# So many failures in a row, over so many requests, are no coincidence
_MAX_FAILURES = 32
_MIN_REQUESTS = 8
# Fewer tokens than these of a prompt, or of a count, tell nothing: a template's own, or a count that is made up
_MIN_TOKENS = 256
_MIN_COUNT = 16
# Characters of text to a token at most, once white space and rules of one character are left out: English has 4 to 5
_MAX_CHARS_PER_TOKEN = 8
# Tokenizers count alike, but for what a template adds or leaves out
_MIN_SHARE_READ = 0.7


class Streak:
    """Failures and unusable replies since the last good one, those of a run before a restart included.

    Args:
        keys:
            Requests of the useless replies that a cache knows of the runs before, one for each reply.
    """

    def __init__(self, keys: Sequence[str] = ()):
        self.keys = set(keys)
        self.has_good = False
        self._num_paid = self._num_failures = len(keys)
        self._reasons: Counter[str] = Counter()

    def good(self) -> None:
        """A reply could be used."""
        self.has_good, self._num_paid, self._num_failures = True, 0, 0
        self.keys.clear()
        self._reasons.clear()

    def bad(self, key: str, reason: str, is_paid: bool) -> None:
        """A request failed once, or its reply could not be used."""
        self.keys.add(key)
        self._num_failures += 1
        self._num_paid += is_paid
        self._reasons[reason] += 1

    def error(self, base_url: str, detail: str, only_paid: bool) -> ServerRefused | None:
        """What ends the run, if it has been too much: of what was paid for, or of all failures."""
        # Once something was good, it takes more: hard requests may come together
        limit = _MAX_FAILURES * (4 if self.has_good else 1)
        number = self._num_paid if only_paid else self._num_failures
        if number < limit or len(self.keys) < _MIN_REQUESTS:
            return None
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(3))
        return (ServerUnavailable if self.has_good else ServerRefused)(
            f"The server at {base_url} gave no usable reply in {number} attempts on {len(self.keys)} requests "
            f"({reasons}), the last: {detail} All others would be paid for in vain. {_advice(self._reasons)} Then run "
            "again: finished requests are kept, and these are sent again."
        )


def _advice(reasons: Counter[str]) -> str:
    """What to look at, by the most frequent reason."""
    reason = reasons.most_common(1)[0][0]
    if reason == "truncated":
        return "Raise `max_tokens`, or shorten the reasoning by `extra_body`; look at the `finish_reason`."
    if reason in ("reasoning_only", "empty_reply"):
        return (
            "Look at the server's reasoning parser: one of another model takes the answer for reasoning, none leaves "
            "the reasoning in the answer."
        )
    return "Look at the server's log, at `model`, and at a reply to one request."


def tokens_at_least(text: str) -> int:
    """A number of tokens that no tokenizer in use stays below."""
    return len(re.sub(r"\s+|([^\w\s])\1{2,}", " ", text)) // _MAX_CHARS_PER_TOKEN


def cut_prompt_error(base_url: str, num_read: int, num_sent: int, is_counted: bool) -> ServerRefused | None:
    """What ends the run if a server read far less than the prompt: `num_sent` tokens, or at least as many."""
    least = num_sent * (_MIN_SHARE_READ if is_counted else 1)
    if num_sent < _MIN_TOKENS or num_read < _MIN_COUNT or num_read >= least:
        return None
    return ServerRefused(
        f"The server at {base_url} read {num_read:,} tokens of a prompt of {'' if is_counted else 'at least '}"
        f"{num_sent:,}: it cuts prompts in silence, and would answer without the document. Raise its context (Ollama: "
        "`OLLAMA_CONTEXT_LENGTH` or `num_ctx`; llama.cpp: `--ctx-size`), or set `max_model_tokens` to it, so that "
        "longer prompts are left out. Then run again: finished requests are kept, and this one is sent again."
    )
