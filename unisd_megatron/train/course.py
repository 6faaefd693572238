"""Where a run stands, for the one sentence that a rank says when it has lost the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from unisd_megatron.errors import LostContact
from unisd_megatron.train import checkpoint


class Course:
    """What this rank is at."""

    def __init__(self) -> None:
        self._begun, self._at = time.monotonic(), "the start"

    def steps(self, steps: range) -> Iterator[int]:
        """The same steps, noted as they are begun."""
        for step in steps:
            self._begun, self._at = time.monotonic(), f"step {step}"
            yield step
        self._begun, self._at = time.monotonic(), "the end"

    def __str__(self) -> str:
        return f"{time.monotonic() - self._begun:.0f} s into {self._at}"


@contextlib.contextmanager
def told(output: Path) -> Iterator[Course]:
    """Adds to `LostContact` where the run was and how it is continued."""
    course = Course()
    try:
        yield course
    except LostContact as error:
        raise LostContact(f"{error}; {course}; {_way_on(output)}") from error


def _way_on(output: Path) -> str:
    found = checkpoint.complete(output)
    last = f"the last complete checkpoint is {found[-1].name}" if found else f"{output} has no complete checkpoint yet"
    return f"{last}; start all hosts again with --resume_from_checkpoint auto"
