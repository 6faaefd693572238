"""A task: where its records come from, what is asked, what the reference is, how one may be wrong, and when an answer is right.

This room knows text only: no tokenizer, no torch, no model, and it never runs code. A task states the six things that are its
own; the prompts that the teacher sees are made from them by `prompts.py`, in one form for the reference and for the negative
demonstration, so that the contrast measures the content and never the formatting.

`semantics`: "corrected", or "released" for what the authors' code (arXiv 2605.06597) does where that changes results; every
difference is listed in docs/semantics.md.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from unisd_megatron.data import prompts
from unisd_megatron.data.sources import hub_rows, read_rows
from unisd_megatron.errors import DataError

Semantics = Literal["corrected", "released"]


@dataclass(frozen=True, slots=True)
class Record:
    """One problem of a task: a stable id and the task's own fields, exactly as loaded."""

    id: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer is worth."""

    correct: bool
    failure: str | None = None
    """Kind of failure, in a few words that are the same for all answers of a kind; None exactly when correct."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further measures of this answer, each between 0 and 1, that are reported beside the accuracy."""


@dataclass(frozen=True, slots=True)
class Program:
    """An answer in Python with the tests that decide it; for the sandbox alone to run."""

    code: str
    """What the model wrote."""

    tests: str
    """Run after `code`, in its module: the answer is right when they run to their end."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """One way of being wrong that a model is asked for, to make a negative demonstration."""

    kind: str
    """In a few words: "off-by-one error", "wrong option C"."""

    request: str
    """The prompt. The model answers in JSON: `{"reasoning": text, "answer": text}`."""


class Task(ABC):
    """One benchmark. Subclasses live one per file in `tasks/`; those with a `name` are in `unisd_megatron.data.TASKS`."""

    name: ClassVar[str]
    hub_id: ClassVar[str | None]  # data set id on the Hugging Face hub; None: no hub, `--data_path` or built in
    hub_config: ClassVar[str | None] = None
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}  # ours -> the hub's; no "train": evaluation only

    def __init__(self, semantics: Semantics = "corrected") -> None:
        self.released = semantics == "released"

    # Where it comes from.

    @abstractmethod
    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        """The record of one row of the source; `ValueError` or `KeyError` when the row is not of this task's schema."""

    def keep(self, record: Record, split: str) -> bool:
        """Whether a record of the source belongs to `split` ("train" or "test"); True where files are splits."""
        return True

    # What is asked, and what is right.

    @abstractmethod
    def question(self, record: Record) -> str:
        """What the student sees."""

    @abstractmethod
    def reference(self, record: Record) -> str:
        """The reference solution, as shown to the teacher: in the form that `question` asks for."""

    @abstractmethod
    def judge(self, record: Record, completion: str) -> Verdict | Program:
        """What the completion is worth, or the program whose run decides it (`evaluate.judging` has both done)."""

    def options(self, record: Record) -> Mapping[str, str]:
        """The completions among which this question asks to choose, by their letter; none where it is not a choice."""
        return {}

    def group(self, record: Record) -> str | None:
        """The part of the benchmark that accuracies are also reported for, such as a subject; None: there are no parts."""
        return None

    # What is wrong.

    def corrupt(self, record: Record, rng: random.Random) -> str | None:
        """A plausible wrong solution in the form of `reference`, made by a rule; None when this record offers none."""
        return None

    @classmethod
    def has_rule(cls) -> bool:
        """Whether wrong solutions are made by a rule, where no model has generated any."""
        return cls.corrupt is not Task.corrupt

    @classmethod
    def has_request(cls) -> bool:
        """Whether a model can be asked for wrong solutions."""
        return cls.corruptions is not Task.corruptions

    def corruptions(self, record: Record) -> Sequence[Corruption]:
        """The kinds of wrong solutions that a model can be asked for, for this record; none: it cannot be asked."""
        return ()

    def negative(self, record: Record, corruption: Corruption, reasoning: str, answer: str) -> str | None:
        """The wrong solution, in the form of `reference`, that a model's answer to `corruption` makes; None when unusable."""
        return None

    # What stands for the record where records are shown or compared.

    def topic(self, record: Record) -> str:
        """What is asked, without options, tools, tests, or instructions common to all.

        By it similar records are found, and twins: records with the same words in it never show each other's solution.
        """
        return self.question(record)

    def teacher_prompt(self, record: Record, solution: str, *, negative: bool = False) -> str:
        """The question with a solution before it is answered: the reference (primary view) or a wrong one (negative)."""
        if negative and self.released:
            return prompts.with_wrong_solution_released(self.question(record), solution)
        return prompts.with_solution(self.question(record), solution)

    def auxiliary_prompt(self, record: Record, donors: Sequence[Record], *, gold: bool = False) -> str:
        """The question behind other solved examples; this record's own reference is shown if `gold`, else nothing of it."""
        shown = [(self.question(donor), self.reference(donor)) for donor in donors]
        return prompts.behind_examples(self._asked(record, gold), shown)

    def instructed_prompt(self, record: Record, instruction: str, *, gold: bool = False) -> str:
        """The question behind an instruction that was induced from other solved examples."""
        return prompts.behind_instruction(self._asked(record, gold), instruction)

    def _asked(self, record: Record, gold: bool) -> str:
        return self.teacher_prompt(record, self.reference(record)) if gold else self.question(record)

    # Reading.

    def load(self, split: str, data_path: str | None) -> list[Record]:
        """All records of a split, or of "all", from `data_path` (JSON, JSONL, either gzipped, or parquet) or from the hub.

        Raises `DataError` naming the file and the line of the first broken record, both places of an id that is there twice,
        or that nothing is left.
        """
        self.check_split(split)
        rows = read_rows(Path(data_path)) if data_path is not None else self._hub_rows(split)
        parsed = ((where, self._parse(row, index, where)) for where, index, row in rows)
        places: dict[str, str] = {}
        records = []
        for where, record in parsed:
            if split != "all" and not self.keep(record, split):
                continue
            if record.id in places:
                raise DataError(f"{where}: the id {record.id} is that of {places[record.id]} too; give every record its own")
            places[record.id] = where
            records.append(record)
        if not records:
            raise DataError(f"{data_path or self.hub_id}: no {split} record for --dataset {self.name}; the data set is empty")
        return records

    def check_split(self, split: str) -> None:
        """Raises `DataError` for one that the task has not."""
        if split not in (*self.splits, "all"):
            why = "it is for evaluation only" if split == "train" else f"use {' or '.join(self.splits)}"
            raise DataError(f"--dataset {self.name} has no split {split!r}; {why}")

    def _hub_rows(self, split: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        if self.hub_id is None:
            raise DataError(f"--dataset {self.name} has no hub id; pass --data_path FILE")
        return hub_rows(self.hub_id, self.hub_config, self.splits.get(split, split))

    def _parse(self, row: Mapping[str, Any], index: int, where: str) -> Record:
        try:
            return self.parse(row, index)
        except (KeyError, ValueError, TypeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: not a record of {self.name}: {reason}") from error
