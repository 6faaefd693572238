"""The demo's task: column addition of two zero-padded three-digit numbers, one worked column per digit.

The student reads `Q:347+285\\nA:` and writes `7+5+0=12;4+8+1=13;3+2+1=06#0632`: the columns from the units up, each
`x+y+carry=two-digit sum`, then `#` and the four-digit answer. Every text has a fixed length and uses 21 characters,
so a very small model can learn it. The texts are written here and nowhere else: the pretraining script of the demo's
model (`examples/demo/make_model.py`) uses the functions below, because a model this small has to meet in a run
exactly the forms that it was pretrained on. For the same reason the prompts of `Task` are overridden.
"""

from __future__ import annotations

import operator
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unisd_megatron.data.task import Record, Task, Verdict
from unisd_megatron.errors import DataError

LARGEST = 999  # three digits
SPLIT_SIZES = {"train": 2048, "test": 300}
SPLIT_SEED = 20260821  # any number: it only has to stay, so that results of different days are about the same questions

DigitSum = Callable[[int, int], int]


def is_held_out(a: int, b: int) -> bool:
    """Whether `a+b` belongs to the tenth of all questions that nobody trains on, the pretraining included.

    A checksum, since a linear hash of a and b would hold out a residue class of a+b: a systematic hole in training.
    """
    return zlib.crc32(f"{a}+{b}".encode()) % 10 == 0


def careful_solution(a: int, b: int, digit_sum: DigitSum = operator.add) -> str:
    """The columns and the answer, by an author who knows `digit_sum` and carries."""
    return _solution(a, b, digit_sum, lambda total: total // 10)


def careless_solution(a: int, b: int, digit_sum: DigitSum = operator.add) -> str:
    """The columns and the answer, by an author who knows `digit_sum` and writes every carry as 0."""
    return _solution(a, b, digit_sum, lambda _total: 0)


def question_text(a: int, b: int) -> str:
    """The question, up to where the completion starts (12 characters)."""
    return f"Q:{a:03d}+{b:03d}\nA:"


def solved_text(a: int, b: int, solution: str) -> str:
    """A solved example, to stand in front of another text."""
    return f"{question_text(a, b)}{solution}\n"


def referred_text(a: int, b: int, solution: str) -> str:
    """The question with a solution, right or wrong, to be followed (46 characters)."""
    return f"Q:{a:03d}+{b:03d}\nR:{solution}\nA:"


def _solution(a: int, b: int, digit_sum: DigitSum, carry_after: Callable[[int], int]) -> str:
    columns, answer, carry = [], 0, 0
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        total = digit_sum(x, y) + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        answer += place * (total if place == 100 else total % 10)
        carry = carry_after(total)
    return f"{';'.join(columns)}#{answer:04d}"


class Addition(Task):
    """Built in; or a file of rows `{"a": 347, "b": 285}`, whose held-out questions are its test split."""

    name = "addition"
    hub_id = None

    def load(self, split: str, data_path: str | None) -> list[Record]:
        """The records of "train" or "test": drawn once for all where no `data_path` is given."""
        return self._draw(split) if data_path is None and split in SPLIT_SIZES else super().load(split, data_path)

    def _draw(self, split: str) -> list[Record]:
        rng = random.Random(f"{self.name} {split} {SPLIT_SEED}")
        records: dict[str, Record] = {}
        while len(records) < SPLIT_SIZES[split]:
            record = self.parse({"a": rng.randrange(LARGEST + 1), "b": rng.randrange(LARGEST + 1)}, len(records))
            if self.keep(record, split):
                records[record.id] = record
        return list(records.values())

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        a, b = row["a"], row["b"]
        for name, number in (("a", a), ("b", b)):
            if type(number) is not int or not 0 <= number <= LARGEST:  # `true` is an int to isinstance
                raise ValueError(f"{name} is {number!r}; expected a whole number from 0 to {LARGEST}")
        return Record(id=f"{a}+{b}", fields={"a": a, "b": b})

    def keep(self, record: Record, split: str) -> bool:
        """Of a file too, no held-out question is trained on: the demo's model has never seen one."""
        return is_held_out(*_operands(record)) == (split == "test")

    def question(self, record: Record) -> str:
        return question_text(*_operands(record))

    def reference(self, record: Record) -> str:
        return careful_solution(*_operands(record))

    def corrupt(self, record: Record, rng: random.Random) -> str:
        """The careless solution; where nothing is carried, so that it would be right, one column is wrong by one."""
        careless = careless_solution(*_operands(record))
        if careless != self.reference(record):
            return careless
        a, b = _operands(record)
        place = rng.choice((1, 10, 100))
        mistaken = (a // place % 10, b // place % 10)
        return careful_solution(a, b, lambda x, y: x + y + ((x, y) == mistaken))

    def judge(self, record: Record, completion: str) -> Verdict:
        """Whether the completion ends in `#` and the sum; whether it ended at all is judged where EOS is seen."""
        answer = re.fullmatch(r"0*(\d+)", completion.rpartition("#")[2].strip(), re.ASCII) if "#" in completion else None
        if answer is None:
            return Verdict(False, "no answer")
        correct = answer[1] == str(sum(_operands(record)))
        return Verdict(correct, None if correct else "wrong answer")

    def teacher_prompt(self, record: Record, solution: str, *, negative: bool = False) -> str:
        return referred_text(*_operands(record), solution)

    def auxiliary_prompt(self, record: Record, donors: Sequence[Record], *, gold: bool = False) -> str:
        shown = "".join(solved_text(*_operands(donor), self.reference(donor)) for donor in donors)
        return shown + self._asked(record, gold)

    def instructed_prompt(self, record: Record, instruction: str, *, gold: bool = False) -> str:
        raise DataError(f"--dataset {self.name} has a model of 21 characters, which no instruction can be written in")


def _operands(record: Record) -> tuple[int, int]:
    return record.fields["a"], record.fields["b"]
