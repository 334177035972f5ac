"""The `rule` engine: questions over long documents whose answers are certain, without a language model.

A row's document is a window of a real one, of a chosen length. The task decides what is done to it:

| task | in the window | languages |
| --- | --- | --- |
| `lookup_number`, `lookup_name`, `two_hop` | facts among near misses, see [`rules`] | English, code |
| `multi_hop` | the same: a sum or a difference of two places, or an office in the largest of three | English, code |
| `key_chain` | notes that lead from key to key, to a number; other chains beside | all in `TEMPLATES`, code |
| `reconstruction` | blocks taken out, whose order is asked for | all in `TEMPLATES`, code |
| `counting` | nothing: how often does a word occur? | those with spaces, code |
| `unanswerable` | a chain, or facts (English, code), without the last of those needed | all in `TEMPLATES`, code |

The evidence of `reconstruction` is each mark of a gap with the blocks around it; that of `counting` is the blocks that
hold the word. Code gets its facts as comments above a line, Markdown as paragraphs of their own.

Names, places and numbers belong to one split; sums, differences, counts and orders of gaps are of no split, nor are
documents: those of an evaluation set must be others.

| reason of a drop | what it says |
| --- | --- |
| `no_template_for_language` | no task can be asked in its language |
| `too_short_for_task` | the document has too few blocks |
| `no_fit` | no facts, gaps or words could be found that make the answer certain within the length |
"""

import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from typing import Literal

import yaml
from pydantic import Field, field_validator, model_validator

from ...strict_model import StrictModel
from ..records import Document, Drop, Evidence, Kind, Row
from ..sources.files import comment_prefix
from .blocks import Block, blocks_at, terms
from .facts import FACT_TASKS, Case, Facts, count_word
from .llm_engine import OR_SAY, not_stated


STAGE = "questions"

ENGLISH_TASKS = (*FACT_TASKS, "multi_hop")
TASKS = (*ENGLISH_TASKS, "key_chain", "reconstruction", "counting", "unanswerable")
_ATTEMPTS = 8

# Where a sentence of any language ends, and not only an abbreviation: what follows is white space, save after `。`
_SENTENCE_END = re.compile(r"(?:(?<=\w{4}[.!?…؟।])|(?<=\w{4}[.!?…؟।][\"'”’)»]))\s+(?=\S)|[。！？][」』”’）]*")
# Words of which it is not certain whether they are whole: "couldn't", "well-known", and one that a hyphen parts
_JOINED = re.compile(r"\w+(?:['’‐‑-](?:[ \t]*\r?\n[ \t]*)?\w+)+")
# Accents that are characters of their own, soft hyphens and other invisible characters
_MARKS = ("Mn", "Mc", "Me", "Cf")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)

GAP = "[[GAP {number}]]"
# What the engine says, by language: see the file
TEMPLATES: dict[str, dict[str, str]] = yaml.safe_load(
    (resources.files(__package__) / "templates.yaml").read_text(encoding="utf-8")
)


