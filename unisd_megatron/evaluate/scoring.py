"""Scoring, with the work shared by the ranks: where answers are programs, each rank runs its part of them in the sandbox."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from unisd_megatron.data import Program, Record, Task, Verdict
from unisd_megatron.evaluate.judging import judging_identity, verdicts
from unisd_megatron.evaluate.sandbox import Sandbox
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Axis


class Judge:
    """What answers to a task are worth. Args: example: any record of it, which tells whether its answers are programs; unsafe:
    run them although this machine cannot confine them; workers: programs at a time, None: this rank's part of the processors.

    Raises a `RequestError` where programs are to be run that cannot be confined.
    """

    def __init__(self, task: Task, example: Record, *, unsafe: bool = False, workers: int | None = None) -> None:
        self.task = task
        self._workers = workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        runs = isinstance(task.judge(example, task.reference(example)), Program)
        self._sandbox = Sandbox(unsafe=unsafe) if runs else None
        self.identity = judging_identity(unsafe) if runs else None
        """What shapes the verdicts on programs; None where answers are no programs."""

    @property
    def confinement(self) -> dict[str, list[str]] | None:
        """What programs are kept by, and what this machine lacks for it; None where answers are no programs."""
        if self._sandbox is None:
            return None
        return {"protections": list(self._sandbox.protections), "missing": list(self._sandbox.missing)}

    def verdicts(
        self, answers: Sequence[tuple[Record, str]], world: Axis, progress: Callable[[int], object] | None = None
    ) -> list[Verdict]:
        """The verdict of each `(record, completion)`, in order, on every rank. Collective over `world`.

        `progress` is told how many of this rank's answers are judged.
        """
        mine = verdicts(self.task, answers[world.rank :: world.size], self._sandbox, progress, self._workers)
        plain = [[one.correct, one.failure, dict(one.metrics)] for one in mine]
        parts = [[Verdict(*one) for one in part] for part in all_gather_json(plain, world)]
        return [parts[i % world.size][i // world.size] for i in range(len(answers))]
