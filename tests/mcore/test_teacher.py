"""The teacher: its average follows its equation, and the three ways to keep its weights differ in memory alone."""

from __future__ import annotations

import dataclasses
import gc
import time
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from unisd_megatron.batch import Sample
from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed
from unisd_megatron.families import FAMILIES
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.model import build
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import LossSettings, loss_settings
from unisd_megatron.parity.layout import VIEWS, InMemory, Rig
from unisd_megatron.resolve import resolve
from unisd_megatron.weights import stream
from unisd_megatron.weights.tiny import tiny_model
from world import World


def tiny(layout: Layout, grid: Grid, seed: int = 1) -> Any:
    family = "qwen2" if layout.expert_model_parallel_size == 1 else "qwen3_moe"
    reference = tiny_model(family, seed)
    arch = FAMILIES[family].arch(reference.config.to_dict())
    model = build(arch, layout, platforms.choose(), grid)
    mappings = FAMILIES[family].mappings(arch)
    stream.load(model.named_shards(), mappings, InMemory(reference), grid.tensor)  # type: ignore[arg-type]
    return model


def ema_error(rank: int, group: Any, layout: Layout) -> tuple[float, float, bool]:
    """After 50 updates towards a student that moves a little each time: worst error against the closed form, of the
    fp32 average and (what a bf16 average would have lost) of the weights; and whether off-beat steps moved anything."""
    with start.world(platforms.choose(), layout, 1) as grid:
        student, beta = tiny(layout, grid), 0.9
        teacher = Teacher(tiny(layout, grid), "ema", grid, beta=beta, every=2)
        expected = {name: p.detach().double().clone() for name, p in student.named_shards()}
        off_beat = False
        for step in range(1, 101):
            with torch.no_grad():
                for name, p in student.named_shards():
                    own = zlib.crc32(f"{name} {step} {grid.tensor.rank}".encode())  # the same where weights are
                    p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(own)).to(p.dtype))
            if step % 2 == 0:
                for name, p in student.named_shards():
                    expected[name] = beta * expected[name] + (1 - beta) * p.detach().double()
            off_beat |= teacher.follow(student, step) != (step % 2 == 0)
        average = {name: torch.empty(p.shape) for name, p in student.named_shards()}
        assert teacher.shards is not None
        teacher.shards.write_(average.items())
        masters = max(float((average[name].double() - e).abs().max()) for name, e in expected.items())
        weights = max(float((p.double() - expected[name]).abs().max()) for name, p in teacher.model.named_shards())
        return masters, weights, off_beat


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 2), Layout(expert_model_parallel_size=2)])
def test_equals_its_closed_form(world: World, layout: Layout, bf16: bool) -> None:
    for masters, weights, off_beat in world.run(4, ema_error, dataclasses.replace(layout, bf16=bf16)):
        assert masters <= 1e-6
        assert weights <= (1e-2 if bf16 else 1e-6)  # half a unit in the last place of bf16 near 2
        assert not off_beat


def distance_error(rank: int, group: Any, layout: Layout) -> float:
    """Of the reported distance of two models with different seeds, relative to the one between their Hugging Face tensors."""
    family = "qwen2" if layout.expert_model_parallel_size == 1 else "qwen3_moe"
    first, second = (dict(tiny_model(family, seed).named_parameters()) for seed in (1, 2))  # a tied head is named once
    apart = sum(float((first[name] - second[name]).detach().double().square().sum()) for name in first)
    whole = sum(float(p.detach().double().square().sum()) for p in second.values())
    with start.world(platforms.choose(), layout, 1) as grid:
        teacher = Teacher(tiny(layout, grid, seed=1), "ema", grid, beta=0.9, every=1)
        return abs(teacher.distance(tiny(layout, grid, seed=2)) / (apart / whole) ** 0.5 - 1)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, Layout()), (4, Layout(2, 2)), (4, Layout(2)), (4, Layout(2, expert_model_parallel_size=2, sequence_parallel=True))],
    ids=["alone", "tp2 pp2", "tp2 dp2", "tp2 ep2"],
)
def test_distance_counts_every_weight_once(world: World, size: int, layout: Layout) -> None:
    assert max(world.run(size, distance_error, layout)) <= 1e-6


def mismatched(rank: int, group: Any) -> str:
    platform = platforms.choose()
    with start.world(platform, Layout(), 1) as grid:
        arch = FAMILIES["qwen2"].arch(tiny_model("qwen2", 1).config.to_dict())
        untied = FAMILIES["llama"].arch(tiny_model("llama", 1).config.to_dict())
        teacher = Teacher(build(arch, Layout(), platform, grid), "ema", grid, beta=0.9, every=1)
        try:
            teacher.follow(build(untied, Layout(), platform, grid), 1)
        except CheckFailed as error:
            return str(error)
    return "moved"


def test_fails_loudly_when_parameters_do_not_match(world: World) -> None:
    assert "do not match" in world.run(1, mismatched)[0]


def held() -> int:
    """Bytes of this process's tensors that were made after `gc.freeze()`: those that stay.

    gloo's threads let go of a collective's buffers a moment after it has ended.
    """
    readings = []
    for _ in range(4):
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
        readings.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
        del tensors
        time.sleep(0.05)
    return min(readings)


