"""From records to examples: the prompts of the student, of the teacher, and of its other contexts, for every task alike."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from unisd_megatron.data.example import Example
from unisd_megatron.data.task import Record, Task
from unisd_megatron.errors import ConfigError, DataError


def build_examples(
    task: Task, records: Sequence[Record], *, auxiliary: int, donors_per_context: int, negatives: bool, seed: int
) -> tuple[list[Example], int]:
    """The examples, in the order of the records, and how many records were dropped for want of a wrong solution.

    `auxiliary` contexts are made for each record, each of `donors_per_context` solved other records drawn at random.
    What is drawn for a record depends on the seed, on its id and on which records there are; not on their order, nor
    on whether negatives are asked for (a dropped record still is a donor).
    """
    if auxiliary < 0 or donors_per_context < 1:
        raise ConfigError(
            f"{auxiliary} auxiliary contexts of {donors_per_context} solved examples each cannot be built; "
            "use 0 or more contexts of 1 or more examples"
        )
    pool = _Pool(task, records) if auxiliary else None
    examples, dropped = [], 0
    for record in records:
        wrong = task.corrupt(record, random.Random(f"{seed}:{record.id}:negative")) if negatives else None
        if negatives and wrong is None:
            dropped += 1
            continue
        contexts = pool.draw(record, auxiliary, donors_per_context, seed) if pool is not None else []
        examples.append(
            Example(
                id=record.id,
                prompt=task.question(record),
                teacher=task.teacher_prompt(record, task.reference(record)),
                auxiliary=tuple(task.auxiliary_prompt(record, donors) for donors in contexts),
                negative=None if wrong is None else task.teacher_prompt(record, wrong),
            )
        )
    if records and not examples:
        raise DataError(f"none of the {len(records)} {task.name} records offers a wrong solution; nothing is left to train on")
    return examples, dropped


class _Pool:
    """All records as donors, in an order of their own, so that the order they came in does not matter."""

    def __init__(self, task: Task, records: Sequence[Record]) -> None:
        question = {id(record): task.question(record).strip() for record in records}
        self._task_name = task.name
        self._donors = sorted(records, key=lambda record: (record.id, question[id(record)]))
        self._question: Mapping[int, str] = question
        self._same_question: dict[str, set[int]] = defaultdict(set)  # question text -> positions in `_donors`
        for position, donor in enumerate(self._donors):
            self._same_question[question[id(donor)]].add(position)

    def draw(self, record: Record, contexts: int, per_context: int, seed: int) -> list[list[Record]]:
        """`contexts` groups of donors without the record itself or its twins; disjoint, unless the pool is too small.

        Twins (the same question under another id) would show this record's own solution.
        """
        twins = self._same_question[self._question[id(record)]]
        others = len(self._donors) - len(twins)
        if others < per_context:
            raise DataError(
                f"{record.id}: an auxiliary context shows {per_context} solved other questions, but of the {len(self._donors)} "
                f"{self._task_name} records only {others} ask something else; use more records or fewer examples per context"
            )
        rng = random.Random(f"{seed}:{record.id}:donors")
        wanted = contexts * per_context
        # Drawing as many more as there are twins leaves enough after taking the twins out, without a list of all others.
        drawn = rng.sample(range(len(self._donors)), min(wanted + len(twins), len(self._donors)))
        donors = [position for position in drawn if position not in twins]
        # Past the end, begin again: within one context no donor can repeat, since there are at least `per_context`.
        chosen = [self._donors[donors[place % len(donors)]] for place in range(wanted)]
        return [chosen[first : first + per_context] for first in range(0, wanted, per_context)]
