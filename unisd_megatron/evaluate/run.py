"""Accuracy of a model on held-out questions: generate, score, count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unisd_megatron.data import Record, Task
from unisd_megatron.data.tokens import encode_prompt
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Grid
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
    task: Task, records: Sequence[Record], tokenizer: Any, engine: RolloutEngine, sampling: Sampling, grid: Grid, seed: int = 0
) -> list[Answer]:
    """Answers of the model behind `engine`, in the order of `records`, on every rank. Collective over all ranks."""
    mine = range(grid.data.rank, len(records), grid.data.size)
    requests = [
        Request(records[i].id, encode_prompt(tokenizer, task.question(records[i])), sequence_seed(seed, 0, i)) for i in mine
    ]
    completions = engine.generate(requests, sampling)
    said = {}
    for i, completion in zip(mine, completions, strict=True):
        ids = [token for token in completion.token_ids if token not in sampling.eos_ids]
        said[str(i)] = [tokenizer.decode(ids, skip_special_tokens=False), completion.finish_reason == "stop"]
    merged = {int(i): value for part in all_gather_json(said, grid.data) for i, value in part.items()}
    return [
        Answer(
            record.id,
            task.question(record),
            merged[i][0],
            merged[i][1],
            merged[i][1] and task.is_correct(record, merged[i][0]),
        )
        for i, record in enumerate(records)
    ]


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of correct answers."""
    return sum(one.correct for one in answers) / len(answers)
