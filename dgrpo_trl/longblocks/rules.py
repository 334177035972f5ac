"""Long-document questions made by rule: facts written into real text, looked up among near misses.

A document is a run of sentences of one source, in order, cut into blocks; a few one-sentence facts stand between them.
One fact (or a chain of two) answers the question. The others have the same form and a similar subject, so that the
reader must find the right one: matching the form alone is not enough. No language model is needed, the answer is
certain, and the blocks that hold it are known, which gives the teacher its prompt.

| task | fact | question |
| --- | --- | --- |
| `lookup_number` | The church of Ashwick has 412 windows. | How many windows does the church of Ashwick have? |
| `lookup_name` | The baker of Ashwick is Clara. | Who is the baker of Ashwick? |
| `two_hop` | Clara lives in Ashwick. + the first fact | How many ... of the town where Clara lives have? |
"""

import copy
import hashlib
import random
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .blocks import split_blocks


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TASKS = FACT_TASKS = ("lookup_number", "lookup_name", "two_hop")
SPLITS = ("train", "test")

SYSTEM_MESSAGE = "Answer with one name or number."

_PLACE_HEADS = (
    "Ash Ald Bar Birch Brad Bridge Clay Cliff Cross Dun East Elm Fair Farn Glen Green Hart Hazel High Holm King "
    "Lang Mark Marsh Mill Moor New North Oak Old Ox Red Rock Salt Sand Sea Shep South Stan Stone Thorn Wal West "
    "White Win Wood"
).split()
_PLACE_TAILS = "bury by combe dale field ford ham land ley minster port stead ton well wick worth".split()
_PEOPLE = (
    "Adam Adele Agnes Albert Alfred Alice Amelia Amos Andrew Anna Arthur Audrey Barbara Basil Beatrice Benedict "
    "Bernard Bertha Bridget Calvin Carl Caroline Cecil Charlotte Chester Clara Clarence Claude Clement Clifford "
    "Conrad Cora Daisy Daniel David Della Dennis Diana Dora Dorothy Douglas Edgar Edith Edmund Edwin Eleanor "
    "Elias Ella Ellen Elmer Elsie Emily Emma Enoch Eric Ernest Esther Ethel Eugene Eva Evelyn Felix Flora "
    "Florence Floyd Frances Frank Fred George Gerald Gertrude Gilbert Gladys Gordon Grace Graham Hannah Harold "
    "Harriet Harry Harvey Hazel Helen Herbert Hilda Homer Horace Howard Hubert Hugh Ida Irene Iris Isaac Isabel "
    "Ivan Jack Jacob James Jane Janet Jasper Jean Jerome Jesse Joan Joel Josephine Judith Julian Karen Kate "
    "Kenneth Laura Laurence Leo Leonard Lewis Lillian Linda Lloyd Louis Lucy Luther Mabel Margaret Marion Martha "
    "Martin Matilda Maud Max Mildred Miles Miriam Molly Morris Nancy Nathan Nell Nicholas Nora Norman Olive "
    "Oliver Oscar Otto Patrick Pauline Percy Peter Philip Phoebe Quentin Rachel Ralph Raymond Rebecca Reuben "
    "Rhoda Robert Roland Rosa Rose Rufus Rupert Russell Ruth Sally Samuel Sarah Seth Simon Sophie Stella Stephen "
    "Susan Sylvia Theodore Thomas Tobias Vera Vernon Victor Vincent Viola Virginia Walter Wanda Warren Wilfred "
    "Winifred"
).split()

# What stands in a place, several of them, and what is counted there
_COUNTED = (
    ("church", "churches", "windows"),
    ("farm", "farms", "sheep"),
    ("school", "schools", "books"),
    ("harbour", "harbours", "boats"),
    ("market", "markets", "stalls"),
    ("orchard", "orchards", "trees"),
)
_ROLES = ("baker", "doctor", "judge", "mayor", "miller", "sheriff", "tailor", "teacher")

