"""Who am I among the ranks, and whom do I talk to. Built once in `mcore/start.py`, or from plain groups in tests.

A *replica* is the TP x PP ranks that share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One axis of the layout: this process's rank along it, its size, and the group; `group` is None iff size is 1."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Grid:
    """The axes of one process; `world` covers all ranks."""

    tensor: Axis
    pipeline: Axis
    data: Axis
    replica: Axis
    world: Axis
    device: torch.device
    sequence_parallel: bool = False

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1
