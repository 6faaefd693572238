"""This rank's 1/DP of its stage's weights: where the EMA masters live, and the weights that must step aside for others.

The parameters, in the order of `named_shards()`, make one row of numbers; experts that are dealt out over ranks make another,
cut over the ranks that have the same ones. A row is cut into buckets and each bucket into DP equal pieces, the last padded with
zeros; rank r holds piece r of every bucket. So averaging needs no communication, and
whatever is gathered is gathered one bucket at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.errors import CheckFailed
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.mechanisms.ema import mix_

BUCKET = 2**25
"""Weights that are gathered, or staged on the device, at a time."""

EXPERTS = ".mlp.experts."
"""In the canonical names of what expert parallelism deals out."""

Named = Iterable[tuple[str, Tensor]]


class StageShards:
    """This rank's pieces of all weights of its stage, experts apart where expert-parallel ranks have different ones.

    Methods as those of `WeightShards`; collective over the ranks with the same weights.
    Args: shards: canonical name and this rank's tensor (`Stage.named_shards`); how: see `WeightShards`.
    """

    def __init__(self, shards: Named, grid: Grid, *, dtype: torch.dtype | None = None, on_host: bool = False) -> None:
        self._apart = grid.expert.size > 1
        axes = (grid.data_context, grid.expert_data)
        self._rows = [
            WeightShards(part, axis, dtype=dtype, on_host=on_host)
            for part, axis in zip(self._divided(shards), axes, strict=True)
        ]

    @property
    def dtype(self) -> torch.dtype:
        """Of the pieces."""
        return functools.reduce(torch.promote_types, (row.values.dtype for row in self._rows if row.values.numel()))

    @property
    def nbytes(self) -> int:
        """Memory of the pieces."""
        return sum(row.values.untyped_storage().nbytes() for row in self._rows)

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """`(canonical name, start, stop)`: the elements of each of this rank's shards, flat, that its pieces hold."""
        for row in self._rows:
            yield from row.spans()

    def take(self, shards: Named) -> None:
        for row, part in zip(self._rows, self._divided(shards), strict=True):
            row.take(part)

    def mix_(self, shards: Named, beta: float) -> None:
        for row, part in zip(self._rows, self._divided(shards), strict=True):
            row.mix_(part, beta)

    def squares(self, shards: Named) -> Tensor:
        rows = [row.squares(part) for row, part in zip(self._rows, self._divided(shards), strict=True)]
        return torch.stack([sums.to(rows[0].device) for sums in rows]).sum(0)

    def write_(self, shards: Named) -> None:
        for row, part in zip(self._rows, self._divided(shards), strict=True):
            row.write_(part)

    def to_host(self) -> dict[str, Tensor]:
        """By canonical name: content on the first of the ranks that have the same weight, `meta` tensors elsewhere."""
        return {name: tensor for row in self._rows for name, tensor in row.to_host().items()}

    def _divided(self, shards: Named) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        rows: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
        for name, tensor in shards:
            rows[self._apart and EXPERTS in name].append((name, tensor))
        return rows


