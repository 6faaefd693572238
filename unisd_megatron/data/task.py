"""A task: where its records come from, what is asked, what the reference is, and when an answer is right.

This room knows text only: no tokenizer, no torch, no model. Every task states six things (`load`, `question`,
`reference`, `corrupt`, `is_correct`, and its hub id); the prompts that the teacher sees are made from them by the
three `*_prompt` methods below, which are identical for the reference and for the negative demonstration, so that
the contrast measures the content and never the formatting (the released code's templates differ).

Templates follow `UniSD` (arXiv 2605.06597 and its released code), reworded only where that code has a fault.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO, cast

from unisd_megatron.errors import DataError, MissingDependency

SELF_INSTRUCTION = (
    "Study the reference solution above carefully, then solve the task again in your own way and with your own words."
)


@dataclass(frozen=True, slots=True)
class Record:
    """One problem of a task: a stable id and the task's own fields, exactly as loaded."""

    id: str
    fields: Mapping[str, Any]


class Task(ABC):
    """One benchmark. Subclasses live one per file and are listed in `unisd_megatron.data.TASKS`."""

    name: ClassVar[str]
    hub_id: ClassVar[str | None]  # data set id on the Hugging Face hub; None: no hub, `--data_path` or built in
    hub_config: ClassVar[str | None] = None

    @abstractmethod
    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        """The record of one row of the source; `ValueError` or `KeyError` when the row is not of this task's schema."""

    @abstractmethod
    def question(self, record: Record) -> str:
        """What the student sees."""

    @abstractmethod
    def reference(self, record: Record) -> str:
        """The reference solution, as shown to the teacher."""

    @abstractmethod
    def corrupt(self, record: Record, rng: random.Random) -> str | None:
        """A plausible wrong solution in the form of `reference`, or None when this record offers no such corruption."""

    @abstractmethod
    def is_correct(self, record: Record, completion: str) -> bool:
        """Whether the completion answers the question."""

    def keep(self, record: Record, split: str) -> bool:
        """Whether a record of the source belongs to `split` ("train" or "test"); True where files are splits."""
        return True

    def load(self, split: str, data_path: str | None) -> list[Record]:
        """All records of a split, from `data_path` (JSON, JSONL, either gzipped) or from the hub.

        Raises `DataError` naming the file and the line of the first broken record, or that nothing is left.
        """
        records = list(self._from_file(data_path)) if data_path is not None else list(self._from_hub(split))
        records = [record for record in records if self.keep(record, split)]
        if not records:
            raise DataError(f"{data_path or self.hub_id}: no {split} record for --dataset {self.name}; the data set is empty")
        return records

    def _from_file(self, data_path: str) -> Iterator[Record]:
        for where, index, row in read_rows(Path(data_path)):
            yield self._parse(row, index, where)

    def _from_hub(self, split: str) -> Iterator[Record]:
        if self.hub_id is None:
            raise DataError(f"--dataset {self.name} has no hub id; pass --data_path FILE")
        try:
            import datasets
        except ImportError as error:
            raise MissingDependency(
                f"loading {self.hub_id} needs the `datasets` library; pip install datasets, or pass --data_path FILE"
            ) from error
        try:
            rows = datasets.load_dataset(self.hub_id, self.hub_config, split=split)
        except (OSError, ValueError) as error:  # no network, no such data set; no such configuration or split
            raise DataError(f"{self.hub_id} cannot be loaded from the hub ({error}); pass --data_path FILE") from error
        for index, row in enumerate(rows):
            yield self._parse(row, index, f"{self.hub_id}, {split} row {index}")

    def _parse(self, row: Mapping[str, Any], index: int, where: str) -> Record:
        try:
            return self.parse(row, index)
        except (KeyError, ValueError, TypeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: not a record of {self.name}: {reason}") from error

    # The prompts the teacher reads. One form for right and wrong solutions.

    def teacher_prompt(self, record: Record, solution: str) -> str:
        """The question with a solution before it is answered: the reference (primary view) or a corrupted one (negative)."""
        return (
            f"\n{self.question(record)}\n\nThis is an example for a response to the question:\n{solution}\n\n"
            f"{SELF_INSTRUCTION}\n"
        )

    def auxiliary_prompt(self, record: Record, donors: Sequence[Record]) -> str:
        """The question behind other solved examples; nothing of this record's own solution is shown."""
        parts = ["# Reference Samples (DO NOT SOLVE THESE)", "Learn from how they are solved; do not copy their answers.", ""]
        for number, donor in enumerate(donors, start=1):
            parts += [f"### [REFERENCE ONLY #{number}]", self.question(donor).strip(), "", "Reference Answer:"]
            parts += [self.reference(donor), ""]
        parts += ["-----", "## Task to Solve (ONLY ANSWER THIS TASK)", self.question(record)]
        return "\n".join(parts)


def read_rows(path: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yields `(where, index, row)` for each JSON object of a `.json`, `.jsonl` file or its `.gz`; `where` names the line."""
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in _READERS:
        raise DataError(f"{path}: unknown kind of data file; use .json, .jsonl, or either with .gz")
    try:
        with cast(TextIO, opener(path, "rt", encoding="utf-8")) as stream:
            for index, (where, row) in enumerate(_READERS[kind](path, stream)):
                if not isinstance(row, Mapping):
                    raise DataError(f"{where}: expected an object, got {type(row).__name__}")
                yield where, index, row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:  # cut short, not gzip, not UTF-8, not ours to read
        raise DataError(f"{path}: cannot be read as {'gzipped ' * (path.suffix == '.gz')}UTF-8 text: {error}") from error


def _json_list(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.load(stream)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of records, got {type(rows).__name__}")
    yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error


_READERS = {".json": _json_list, ".jsonl": _json_lines}
