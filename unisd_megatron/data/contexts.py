"""From records to examples: the prompts of the student, of the teacher, and of its other contexts, for every task alike.

An auxiliary context shows solved examples of other questions (drawn at random, or the most similar ones) or an instruction
that was induced from such. Whether it also shows the record's own reference is one choice for all tasks.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from unisd_megatron.data import prompts
from unisd_megatron.data.example import Example
from unisd_megatron.data.task import Record, Task
from unisd_megatron.errors import ConfigError, DataError

Nearest = Callable[[int], Sequence[Sequence[int]]]
"""For each record, the positions of the `count` records most like it (itself among them), the most similar first."""

RELEASED_SEED = 42  # of everything the authors' code draws for contexts and negatives, whatever its --seed


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a model induced from solved examples, and the ids of those."""

    text: str
    examples: frozenset[str]


def build_examples(
    task: Task,
    records: Sequence[Record],
    *,
    auxiliary: int,
    donors_per_context: int,
    negatives: bool,
    seed: int,
    gold: bool = False,
    nearest: Nearest | None = None,
    instructions: Sequence[Instruction] | None = None,
    generated: Mapping[str, Sequence[str]] | None = None,
    first: int | None = None,
) -> tuple[list[Example], int]:
    """The examples, in the order of the records, and how many records were dropped for want of a wrong solution.

    Args: auxiliary: contexts of each record; donors_per_context: solved other records in each, the most similar ones by
    `nearest`, else drawn at random; gold: whether they show the record's own reference too; instructions: contexts show one of
    these instead; generated: wrong solutions by record id, else the task's rule makes them; first: only of that many records,
    though all are donors.

    What is drawn for a record depends on the seed, on its id and on which records there are; not on their order, nor
    on whether negatives are asked for (a dropped record still is a donor).
    """
    if auxiliary < 0 or donors_per_context < 1:
        raise ConfigError(
            f"{auxiliary} auxiliary contexts of {donors_per_context} solved examples each cannot be built; "
            "use 0 or more contexts of 1 or more examples"
        )
    if task.released:
        seed = RELEASED_SEED
    if auxiliary and instructions is not None:
        contexts: _Contexts = _Instructed(task, instructions, auxiliary, seed)
    elif auxiliary:
        contexts = _Demonstrated(task, records, nearest, auxiliary, donors_per_context, seed)
    examples, dropped = [], 0
    for position, record in enumerate(records[:first]):
        wrong = _wrong_solution(task, record, generated, seed) if negatives else None
        if negatives and wrong is None:
            dropped += 1
            continue
        examples.append(
            Example(
                id=record.id,
                prompt=task.question(record),
                teacher=task.teacher_prompt(record, task.reference(record)),
                auxiliary=tuple(contexts.prompts(position, record, gold)) if auxiliary else (),
                negative=None if wrong is None else task.teacher_prompt(record, wrong, negative=True),
            )
        )
    if records and not examples:
        raise DataError(f"none of the {len(records)} {task.name} records offers a wrong solution; nothing is left to train on")
    return examples, dropped


def pool_of(task: Task, records: Sequence[Record], count: int | None) -> list[Record]:
    """The records among which donors are looked for, where examples are made of the first `count`: these, and no others."""
    return list(records if task.released and task.name in _DONORS_FROM_ALL else records[:count])


def _wrong_solution(task: Task, record: Record, generated: Mapping[str, Sequence[str]] | None, seed: int) -> str | None:
    rng = random.Random(f"{seed}:{record.id}:negative")
    if generated is None:
        return task.corrupt(record, rng)
    choices = generated.get(record.id, ())
    return rng.choice(choices) if choices else None


