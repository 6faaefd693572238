"""What a teacher that reads in FP8 costs: KL of it from itself in its weights' dtype, on one batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from unisd_megatron.batch import TEACHER, Piece
from unisd_megatron.losses.readout import Readout, compare
from unisd_megatron.mechanisms.tally import Tally
from unisd_megatron.train.collate import Work
from unisd_megatron.train.learner import Learner

DRIFT = "teacher/fp8_drift"
"""KL(teacher in its weights' dtype || teacher as it reads), nats, mean over the completion tokens of the primary view."""


@torch.no_grad()
def add_drift(tally: Tally, learner: Learner, work: Work, hidden: Sequence[Tensor]) -> None:
    """Reads the batch once more, exactly, and adds the drift to the last stage's tally. Collective, as the teacher's passes.

    Args: hidden: what the teacher said of the primary view as it reads: final hidden states `[n, h]` of each micro-batch.
    """

    teacher = learner.teacher
    assert teacher is not None, "validation refuses --teacher-fp8 where there is no teacher"

    def listen(i: int, rows: Tensor) -> list[tuple[Piece, Tensor]]:
        return [(piece, rows[piece.here]) for piece in work.readings[i].pieces if piece.name == TEACHER]

    said = teacher.score([reading.view for reading in work.readings], listen, exactly=True)
    if not learner.grid.is_last_stage:
        return
    exact = [torch.full_like(rows, torch.nan) for rows in hidden]
    for piece, rows in itertools.chain.from_iterable(said):
        exact[piece.batch][piece.there] = rows
    settings, head = learner.objective.settings, teacher.head_weight()
    for batch, coarse, fine in zip(work.batches, hidden, exact, strict=True):
        found = compare(
            Readout(coarse, head),
            Readout(fine, head),
            token_ids=batch.token_ids,
            alpha=0.0,
            temperature=settings.temperature,
            vocab_size=learner.arch.vocab_size,
            group=learner.grid.tensor.group,
            path=settings.path,
        )
        tally.add_mean(DRIFT, found.divergence)
