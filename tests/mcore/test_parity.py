"""Loss and gradient of every mode under real Megatron layouts equal one process; and the check catches what it is there for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import schedule, start
from unisd_megatron.parity.layout import BF16_GRADIENT_TOLERANCE, TOLERANCE, Rig, cases, compare, gradient_error, total_norm
from world import World

LAYOUTS = {
    "tp2 pp2 vpp2 sp, packs of 2": Layout(2, 2, 2, sequence_parallel=True, micro_batch_size=2, global_batch_size=8),
    "tp2 pp2 sp, padded, micro-batches of 2, recompute": Layout(
        2, 2, sequence_parallel=True, packing=False, micro_batch_size=2, global_batch_size=8, recompute_granularity="full"
    ),
    "tp4": Layout(4, global_batch_size=8),
    "tp2 cp2 sp, packs of 2, recompute": Layout(
        2,
        context_parallel_size=2,
        sequence_parallel=True,
        micro_batch_size=2,
        global_batch_size=8,
        recompute_granularity="full",
    ),
    "pp2 vpp2 dp2, padded": Layout(1, 2, 2, packing=False, global_batch_size=8),
    "dp2 cp2, packs of 2": Layout(context_parallel_size=2, micro_batch_size=2, global_batch_size=8),
    "pp2 vpp2 cp2": Layout(1, 2, 2, 2, global_batch_size=8),
}


def on_rig(rank: int, group: Any, layout: Layout, work: Callable[..., Any], *args: Any) -> Any:
    """Runs `work(rig, *args)` on every rank."""
    platform = platforms.choose()
    with start.world(platform, layout, 1) as grid:
        family = args[0] if args and args[0] in ("qwen2", "llama") else "qwen2"
        return work(Rig(layout, platform, grid, family, "fused"), *args)


def all_cases(rig: Rig, *_: Any) -> list[Any]:
    return compare(rig)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_mode_equals_one_process(world: World, name: str) -> None:
    results = world.run(4, on_rig, LAYOUTS[name], all_cases, timeout_s=240)[0]
    assert len(results) >= 20
    assert [case for case in results if not case.holds] == []


def test_bf16_stays_within_what_rounding_costs(world: World) -> None:
    results = world.run(2, on_rig, Layout(2, sequence_parallel=True, bf16=True, global_batch_size=8), all_cases)[0]
    assert len(results) >= 20 and [case for case in results if not case.holds] == []


def precision(rank: int, group: Any) -> tuple[str, bool, bool]:
    """What products are computed in after a rig was built in a container that allows TF32."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    on_rig(rank, group, Layout(), lambda rig: None)
    return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_fp32_is_not_tf32(world: World) -> None:
    assert world.run(1, precision) == [("highest", False, False)]


def importance(rig: Rig) -> tuple[float, float, float]:
    """Relative error of loss and gradient with truncated importance sampling, and the part of the ratios that it cuts."""
    settings = replace(dict(cases("fused"))["unisd_star, JSD 0.5, clip 0.2"], importance_cap=1.5)
    shifts = itertools.cycle([0.3, -0.2, 1.1, -0.9, 0.0])
    samples = []
    for sample in rig.samples:  # engines whose probabilities are 0.4 to 3 times those of a uniform draw
        said = sample.completion
        logged = tuple(next(shifts) - 5.7 for _ in said.token_ids)
        samples.append(replace(sample, completion=replace(said, log_probs=logged)))
    rig.samples = samples
    without, *_ = rig.gradients(replace(settings, importance_cap=None), samples)
    loss, gradients, _ = rig.gradients(settings, samples)
    if rig.grid.world.rank:
        return 0.0, 0.0, 1.0
    expected_loss, expected = rig.expected(settings)
    return abs(loss / expected_loss - 1), gradient_error(gradients, expected), abs(without / loss - 1)


@pytest.mark.parametrize("name", ["tp2 pp2 sp, padded, micro-batches of 2, recompute", "dp2 cp2, packs of 2"])
def test_importance_sampling_weighs_every_term(world: World, name: str) -> None:
    loss, gradient, effect = world.run(4, on_rig, LAYOUTS[name], importance, timeout_s=120)[0]
    assert loss <= TOLERANCE and gradient <= TOLERANCE
    assert effect > 0.05


def test_llama_untied_scaled_rope(world: World) -> None:
    results = world.run(4, on_rig, LAYOUTS["tp2 pp2 vpp2 sp, packs of 2"], all_cases, "llama", timeout_s=240)[0]
    assert [case for case in results if not case.holds] == []