class WeightShards:
    """This rank's pieces of the weights it was made from, taken at once.

    Attributes: values: the pieces, flat; dtype as given, else the narrowest that holds every weight exactly.
    Args: shards: canonical name and this rank's tensor, the same on every rank of the axis; axis: data-parallel;
    on_host: keep the pieces in host memory (pinned where the weights are on a GPU). All arithmetic is done where the weights
    are, so that the numbers do not depend on it.
    """

    def __init__(
        self, shards: Named, axis: Axis, *, dtype: torch.dtype | None = None, on_host: bool = False, bucket: int = BUCKET
    ) -> None:
        shards = list(shards)
        self.axis = axis
        self._shapes = {name: tensor.shape for name, tensor in shards}
        self._device = shards[0][1].device if shards else torch.device("cpu")
        total = sum(tensor.numel() for _, tensor in shards)
        self._buckets = [(start, min(start + bucket, total)) for start in range(0, total, bucket)]
        self.values = torch.zeros(
            sum(self._piece_size(*bounds) for bounds in self._buckets),
            dtype=dtype or _widest(tensor for _, tensor in shards),
            device="cpu" if on_host else self._device,
            pin_memory=on_host and self._device.type == "cuda",
        )
        self.take(shards)

    @torch.no_grad()
    def take(self, shards: Named) -> None:
        """Copies this rank's part of the weights. Raises `CheckFailed` if they are not those this was made from."""
        for piece, parts in self._mine(self._flat(shards)):
            for segment, where in parts:
                piece[where].copy_(segment)

    @torch.no_grad()
    def mix_(self, shards: Named, beta: float) -> None:
        """values <- beta values + (1 - beta) weights, for this rank's part; see `mechanisms.mix_`. No communication.

        Beyond the pieces it needs memory for one segment at a time. Raises `CheckFailed` as `take` does.
        """
        for piece, parts in self._mine(self._flat(shards)):
            here = piece.to(self._device)
            if parts:
                mix_([here[where] for _, where in parts], [segment for segment, _ in parts], beta)
            if here is not piece:
                piece.copy_(here)

    @torch.no_grad()
    def squares(self, shards: Named) -> Tensor:
        """Sums over this rank's part, fp64 `[2]` where the weights are: of (pieces - weights)^2, and of weights^2.

        Weights on the `meta` device are left out. No communication; beyond the pieces it needs memory for two segments in fp32
        at a time. Raises `CheckFailed` as `take` does.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for piece, parts in self._mine(self._flat(shards)):
            here = piece.to(self._device)
            for segment, where in parts:
                if not segment.is_meta:
                    weights = segment.float()
                    sums += torch.stack([_square(here[where] - weights), _square(weights)])
        return sums

    @torch.no_grad()
    def write_(self, shards: Named) -> None:
        """Casts the pieces to the weights' dtype and gathers them into the weights, in place. Collective over the axis.

        Raises `CheckFailed` as `take` does. Weights on the `meta` device join the gathering and keep nothing.
        """
        shards = list(shards)
        flat, dtype = self._flat(shards), _widest(tensor for _, tensor in shards)
        for (start, stop), (piece, _) in zip(self._buckets, self._mine(flat), strict=True):
            whole = self._gather(piece.to(device=self._device, dtype=dtype))
            for segment, where in _overlap(flat, start, stop):
                segment.copy_(whole[where])

    def to_host(self) -> dict[str, Tensor]:
        """The stage's whole weights in the pieces' dtype, by canonical name. Collective over the axis.

        In host memory on the first rank of the axis; elsewhere without content, on the `meta` device.
        """
        device = "cpu" if self.axis.rank == 0 else "meta"
        whole = {name: torch.empty(shape, dtype=self.values.dtype, device=device) for name, shape in self._shapes.items()}
        self.write_(whole.items())
        return whole

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """See `StageShards.spans`."""
        flat = [torch.empty(shape.numel(), device="meta") for shape in self._shapes.values()]
        names = {id(tensor): name for tensor, name in zip(flat, self._shapes, strict=True)}
        for _, parts in self._mine(flat):
            for segment, _ in parts:
                start = segment.storage_offset()
                yield names[id(segment._base)], start, start + segment.numel()

    def _piece_size(self, start: int, stop: int) -> int:
        return -(-(stop - start) // self.axis.size)

    def _mine(self, flat: list[Tensor]) -> Iterator[tuple[Tensor, list[tuple[Tensor, slice]]]]:
        """Of each bucket: this rank's piece, and the segments of the weights it holds with their places in the piece."""
        position = 0
        for start, stop in self._buckets:
            size = self._piece_size(start, stop)
            first = start + self.axis.rank * size
            yield self.values[position : position + size], list(_overlap(flat, first, min(first + size, stop)))
            position += size

    def _gather(self, piece: Tensor) -> Tensor:
        if self.axis.group is None:
            return piece
        whole = piece.new_empty(piece.numel() * self.axis.size)
        dist.all_gather_into_tensor(whole, piece, group=self.axis.group)
        return whole

    def _flat(self, shards: Named) -> list[Tensor]:
        shards = list(shards)
        found = {name: tensor.shape for name, tensor in shards}
        if list(found.items()) != list(self._shapes.items()):
            same = len(found.items() & self._shapes.items())
            raise CheckFailed(
                f"student and teacher do not match: of the {len(self._shapes)} parameters that the teacher keeps, {same} are "
                f"among the {len(found)} given, by name and shape"
            )
        return [tensor.detach().view(-1) for _, tensor in shards]


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()


def _overlap(flat: list[Tensor], start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
    """The parts of the tensors within [start, stop) of their row, with their places relative to `start`."""
    position = 0
    for tensor in flat:
        first, last = max(start, position), min(stop, position + tensor.numel())
        if first < last:
            yield tensor[first - position : last - position], slice(first - start, last - start)
        position += tensor.numel()


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.bool)
