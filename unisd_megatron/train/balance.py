"""Which sequences of the global batch share a micro-batch, and which replica runs it: every rank comes to the same answer."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def divide(costs: Sequence[int], widths: Sequence[int], replicas: int, count: int, *, packing: bool) -> list[list[list[int]]]:
    """Sequence numbers by replica and micro-batch, `count` micro-batches for each replica, none empty.

    Args: costs: tokens to compute for each sequence, over all its views; widths: those of the student's view. At least as many
    sequences as micro-batches.
    Packed: sequences are dealt, the costliest first, to the replica with the least to do, and there, the widest first, to the
    narrowest micro-batch. Padded: a micro-batch takes a fixed number of sequences of similar width, since the widest sets its
    width, and micro-batches are dealt to the replicas. Pipeline stages and replicas wait for the slowest.
    """
    if packing:
        most = len(costs) - (replicas - 1) * count  # leaves the others a sequence for each micro-batch
        dealt = lightest(range(len(costs)), costs, replicas, most)
        for mine in dealt:
            while len(mine) < count:  # one replica took a few enormous sequences
                mine.append(max(dealt, key=len).pop())
        return [_nested(mine, lightest(range(len(mine)), [widths[i] for i in mine], count, len(mine))) for mine in dealt]
    size = len(costs) // (replicas * count)
    widest_first = sorted(range(len(costs)), key=lambda i: (-widths[i], i))
    groups = [widest_first[i : i + size] for i in range(0, len(costs), size)]
    totals = [sum(costs[i] for i in group) for group in groups]
    return [[groups[g] for g in mine] for mine in lightest(range(len(groups)), totals, replicas, count)]


def lightest(items: Sequence[int], costs: Sequence[int], bins: int, capacity: int) -> list[list[int]]:
    """Puts the items, the costliest first, each into the lightest bin that has room."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for item in sorted(items, key=lambda i: (-costs[i], i)):
        weight, number = heapq.heappop(heap)
        filled[number].append(item)
        if len(filled[number]) < capacity:
            heapq.heappush(heap, (weight + costs[item], number))
    return filled


def _nested(mine: Sequence[int], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[mine[i] for i in group] for group in groups]