def materialized(rig: Rig) -> float:
    """Worst difference between the two ways of reading the vocabulary, loss and gradients."""
    worst = 0.0
    compared = {"vanilla", "reverse KL", "unisd_star, JSD 0.5, clip 0.2", "match_repr"}
    for (name, fused), (_, plain) in zip(cases("fused"), cases("materialized"), strict=True):
        if name not in compared:
            continue
        loss, gradients, _ = rig.gradients(fused, rig.samples)
        other_loss, others, _ = rig.gradients(plain, rig.samples)
        scale = total_norm(others)
        worst = max(worst, abs(loss - other_loss), *(float((gradients[n] - others[n]).norm() / scale) for n in gradients))
    return worst


def test_fused_and_materialized_paths_agree(world: World) -> None:
    layout = LAYOUTS["tp2 pp2 sp, padded, micro-batches of 2, recompute"]
    assert max(world.run(4, on_rig, layout, materialized, timeout_s=240)) < 1e-6


# Negative controls: each sabotage is a mistake that a shipped system has made. The loss may stay exact; the check must fail.


def missing_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "enter_shards", lambda rows, group: rows)


def doubled_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = schedule.gather_rows

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
            ctx.group = group
            return rows.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=ctx.group)
            return gradient, None

    monkeypatch.setattr(schedule, "gather_rows", lambda rows, group: Doubled.apply(gather(rows, group), group))


def zero_padded_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    from unisd_megatron.train import step

    for name in ("compare", "sampled_log_probs"):
        honest = getattr(step, name)
        monkeypatch.setattr(
            step, name, functools.partial(lambda honest, *a, **k: honest(*a, **{**k, "vocab_size": None}), honest)
        )


def sabotaged(rig: Rig, sabotage: Callable[[pytest.MonkeyPatch], None]) -> tuple[float, float, float] | None:
    """`(honest gradient error, sabotaged loss error, sabotaged gradient error)` of mode vanilla, on rank 0."""
    _, settings = next(iter(cases("fused")))
    honest = rig.gradients(settings, rig.samples)
    with pytest.MonkeyPatch.context() as monkeypatch:
        sabotage(monkeypatch)
        loss, gradients, _ = rig.gradients(settings, rig.samples)
    if rig.grid.world.rank != 0:
        return None
    expected_loss, expected = rig.expected(settings)
    return gradient_error(honest[1], expected), abs(loss / expected_loss - 1), gradient_error(gradients, expected)


def unmarked_shards(rig: Rig) -> tuple[float, float] | None:
    """`(honest, sabotaged)` relative error of the gradient norm, on rank 0; loss and gradients are exact in both."""
    _, settings = next(iter(cases("fused")))
    _, _, honest = rig.gradients(settings, rig.samples)
    for _, parameter in rig.student.model.named_shards():
        if hasattr(parameter, "tensor_model_parallel"):
            del parameter.tensor_model_parallel
    _, _, norm = rig.gradients(settings, rig.samples)
    if rig.grid.world.rank != 0:
        return None
    expected = float(total_norm(rig.expected(settings)[1]))
    return abs(honest / expected - 1), abs(norm / expected - 1)


def test_the_check_catches_a_norm_that_misses_shards(world: World) -> None:
    honest, norm_error = world.run(2, on_rig, Layout(2, 1, global_batch_size=8), unmarked_shards)[0]
    assert honest <= TOLERANCE
    assert norm_error > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("sabotage", "layout", "loss_stays_exact"),
    [
        (missing_all_reduce, Layout(2, 1, global_batch_size=8), True),
        (doubled_reduction, Layout(2, 1, sequence_parallel=True, global_batch_size=8), True),
        (zero_padded_vocabulary, Layout(2, 1, global_batch_size=8), False),
    ],
)
def test_the_check_catches(world: World, sabotage: Callable[..., None], layout: Layout, loss_stays_exact: bool) -> None:
    honest, loss_error, gradient = world.run(2, on_rig, layout, sabotaged, sabotage, timeout_s=120)[0]
    assert honest <= TOLERANCE
    assert gradient > 100 * TOLERANCE
    assert (loss_error <= TOLERANCE) == loss_stays_exact


@pytest.mark.parametrize(("sabotage", "parallel"), [(missing_all_reduce, False), (doubled_reduction, True)])
def test_the_check_catches_in_bf16(world: World, sabotage: Callable[..., None], parallel: bool) -> None:
    layout = Layout(2, 1, sequence_parallel=parallel, bf16=True, global_batch_size=8)
    honest, _, gradient = world.run(2, on_rig, layout, sabotaged, sabotage, timeout_s=120)[0]
    assert honest <= BF16_GRADIENT_TOLERANCE and gradient > 3 * BF16_GRADIENT_TOLERANCE
