"""Whether parts make a whole: every element once. Intervals of a row, and boxes of a tensor."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence

from unisd_megatron.errors import CheckFailed


def check_row(spans: Iterable[tuple[int, int, int]], size: int, what: str) -> None:
    """Raises `CheckFailed` unless the spans `(start, stop, rank)` cover [0, size), each element once; names what differs."""
    end, last = 0, None
    for start, stop, rank in sorted(spans):
        if stop <= start:
            raise CheckFailed(f"{what}: rank {rank} has an empty part [{start}, {stop})")
        if start > end:
            raise CheckFailed(f"{what}: elements {end} to {start - 1} are on no rank")
        if start < end:
            raise CheckFailed(f"{what}: elements {start} to {min(stop, end) - 1} are on rank {last} and on rank {rank}")
        end, last = stop, rank
    if end != size:
        wrong = (
            f"elements {end} to {size - 1} are on no rank" if end < size else f"rank {last} ends at {end} of {size} elements"
        )
        raise CheckFailed(f"{what}: {wrong}")


def check_boxes(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...], int]], whole: tuple[int, ...], what: str) -> None:
    """Raises `CheckFailed` unless the boxes `(offset, shape, rank)` fill a tensor of shape `whole`, each element once."""
    for offset, shape, rank in boxes:
        if not all(first >= 0 and first + size <= limit for first, size, limit in zip(offset, shape, whole, strict=True)):
            raise CheckFailed(f"{what}: rank {rank} writes {list(shape)} at {list(offset)}, outside of {list(whole)}")
    edges = [
        sorted({0, *(offset[axis] for offset, _, _ in boxes), *(offset[axis] + shape[axis] for offset, shape, _ in boxes)})
        for axis in range(len(whole))
    ]
    cells: dict[tuple[int, ...], int] = {}
    for offset, shape, rank in boxes:
        ranges = [
            range(bisect.bisect_left(edge, first), bisect.bisect_left(edge, first + size))
            for edge, first, size in zip(edges, offset, shape, strict=True)
        ]
        for cell in itertools.product(*ranges):
            if cell in cells:
                corner = [edge[place] for edge, place in zip(edges, cell, strict=True)]
                raise CheckFailed(f"{what}: the part at {corner} is written by rank {cells[cell]} and by rank {rank}")
            cells[cell] = rank
    filled = sum(math.prod(shape) for _, shape, _ in boxes)
    if filled != math.prod(whole):
        raise CheckFailed(f"{what}: {math.prod(whole) - filled} of {math.prod(whole)} elements are written by no rank")
