"""The buckets of weight sync that the ranks of a large world agree on, each rank with what it holds and what others say."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unisd_megatron.errors import CheckFailed
from unisd_megatron.families import Mapping
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.mcore.holding import Holding
from unisd_megatron.parity.meeting import Meeting, Table
from unisd_megatron.weights.buckets import WeightStream


@dataclass(frozen=True)
class Bucket:
    """What travels at a time. stage, expert: the pipeline and the expert-parallel rank it is on (None: on all of these)."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    stage: int
    expert: int | None


def agree(holdings: Sequence[Holding], mappings: Sequence[Mapping]) -> list[tuple[list[int], list[Bucket]]]:
    """`(ranks, buckets)` of each set of ranks that agree with one another. Raises `CheckFailed` where they do not agree.

    Sets that hold the same shards in the same places say the same; they are asked once.
    """
    known: dict[tuple[object, ...], list[Bucket]] = {}
    found = []
    for ranks in _sets(holdings):
        place = {rank: number for number, rank in enumerate(ranks)}
        key = tuple(
            (
                tuple(holdings[rank].shards.items()),
                tuple(tuple(place[other] for other in holdings[rank].groups[axis]) for axis in ("pipeline", "expert")),
            )
            for rank in ranks
        )
        if key not in known:
            known[key] = _meet(holdings, ranks, mappings)
        found.append((ranks, known[key]))
    return found


def _sets(holdings: Sequence[Holding]) -> list[list[int]]:
    """Ranks that hear of one another: over their pipeline groups and their expert-parallel groups."""
    left, found = set(range(len(holdings))), []
    while left:
        reached, front = set(), {min(left)}
        while front:
            reached |= front
            front = {o for rank in front for axis in ("pipeline", "expert") for o in holdings[rank].groups[axis]} - reached
        found.append(sorted(reached))
        left -= reached
    return found


def _meet(holdings: Sequence[Holding], ranks: Sequence[int], mappings: Sequence[Mapping]) -> list[Bucket]:
    tables: dict[tuple[int, ...], Table] = {}
    for rank in ranks:
        for axis in ("pipeline", "expert"):
            members = tuple(holdings[rank].groups[axis])
            tables.setdefault(members, Table(len(members)))
    heard: dict[int, list[Bucket]] = {}
    failed: list[Exception] = []

    def attend(rank: int) -> None:
        try:
            heard[rank] = _buckets(holdings[rank], tables, mappings)
        except Exception as error:
            failed.append(error)
            for table in tables.values():
                table.barrier.abort()

    threads = [threading.Thread(target=attend, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise next((error for error in failed if not isinstance(error, threading.BrokenBarrierError)), failed[0])
    for rank in ranks:
        if heard[rank] != heard[ranks[0]]:
            raise CheckFailed(f"weight sync: rank {rank} and rank {ranks[0]} expect other buckets")
    return heard[ranks[0]]


def _buckets(holding: Holding, tables: dict[tuple[int, ...], Table], mappings: Sequence[Mapping]) -> list[Bucket]:
    """What one rank makes of the agreement."""

    def axis(name: str) -> Axis:
        members, number = tuple(holding.groups[name]), holding.rank[name]
        return Axis(number, len(members), Meeting(tables[members], number) if len(members) > 1 else None)

    alone = Axis()
    tensor = Axis(holding.rank["tensor"], len(holding.groups["tensor"]))
    grid = Grid(tensor, axis("pipeline"), alone, alone, alone, axis("expert"), alone, alone, alone, torch.device("cpu"))
    shards = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (shape, dtype) in holding.shards.items()
    }
    stream = WeightStream(lambda: shards.items(), mappings, grid)
    out = []
    for number in range(len(stream)):
        names, shapes, dtype = stream.contents(number)
        one = Bucket(tuple(names), tuple(tuple(s) for s in shapes), dtype, stream.stage(number), stream.expert(number))
        out.append(one)
    return out
