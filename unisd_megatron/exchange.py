"""Small JSON values between ranks: token ids, names, metrics. Bytes on the wire are JSON, never pickle."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from unisd_megatron.grid import Axis


def all_gather_json(value: Any, axis: Axis) -> list[Any]:
    """The value of every rank of the axis, in rank order, on every rank. Collective over the axis (gloo)."""
    if axis.group is None:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(axis.size)]
    dist.all_gather(lengths, torch.tensor([payload.numel()]), group=axis.group)
    longest = int(max(length.item() for length in lengths))
    padded = torch.cat([payload, torch.zeros(longest - payload.numel(), dtype=torch.uint8)])
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(axis.size)]
    dist.all_gather(parts, padded, group=axis.group)
    return [json.loads(bytes(part[: int(n)].tolist())) for part, n in zip(parts, lengths, strict=True)]


def broadcast_json(value: Any, source: int, axis: Axis) -> Any:
    """The value of the rank `source` of the axis, on every rank of it. Collective over the axis (gloo)."""
    if axis.group is None:
        return value
    root = dist.get_global_rank(axis.group, source)
    payload = torch.frombuffer(bytearray(json.dumps(value if axis.rank == source else None).encode()), dtype=torch.uint8)
    length = torch.tensor([payload.numel()])
    dist.broadcast(length, src=root, group=axis.group)
    if axis.rank != source:
        payload = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(payload, src=root, group=axis.group)
    return json.loads(bytes(payload.tolist()))


def largest(value: int, axis: Axis) -> int:
    """The largest value of any rank of the axis, on every rank. Collective over the axis (gloo)."""
    if axis.group is None:
        return value
    told = torch.tensor([value])
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=axis.group)
    return int(told)
