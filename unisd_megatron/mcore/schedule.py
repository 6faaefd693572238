"""Runs views through the pipeline: forward only (`score`), or forward and backward (`learn`).

Both drive Megatron's own schedules, 1F1B or interleaved. All views that a model must read in a step go through one
forward-only schedule, so the pipeline fills once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.grid import Grid
from unisd_megatron.losses.collectives import deal_rows, enter_shards, gather_rows
from unisd_megatron.mcore import userbuffers
from unisd_megatron.mcore.attention import packed_seq_params

Said = TypeVar("Said")


def completion_rows(hidden: Tensor, view: View, grid: Grid) -> Tensor:
    """Hidden states that predict this rank's share of the kept tokens, `[n, h]`, the same on every tensor-parallel rank.

    Args: hidden: final-norm output `[s, b, h]`, or this rank's `[s/t, b, h]` under sequence parallel; s is the whole row, or
    this rank's part of it under context parallel, where rows then change ranks to even out the shares.
    Backward: expects each rank's partial gradient (its vocabulary shard's) and sums them over the tensor-parallel group:
    one reduce-scatter under sequence parallel, else one all-reduce of the kept rows.
    """
    row, position = view.predictors.unbind(1)
    if grid.sequence_parallel:
        return _deal(gather_rows(hidden, grid.tensor.group)[position, row], view, grid)
    return enter_shards(_deal(hidden[position, row], view, grid), grid.tensor.group)


def _deal(rows: Tensor, view: View, grid: Grid) -> Tensor:
    if view.dealt is None:
        return rows
    return deal_rows(rows, view.dealt.owned, view.dealt.total, view.dealt.share, grid.context.group)


def score(
    chunks: Sequence[torch.nn.Module], views: Sequence[View], listen: Callable[[int, Tensor], Said], grid: Grid
) -> list[Said]:
    """Reads the views without gradient; on the last stage, `listen(i, rows)` of each view in order.

    Args: listen: called with the view's number and its kept rows `[N, h]`; what it returns is all that is kept.
    Returns an empty list on other stages. Collective over the replica.
    """

    def loss_func(i: int, output: Tensor, non_loss_data: bool = True) -> Said:
        return listen(i, completion_rows(output, views[i], grid))

    with torch.no_grad():
        return _run(chunks, views, loss_func, grid, forward_only=True, collect_non_loss_data=True)


def learn(chunks: Sequence[torch.nn.Module], views: Sequence[View], loss: Callable[[int, Tensor], Tensor], grid: Grid) -> None:
    """Forward and backward over the micro-batches; gradients of the sum of losses are in the gradient buffers afterwards.

    Args: loss: called on the last stage with the micro-batch's number and its kept rows; returns a scalar.
    Collective over all ranks (gradients are reduced over data-parallel ranks at the end).
    """

    def loss_func(i: int, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        value = loss(i, completion_rows(output, views[i], grid))
        # The loss is normalised already; `student.py` keeps Megatron from dividing by this count.
        return value, torch.zeros((), dtype=torch.int, device=value.device), {}

    _run(chunks, views, loss_func, grid, forward_only=False, collect_non_loss_data=False)


def _run(
    chunks: Sequence[torch.nn.Module], views: Sequence[View], loss_func: Callable[..., Any], grid: Grid, **how: Any
) -> list[Any]:
    config = get_model_config(chunks[0])
    if (len(chunks) > 1 or config.tp_comm_overlap) and len({view.tokens.shape for view in views}) > 1:
        raise ValueError("this schedule takes rows of one length; lay them out with Form(equal_lengths=True)")
    if config.tp_comm_overlap:
        userbuffers.fit(config, views[0].tokens.numel())

    def forward_step(items: Iterator[tuple[int, View]], module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        i, view = next(items)
        positions = torch.arange(view.tokens.shape[1], device=view.tokens.device).expand_as(view.tokens)
        output = module(view.tokens, positions, None, packed_seq_params=packed_seq_params(view))
        return output, partial(loss_func, i)

    batch, length = views[0].tokens.shape
    iterators = [iter(enumerate(views)) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators,
        model=list(chunks),
        num_microbatches=len(views),
        seq_length=length * grid.context.size,  # Megatron divides it by the context-parallel ranks
        micro_batch_size=batch,
        **how,
    )
