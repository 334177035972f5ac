"""Facts about invented places and people, of which some answer a question and the others come near it.

Each fact is one sentence. One of them, or several that belong together, answer the question; the others have the same
form and a similar subject, so that the reader must find the right ones: matching the form alone is not enough.

| kind | fact | question |
| --- | --- | --- |
| `lookup_number` | The church of Ashwick has 412 windows. | How many windows does the church of Ashwick have? |
| `lookup_name` | The baker of Ashwick is Clara. | Who is the baker of Ashwick? |
| `two_hop` | Clara lives in Ashwick. + the first fact | How many ... of the town where Clara lives have? |
| `multi_hop` | four of these | a sum, a difference, or who holds an office in the town with the most |
"""

import copy
import random
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ...files import read_table
from ...text import hash_share


T = TypeVar("T")

_WORDS: dict[str, Any] = read_table(__package__, "facts.yaml")
_PLACE_HEADS, _PLACE_TAILS, _PEOPLE, _ROLES = (
    _WORDS[name].split() for name in ("place_heads", "place_tails", "people", "roles")
)
_COUNTED = [tuple(words.split()) for words in _WORDS["counted"]]

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

    A share `test_share` of places, people and numbers is kept for `"test"`; without a `split`, all of them are used.
    """

    def __init__(self, seed: int, test_share: float, split: str | None):
        def own(items: Iterable[T]) -> list[T]:
            train: list[T] = []
            test: list[T] = []
            for item in items:
                (test if hash_share(str(item), seed) < test_share else train).append(item)
            return {"train": train, "test": test, None: [*train, *test]}[split]

        self._places = own(head + tail for head in _PLACE_HEADS for tail in _PLACE_TAILS)
        self._people = own(_PEOPLE)
        self.numbers = own(range(101, 1000))

    def without(self, words: Collection[str]) -> "Facts":
        """The same without the names and numbers that are among the words of a text."""
        facts = copy.copy(self)
        for name, items in vars(self).items():
            setattr(facts, name, [item for item in items if str(item) not in words])
        return facts

    @property
    def max_near_misses(self) -> int:
        """The largest number of near misses for which there are enough names, places and numbers."""
        return min(len(self._places), len(self._people), len(self.numbers) // 2) - 3

    def lookup_number(self, rng: random.Random, num_near_misses: int) -> Case:
        """A question that one fact answers, with a number."""
        return self._lookup(rng, num_near_misses, _NUMBER_RELATIONS, list(map(str, self.numbers)))

    def lookup_name(self, rng: random.Random, num_near_misses: int) -> Case:
        """A question that one fact answers, with a name."""
        return self._lookup(rng, num_near_misses, _NAME_RELATIONS, self._people)

    def _lookup(
        self,
        rng: random.Random,
        num_near_misses: int,
        relations: tuple[tuple[str, str], ...],
        values: list[str],
    ) -> Case:
        places = self._similar_places(rng, num_near_misses + 1)
        (fact, question), (other_fact, _) = rng.sample(relations, 2)
        values = rng.sample(values, num_near_misses + 1)
        facts = [fact.format(place=place, value=value) for place, value in zip(places, values, strict=True)]
        # One near miss keeps the subject and changes the relation; the others do the reverse
        facts[-1] = other_fact.format(place=places[0], value=values[-1])
        return Case(
            question=question.format(place=places[0]),
            answer=values[0],
            evidence=(facts[0],),
            near_misses=tuple(facts[1:]),
            entities=(*places, *values),
        )

    def two_hop(self, rng: random.Random, num_near_misses: int) -> Case:
        """A question that needs two facts: where somebody lives, and a number there."""
        places = self._similar_places(rng, num_near_misses + 1)
        fact, question = rng.sample(_NUMBER_RELATIONS, 2)[0]
        values = [str(number) for number in rng.sample(self.numbers, num_near_misses + 1)]
        # Half as many chains as near misses, as each is two facts, and never fewer than two besides the right one
        num_chains = 1 + max(2, num_near_misses // 2)
        people = rng.sample(self._people, num_chains)
        places, values = places[:num_chains], values[:num_chains]
        facts = [fact.format(place=place, value=value) for place, value in zip(places, values, strict=True)]
        homes = [_HOME.format(person=person, place=place) for person, place in zip(people, places, strict=True)]
        return Case(
            question=question.format(place=f"the town where {people[0]} lives"),
            answer=values[0],
            evidence=(homes[0], facts[0]),
            near_misses=(*homes[1:], *facts[1:]),
            entities=(*people, *places, *values),
        )

    def multi_hop(self, rng: random.Random, num_near_misses: int) -> Case:
        """A question that needs four facts: a sum, a difference, or who holds an office in the town with the most."""
        (building, buildings, things), (other_building, _, other_things) = rng.sample(_COUNTED, 2)
        num_places = num_near_misses + 3
        places = self._similar_places(rng, num_places)
        people = rng.sample(self._people, num_places)
        values = rng.sample(self.numbers, num_places)
        other_values = rng.sample([n for n in self.numbers if n not in set(values)], 2)
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

    def _similar_places(self, rng: random.Random, num_places: int) -> list[str]:
        """Places of which the later ones share, as far as there are any, their head with the first."""
        places = self._places
        first = rng.choice(places)
        head = max((h for h in _PLACE_HEADS if first.startswith(h)), key=len)
        similar = [place for place in places if place.startswith(head) and place != first]
        similar = rng.sample(similar, min(len(similar), num_places // 2))
        others = rng.sample([p for p in places if p != first and p not in similar], num_places - 1 - len(similar))
        return [first, *rng.sample(similar + others, num_places - 1)]


def count_word(text: str, word: str) -> int:
    """How often a word stands in a text, not as a part of a longer one."""
    if word not in text:  # much faster than the pattern
        return 0
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text))