# (fact, question). `{place}` of a question becomes "the town where <person> lives" in a chain of two facts.
_NUMBER_RELATIONS = tuple(
    (
        f"The {building} of {{place}} has {{value}} {things}.",
        f"How many {things} does the {building} of {{place}} have?",
    )
    for building, _, things in _COUNTED
)
_NAME_RELATIONS = tuple(
    (f"The {role} of {{place}} is {{value}}.", f"Who is the {role} of {{place}}?") for role in _ROLES
)
_HOME = "{person} lives in {place}."

_SENTENCE_BORDER = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z])")


def _share(text: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the text and the seed: the same on every machine and in every run."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_of(text: str, seed: int, test_share: float) -> str:
    return "test" if _share(text, seed) < test_share else "train"


@dataclass(frozen=True)
class Passage:
    """A run of sentences of one source, in order, from which documents are cut.

    Args:
        id (`str`):
            Name of the source and number of the run in it.
        source (`str`):
            Name of the source.
        language (`str`):
            Two-letter language code.
        sentences (`tuple[str, ...]`):
            The sentences, in order, each on one line.
    """

    id: str
    source: str
    language: str
    sentences: tuple[str, ...]


def split_passages(
    text: str, source: str, language: str = "en", sentences_per_passage: int = 24, max_sentence_chars: int = 240
) -> list[Passage]:
    """Cut a source into passages. No sentence is in two of them.

    A sentence that holds a digit could hold an answer by accident, and one that is very long does not fit a small
    document: both are left out, as is what does not look like a sentence (titles, lists, names of speakers).

    Args:
        text (`str`):
            The source, its headers already removed.
        source (`str`):
            Name for the `source` column.
        language (`str`, *optional*, defaults to `"en"`):
            Two-letter code for the `language` column.
        sentences_per_passage (`int`, *optional*, defaults to `24`):
            Sentences of a passage; the rest of the source, if shorter, is left out.
        max_sentence_chars (`int`, *optional*, defaults to `240`):
            Longest sentence kept, in characters.

    Returns:
        `list[Passage]`: the passages, in the order of the text.
    """
    sentences = [
        sentence
        for block in split_blocks(text)
        for sentence in _SENTENCE_BORDER.split(" ".join(block.text.split()))
        if _is_usable(sentence, max_sentence_chars)
    ]
    num_passages = len(sentences) // sentences_per_passage
    return [
        Passage(
            id=f"{source}#{index}",
            source=source,
            language=language,
            sentences=tuple(sentences[index * sentences_per_passage : (index + 1) * sentences_per_passage]),
        )
        for index in range(num_passages)
    ]


def _is_usable(sentence: str, max_sentence_chars: int) -> bool:
    if len(sentence) > max_sentence_chars or len(sentence.split()) < 3:
        return False
    return sentence[-1] in ".!?" and not re.search(r"\d", sentence)


@dataclass(frozen=True)
class Case:
    """The facts of one row, before they are written into a text."""

    question: str
    answer: str
    evidence: tuple[str, ...]
    near_misses: tuple[str, ...]
    entities: tuple[str, ...]


class Facts:
    """Facts about invented places and people, each of which belongs to one split.

    Args:
        seed (`int`):
            Seed of the split.
        test_share (`float`):
            Share of places, people and numbers that are kept for `"test"`, between 0 and 1.
    """

    def __init__(self, seed: int, test_share: float):
        def by_split(items) -> dict[str | None, list]:
            groups = {split: [] for split in SPLITS}
            for item in items:
                groups[_split_of(str(item), seed, test_share)].append(item)
            return {**groups, None: [*groups["train"], *groups["test"]]}

        self._places = by_split(head + tail for head in _PLACE_HEADS for tail in _PLACE_TAILS)
        self._people = by_split(_PEOPLE)
        self._numbers = by_split(range(101, 1000))

    def numbers(self, split: str | None) -> list[int]:
        """The numbers of a split; of both for `None`."""
        return self._numbers[split]

    def without(self, words: Collection[str]) -> "Facts":
        """The same without the names and numbers that are among the words of a text."""
        facts = copy.copy(self)
        for name, groups in vars(self).items():
            kept = {split: [item for item in items if str(item) not in words] for split, items in groups.items()}
            setattr(facts, name, kept)
        return facts

    def max_near_misses(self, split: str | None) -> int:
        """The largest number of near misses for which there are names, places and numbers enough."""
        return min(len(self._places[split]), len(self._people[split]), len(self._numbers[split]) // 2) - 3

    def case(self, rng: random.Random, split: str | None, task: str, num_near_misses: int) -> Case:
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {TASKS}, got {task!r}.")
        num_subjects = num_near_misses + 1
        places = self._similar_places(rng, split, num_subjects)
        if task == "lookup_name":
            relation, other_relation = rng.sample(_NAME_RELATIONS, 2)
            values = rng.sample(self._people[split], num_subjects)
        else:
            relation, other_relation = rng.sample(_NUMBER_RELATIONS, 2)
            values = [str(number) for number in rng.sample(self._numbers[split], num_subjects)]

        fact, question = relation
        facts = [fact.format(place=place, value=value) for place, value in zip(places, values, strict=True)]
        if task != "two_hop":
            # One near miss keeps the subject and changes the relation; the others do the reverse.
            facts[-1] = other_relation[0].format(place=places[0], value=values[-1])
            return Case(
                question=question.format(place=places[0]),
                answer=values[0],
                evidence=(facts[0],),
                near_misses=tuple(facts[1:]),
                entities=(*places, *values),
            )
        # Half as many chains as near misses, as each is two facts, and never fewer than two beside the right one.
        num_chains = 1 + max(2, num_near_misses // 2)
        people = rng.sample(self._people[split], num_chains)
        places, values, facts = places[:num_chains], values[:num_chains], facts[:num_chains]
        homes = [_HOME.format(person=person, place=place) for person, place in zip(people, places, strict=True)]
        return Case(
            question=question.format(place=f"the town where {people[0]} lives"),
            answer=values[0],
            evidence=(homes[0], facts[0]),
            near_misses=(*homes[1:], *facts[1:]),
            entities=(*people, *places, *values),
        )

    def multi_hop(self, rng: random.Random, split: str | None, num_near_misses: int) -> Case:
        """A question that needs four facts: a sum, a difference, or who holds an office in the town with the most."""
        (building, buildings, things), (other_building, _, other_things) = rng.sample(_COUNTED, 2)
        num_places = num_near_misses + 3
        places = self._similar_places(rng, split, num_places)
        people = rng.sample(self._people[split], num_places)
        values = rng.sample(self._numbers[split], num_places)
        other_values = rng.sample([n for n in self._numbers[split] if n not in set(values)], 2)
        facts = [
            f"The {building} of {place} has {value} {things}." for place, value in zip(places, values, strict=True)
        ]
        near_misses = [
            f"The {other_building} of {place} has {value} {other_things}."
            for place, value in zip(places, other_values, strict=False)
        ]
        if rng.randrange(3) == 0:
            role = rng.choice(_ROLES)
            links = [f"The {role} of {place} is {person}." for place, person in zip(places, people, strict=True)]
            most = max(range(3), key=values.__getitem__)
            answer = people[most]
            question = (
                f"Of the towns {places[0]}, {places[1]} and {places[2]}, take the one whose {building} has the most "
                f"{things}. Who is its {role}?"
            )
            evidence = (*facts[:3], links[most])
            near_misses += [links[index] for index in range(3) if index != most]
            rest = zip(facts[3:], links[3:], strict=True)
        else:
            links = [_HOME.format(person=person, place=place) for person, place in zip(people, places, strict=True)]
            more, fewer = sorted((0, 1), key=values.__getitem__, reverse=True)
            if rng.randrange(2) == 0:
                answer = str(values[0] + values[1])
                towns = f"the towns where {people[0]} and {people[1]} live"
                question = f"How many {things} do the {buildings} of {towns} have together?"
            else:
                answer = str(values[more] - values[fewer])
                question = (
                    f"How many more {things} does the {building} of the town where {people[more]} lives have than the "
                    f"{building} of the town where {people[fewer]} lives?"
                )
            evidence = (links[0], facts[0], links[1], facts[1])
            rest = zip(facts[2:], links[2:], strict=True)
        near_misses += [fact for pair in rest for fact in pair][: max(0, num_near_misses - len(near_misses))]
        entities = (*places, *people, *map(str, (*values, *other_values)))
        return Case(question, answer, evidence, tuple(near_misses), entities)

    def _similar_places(self, rng: random.Random, split: str | None, num_places: int) -> list[str]:
        """Places of which the later ones share, as far as there are any, their head with the first."""
        places = self._places[split]
        first = rng.choice(places)
        head = max((h for h in _PLACE_HEADS if first.startswith(h)), key=len)
        similar = [place for place in places if place.startswith(head) and place != first]
        similar = rng.sample(similar, min(len(similar), num_places // 2))
        others = rng.sample([p for p in places if p != first and p not in similar], num_places - 1 - len(similar))
        return [first, *rng.sample(similar + others, num_places - 1)]


class RuleBuilder:
    """Builds rows of long-document questions by rule, the same ones for the same seed.

    Places, people, numbers and passages are each given to `"train"` or `"test"` by a hash of the seed and their text,
    so the two splits share no entity, no answer and no passage.

    Args:
        passages (`Iterable[Passage]`):
            The real text, see [`split_passages`].
        tokenizer (`PreTrainedTokenizerBase`):
            Counts prompt lengths; must have a chat template.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split and of every row.
        test_share (`float`, *optional*, defaults to `0.3`):
            Share of entities and passages kept for `"test"`, between 0 and 1.
        tokens_per_near_miss (`int`, *optional*, defaults to `40`):
            A prompt of n tokens holds about n divided by this many near misses, and never fewer than two.

    Raises:
        ValueError: if a passage holds the text of a special token of the tokenizer, which would become a real one.
    """

    def __init__(
        self,
        passages: Iterable[Passage],
        tokenizer: "PreTrainedTokenizerBase",
        seed: int = 0,
        test_share: float = 0.3,
        tokens_per_near_miss: int = 40,
    ):
        from ..data import escape_special_tokens  # brings TRL along

        self.tokenizer = tokenizer
        self.seed = seed
        self.tokens_per_near_miss = tokens_per_near_miss

        self._passages = {split: [] for split in SPLITS}
        for passage in passages:
            self._passages[_split_of(passage.id, seed, test_share)].append(passage)
        self._facts = Facts(seed, test_share)
        for split, own_passages in self._passages.items():
            if not own_passages:
                raise ValueError(f"No passage falls into the {split!r} split. Give more text.")
            for passage in own_passages:
                text = " ".join(passage.sentences)
                if escape_special_tokens(text, tokenizer) != text:
                    raise ValueError(
                        f"Passage {passage.id!r} holds a special token of the tokenizer, which would become a real "
                        "one. Apply `dgrpo_trl.data.escape_special_tokens` to the source."
                    )

    def rows(
        self,
        split: str,
        num_rows: int,
        length_bins: Iterable[int] = (128, 192, 256, 384),
        tasks: Iterable[str] = TASKS,
        tolerance_tokens: int = 16,
    ) -> Iterator[dict]:
        """Yield rows, going through every pair of task and length bin in turn.

        Args:
            split (`str`):
                `"train"` or `"test"`.
            num_rows (`int`):
                Number of rows.
            length_bins (`Iterable[int]`, *optional*, defaults to `(128, 192, 256, 384)`):
                Longest prompt of each bin, in tokens of the tokenizer, chat template included.
            tasks (`Iterable[str]`, *optional*, defaults to `TASKS`):
                Tasks to use.
            tolerance_tokens (`int`, *optional*, defaults to `16`):
                A prompt is at most this much shorter than its bin.

        Yields:
            `dict`: the LongBlocks columns `id`, `document`, `source`, `language`, `question`, `answer`, and `task`,
            `evidence` (list of `block`, `start`, `end`), `prompt` and `teacher_prompt` (conversational, the second
            with the evidence blocks only), `length_bin` and `prompt_tokens`.

        Raises:
            ValueError: for an unknown split or task, or a bin that is too short for the facts.
        """
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {SPLITS}, got {split!r}.")
        kinds = [(task, length_bin) for length_bin in length_bins for task in tasks]
        seen = set()
        for index in range(num_rows):
            task, length_bin = kinds[index % len(kinds)]
            for attempt in range(200):
                rng = random.Random(f"{self.seed}:{split}:{index}:{attempt}")
                row = self._row(rng, split, task, length_bin, tolerance_tokens)
                if row is not None and row["id"] not in seen:
                    break
            else:
                raise ValueError(
                    f"No {task!r} row of {length_bin - tolerance_tokens} to {length_bin} prompt tokens could be "
                    "built. Use a longer bin, a larger `tolerance_tokens` or `tokens_per_near_miss`, or more text."
                )
            seen.add(row["id"])
            yield row

    def _row(self, rng: random.Random, split: str, task: str, length_bin: int, tolerance_tokens: int) -> dict | None:
        """One row, or `None` when the drawn facts and text do not fit together; the caller draws again."""
        case = self._facts.case(rng, split, task, max(2, length_bin // self.tokens_per_near_miss))
        passage = rng.choice(self._passages[split])
        start = rng.randrange(len(passage.sentences))
        facts = [(fact, True) for fact in case.evidence] + [(fact, False) for fact in case.near_misses]
        rng.shuffle(facts)

        # The longest run of sentences that fits: the count grows with each sentence, so stop at the first excess.
        best = None
        for num_sentences in range(len(facts) // 2, len(passage.sentences) - start + 1):
            sentences = passage.sentences[start : start + num_sentences]
            document, evidence_texts = _write(rng, sentences, facts)
            prompt = build_prompt(document, case.question)
            num_tokens = self._num_tokens(prompt)
            if num_tokens > length_bin:
                break
            best = (document, evidence_texts, prompt, num_tokens)
        if best is None or best[3] < length_bin - tolerance_tokens:
            return None
        document, evidence_texts, prompt, num_tokens = best
        text = " ".join(passage.sentences)
        if any(count_word(text, entity) for entity in case.entities) or count_word(document, case.answer) != 1:
            return None

        evidence = [block for block in split_blocks(document) if block.text in evidence_texts]
        return {
            "id": hashlib.sha256(f"{document}\n{case.question}".encode()).hexdigest()[:16],
            "document": document,
            "source": passage.source,
            "language": passage.language,
            "question": case.question,
            "answer": case.answer,
            "task": task,
            "evidence": [{"block": block.id, "start": block.start, "end": block.end} for block in evidence],
            "prompt": prompt,
            "teacher_prompt": build_prompt("\n\n".join(block.text for block in evidence), case.question),
            "length_bin": length_bin,
            "prompt_tokens": num_tokens,
        }

    def _num_tokens(self, prompt: list[dict]) -> int:
        text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def build_prompt(context: str, question: str) -> list[dict]:
    """The conversational prompt: the context, then the question. Student and teacher read the same form."""
    return [
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": f"{context}\n\n{question}"},
    ]


def _write(rng: random.Random, sentences: tuple[str, ...], facts: list[tuple[str, bool]]) -> tuple[str, set[str]]:
    """Write the facts between the sentences and cut the text into blocks. A block holds one fact that is evidence, or
    one or two that are not, so that the evidence blocks hold no near miss.

    Returns the document and the texts of the evidence blocks.
    """
    groups = []
    for fact, is_evidence in facts:
        if groups and not is_evidence and not groups[-1][1] and len(groups[-1][0]) == 1:
            groups[-1][0].append(fact)
        else:
            groups.append(([fact], is_evidence))
    cuts = sorted(rng.randint(0, len(sentences)) for _ in range(len(groups) - 1))
    blocks, evidence_texts = [], set()
    for start, end, (group_facts, is_evidence) in zip([0, *cuts], [*cuts, len(sentences)], groups, strict=True):
        lines = list(sentences[start:end])
        for fact in group_facts:
            lines.insert(rng.randint(0, len(lines)), fact)
        blocks.append(" ".join(lines))
        if is_evidence:
            evidence_texts.add(blocks[-1])
    return "\n\n".join(blocks), evidence_texts


def count_word(text: str, word: str) -> int:
    """How often a word stands in a text, not as a part of a longer one."""
    if word not in text:  # much faster than the pattern
        return 0
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text))
