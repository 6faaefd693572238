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
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.step import listen_to_teacher, share_out
from world import World

VIEWS, MICRO_BATCHES = 4, 4
STAR = LossSettings(agreement="token", gamma=1.0, views=2, contrastive_weight=0.5)  # teacher, two auxiliary views, negative


Event = list[int]  # [chunk of the stage, number of the item]


def slots(stages: list[list[list[Event]]]) -> int:
    """Pipeline slots, each as long as one chunk takes for one item, from `[stage][schedule][event]`.

    A stage does one thing per slot, in the order recorded, once the chunk before has done the same item: on the stage before,
    or on the last stage for the first. A schedule ends before the next begins, because its results leave the pipeline.
    """
    total = 0
    for runs in zip(*stages, strict=True):
        done: dict[tuple[int, int, int], int] = {}
        places = [0] * len(runs)
        while any(place < len(run) for place, run in zip(places, runs, strict=True)):
            moved = False
            for stage, run in enumerate(runs):
                if places[stage] == len(run):
                    continue
                chunk, item = run[places[stage]]
                before = (stage - 1, chunk, item) if stage else (len(runs) - 1, chunk - 1, item)
                if before not in done and (stage or chunk):
                    continue
                own = done[stage, *run[places[stage] - 1]] if places[stage] else 0
                done[stage, chunk, item] = max(own, done.get(before, 0)) + 1
                places[stage] += 1
                moved = True
            assert moved, "the stages wait for one another"
        total += max(done.values())
    return total


def recorded(rig: Rig, work: Callable[[Learner, Work], Any]) -> list[list[list[Event]]]:
    """What every stage ran while `work` was done, on every rank. A chunk gets the items of a schedule in their order."""
    runs: list[list[Event]] = []
    honest = schedule.get_forward_backward_func

    def begin() -> Callable[..., Any]:
        runs.append([])
        return honest()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "get_forward_backward_func", begin)
        hooks = [
            chunk.register_forward_pre_hook(
                lambda *_, number=number: runs[-1].append([number, sum(event[0] == number for event in runs[-1])])
            )
            for number, chunk in enumerate(rig.teacher.model.chunks)
        ]
        learner = Learner(rig.student, rig.teacher, Objective(STAR, rig.grid.data), rig.arch, rig.grid)
        work(learner, share_out(rig.samples, learner, rig.layout, mask_truncated=True))
        for hook in hooks:
            hook.remove()
    return all_gather_json(runs, rig.grid.world)


def one_by_one(learner: Learner, work: Work) -> None:
    """As systems do that run the teacher once for each view: so many schedules, each of so many micro-batches."""
    for begin in range(0, len(work.readings), MICRO_BATCHES):
        part = work.readings[begin : begin + MICRO_BATCHES]
        learner.teacher.score([reading.view for reading in part], lambda i, rows: rows)


def both(rank: int, group: Any, stages: int, chunks: int | None) -> tuple[int, int, int]:
    layout, platform = Layout(1, stages, chunks, micro_batch_size=2, global_batch_size=8), platforms.choose()
    with start.world(platform, layout, 1) as grid:
        rig = Rig(layout, platform, grid)
        merged, separate = recorded(rig, listen_to_teacher), recorded(rig, one_by_one)
    return len(merged[0]), slots(merged), slots(separate)


@pytest.mark.parametrize(("stages", "chunks"), [(4, None), (2, 2)])
def test_the_pipeline_fills_once_for_all_views(world: World, stages: int, chunks: int | None) -> None:
    """With c chunks per stage a slot is c times shorter, and so is the bubble."""
    assert len(STAR.teacher_views) == VIEWS and STUDENT not in STAR.teacher_views
    each = chunks or 1
    for schedules, merged, separate in world.run(stages, both, stages, chunks, timeout_s=120):
        assert schedules == 1
        assert merged == each * VIEWS * MICRO_BATCHES + stages - 1
        assert separate == VIEWS * (each * MICRO_BATCHES + stages - 1)
