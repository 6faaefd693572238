"""Accuracy of a model on held-out questions: generate, score, count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unisd_megatron.data import Record, Task
from unisd_megatron.data.tokens import encode_prompt
from unisd_megatron.rollout.engine import Request, RolloutEngine, Sampling, sequence_seed


@dataclass(frozen=True)
class Answer:
    """One scored answer. An answer that did not end counts as wrong."""

    id: str
    prompt: str
    completion: str
    finished: bool
    correct: bool


def answer(
    task: Task, records: Sequence[Record], tokenizer: Any, engine: RolloutEngine, sampling: Sampling, seed: int = 0
) -> list[Answer]:
    """Answers of the model behind `engine`, in the order of `records`, on every rank. Collective over all ranks."""
    requests = [
        Request(record.id, encode_prompt(tokenizer, task.question(record)), sequence_seed(seed, 0, i))
        for i, record in enumerate(records)
    ]
    out = []
    for record, completion in zip(records, engine.generate(requests, sampling), strict=True):
        ids = [token for token in completion.token_ids if token not in sampling.eos_ids]
        text, finished = tokenizer.decode(ids, skip_special_tokens=False), completion.finish_reason == "stop"
        correct = finished and task.is_correct(record, text)
        out.append(Answer(record.id, task.question(record), text, finished, correct))
    return out


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of correct answers."""
    return sum(one.correct for one in answers) / len(answers)