class _Instructed:
    """Contexts of instructions: other ones in each context of a record, none that was induced from the record itself."""

    def __init__(self, task: Task, instructions: Sequence[Instruction], contexts: int, seed: int) -> None:
        if not instructions:
            raise DataError(f"no instruction was induced for {task.name}; prepare them with another seed or model")
        self._task, self._instructions, self._contexts, self._seed = task, instructions, contexts, seed

    def prompts(self, position: int, record: Record, gold: bool) -> list[str]:
        rng = random.Random(f"{self._seed}:{record.id}:instructions")
        if self._task.released:
            drawn = rng.choices(self._instructions, k=self._contexts)
            return [prompts.studying(self._task.instructed_prompt(record, one.text, gold=gold)) for one in drawn]
        others = [one for one in self._instructions if record.id not in one.examples]
        if not others:
            raise DataError(
                f"{record.id}: every instruction of {self._task.name} was induced from this very record; use more records or a "
                "smaller --num_demos"
            )
        order = rng.sample(others, len(others))
        return [self._task.instructed_prompt(record, order[k % len(order)].text, gold=gold) for k in range(self._contexts)]


# Faults of the authors' code that `released` keeps, each of one task (see docs/contexts.md).
_GOLD_WITH_RETRIEVED = frozenset({"tooluse"})
_RETRIEVES_ITSELF = frozenset({"medmcqa"})
_DONORS_FROM_ALL = frozenset({"tooluse"})


class _Demonstrated:
    """Contexts of solved examples: disjoint groups of donors, without the record itself or its twins.

    Twins (the same question under another id) would show this record's own solution.
    """

    def __init__(
        self, task: Task, records: Sequence[Record], nearest: Nearest | None, contexts: int, per_context: int, seed: int
    ) -> None:
        self._task, self._seed, self._contexts = task, seed, contexts
        self._per_context = 1 if task.released and nearest is None else per_context
        self._similar = nearest is not None
        # In an order of their own, so that the order they came in does not matter to what is drawn.
        keys = [_asked(task, record) for record in records]
        order = range(len(records)) if self._similar else sorted(range(len(records)), key=lambda i: (records[i].id, keys[i]))
        self._donors = [records[i] for i in order]
        self._own = {id(donor): place for place, donor in enumerate(self._donors)}
        self._twins: dict[tuple[str, ...], set[int]] = defaultdict(set)  # what is asked -> places in `_donors`
        for place, i in enumerate(order):
            self._twins[keys[i]].add(place)
        self._keys = keys
        most = max((len(one) for one in self._twins.values()), default=0)
        wanted = self._contexts * self._per_context + (1 if task.released else most)
        self._nearest = nearest(min(wanted, len(records))) if nearest is not None else None

    def prompts(self, position: int, record: Record, gold: bool) -> list[str]:
        if self._task.released and self._similar:
            gold = gold or self._task.name in _GOLD_WITH_RETRIEVED
        return [self._task.auxiliary_prompt(record, donors, gold=gold) for donors in self._groups(position, record)]

    def _groups(self, position: int, record: Record) -> list[list[Record]]:
        excluded = self._excluded(position, record)
        others = len(self._donors) - len(excluded)
        if others < self._per_context:
            raise DataError(
                f"{record.id}: an auxiliary context shows {self._per_context} solved other questions, but of the "
                f"{len(self._donors)} {self._task.name} records only {others} ask something else; use more records or fewer "
                "examples per context"
            )
        wanted = self._contexts * self._per_context
        if self._nearest is not None:
            found: Sequence[int] = self._nearest[position]
        else:
            # Drawing as many more as there are twins leaves enough after taking the twins out, without a list of all others.
            rng = random.Random(f"{self._seed}:{record.id}:donors")
            found = rng.sample(range(len(self._donors)), min(wanted + len(excluded), len(self._donors)))
        donors = [place for place in found if place not in excluded]
        # Past the end, begin again: within one context no donor can repeat, since there are at least that many.
        chosen = [self._donors[donors[place % len(donors)]] for place in range(wanted)]
        return [chosen[start : start + self._per_context] for start in range(0, wanted, self._per_context)]

    def _excluded(self, position: int, record: Record) -> set[int]:
        if not self._task.released:
            return self._twins[self._keys[position]]
        if self._similar and self._task.name in _RETRIEVES_ITSELF:
            return set()
        return {self._own[id(record)]}


def _asked(task: Task, record: Record) -> tuple[str, ...]:
    """The words of what is asked, in alphabetical order: the same for twins, whichever options or tools stand beside it."""
    return tuple(sorted(task.topic(record).split()))


_Contexts = _Instructed | _Demonstrated
