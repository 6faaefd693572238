"""Who am I among the ranks, and whom do I talk to. Built once in `mcore/start.py`, or from plain groups in tests.

A *replica* is the TP x CP x PP ranks that share a batch.
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
    """The axes of one process.

    tensor: ranks that share each weight; pipeline: stages; context: ranks that share each sequence; data: replicas;
    data_context: ranks with the same weights and other tokens (data x context), but for experts, which `expert` deals out
    over some of these ranks and of which `expert_data` have the same; world: all ranks.
    """

    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    data_context: Axis
    expert: Axis
    expert_data: Axis
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
