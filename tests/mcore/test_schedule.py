"""The teacher's views fill the pipeline once: slots counted from what each stage really ran, in the order it ran it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from unisd_megatron.batch import STUDENT
from unisd_megatron.config import Layout
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import schedule, start
from unisd_megatron.mechanisms.objective import LossSettings, Objective
from unisd_megatron.parity.layout import Rig
from unisd_megatron.train.collate import Work
from unisd_megatron.train.step import Learner, listen_to_teacher, share_out
from world import World

VIEWS, MICRO_BATCHES, STAGES = 4, 4, 4
STAR = LossSettings(agreement="token", gamma=1.0, views=2, contrastive_weight=0.5)  # teacher, two auxiliary views, negative


def slots(stages: list[list[list[int]]]) -> int:
    """Pipeline slots from `[stage][schedule][sequence of micro-batch numbers]`.

    A stage runs one micro-batch per slot, after the stage before it has run the same one. A schedule ends before the next
    begins, because its results leave the pipeline.
    """
    total = 0
    for runs in zip(*stages, strict=True):
        done: dict[int, int] = {}
        for run in runs:
            clock, mine = 0, {}
            for item in run:
                clock = max(clock, done.get(item, 0)) + 1
                mine[item] = clock
            done = mine
        total += max(done.values())
    return total


def recorded(rig: Rig, work: Callable[[Learner, Work], Any]) -> list[list[list[int]]]:
    """What every stage ran while `work` was done, on every rank."""
    runs: list[list[int]] = []
    honest = schedule.get_forward_backward_func

    def begin() -> Callable[..., Any]:
        runs.append([])
        return honest()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "get_forward_backward_func", begin)
        chunk = rig.teacher.model.chunks[0]
        hook = chunk.register_forward_pre_hook(lambda *_: runs[-1].append(len(runs[-1])))
        learner = Learner(rig.student, rig.teacher, Objective(STAR, rig.grid.data), rig.arch, rig.grid)
        work(learner, share_out(rig.samples, learner, rig.layout, mask_truncated=True))
        hook.remove()
    return all_gather_json(runs, rig.grid.world)


def one_by_one(learner: Learner, work: Work) -> None:
    """As systems do that run the teacher once for each view: so many schedules, each of so many micro-batches."""
    for begin in range(0, len(work.readings), MICRO_BATCHES):
        part = work.readings[begin : begin + MICRO_BATCHES]
        learner.teacher.score([reading.view for reading in part], lambda i, rows: rows)


def both(rank: int, group: Any) -> tuple[int, int, int]:
    layout, platform = Layout(1, STAGES, micro_batch_size=2, global_batch_size=8), platforms.choose()
    with start.world(platform, layout, 1) as grid:
        rig = Rig(layout, platform, grid)
        merged, separate = recorded(rig, listen_to_teacher), recorded(rig, one_by_one)
    return len(merged[0]), slots(merged), slots(separate)


def test_the_pipeline_fills_once_for_all_views(world: World) -> None:
    assert len(STAR.teacher_views) == VIEWS and STUDENT not in STAR.teacher_views
    for schedules, merged, separate in world.run(STAGES, both, timeout_s=120):
        assert schedules == 1
        assert merged == VIEWS * MICRO_BATCHES + STAGES - 1
        assert separate == VIEWS * (MICRO_BATCHES + STAGES - 1)