class RuleEngineConfig(StrictModel):
    """Section `questions` without a language model."""

    engine: Literal["rule"]
    tasks: dict[str, float] = Field(
        default={
            "lookup_number": 0.1,
            "lookup_name": 0.1,
            "two_hop": 0.15,
            "multi_hop": 0.15,
            "key_chain": 0.2,
            "reconstruction": 0.15,
            "counting": 0.1,
            "unanswerable": 0.05,
        },
        description="Weights of the tasks; those that cannot be asked of a document are left out for it.",
    )
    rows_per_document: int = Field(4, ge=1, description="Questions on a document.")
    lengths: tuple[int | None, ...] = Field(
        (2048,),
        min_length=1,
        description="Tokens of a row's document and question, at most; taken in turn. `null`: the whole document.",
    )
    tokens_per_near_miss: int = Field(
        200, ge=1, description="A window of n tokens holds about n divided by this many near misses, from 2 to 24."
    )
    min_hops: int = Field(2, ge=2, description="Notes of a chain of keys, at least.")
    max_hops: int = Field(5, ge=2, le=12, description="Notes of a chain of keys, at most.")
    min_gaps: int = Field(2, ge=2, description="Blocks taken out, at least.")
    max_gaps: int = Field(4, ge=2, le=8, description="Blocks taken out, at most.")
    not_stated_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of the answerable questions about facts and keys that also say what to answer if the "
        "document does not, so that this does not give the unanswerable ones away.",
    )
    split: Literal["train", "test"] | None = Field(
        None, description="Use only the names, places and numbers of this split, which the other never sees."
    )
    test_share: float = Field(0.3, gt=0, lt=1, description="Share of them that are kept for `test`.")
    seed: int = Field(0, description="Seed of all choices.")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(tasks) - set(TASKS))
        if unknown or not tasks or min(tasks.values()) < 0 or sum(tasks.values()) <= 0:
            raise ValueError(f"`tasks` are {tasks}. Give weights of some of {', '.join(TASKS)}, not all of them 0.")
        return tasks

    @model_validator(mode="after")
    def _check_ranges(self) -> "RuleEngineConfig":
        for name in ("hops", "gaps"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least > most:
                raise ValueError(
                    f"`min_{name}` is {least} and `max_{name}` {most}. No number is both. Lower the first or raise "
                    "the second."
                )
        return self


@dataclass(frozen=True)
class _Draft:
    """A row before its blocks are cut: the text in pieces, of which some are evidence."""

    pieces: list[str]
    between: list[str]  # white space before each piece
    evidence: set[int]
    question: str
    answer: str


class RuleEngine:
    """Makes questions by rule, the same ones for the same document and seed.

    Args:
        config ([`RuleEngineConfig`]):
            How many, of which tasks and lengths.
        count_tokens (`Callable[[str], int]`):
            Length of a text in tokens.
    """

    def __init__(self, config: RuleEngineConfig, count_tokens: Callable[[str], int]):
        self.config = config
        self.count_tokens = count_tokens
        self.facts = Facts(config.seed, config.test_share)

    async def rows(
        self, document: Document, blocks: list[Block], links: list[list[int]]
    ) -> tuple[list[Row], list[Drop]]:
        """Questions on one document, and what came to nothing.

        Args:
            document ([`~records.Document`]):
                The document.
            blocks (`list[Block]`):
                Its blocks.
            links (`list[list[int]]`):
                Not used: facts decide what belongs together.
        """
        if document.num_tokens is None:
            document = replace(document, num_tokens=self.count_tokens(document.text))
        rows, drops, questions = [], [], set()
        for number in range(self.config.rows_per_document):
            result = self._row(document, blocks, number)
            if isinstance(result, Row) and result.question in questions:
                result = Drop(STAGE, document.source, f"{document.id}:{number}", "no_fit", "the same question again")
            if isinstance(result, Row):
                questions.add(result.question)
                rows.append(result)
            else:
                drops.append(result)
        return rows, drops

    def _row(self, document: Document, blocks: list[Block], number: int) -> Row | Drop:
        def drop(reason: str, detail: str = "") -> Drop:
            return Drop(STAGE, document.source, f"{document.id}:{number}", reason, detail)

        rng = random.Random(f"{self.config.seed}:{document.id}:{number}")
        language = document.language or "en"
        weights = self._weights(document, language)
        if not weights:
            return drop("no_template_for_language", language)
        if len(blocks) < 3:
            return drop("too_short_for_task", f"{len(blocks)} blocks")
        task = rng.choices(list(weights), list(weights.values()))[0]
        length = self.config.lengths[number % len(self.config.lengths)]
        max_tokens = length and int(length * 0.9)
        for _ in range(_ATTEMPTS):
            window = blocks if length is None else self._window(rng, document, blocks, max_tokens)
            draft = self._draft(rng, task, document, language, window)
            if draft is None:
                continue
            text, row_blocks = _assemble(draft)
            num_tokens = self.count_tokens(f"{text}\n\n{draft.question}")
            if length is not None and num_tokens > length:
                max_tokens -= num_tokens - length + length // 50 + 1
                continue
            return Row(
                document_id=document.id,
                source=document.source,
                language=language,
                question=draft.question,
                answer=draft.answer,
                task=task,
                evidence=tuple(
                    Evidence(row_blocks[i].id, row_blocks[i].start, row_blocks[i].end) for i in sorted(draft.evidence)
                ),
                document=text,
            )
        return drop("no_fit", f"{task} in {length or document.num_tokens} tokens")

    def _weights(self, document: Document, language: str) -> dict[str, float]:
        """The tasks that can be asked of a document."""
        templates = TEMPLATES.get(language)
        weights = {task: weight for task, weight in self.config.tasks.items() if weight > 0}
        if language != "en":
            weights = {task: weight for task, weight in weights.items() if task not in ENGLISH_TASKS}
        if templates is None:
            return {}
        if "count" not in templates:
            weights.pop("counting", None)
        return weights

    def _window(self, rng: random.Random, document: Document, blocks: list[Block], max_tokens: int) -> list[Block]:
        """Neighbouring blocks of about so many tokens, judged by the document's own rate of characters."""
        max_chars = max_tokens * len(document.text) / max(1, document.num_tokens)
        # The last place to begin from which the window can still be filled
        last = len(blocks) - 1
        while last > 0 and blocks[-1].end - blocks[last].start < max_chars:
            last -= 1
        start = rng.randint(0, last)
        stop = start + 1
        while stop < len(blocks) and blocks[stop].end - blocks[start].start <= max_chars:
            stop += 1
        return blocks[start:stop]

    def _draft(
        self, rng: random.Random, task: str, document: Document, language: str, window: list[Block]
    ) -> _Draft | None:
        """What the task makes of a window; `None` if it does not fit with these draws."""
        if len(window) < 3:
            return None
        between = ["", *(document.text[a.end : b.start] for a, b in zip(window, window[1:], strict=False))]
        if task == "reconstruction":
            return self._reconstruction(rng, language, window, between)
        if task == "counting":
            return self._counting(rng, language, window, between)
        text = document.text[window[0].start : window[-1].end]
        # Numbers apart too: no space may stand between them and the words of a text
        facts = self.facts.without({*re.findall(r"\w+", text), *re.findall(r"\d+", text)})
        if task in ENGLISH_TASKS or (task == "unanswerable" and language == "en" and rng.randrange(2)):
            num_tokens = len(text) / len(document.text) * document.num_tokens
            near_misses = min(24, max(2, int(num_tokens / self.config.tokens_per_near_miss)))
            fact_task = rng.choice(FACT_TASKS) if task == "unanswerable" else task
            case = self._case(rng, facts, fact_task, min(near_misses, facts.max_near_misses(self.config.split)))
            if case is not None and task == "unanswerable":
                case = _without_last_fact(case, not_stated(language))
        else:
            case = self._chains(rng, facts, language, task == "unanswerable", len(window) - 1)
        if case is None or any(count_word(text, entity) for entity in case.entities):
            return None
        question = case.question
        if task == "unanswerable" or rng.random() < self.config.not_stated_share:
            question = f"{question} {OR_SAY[language].format(not_stated(language))}"
        prefix = f"{comment_prefix(document.source_id)} " if document.kind == "code" else None
        lines = [(fact, True) for fact in case.evidence] + [(fact, False) for fact in case.near_misses]
        rng.shuffle(lines)
        pieces, evidence = _insert(rng, [block.text for block in window], between, lines, document.kind, prefix)
        return None if pieces is None else _Draft(pieces, between, evidence, question, case.answer)

    def _case(self, rng: random.Random, facts: Facts, task: str, num_near_misses: int) -> Case | None:
        """Facts to look up, with a question that says what form the answer has; `None` if too few names are left."""
        if num_near_misses < 2:
            return None
        if task == "multi_hop":
            case = facts.multi_hop(rng, self.config.split, num_near_misses)
        else:
            case = facts.case(rng, self.config.split, task, num_near_misses)
        kind = "number" if case.answer.isdecimal() else "name"
        return replace(case, question=f"{case.question} Answer with the {kind} only.")

    def _chains(self, rng: random.Random, facts: Facts, language: str, is_broken: bool, max_hops: int) -> Case | None:
        """Notes of the chain that is asked for, and of two others; a broken chain lacks its last note."""
        max_hops, numbers = min(max_hops, self.config.max_hops), facts.numbers(self.config.split)
        if max_hops < self.config.min_hops or len(numbers) < 3:
            return None
        templates = TEMPLATES[language]
        hops = rng.randint(self.config.min_hops, max_hops)
        keys = [[f"{rng.getrandbits(32):08x}" for _ in range(hops)] for _ in range(3)]
        values = [str(number) for number in rng.sample(numbers, 3)]
        chains = [
            [
                *(templates["next_note"].format(key=a, other=b) for a, b in zip(chain, chain[1:], strict=False)),
                templates["last_note"].format(key=chain[-1], value=value),
            ]
            for chain, value in zip(keys, values, strict=True)
        ]
        if is_broken:
            evidence, near_misses, answer = [], [*chains[0][:-1], *chains[1], *chains[2]], not_stated(language)
        else:
            evidence, near_misses, answer = chains[0], [*chains[1], *chains[2]], values[0]
        question = templates["follow"].format(key=keys[0][0])
        entities = (*(key for chain in keys for key in chain), *values)
        return Case(question, answer, tuple(evidence), tuple(near_misses), entities)

    def _reconstruction(
        self, rng: random.Random, language: str, window: list[Block], between: list[str]
    ) -> _Draft | None:
        """Blocks that are no neighbours are taken out, and asked for in shuffled order."""
        texts = [block.text for block in window]
        if any("[[GAP" in text for text in texts):  # which mark is ours would not be certain
            return None
        repeats = Counter(texts)
        inner = range(1, len(texts) - 1)
        usable = [i for i in inner if repeats[texts[i]] == 1 and len(texts[i]) >= 80]
        rng.shuffle(usable)
        num_gaps = rng.randint(self.config.min_gaps, self.config.max_gaps)
        gaps: list[int] = []
        for index in usable:
            is_apart = all(abs(index - other) > 2 for other in gaps)
            is_other = not any(_are_alike(texts[index], texts[other]) for other in gaps)
            if is_apart and is_other and len(gaps) < num_gaps:
                gaps.append(index)
        if len(gaps) < self.config.min_gaps:
            return None
        gaps.sort()
        order = rng.sample(gaps, len(gaps))
        letters = {index: chr(ord("A") + place) for place, index in enumerate(order)}
        pieces = list(texts)
        for number, index in enumerate(gaps, start=1):
            pieces[index] = GAP.format(number=number)
        options = "\n\n".join(f"{letters[index]}:\n{texts[index]}" for index in order)
        question = TEMPLATES[language]["reconstruct"].format(count=len(gaps), options=options)
        evidence = {index + step for index in gaps for step in (-1, 0, 1)}
        return _Draft(pieces, between, evidence, question, ", ".join(letters[index] for index in gaps))

    def _counting(self, rng: random.Random, language: str, window: list[Block], between: list[str]) -> _Draft | None:
        """A word that occurs a few times in the window as it is.

        In lower case, not folded: that would ask for "strasse" where the text has "straße".
        """
        texts = [block.text for block in window]
        document = "".join(map("".join, zip(between, texts, strict=True)))
        counts = _whole_words(document)
        words = sorted(w for w, n in counts.items() if 2 <= n <= 9 and len(w) >= 5 and w.isalpha())
        if not words:
            return None
        word = rng.choice(words)
        in_blocks = [re.findall(r"\w+", text.lower()).count(word) for text in texts]
        # A block may end within a word; and capitals may be those of another word too: "ſ", "İ"
        as_read = len(re.findall(rf"\b{re.escape(word)}\b", document, re.IGNORECASE))
        if not counts[word] == sum(in_blocks) == as_read:
            return None
        evidence = {i for i, number in enumerate(in_blocks) if number}
        question = TEMPLATES[language]["count"].format(word=word)
        return _Draft(texts, between, evidence, question, str(counts[word]))


def _whole_words(text: str) -> Counter[str]:
    """How often the words of a text occur, in lower case; only those that are certain to be whole words."""
    lower = text.lower()
    counts = Counter()
    uncertain = {word for run in _JOINED.findall(lower) for word in re.findall(r"\w+", run)}
    for match in re.finditer(r"\w+", lower):
        counts[match[0]] += 1
        neighbours = lower[max(0, match.start() - 1) : match.start()], lower[match.end() : match.end() + 1]
        if any(character and unicodedata.category(character) in _MARKS for character in neighbours):
            uncertain.add(match[0])
    return Counter({word: number for word, number in counts.items() if word not in uncertain})


def _are_alike(text: str, other: str) -> bool:
    """Whether two pieces could be taken for each other: they begin alike, or share most of their pairs of words."""
    pairs, other_pairs = (set(itertools.pairwise(terms(piece))) for piece in (text, other))
    return text[:60] == other[:60] or 2 * len(pairs & other_pairs) > len(pairs | other_pairs)


def _without_last_fact(case: Case, answer: str) -> Case:
    """The same question, which the facts no longer answer: what led to the last one is a near miss now."""
    return replace(case, answer=answer, evidence=(), near_misses=(*case.near_misses, *case.evidence[:-1]))


def _insert(
    rng: random.Random,
    pieces: list[str],
    between: list[str],
    facts: list[tuple[str, bool]],
    kind: Kind,
    comment: str | None,
) -> tuple[list[str] | None, set[int]]:
    """Writes facts into pieces of text, of which all that was there stays.

    A piece with evidence holds no near miss, so that the evidence alone is not ambiguous.

    Returns the pieces, `None` if there are too few, and the indices of those that hold evidence.
    """
    usable = _usable(pieces, between, kind)
    num_evidence = sum(is_evidence for _, is_evidence in facts)
    if len(usable) < num_evidence + 1:
        return None, set()
    places = rng.sample(usable, num_evidence)
    others = [index for index in usable if index not in set(places)]
    pieces, evidence = list(pieces), set(places)
    free = iter(places)
    for fact, is_evidence in facts:
        index = next(free) if is_evidence else rng.choice(others)
        piece, newline = pieces[index], "\r\n" if "\r\n" in between[index] else "\n"
        if kind == "code":
            pieces[index] = f"{comment}{fact}{newline}{_indentation(between[index])}{piece}"
        elif kind == "markdown":
            pieces[index] = f"{piece}{newline}{newline}{fact}"
        else:
            ends = [match.end() for match in _SENTENCE_END.finditer(piece)]
            place = rng.choice([*(end for end in ends if not piece[end : end + 1].islower()), len(piece)])
            space = "" if fact.endswith("。") else " "
            if piece[place:]:
                pieces[index] = f"{piece[:place]}{fact}{space}{piece[place:]}"
            else:
                pieces[index] = f"{piece}{space}{fact}"
    return pieces, evidence


def _usable(pieces: list[str], between: list[str], kind: Kind) -> list[int]:
    """The pieces that facts may be written into: of code those that begin a line, of Markdown those outside fences."""
    if kind == "code":
        return [i for i, space in enumerate(between) if i == 0 or "\n" in space]
    if kind == "markdown":
        num_fences = itertools.accumulate(len(_FENCE.findall(piece)) for piece in pieces)
        return [i for i, number in enumerate(num_fences) if number % 2 == 0]
    return list(range(len(pieces)))


def _indentation(space: str) -> str:
    """What of the white space above a line belongs to the line."""
    return space.rpartition("\n")[2]


def _assemble(draft: _Draft) -> tuple[str, list[Block]]:
    """The text of a draft, and its pieces as blocks."""
    text, spans = "", []
    for space, piece in zip(draft.between, draft.pieces, strict=True):
        text += space
        spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, blocks_at(text, spans)
