"""The teacher's part of a distributed checkpoint: the same entries however its weights are kept.

Keys, shapes and cuts are those of the module it reads with (its own or the student's); the content is the teacher's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor

from unisd_megatron.errors import CheckpointError
from unisd_megatron.mcore.skeleton import parameters
from unisd_megatron.mcore.teacher import Teacher


def describe(teacher: Teacher, prefix: str, metadata: dict[str, Any], *, is_loading: bool) -> ShardedStateDict:
    """The entries to write, or to read into fresh host memory, by canonical name. Collective over DP when writing.

    An EMA is written in fp32. Only main replicas are written, all of them on the first data-parallel rank: the only one that
    gathers content, 4 bytes of host memory per weight of its stage. A reader holds as much for a moment, on every rank.
    Raises `CheckpointError` if a weight of the teacher would not be in the checkpoint.
    """
    dtype = None if teacher.shards is None else teacher.shards.dtype
    content = (
        {
            name: torch.empty_like(parameter, dtype=dtype, device="cpu", requires_grad=False)
            for name, parameter in teacher.model.named_shards()
        }
        if is_loading
        else teacher.weights()
    )
    state = teacher.model.sharded_state_dict(prefix=prefix, metadata=metadata)
    entries = parameters(teacher.model, state, prefix)
    for name, entry in entries.items():
        assert entry.data is not None
        entry.data = content[name].view(entry.data.shape)
        if isinstance(entry, ShardedTensor):
            entry.dtype = content[name].dtype
    missing = sorted(content.keys() - entries.keys())
    if missing:
        raise CheckpointError(f"the checkpoint would miss the teacher's {missing[0]} and {len(missing) - 1} more")
    return entries
