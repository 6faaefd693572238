"""Overlapping communication changes no bit of the weights, and the pieces of the main parameters make the whole weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from unisd_megatron.config import Layout, Optimization
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.exact import exact_weights
from unisd_megatron.mcore.model import build
from unisd_megatron.mcore.student import Student
from unisd_megatron.mechanisms.objective import loss_settings
from unisd_megatron.parity.layout import Rig
from unisd_megatron.resolve import resolve
from world import World

STEPS = 2


def trained(layout: Layout, grid: Grid, overlapped: bool, family: str, mode: str) -> tuple[dict[str, Tensor], bool]:
    """Weights after some steps, and whether `exact_weights` finds them in the optimizer, to the bit."""
    platform = dataclasses.replace(
        platforms.choose(),
        overlap_grad_reduce=overlapped,
        overlap_param_gather=overlapped and layout.use_distributed_optimizer,
    )
    rig = Rig(layout, platform, grid, family)
    model = build(rig.arch, layout, platform, grid)
    rig._load(model, rig.references[0])
    rig.student = Student(model, layout, Optimization(learning_rate=1e-2), STEPS, grid, platform)
    settings = loss_settings(resolve({"mode": mode, "model_name": "tiny"}, {}))
    for step in range(STEPS):
        rig.gradients(settings, rig.samples)
        rig.student.step(step)
    parameters = dict(model.named_shards())
    found = True
    if layout.bf16 and layout.use_distributed_optimizer:
        exact = exact_weights(rig.student.optimizer, list(parameters.values()))
        found = all(torch.equal(exact[p].view(torch.int16), p.detach().view(torch.int16)) for p in parameters.values())
    return {name: p.detach().clone() for name, p in parameters.items()}, found


def agreement(rank: int, group: Any, layout: Layout, family: str = "qwen2", mode: str = "vanilla") -> tuple[list[str], bool]:
    with start.world(platforms.choose(), layout, 1) as grid:
        plain, found = trained(layout, grid, False, family, mode)
        other, found_too = trained(layout, grid, True, family, mode)
    return [name for name in plain if not torch.equal(plain[name], other[name])], found and found_too


@pytest.mark.parametrize(
    "layout", [Layout(bf16=True, use_distributed_optimizer=True), Layout(), Layout(1, 2, use_distributed_optimizer=True)]
)
def test_overlap_changes_nothing(world: World, layout: Layout) -> None:
    for different, found in world.run(2 * layout.pipeline_model_parallel_size, agreement, layout):
        assert different == []
        assert found


@pytest.mark.parametrize(
    ("layout", "family"),
    [(Layout(use_distributed_optimizer=True), "llama"), (Layout(1, 2), "qwen2")],
    ids=["untied", "tied, a copy on the last stage"],
)
def test_a_head_that_the_loss_does_not_reach_is_waited_for_by_none(world: World, layout: Layout, family: str) -> None:
    for different, _ in world.run(2 * layout.pipeline_model_parallel_size, agreement, layout, family, "match_repr"):
        assert different == []
