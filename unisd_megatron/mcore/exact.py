"""The exact weights of a model whose parameters are kept in FP8: the optimizer's fp32 main parameters, rounded to bf16.

They are the weights that a model kept in bf16 would have after the same steps, so that what leaves a run does not depend on how
the run keeps them: to the rollout engine, to the average of the teacher, into checkpoints and exported folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def exact_weights(optimizer: Any, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Of each parameter, whole and in its nominal dtype (bf16). Collective over data-parallel ranks.

    Args: optimizer: Megatron's distributed optimizer, or a chain of such.
    """
    wanted, found = {id(parameter) for parameter in parameters}, {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, mine, begin in _held(one):
            if id(parameter) not in wanted:
                continue
            whole = torch.zeros(parameter.shape, dtype=parameter.dtype, device=mine.device).view(-1)
            whole[begin : begin + mine.numel()] = mine.to(parameter.dtype)
            # Every number is zero on all ranks but one: a sum of bytes moves it, sign of zero and all.
            dist.all_reduce(whole.view(torch.uint8), group=one.data_parallel_group)
            found[parameter] = whole.view(parameter.shape)
    lacking = len(wanted) - len(found)
    if lacking:
        raise RuntimeError(f"{lacking} weights that are kept in FP8 have no main parameters in the distributed optimizer")
    return found


def _held(optimizer: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """`(parameter, this rank's piece of its fp32 main parameter, where in it the piece begins)`, on every rank in one order.

    A rank may have nothing of a parameter; all name each, so that they gather alike.
    """
    pieces = {}
    for parameters, mains in zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True):
        for parameter, main in zip(parameters, mains, strict=True):
            pieces[parameter] = main, optimizer._get_model_param_range_map(parameter)["param"].start
    for buffer in optimizer.buffers:
        for parameter in buffer.params:
            empty = torch.zeros(0, dtype=torch.float32, device=parameter.device)
            main, begin = pieces.get(parameter, (empty, 0))
            if main is not None:
                yield parameter, main, begin
