"""Every family is what `transformers` computes, under every kind of layout: weights, logits, log-probs, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.config import Layout
from unisd_megatron.families import FAMILIES
from unisd_megatron.families.published import published
from unisd_megatron.losses import token_log_probs
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import schedule, start
from unisd_megatron.parity.layout import TOLERANCE, Rig, cases, gradient_error, total_norm
from unisd_megatron.weights import stream
from unisd_megatron.weights.tiny import VOCAB_SIZE, tiny_model
from world import World

LAYOUTS = {
    "one process": Layout(global_batch_size=8),
    "tp2": Layout(2, global_batch_size=8),
    "pp2, padded, micro-batches of 2": Layout(1, 2, packing=False, micro_batch_size=2, global_batch_size=8),
    "tp4": Layout(4, global_batch_size=8),
    "tp2 pp2 sp, packs of 2, recompute": Layout(
        2, 2, sequence_parallel=True, micro_batch_size=2, global_batch_size=8, recompute_granularity="full"
    ),
    "tp2 cp2 sp, packs of 2": Layout(
        2, context_parallel_size=2, sequence_parallel=True, micro_batch_size=2, global_batch_size=8
    ),
}
EXPERTS = {
    "ep2": (2, Layout(expert_model_parallel_size=2, global_batch_size=8)),
    "ep2 dp4": (4, Layout(expert_model_parallel_size=2, micro_batch_size=2, global_batch_size=8)),
    "ep2 tp2 sp": (4, Layout(2, sequence_parallel=True, expert_model_parallel_size=2, global_batch_size=8)),
    "ep2 pp2 vpp2, recompute": (
        4,
        Layout(1, 2, 2, expert_model_parallel_size=2, micro_batch_size=2, global_batch_size=8, recompute_granularity="full"),
    ),
    "ep4 cp2 dp2": (
        4,
        Layout(context_parallel_size=2, expert_model_parallel_size=4, micro_batch_size=2, global_batch_size=8),
    ),
}
SEGMENTS = [0, 21, 24, 44, 48]  # longer and shorter than a window


def tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(0))


def logits_error(rig: Rig, family: str) -> tuple[float, float]:
    """Largest differences of logits and of sampled log-probs, padded and packed; zero on stages without a head."""
    reference, grid, stage = tiny_model(family, 1), rig.grid, rig.student.model
    padded = View(tokens(), torch.cartesian_prod(torch.arange(2), torch.arange(48)))
    positions = torch.stack([torch.zeros(48, dtype=torch.int64), torch.arange(48)], dim=1)
    packed = View(tokens()[:1], positions, torch.tensor(SEGMENTS, dtype=torch.int32), 21)
    with torch.no_grad():
        segments = [reference(part[None]).logits[0] for part in tokens()[0].split(torch.tensor(SEGMENTS).diff().tolist())]
        expected = [reference(tokens()).logits.flatten(0, 1), torch.cat(segments)]
    sampled = torch.randint(0, VOCAB_SIZE, (96,), generator=torch.Generator().manual_seed(1))

    def listen(i: int, rows: Tensor) -> tuple[float, float]:
        shard = rows @ stage.head_weight().t()
        first = grid.tensor.rank * shard.shape[1]
        whole = expected[i][:, first : first + shard.shape[1]]
        ids = sampled[: len(rows)]
        said = token_log_probs(shard, ids, temperature=0.7, vocab_size=VOCAB_SIZE, group=grid.tensor.group)
        right = (expected[i] / 0.7).log_softmax(-1)[torch.arange(len(ids)), ids]
        return float((shard[:, : whole.shape[1]] - whole).abs().max()) if whole.numel() else 0.0, float(
            (said - right).abs().max()
        )

    worst = schedule.score(stage.chunks, [padded, packed], listen, grid)
    return tuple(max(values) for values in zip(*worst, strict=True)) if worst else (0.0, 0.0)  # type: ignore[return-value]


def gradients_error(rig: Rig) -> float:
    """Worst relative error of loss, gradients and their norm in one case; on rank 0."""
    settings = dict(cases("fused"))["reverse KL"]
    loss, gradients, norm = rig.gradients(settings, rig.samples)
    if rig.grid.world.rank != 0:
        return 0.0
    expected_loss, expected = rig.expected(settings)
    return max(abs(loss / expected_loss - 1), gradient_error(gradients, expected), abs(norm / float(total_norm(expected)) - 1))


def errors(rank: int, group: Any, layout: Layout, family: str) -> tuple[bool, float, float, float]:
    """Whether the weights come back bit for bit, then errors of logits, log-probs and gradients."""
    platform = platforms.choose()
    plain = layout.context_parallel_size == 1 and layout.virtual_pipeline_model_parallel_size is None
    with start.world(platform, layout, 1) as grid:
        rig = Rig(layout, platform, grid, family, "fused")
        stored = published(tiny_model(family, 1).state_dict().items())
        back = dict(stream.full_tensors(rig.student.model.named_shards(), rig.mappings, grid))
        same = all(torch.equal(back[name], stored[name]) for name in back)
        same = same and stored.keys() - back.keys() <= ({"lm_head.weight"} if rig.arch.tied else set())
        said = logits_error(rig, family) if plain else (0.0, 0.0)
        # Gradients at tensor-parallel 4 add nothing to those at 2 and cost as much as all the rest.
        return same, *said, gradients_error(rig) if grid.tensor.size < 4 else 0.0


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_family_equals_transformers(world: World, name: str) -> None:
    # Under context parallel there are only three kinds of layers.
    for family in ["qwen3", "gemma3", "qwen3_moe"] if LAYOUTS[name].context_parallel_size > 1 else FAMILIES:
        check(world.run(LAYOUTS[name].model_parallel_size, errors, LAYOUTS[name], family, timeout_s=240), family)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_dealt_out_over_ranks_equal_transformers(world: World, name: str) -> None:
    size, layout = EXPERTS[name]
    check(world.run(size, errors, layout, "qwen3_moe", timeout_s=240), "qwen3_moe")


def check(found: list[tuple[bool, float, float, float]], family: str) -> None:
    for same, logits, log_probs, gradients in found:
        assert same, family
        assert logits <= 1e-4, (family, logits)
        assert log_probs <= 1e-5, (family, log_probs)
        assert gradients <= TOLERANCE, (family, gradients)
