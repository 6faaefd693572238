"""Which sequences of the global batch share a micro-batch, and which replica runs it: every rank comes to the same answer."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def divide(costs: Sequence[int], replicas: int, count: int, *, packing: bool) -> list[list[list[int]]]:
    """Sequence numbers by replica and micro-batch, `count` micro-batches for each replica, none empty.

    Args: costs: tokens to compute for each sequence, over all its views; at least as many as micro-batches.
    Packed, a micro-batch takes any sequences: the longest go first, each to the lightest micro-batch so far. Padded, a
    micro-batch takes a fixed number of sequences of similar length, since the longest sets its width. Either way the
    micro-batches are then dealt to the replica with the least to do. Pipeline stages wait for the slowest replica.
    """
    longest_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    bins = replicas * count
    if packing:
        groups = _lightest(longest_first, costs, bins, len(costs))
    else:
        size = len(costs) // bins
        groups = [longest_first[i : i + size] for i in range(0, len(costs), size)]
    totals = [sum(costs[i] for i in group) for group in groups]
    heaviest_first = sorted(range(bins), key=lambda g: (-totals[g], g))
    dealt = _lightest(heaviest_first, totals, replicas, count)
    return [[groups[g] for g in mine] for mine in dealt]


def _lightest(order: Sequence[int], costs: Sequence[int], bins: int, capacity: int) -> list[list[int]]:
    """Puts the items, in order, each into the lightest bin that has room."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for item in order:
        weight, number = heapq.heappop(heap)
        filled[number].append(item)
        if len(filled[number]) < capacity:
            heapq.heappush(heap, (weight + costs[item], number))
    return filled
