"""The teacher: the same architecture and layout as the student, other weights, no gradient.

`frozen` never moves; `ema` follows the student with fp32 masters; `live` is the student itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.errors import CheckFailed
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import schedule
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.schedule import Said
from unisd_megatron.mechanisms.ema import mix_


class Teacher:
    """Reads views; with `ema`, keeps `masters`: fp32 values of its own shards, in the order of the parameters.

    Args: model: the teacher's own module, or the student's when `kind` is "live"; beta: EMA weight of the old teacher;
    every: optimizer steps between updates.
    """

    def __init__(
        self, model: Stage, kind: Literal["frozen", "ema", "live"], grid: Grid, beta: float = 0.0, every: int = 0
    ) -> None:
        self.model = model
        self.kind = kind
        self.grid = grid
        self._beta, self._every = beta, every
        if kind != "live":
            model.requires_grad_(False)
        # In fp32 the weights are their own masters: `float()` returns the same tensor.
        self.masters: dict[str, Tensor] = (
            {name: parameter.detach().float() for name, parameter in model.named_shards()} if kind == "ema" else {}
        )

    def score(self, views: Sequence[View], listen: Callable[[int, Tensor], Said]) -> list[Said]:
        """Reads the views in one forward-only schedule; see `schedule.score`."""
        return schedule.score(self.model.chunks, views, listen, self.grid)

    def head_weight(self) -> Tensor:
        """This rank's shard of the teacher's head `[V/t, h]`, detached; on the last stage only."""
        return self.model.head_weight().detach()

    @torch.no_grad()
    def follow(self, student: Stage, steps_done: int) -> bool:
        """Moves the teacher towards the student if an update is due after `steps_done` optimizer steps. No communication.

        theta_T <- beta theta_T + (1 - beta) theta_S (paper, eq. 3) on the fp32 masters, then cast into the weights.
        Raises `CheckFailed` if student and teacher do not match parameter by parameter. Returns whether it moved.
        """
        if self.kind != "ema" or steps_done % self._every:
            return False
        shards = dict(student.named_shards())
        if not shards or shards.keys() != self.masters.keys():
            raise CheckFailed(
                f"the EMA teacher matched {len(shards.keys() & self.masters.keys())} of its {len(self.masters)} parameters "
                f"with the {len(shards)} of the student"
            )
        mix_(self.masters.values(), [shards[name].detach() for name in self.masters], self._beta)
        self.refresh()
        return True

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the masters into the weights (after an update or a restore)."""
        for name, parameter in self.model.named_shards():
            if name in self.masters:
                parameter.copy_(self.masters[name])
