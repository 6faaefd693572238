"""Ranks of a group as threads of this process: for agreements of a world that is not there.

A `Meeting` is a process group to `torch.distributed.all_gather`, as far as `exchange.all_gather_json` uses it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch.distributed as dist
from torch import Tensor

WAIT_S = 600.0


class Table:
    """Where the ranks of one group lay what they say."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.said: list[Tensor | None] = [None] * size


class _Done(dist._Work):
    def wait(self, *_: Any) -> bool:
        return True


class Meeting(dist.ProcessGroup):
    """One rank's seat at a table."""

    def __init__(self, table: Table, rank: int) -> None:
        super().__init__(rank, table.size)
        self._table, self._rank = table, rank

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> dist._Work:
        self._table.said[self._rank] = inputs[0].clone()
        self._table.barrier.wait(WAIT_S)
        for output, said in zip(outputs[0], self._table.said, strict=True):
            assert said is not None
            output.copy_(said)
        self._table.barrier.wait(WAIT_S)  # nobody speaks again before all have heard
        return _Done()
