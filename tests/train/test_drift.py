"""The drift of a teacher that reads in another precision is the KL of it from itself, and every model computes as it did after.

FP8 needs a GPU; here weights are rounded to e4m3 while the teacher reads, which changes what it says as much.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unisd_megatron.batch import STUDENT, TEACHER
from unisd_megatron.config import Layout
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.precision import in_fp8, in_weights_dtype
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import Objective, loss_settings
from unisd_megatron.parity.layout import Rig
from unisd_megatron.parity.oracle import read
from unisd_megatron.resolve import resolve
from unisd_megatron.train.collate import form_of, lay_out
from unisd_megatron.train.drift import DRIFT
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.step import compute_gradients, gather_tally, share_out
from world import World


def rounded(weight: Tensor) -> Tensor:
    return weight.to(torch.float8_e4m3fn).to(weight.dtype)


@contextlib.contextmanager
def coarse(stage: Stage) -> Iterator[None]:
    """The matrices of the layers rounded, as FP8 rounds them; not embedding, norms and head."""
    matrices = [p for name, p in stage.named_shards() if ".layers." in name and p.dim() == 2]
    exact = [p.detach().clone() for p in matrices]
    for p in matrices:
        p.data.copy_(rounded(p.data))
    try:
        yield
    finally:
        for p, value in zip(matrices, exact, strict=True):
            p.data.copy_(value)


def expected(rig: Rig) -> float:
    teacher = rig.references[1]
    kept = [s for s in rig.samples if s.counts and s.completion.finish_reason == "stop"]

    def said() -> list[Tensor]:
        with torch.no_grad():
            heard = [read(teacher, s.prompts.views[TEACHER], s.completion.token_ids).logits for s in kept]
        return [logits.log_softmax(-1) for logits in heard]

    exact = said()
    for name, p in teacher.named_parameters():
        if ".layers." in name and p.dim() == 2:
            p.data.copy_(rounded(p.data.float()))
    divergences = [(one.exp() * (one - other)).sum(-1) for one, other in zip(exact, said(), strict=True)]
    return float(torch.cat(divergences).mean())


def measured(rank: int, group: Any, layout: Layout) -> tuple[float, float, float | None, float | None]:
    """Drift as measured, loss with and without its measurement, and what the drift should be (on the first rank)."""
    with start.world(platforms.choose(), layout, 1) as grid:
        rig = Rig(layout, platforms.choose(), grid)
        teacher = Teacher(rig.teacher.model, "frozen", grid, precision=coarse)
        settings = dataclasses.replace(loss_settings(resolve({"mode": "vanilla", "model_name": "tiny"}, {})), temperature=1.0)
        learner = Learner(rig.student, teacher, Objective(settings, grid.data, grid.data_context), rig.arch, grid)
        found = []
        for drift in (True, False):
            work = share_out(rig.samples, learner, layout, mask_truncated=True)
            found.append(gather_tally(compute_gradients(learner, work, drift=drift), grid).read())
        assert DRIFT not in found[1]
        should = expected(rig) if grid.world.rank == 0 else None
        return found[0][DRIFT], found[0]["loss"], found[1]["loss"], should


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(context_parallel_size=2)])
def test_is_the_kl_of_the_teacher_from_itself(world: World, layout: Layout) -> None:
    outcomes = world.run(2, measured, layout)
    drift, with_it, without, should = outcomes[0]
    assert should is not None and should > 1e-5
    assert drift == pytest.approx(should, rel=1e-3)
    assert with_it == without
    assert outcomes[1][0] == drift


def padded(rank: int, group: Any, layout: Layout) -> list[tuple[float, set[int], float]]:
    """Of rows as they come, in multiples of 16, and of one length: the loss, lengths modulo 16, padding."""
    with start.world(platforms.choose(), layout, 1) as grid:
        rig = Rig(layout, platforms.choose(), grid)
        settings = loss_settings(resolve({"mode": "contrastive", "model_name": "tiny"}, {}))
        learner = Learner(rig.student, rig.teacher, Objective(settings, grid.data, grid.data_context), rig.arch, grid)
        views, found = list(settings.teacher_views), []
        form = form_of(learner, layout, views, mask_truncated=True)
        assert (form.granularity, rig.student.row_multiple) == (0, 1)
        rig.student.row_multiple = 16
        aligned = form_of(learner, layout, views, mask_truncated=True)
        groups = [rig.samples[i::2] for i in range(2)]
        for one in (form, aligned, dataclasses.replace(form, granularity=64, least=100)):
            work = lay_out(groups, one)
            rows = [batch.view for batch in work.batches] + [reading.view for reading in work.readings]
            lengths = {row.tokens.shape[1] for row in rows}
            if one.granularity:
                assert len(lengths) == 1 and min(lengths) >= 100
            tally = gather_tally(compute_gradients(learner, work), grid)
            found.append((tally.read()["loss"], {n % 16 for n in lengths}, work.padding_fraction([STUDENT, *views])))
        return found


@pytest.mark.parametrize("layout", [Layout(), Layout(2, sequence_parallel=True), Layout(context_parallel_size=2)])
def test_rows_that_are_padded_for_fp8_say_the_same(world: World, layout: Layout) -> None:
    plain, aligned, equal = world.run(layout.model_parallel_size, padded, layout)[0]
    assert plain[1] != {0} and aligned[1] == equal[1] == {0}
    assert plain[2] < aligned[2] < equal[2]
    assert aligned[0] == pytest.approx(plain[0], rel=1e-5) and equal[0] == pytest.approx(plain[0], rel=1e-5)


def precisions(rank: int, group: Any) -> list[tuple[Any, Any]]:
    with start.world(platforms.choose(), Layout(), 1) as grid:
        stage = Rig(Layout(), platforms.choose(), grid).student.model
        # Megatron opens FP8 around `decoder.layers`, and these lie outside of it.
        outside = {name for name, _ in stage.named_shards() if not name.startswith("decoder.layers.")}
        assert outside <= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
        layers = [layer.config for chunk in stage.chunks for layer in chunk.decoder.layers]
        stage.config.fp8, stage.config.fp8_recipe = "hybrid", "delayed"
        seen = []
        for precision in (in_weights_dtype, in_fp8("blockwise")):
            with contextlib.suppress(KeyError), precision(stage):
                seen.append({(config.fp8, config.fp8_recipe) for config in layers})
                raise KeyError
            assert {(config.fp8, config.fp8_recipe) for config in layers} == {("hybrid", "delayed")}
        return [only for (only,) in seen]


def test_a_precision_reaches_every_layer_and_ends_with_its_pass(world: World) -> None:
    assert world.run(1, precisions)[0] == [(None, "delayed"), ("e4m3", "blockwise")]
