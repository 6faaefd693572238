"""What answers are worth: judged as text by their task, or by running the programs that they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from unisd_megatron.data import Program, Record, Task, Verdict
from unisd_megatron.evaluate.sandbox import Outcome, Sandbox


def verdicts(
    task: Task,
    answers: Sequence[tuple[Record, str]],
    sandbox: Sandbox | None = None,
    progress: Callable[[int], object] | None = None,
    workers: int | None = None,
) -> list[Verdict]:
    """The verdict of each `(record, completion)`, in order.

    Programs are run in `sandbox`, or in one that is made when the first is met, `workers` at a time (by default one for each
    core). `progress` is told how many answers are judged. Raises `ConfigError` where programs cannot be locked in.
    """
    found: dict[int, Verdict] = {}
    programs: dict[int, Program] = {}
    for number, (record, completion) in enumerate(answers):
        judged = task.judge(record, completion)
        if isinstance(judged, Program):
            programs[number] = judged
        else:
            found[number] = judged
    if progress is not None and found:
        progress(len(found))
    if programs:
        judged_before = len(found)
        told = None if progress is None else lambda done: progress(judged_before + done)
        outcomes = (sandbox or Sandbox()).run_all(list(programs.values()), workers or len(os.sched_getaffinity(0)), told)
        found |= {number: _verdict(outcome) for number, outcome in zip(programs, outcomes, strict=True)}
    return [found[number] for number in range(len(answers))]


def judging_identity(unsafe: bool) -> dict[str, Any]:
    """What shapes the verdicts on programs."""
    return {"unsafe": unsafe, "version": 1}


def _verdict(outcome: Outcome) -> Verdict:
    return Verdict(outcome.passed, None if outcome.passed else outcome.kind)
