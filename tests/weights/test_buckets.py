"""The stream to a rollout engine: the checkpoint's tensors bit for bit, in bounded buckets, from any layout, time and again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd_megatron.config import Layout
from unisd_megatron.convert.source import load_stage, open_source
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.weights.buckets import WeightStream, unpack
from unisd_megatron.weights.hf import HfFolder
from unisd_megatron.weights.tiny import write_tiny
from world import World

LIMIT = 60_000  # bytes: several parameters of the tiny model, and less than its largest


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("buckets")
    families = ("qwen2", "llama", "qwen3_moe")
    for family in families:
        write_tiny(family, root / family, seed=5)
    return {family: root / family for family in families}


def what_is_wrong(rank: int, group: Any, folder: Path, layout: Layout) -> list[str]:
    platform = platforms.choose()
    with start.world(platform, layout, 1) as grid:
        source = open_source(str(folder), layout)
        model = load_stage(source, layout, platform, grid)
        stream = WeightStream(model.named_shards, source.mappings, grid, bucket_bytes=LIMIT)
        stored, wrong = HfFolder(folder), []
        for changed in (False, True):
            if changed:  # the stream reads the parameters of the moment, not those it was made from
                with torch.no_grad():
                    for _, parameter in model.named_shards():
                        parameter.mul_(2)
            buckets = list(stream.everywhere())  # all kept at once: no bucket may reuse another's memory
            names = [name for bucket in buckets for name, _ in bucket]
            wrong += ["names"] * (sorted(names) != sorted(stored.names()))
            for number, bucket in enumerate(buckets):
                listed, shapes, dtype = stream.contents(number)
                held = sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
                wrong += [f"bucket {number}: {held} bytes"] * (held > LIMIT and len(bucket) > 3)  # 3: one fused parameter
                wrong += [f"bucket {number}: contents"] * (
                    [[name, list(tensor.shape), tensor.dtype] for name, tensor in bucket]
                    != [[name, shape, getattr(torch, dtype)] for name, shape in zip(listed, shapes, strict=True)]
                )
                flat = stream.flat(number)
                wrong += [f"bucket {number}: who holds it"] * ((flat is None) != (stream.stage(number) != grid.pipeline.rank))
                if flat is not None:
                    pairs = unpack(flat, list(zip(listed, map(tuple, shapes), strict=True)))
                    wrong += [name for (name, a), (_, b) in zip(pairs, bucket, strict=True) if not torch.equal(a, b)]
            expected = {name: stored.tensor(name) * (2 if changed else 1) for name in stored.names()}
            wrong += [name for bucket in buckets for name, tensor in bucket if not torch.equal(tensor, expected[name])]
        return wrong + ["one bucket"] * (len(buckets) < 4)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(2, 2, sequence_parallel=True, global_batch_size=4),
        Layout(1, 2, 2, global_batch_size=4),
        Layout(4, 1, global_batch_size=4),
    ],
)
def test_every_rank_gets_every_tensor(world: World, folders: dict[str, Path], family: str, layout: Layout) -> None:
    size = layout.model_parallel_size
    assert world.run(size, what_is_wrong, folders[family], layout) == [[]] * size


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, Layout(expert_model_parallel_size=2)),
        (4, Layout(2, sequence_parallel=True, expert_model_parallel_size=2)),
        (4, Layout(1, 2, expert_model_parallel_size=2)),
        (4, Layout(expert_model_parallel_size=2)),
    ],
)
def test_every_rank_gets_the_experts_of_others(world: World, folders: dict[str, Path], size: int, layout: Layout) -> None:
    assert world.run(size, what_is_wrong, folders["qwen3_moe"], layout) == [[]] * size


def held_at_worst(rank: int, group: Any, folder: Path, layout: Layout, limit: int) -> tuple[int, int]:
    """Bytes that a receiver keeps at worst, which stacks a layer's experts when it has them all; and those of a layer's."""
    platform = platforms.choose()
    with start.world(platform, layout, 1) as grid:
        source = open_source(str(folder), layout)
        model = load_stage(source, layout, platform, grid)
        stream = WeightStream(model.named_shards, source.mappings, grid, bucket_bytes=limit)
        buckets = [zip(*stream.contents(number)[:2], strict=True) for number in range(len(stream))]
        sizes = [
            [(found[0], 4 * torch.Size(shape).numel()) for name, shape in one if (found := re.search(r"layers\.\d+\.", name))]
            for one in buckets
        ]
        left: dict[str, int] = {}
        for layer, size in (pair for one in sizes for pair in one):
            left[layer] = left.get(layer, 0) + size
        largest, worst = max(left.values()), 0
        parts = dict.fromkeys(left, 0)
        for one in sizes:
            for layer, size in one:
                parts[layer] += size
                left[layer] -= size
                if not left[layer]:
                    parts[layer] = 0
            worst = max(worst, sum(parts.values()))
        return worst, largest


@pytest.mark.parametrize(
    ("size", "layout"), [(2, Layout(expert_model_parallel_size=2)), (4, Layout(1, 2, expert_model_parallel_size=2))]
)
def test_an_engine_holds_no_more_than_a_layer_that_is_not_complete(
    world: World, folders: dict[str, Path], size: int, layout: Layout
) -> None:
    """Experts dealt out over ranks come layer by layer: else an engine would hold half of all of them, until the last."""
    for worst, layer in world.run(size, held_at_worst, folders["qwen3_moe"], layout, LIMIT):
        assert worst <= layer + 2 * LIMIT
