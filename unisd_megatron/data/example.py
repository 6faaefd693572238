"""One question with everything that will stand in front of its completion; made before any model exists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """The prompts of one record, as text without a chat template."""

    id: str
    """The record's id: the same in every run, whatever was dropped or shuffled."""

    prompt: str
    """What the student sees: the question alone."""

    teacher: str
    """The question with its reference solution. The only field that shows it, unless auxiliary contexts are asked to."""

    auxiliary: tuple[str, ...] = ()
    """K other contexts, each the question behind solved examples of other questions, or behind an instruction."""

    negative: str | None = None
    """The question with a wrong solution, in the form of `teacher`; None where no negative was asked for."""
