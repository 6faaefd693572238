"""The teacher: the same architecture and layout as the student, other weights, no gradient.

`frozen` never moves; `ema` follows the student, averaged in fp32, 1/DP on each rank; `live` is the student itself.
`beside` keeps the teacher's weights next to the student's; `swap` and `host` lend it the student's for the time it reads, with
1/DP of what is not in use on each rank, in device or host memory. The numbers are the same: docs/teacher_memory.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import schedule
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.precision import Precision, as_built, in_weights_dtype
from unisd_megatron.mcore.schedule import Said
from unisd_megatron.mcore.shards import StageShards


class Followed(Protocol):
    """What an average follows: a `Student`, or its stage."""

    def named_shards(self) -> Iterator[tuple[str, Tensor]]: ...


class Teacher:
    """Reads views with its own weights.

    Attributes: shards: this rank's 1/DP of them: fp32 of an `ema` teacher, the weights' dtype of a frozen one that borrows
    the student's module, None where the module holds all there is.
    Args: model: the teacher's own module, or the student's when `kind` is "live" or `memory` not "beside" (with the teacher's
    first weights in it); beta: EMA weight of the old teacher; every: optimizer steps between updates; precision: what it reads
    in, its weights' dtype if left out (a live one: as the student).
    """

    def __init__(
        self,
        model: Stage,
        kind: Literal["frozen", "ema", "live"],
        grid: Grid,
        beta: float = 0.0,
        every: int = 0,
        memory: Literal["beside", "swap", "host"] = "beside",
        precision: Precision | None = None,
    ) -> None:
        self.model = model
        self.kind = kind
        self.grid = grid
        self._beta, self._every = beta, every
        self._borrows = kind != "live" and memory != "beside"
        self._on_host = memory == "host"
        self._exactly: Precision = as_built if kind == "live" else in_weights_dtype
        self._precision: Precision = precision or self._exactly
        self._head: Tensor | None = None
        # Weights of its own keep `requires_grad`, which nothing uses: Megatron's linear layers add the bias of frozen weights
        # in another order, and where a teacher is kept would show in its last digits.
        self.shards: StageShards | None = None
        if kind == "ema" or self._borrows:
            dtype = torch.float32 if kind == "ema" else None
            self.shards = StageShards(model.named_shards(), grid, dtype=dtype, on_host=self._on_host)

    def score(self, views: Sequence[View], listen: Callable[[int, Tensor], Said], *, exactly: bool = False) -> list[Said]:
        """Reads the views in one forward-only schedule; see `schedule.score`. With borrowed weights also collective over DP.

        Args: exactly: in the dtype of its weights, whatever it reads in otherwise.
        """
        precision = self._exactly if exactly else self._precision
        self.model.settle()
        self._head = None
        with self.in_place(), precision(self.model):
            if self._borrows and self.grid.is_last_stage:
                self._head = self.model.head_weight().detach().clone()
            return schedule.score(self.model.chunks, views, listen, self.grid)

    def head_weight(self) -> Tensor:
        """This rank's shard of the teacher's head `[V/t, h]`, detached; on the last stage only.

        With borrowed weights it is a copy from the latest `score`: the loss needs both heads at once.
        """
        if not self._borrows:
            return self.model.head_weight().detach()
        assert self._head is not None, "a teacher that borrows its weights has a head once it has read"
        return self._head

    def is_due(self, steps_done: int) -> bool:
        """Whether `follow` would move it."""
        return self.kind == "ema" and steps_done % self._every == 0

    def follow(self, student: Followed, steps_done: int) -> bool:
        """Moves the teacher towards the student if an update is due after `steps_done` optimizer steps.

        theta_T <- beta theta_T + (1 - beta) theta_S (paper, eq. 3) in fp32 on this rank's 1/DP; then, with weights of its own,
        cast and gathered into them (collective over DP). Raises `CheckFailed` if student and teacher do not match parameter
        by parameter. Returns whether it moved.
        """
        if not self.is_due(steps_done):
            return False
        assert self.shards is not None
        self.shards.mix_(student.named_shards(), self._beta)
        if not self._borrows:
            self.shards.write_(self.model.named_shards())
        return True

    def distance(self, student: Followed) -> float:
        """||theta_T - theta_S|| / ||theta_S|| of an `ema` teacher, over all weights of the model, each counted once.

        The same number at any layout, on every rank. Collective over all ranks: two numbers; each reads 1/DP of its weights.
        """
        assert self.shards is not None
        counted = {name for name, parameter in self.model.named_shards() if self._counts(parameter)}
        sums = self.shards.squares(
            (name, p if name in counted else p.detach().to("meta")) for name, p in student.named_shards()
        )
        everywhere = all_gather_json(sums.tolist(), self.grid.world)
        return math.sqrt(math.fsum(apart for apart, _ in everywhere) / math.fsum(whole for _, whole in everywhere))

    def _counts(self, parameter: Tensor) -> bool:
        """Not a tied head's second copy on the last stage, nor, but on one rank, what tensor-parallel ranks all have."""
        sharded = getattr(parameter, "tensor_model_parallel", False) or self.grid.tensor.rank == 0
        return sharded and not getattr(parameter, "shared", False)

    def weights(self) -> dict[str, Tensor]:
        """All weights of this stage by canonical name, as a checkpoint holds them: fp32 of an EMA. Collective over DP.

        Content that is gathered for it is in host memory, on the first data-parallel rank; the others have `meta` tensors.
        """
        if self.shards is not None:
            return self.shards.to_host()
        return {name: parameter.detach() for name, parameter in self.model.named_shards()}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        """Takes whole weights, on every rank, in the form that `weights` gives. Collective over DP."""
        if self.shards is not None:
            self.shards.take((name, weights[name]) for name, _ in self.model.named_shards())
            if not self._borrows:
                self.shards.write_(self.model.named_shards())
            return
        for name, parameter in self.model.named_shards():
            parameter.copy_(weights[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The module holds the teacher's weights; afterwards, whatever happens, the student's again, bit for bit."""
        if not self._borrows:
            yield
            return
        assert self.shards is not None
        # Made anew for each pass: the student's backward, the step's peak of memory, does not have it.
        aside = StageShards(self.model.named_shards(), self.grid, on_host=self._on_host)
        try:
            self.shards.write_(self.model.named_shards())
            yield
        finally:
            aside.write_(self.model.named_shards())