def costs(rank: int, group: Any, layout: Layout) -> list[tuple[str, str, list[int], int, int]]:
    """Of each teacher: weights of this rank's stage without and in experts dealt out, bytes it adds to the student's module,
    bytes of its shards."""
    with start.world(platforms.choose(), layout, 1) as grid:
        student, found = tiny(layout, grid), []
        n = [0, 0]
        for name, parameter in student.named_shards():
            n[layout.expert_model_parallel_size > 1 and ".local_experts." in name] += parameter.numel()
        gc.freeze()
        for kind in ("ema", "frozen"):
            for memory in ("beside", "swap"):
                teacher = Teacher(tiny(layout, grid) if memory == "beside" else student, kind, grid, 0.9, 1, memory)
                shards = 0 if teacher.shards is None else teacher.shards.nbytes
                found.append((kind, memory, n, held(), shards))
                del teacher
        gc.unfreeze()
        return found


@pytest.mark.parametrize(
    "layout",
    [Layout(2, bf16=True), Layout(1, 2, bf16=True), Layout(bf16=True), Layout(expert_model_parallel_size=2, bf16=True)],
)
def test_memory_is_what_the_table_says(world: World, layout: Layout) -> None:
    """docs/teacher_memory.md, bf16: 4 n / DP bytes of an average, 2 n / DP of frozen shards, 2 n of weights beside."""
    replicas, copies = layout.data_parallel_size(4), layout.expert_data_parallel_size(4)
    for found in world.run(4, costs, layout):
        for kind, memory, n, added, shards in found:
            size = {("ema", memory): 4, ("frozen", "beside"): 0}.get((kind, memory), 2)
            assert shards == size * (-(-n[0] // replicas) + -(-n[1] // copies)), (kind, memory)
            beside = 2 * sum(n) if memory == "beside" else 0
            assert 0 <= added - beside - shards < 2_000, (kind, memory)  # rotary frequencies


def settings() -> LossSettings:
    return dataclasses.replace(loss_settings(resolve({"mode": "unisd_star", "model_name": "tiny"}, {})), views=VIEWS)


def borrowing(rig: Rig, kind: Any, memory: Any) -> Teacher:
    """A teacher with the weights of the rig's that reads in the student's module."""
    own = [parameter.detach().clone() for _, parameter in rig.student.model.named_shards()]
    with torch.no_grad():
        for (_, mine), (_, others) in zip(rig.student.model.named_shards(), rig.teacher.model.named_shards(), strict=True):
            mine.copy_(others)
        teacher = Teacher(rig.student.model, kind, rig.grid, 0.9, 1, memory)
        for (_, mine), kept in zip(rig.student.model.named_shards(), own, strict=True):
            mine.copy_(kept)
    return teacher


def gradients(rank: int, group: Any, layout: Layout) -> list[str]:
    """What differs from a teacher beside the student."""
    with start.world(platforms.choose(), layout, 1) as grid:
        rig = Rig(layout, platforms.choose(), grid)
        before = [parameter.detach().clone() for _, parameter in rig.student.model.named_shards()]
        loss, expected, norm = rig.gradients(settings(), rig.samples)
        wrong = []
        for kind, memory in (("frozen", "swap"), ("ema", "host")):
            found_loss, found, found_norm = rig.gradients(settings(), rig.samples, borrowing(rig, kind, memory))
            wrong += [f"{kind} {memory} {name}" for name, g in expected.items() if not torch.equal(g, found[name])]
            wrong += [f"{kind} {memory}"] * ((found_loss, found_norm) != (loss, norm))
            after = [parameter for _, parameter in rig.student.model.named_shards()]
            wrong += ["student"] * (not all(map(torch.equal, before, after)))
        return wrong


@pytest.mark.parametrize(
    "layout", [Layout(2, 1, global_batch_size=8), Layout(1, 2, global_batch_size=8, use_distributed_optimizer=True)]
)
def test_losses_and_gradients_do_not_depend_on_where_the_teacher_is_kept(world: World, layout: Layout) -> None:
    assert world.run(4, gradients, layout) == [[]] * 4


def after_a_failure(rank: int, group: Any) -> tuple[bool, bool]:
    """Whether a pass over tokens that the model does not know failed, and the student then had its weights again."""
    layout = Layout(global_batch_size=8)
    with start.world(platforms.choose(), layout, 1) as grid:
        rig = Rig(layout, platforms.choose(), grid)
        before = [parameter.detach().clone() for _, parameter in rig.student.model.named_shards()]
        unknown = [
            Sample(one.prompts, dataclasses.replace(one.completion, token_ids=(10**6,) * len(one.completion.token_ids)))
            for one in rig.samples
        ]
        try:
            rig.gradients(settings(), unknown, borrowing(rig, "frozen", "swap"))
            failed = False
        except IndexError:
            failed = True
        after = [parameter for _, parameter in rig.student.model.named_shards()]
        return failed, all(map(torch.equal, before, after))


def test_a_failed_pass_gives_the_student_its_weights_back(world: World) -> None:
    assert world.run(2, after_a_failure) == [(True, True)] * 2
