"""`unisd parity` with gradients reduced under the backward pass: every mode holds, and a reduction left out would be seen."""

from __future__ import annotations

from typing import Any

import pytest

from unisd_megatron.config import Accelerator, Layout
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.parity.layout import TOLERANCE, Case, Rig, cases, compare, gradient_error
from world import World


def rig_of(layout: Layout, grid: Any) -> Rig:
    rig = Rig(layout, platforms.choose(Accelerator(overlap_grad_reduce=True), layout, 2), grid)
    assert all(ddp.ddp_config.overlap_grad_reduce for ddp in rig.student._ddp)
    return rig


def held(rank: int, group: Any, layout: Layout) -> list[Case]:
    with start.world(platforms.choose(), layout, 1) as grid:
        return compare(rig_of(layout, grid))


@pytest.mark.parametrize("layout", [Layout(global_batch_size=8)], ids=["dp2"])
def test_every_mode_equals_one_process(world: World, layout: Layout) -> None:
    results = world.run(2, held, layout, timeout_s=240)[0]
    assert len(results) >= 20
    assert [case for case in results if not case.holds] == []


def left_out(rank: int, group: Any) -> float:
    """The gradient error, on rank 0, where nobody waits for the reduction of the last bucket or starts it."""
    layout = Layout(global_batch_size=8)
    with start.world(platforms.choose(), layout, 1) as grid:
        rig = rig_of(layout, grid)
        for ddp in rig.student._ddp:
            for bucket in ddp.bucket_groups:
                bucket.register_grad_ready = lambda *_, **__: None
                bucket.finish_grad_sync = lambda *_, **__: None
        _, settings = next(iter(cases("fused")))
        _, gradients, _ = rig.gradients(settings, rig.samples)
        return gradient_error(gradients, rig.expected(settings)[1]) if rank == 0 else 0.0


def test_a_reduction_that_is_left_out_is_seen(world: World) -> None:
    assert world.run(2, left_out, timeout_s=120)[0] > 100 * TOLERANCE
