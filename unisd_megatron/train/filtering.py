"""Which of a model's own samples are trained on (mode ssd)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from unisd_megatron.batch import Sample
from unisd_megatron.data import Program, Record, Task
from unisd_megatron.data.tokens import Tokenizer
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.grid import Axis


class SampleFilter:
    """Marks the samples that count for nothing.

    `stubs`: empty answers, and programs of a single line. `correct`: whatever the task's judge does not find right, and answers
    that did not end. `none`: nothing.
    Raises a `RequestError` where programs are to be judged and this machine cannot confine them.
    """

    def __init__(
        self, kind: str, task: Task, records: Mapping[str, Record], tokenizer: Tokenizer, eos_ids: Collection[int]
    ) -> None:
        example = next(iter(records.values()))
        self._records, self._tokenizer, self._eos_ids = records, tokenizer, eos_ids
        self._kind = kind
        self._programs = isinstance(task.judge(example, task.reference(example)), Program)
        self._judge = Judge(task, example) if kind == "correct" else None

    def __call__(self, samples: Sequence[Sample], world: Axis) -> list[Sample]:
        """The samples, each with `counts` set. Collective over `world`."""
        kept = [True] * len(samples) if self._kind == "none" else self._kept(samples, world)
        return [dataclasses.replace(one, counts=keep) for one, keep in zip(samples, kept, strict=True)]

    def _kept(self, samples: Sequence[Sample], world: Axis) -> list[bool]:
        texts = [self._tokenizer.decode([i for i in one.completion.token_ids if i not in self._eos_ids]) for one in samples]
        if self._judge is None:
            return [len(text.strip().splitlines()) > (1 if self._programs else 0) for text in texts]
        answers = [(self._records[one.prompts.id], text) for one, text in zip(samples, texts, strict=True)]
        verdicts = self._judge.verdicts(answers, world)
        return [
            verdict.correct and one.completion.finish_reason == "stop" for verdict, one in zip(verdicts, samples, strict=True)
        ]
