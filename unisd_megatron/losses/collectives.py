"""Collectives that know their gradient, over one explicit process group.

`torch.distributed.all_reduce` works in place and has no autograd rule. Inside a graph it overwrites a tensor that autograd
believes it knows: the backward pass then treats the sum over ranks as if it were this rank's summand, so the upstream gradient
that belongs to *all* shards is applied to one shard's local statistics only. The loss value stays right, which is why shipped
systems trained this way for months. Every reduction of this package therefore goes through one of the functions below, each
of which states the gradient of the mathematical map it performs, and none of which writes into its argument.

What decides the backward is who owns the loss. In tensor parallelism every rank of the group computes the *same* scalar loss
from replicated values; it is one loss, not a sum of copies. Hence:

    name             forward                      backward
    sum_over         y = sum_r x_r                dx_r = dy             (dy is already the full, replicated gradient)
    enter_shards     y = x                        dx   = sum_r dy_r     (each rank's use contributes a part)
    gather_rows      y = concat_r x_r             dx_r = (sum_q dy_q)[rows of r]
    replicated_use   y = x                        dx   = dy / size      (a use that all ranks repeat identically)
    deal_rows        y_r = (all rows)[share of r] dx_r = (all dy)[rows of r]
    max_over         y = max_r x_r                none
    stack_over       y[r] = x_r                   none
    concat_over      y = concat_r x_r, 1-D        none (rank counts may differ)

`group=None` means "not sharded": the functions are identities and no process group needs to exist. It never means "everyone".
This file knows torch only: no Megatron, no global state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks that share the sharded dimension; 1 when it is not sharded."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """This process's place in `group`; 0 when nothing is sharded."""
    return 0 if group is None else dist.get_rank(group)


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum of `x` over the ranks of `group`, the same on each of them (any shape, out of place).

    y = sum_r x_r, so dL/dx_r = dL/dy: every rank already holds the full upstream gradient, because every rank computes the
    same loss from the same y. Reducing it again would multiply the gradient by the group size.
    """
    return x if group_size(group) == 1 else _SumOver.apply(x, group)


def enter_shards(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` unchanged; its gradient is summed over `group`.

    For a tensor that every rank holds in full and uses against *its own shard* (hidden states against a vocabulary-sharded
    head): each rank's backward yields a partial gradient, and the true one is their sum. Megatron calls this
    copy_to_tensor_model_parallel_region. A later use that all ranks repeat identically must pass through `replicated_use`.
    """
    return x if group_size(group) == 1 else _EnterShards.apply(x, group)


def gather_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows (dim 0) of all ranks in rank order, on every rank: [n, ...] -> [n * size, ...]. Every rank holds equally many.

    For sequence-parallel hidden states that enter a sharded head. Each rank's backward yields a partial gradient of *all*
    rows; the backward here sums them over ranks and hands each rank its rows (reduce-scatter). It already is the reduction
    that `enter_shards` would do: using both doubles the gradient while the loss stays right.
    """
    return x if group_size(group) == 1 else _GatherRows.apply(x, group)


def deal_rows(x: Tensor, places: Tensor, total: int, share: slice | Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` [n, D] holds rows `places` [n] of a [total, D] table whose rows lie on some rank each; returns the rows of
    `share`, a slice of them or their places.

    For context-parallel hidden states: sequence shards decide which rank has a row, the loss wants even shares. The shares of
    all ranks must cut the table without overlap: each row is then used once, and its gradient goes back to where it lay.
    """
    return x if group_size(group) == 1 else _DealRows.apply(x, places, total, share, group)


def replicated_use(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` unchanged; its gradient is divided by the size of `group`.

    For a use that every rank computes identically (feature distance, an unsharded regulariser) of a tensor made by
    `enter_shards` or `gather_rows`. Their backward sums over ranks, which is right for partial gradients and would count
    this identical one `size` times.
    """
    return x if group_size(group) == 1 else _ReplicatedUse.apply(x, group_size(group))


def max_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Element-wise maximum of `x` over `group`; carries no gradient (any shape, out of place).

    Meant for shifts that cancel (log-sum-exp), whose gradient is zero in total.
    """
    x = x.detach()
    if group_size(group) == 1:
        return x
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def stack_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` of every rank stacked in rank order, [size, *x.shape] on each of them; carries no gradient.

    Preferred to an all-reduce where the result must not depend on an element's place in the buffer: rings add the parts of
    different elements in different orders, a local reduction over dim 0 adds all of them in rank order.
    """
    x = x.detach().contiguous()
    size = group_size(group)
    if size == 1:
        return x.unsqueeze(0)
    if x.numel() == 0:  # nothing to send; the shape is known without asking
        return x.new_empty((size, *x.shape))
    result = x.new_empty(size * x.numel())
    _renamed("all_gather_single", "all_gather_into_tensor")(result, x.view(-1), group=group)
    return result.view(size, *x.shape)


def concat_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The 1-D tensors of all ranks joined in rank order, on every rank; their lengths may differ. Carries no gradient.

    Two collectives: the lengths, then the values padded to the longest.
    """
    if x.dim() != 1:
        raise ValueError(f"concat_over joins 1-D tensors; got shape {tuple(x.shape)}")
    x = x.detach()
    if group_size(group) == 1:
        return x
    counts = stack_over(torch.tensor([x.numel()], device=x.device), group).flatten().tolist()
    padded = x.new_zeros(max(counts))
    padded[: x.numel()] = x
    return torch.cat([row[:count] for row, count in zip(stack_over(padded, group), counts, strict=True)])


def _renamed(new: str, old: str) -> Any:
    """A collective that torch 2.13 renamed: the old name warns there, the new one does not exist before."""
    return getattr(dist, new, None) or getattr(dist, old)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        result = x.clone(memory_format=torch.contiguous_format)
        if result.numel():
            dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _EnterShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same buffer to another consumer.
        total = grad.clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, group=ctx.group)
        return total, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return stack_over(x, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = grad.shape[0] // group_size(ctx.group)
        mine = grad.new_empty((rows, *grad.shape[1:]))
        if mine.numel():
            _renamed("reduce_scatter_single", "reduce_scatter_tensor")(mine, grad.contiguous(), group=ctx.group)
        return mine, None


class _DealRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, total: int, share: slice | Tensor, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(places)
        ctx.total, ctx.share, ctx.group = total, share, group
        table = x.new_zeros((total, *x.shape[1:]))
        table[places] = x
        if table.numel():
            dist.all_reduce(table, group=group)  # every row is on one rank: a sum with zeros, exact in any dtype
        return table[share].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        table = grad.new_zeros((ctx.total, *grad.shape[1:]))
        table[ctx.share] = grad
        if table.numel():
            dist.all_reduce(table, group=ctx.group)
        return table[places], None, None, None, None


class _ReplicatedUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None
