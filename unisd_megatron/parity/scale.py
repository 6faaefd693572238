"""A layout on hundreds of ranks, every rank built here: do their parts make the published model, each element once?

Ranks are built one after the other (`mcore/holding.py`) by the code that `train` runs. Nothing is allocated and nothing moves;
what ranks would say to one another is said among what was built (`agreement.py`). Sums are not enough: parts are compared as
intervals and boxes, so that a shift, a gap or an overlap is named.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed
from unisd_megatron.families import Arch, Mapping, family_named
from unisd_megatron.families.mapping import Replicated
from unisd_megatron.mcore.holding import Box, Holding, Span, build_rank
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.parity.agreement import agree
from unisd_megatron.parity.coverage import check_boxes, check_row
from unisd_megatron.parity.cuts import check_cuts, is_expert
from unisd_megatron.plan import rank_bytes
from unisd_megatron.weights.buckets import BUCKET_BYTES
from unisd_megatron.weights.stream import by_name

CHUNK = 4
"""Ranks that a process builds before it says so."""


@dataclass(frozen=True)
class Line:
    """A row of the table: what, the sum of its elements (padding and what tensor-parallel ranks have alike counted out), and of
    how many parts."""

    what: str
    elements: int | None
    parts: int
    note: str = ""


@dataclass(frozen=True)
class Model:
    """What the ranks should add up to."""

    arch: Arch
    layout: Layout
    mappings: list[Mapping]

    @functools.cached_property
    def elements(self) -> int:
        return sum(math.prod(shape) for mapping in self.mappings for shape in mapping.shapes)

    @functools.cached_property
    def table(self) -> dict[str, Mapping]:
        return by_name(self.mappings)


def model_of(arch: Arch, layout: Layout) -> Model:
    return Model(arch, layout, family_named(arch.family).mappings(arch))


def build_ranks(model: Model, platform: Platform, world_size: int, processes: int, say: Callable[[str], None]) -> list[Holding]:
    """Every rank of the world, in order; `processes` of them at a time."""
    gc.freeze()  # Megatron collects garbage for each optimizer; what is loaded by now is none
    found: list[Holding] = []
    chunks = [range(start, min(start + CHUNK, world_size)) for start in range(0, world_size, CHUNK)]
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
            for part in pool.map(_build, itertools.repeat((model.arch, model.layout, platform, world_size)), chunks):
                found += part
                if len(found) * 8 // world_size > (len(found) - len(part)) * 8 // world_size:
                    say(f"{len(found)} of {world_size} ranks built")
    finally:
        gc.unfreeze()
    return found


def _build(given: tuple[Arch, Layout, Platform, int], ranks: range) -> list[Holding]:
    arch, layout, platform, world_size = given
    return [build_rank(arch, layout, platform, world_size=world_size, rank=rank) for rank in ranks]


def check_all(model: Model, holdings: Sequence[Holding]) -> Iterator[Line]:
    """A line for each quantity that adds up. Raises `CheckFailed` with the first that does not."""
    said = {tuple(one.said) for one in holdings}
    if len(said) != 1:
        raise CheckFailed(f"ranks would gather {len(said)} different answers where one was taken for all: {sorted(said)[:2]}")
    yield check_parameters(model, holdings)
    yield check_spans(model, holdings, "EMA masters", [one.ema for one in holdings], divided=True)
    divided = model.layout.use_distributed_optimizer
    yield check_spans(model, holdings, "optimizer state", [one.optimizer for one in holdings], divided=divided)
    yield from check_checkpoint(model, holdings)
    yield check_buckets(model, holdings)
    yield check_planner(model, holdings)


def _whole(model: Model, name: str) -> int:
    """Elements of a parameter in Megatron, the vocabulary's padding among them."""
    return math.prod(model.table[name].shard_shape(1))


def _sum(model: Model, held: dict[str, int], what: str) -> int:
    """Published elements among those held of each parameter, over all tensor-parallel ranks of one replica.

    Raises `CheckFailed` where a parameter's are not all there. A tied head's copy is left out.
    """
    total = 0
    for mapping in model.mappings:
        whole, published = _whole(model, mapping.megatron), sum(math.prod(shape) for shape in mapping.shapes)
        alike = model.layout.tensor_model_parallel_size if isinstance(mapping, Replicated) else 1
        found = held.get(mapping.megatron, 0)
        if found != whole * alike:
            raise CheckFailed(f"{what}: {found} elements of {mapping.megatron}; expected {whole * alike}")
        total += found // alike - (whole - published)
    return total


def check_parameters(model: Model, holdings: Sequence[Holding]) -> Line:
    """Every replica has every parameter in each of its tensor-parallel parts once; expert ranks share a replica's experts."""
    table, own = model.table, {mapping.megatron for mapping in model.mappings}
    size = model.layout.tensor_model_parallel_size
    holders: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    held: dict[str, int] = defaultdict(int)
    for rank, one in enumerate(holdings):
        check_cuts(table, one, rank, size)
        for name, (shape, _) in one.shards.items():
            copy = one.rank["expert_data"] if is_expert(model.arch, model.layout, name) else one.rank["data_context"]
            holders[name, copy, one.rank["tensor"]].append(rank)
            held[name] += math.prod(shape) if copy == 0 else 0
    replicas = 1 + max(one.rank["data_context"] for one in holdings)
    of_experts = 1 + max(one.rank["expert_data"] for one in holdings)
    for name in own:
        count = of_experts if is_expert(model.arch, model.layout, name) else replicas
        for copy, tensor in itertools.product(range(count), range(size)):
            ranks = holders.pop((name, copy, tensor), [])
            if len(ranks) != 1:
                raise CheckFailed(
                    f"parameters: part {tensor} of {name} is on ranks {ranks or 'none'} of replica {copy}; expected one rank"
                )
    extra = {name for name, _, _ in holders}
    if extra and not (model.arch.tied and extra == set(table) - own):
        raise CheckFailed(f"parameters: ranks hold {sorted(extra)[0]}, which the model does not have")
    note = f"on each of {replicas} replicas" + (f", experts of {of_experts}" if of_experts != replicas else "")
    if extra:
        note += "; the tied head a second time on the last stage"
    return Line("parameters", _sum(model, held, "parameters"), len(holdings), note)


def check_spans(model: Model, holdings: Sequence[Holding], what: str, held: Sequence[list[Span]], *, divided: bool) -> Line:
    """What the ranks with the same shard hold of it makes the shard; without `divided` each of them has all of it."""
    rows: dict[tuple[object, ...], list[tuple[int, int, int]]] = defaultdict(list)
    sizes: dict[tuple[object, ...], int] = {}
    for rank, (one, spans) in enumerate(zip(holdings, held, strict=True)):
        apart = () if divided else (rank,)
        where = one.rank["pipeline"], one.rank["tensor"], *apart
        for name, (shape, _) in one.shards.items():
            sizes[(name, *where)] = math.prod(shape)
        for name, start, stop in spans:
            rows[(name, *where)].append((start, stop, rank))
    for key, size in sizes.items():
        check_row(rows.pop(key, []), size, f"{what}: {key[0]}, stage {key[1]}, tensor-parallel part {key[2]}")
    if rows:
        raise CheckFailed(f"{what}: {next(iter(rows))[0]} is no parameter of the ranks that hold a part of it")
    summed: dict[str, int] = defaultdict(int)
    for one, spans in zip(holdings, held, strict=True):
        for name, start, stop in spans:
            axis = "expert_data" if is_expert(model.arch, model.layout, name) else "data_context"
            summed[name] += stop - start if divided or one.rank[axis] == 0 else 0
    parts = sum(len(spans) for spans in held)
    return Line(what, _sum(model, summed, what), parts, "" if divided else "on every replica")


def check_checkpoint(model: Model, holdings: Sequence[Holding]) -> Iterator[Line]:
    """What the ranks write of student, teacher and each kind of optimizer state fills the tensors, as the student's does."""
    kinds = sorted({kind for one in holdings for kind in one.written}, key=lambda kind: (kind != "student", kind))
    needed = {"student", "teacher", "optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"}
    if needed - set(kinds):
        raise CheckFailed(f"checkpoint: no rank writes {sorted(needed - set(kinds))[0]}")
    student: set[tuple[object, ...]] = set()
    for kind in kinds:
        boxes = [(box, rank) for rank, one in enumerate(holdings) for box in one.written.get(kind, [])]
        total = _check_kind(model, kind, boxes)
        places: set[tuple[object, ...]] = {(box.name, box.offset, box.shape) for box, _ in boxes}
        student = student or places
        if places != student:
            raise CheckFailed(f"checkpoint: {kind} is cut otherwise than the student: {sorted(places ^ student, key=str)[0]}")
        yield Line(f"checkpoint: {kind}", total, len(boxes), f"from {len({rank for _, rank in boxes})} ranks")


def _check_kind(model: Model, kind: str, boxes: Sequence[tuple[Box, int]]) -> int:
    """The published elements that are written of a kind."""
    by_key: dict[str, list[tuple[Box, int]]] = defaultdict(list)
    by_parameter: dict[str, int] = defaultdict(int)
    for box, rank in boxes:
        by_key[box.key].append((box, rank))
        by_parameter[box.name] += math.prod(box.shape)
    for key, parts in by_key.items():
        check_boxes([(box.offset, box.shape, rank) for box, rank in parts], parts[0][0].whole, f"checkpoint: {key}")
    unknown = by_parameter.keys() - {mapping.megatron for mapping in model.mappings}
    if unknown:
        raise CheckFailed(f"checkpoint: {kind}: {sorted(unknown)[0]} is not one of the model's parameters")
    alike = model.layout.tensor_model_parallel_size  # one of them writes what all have
    once = {one.megatron: alike if isinstance(one, Replicated) else 1 for one in model.mappings}
    return _sum(model, {name: found * once[name] for name, found in by_parameter.items()}, f"checkpoint: {kind}")


def check_buckets(model: Model, holdings: Sequence[Holding]) -> Line:
    """Every published tensor is in one bucket, whole, and the ranks that should send it have it."""
    total = 0
    for ranks, buckets in agree(holdings, model.mappings):
        shapes = {hf: (shape, one.megatron) for one in model.mappings for hf, shape in zip(one.hf, one.shapes, strict=True)}
        for number, bucket in enumerate(buckets):
            sent: set[str] = set()
            for name, shape in zip(bucket.names, bucket.shapes, strict=True):
                if name not in shapes:
                    raise CheckFailed(f"weight sync: bucket {number} has {name}, which is sent already or not of the model")
                published, parameter = shapes.pop(name)
                sent.add(parameter)
                if shape != published:
                    raise CheckFailed(f"weight sync: {name} is sent as {list(shape)}; it is {list(published)}")
                for rank in ranks:
                    at = holdings[rank].rank
                    sends = at["pipeline"] == bucket.stage and bucket.expert in (None, at["expert"])
                    if sends and parameter not in holdings[rank].shards:
                        raise CheckFailed(f"weight sync: rank {rank} should send {name} and does not have it")
            size = sum(math.prod(shape) for shape in bucket.shapes) * (2 if bucket.dtype == "bfloat16" else 4)
            if size > BUCKET_BYTES and len(sent) > 1:
                raise CheckFailed(f"weight sync: bucket {number} has {size} bytes of several parameters")
        if shapes:
            raise CheckFailed(f"weight sync: {next(iter(shapes))} and {len(shapes) - 1} more tensors are in no bucket")
        total = sum(math.prod(shape) for bucket in buckets for shape in bucket.shapes)
    return Line("weight sync", total, len(buckets), "buckets, alike on all ranks that meet")


def check_planner(model: Model, holdings: Sequence[Holding]) -> Line:
    """`unisd plan` says of every rank, byte for byte, what was built."""
    for rank, one in enumerate(holdings):
        planned = rank_bytes(
            model.arch,
            model.layout,
            world_size=len(holdings),
            teacher="ema",
            pipeline_rank=one.rank["pipeline"],
            data_rank=one.rank["data_context"],
            expert_data_rank=one.rank["expert_data"],
        )
        for what, built in one.bytes.items():
            if getattr(planned, what) != built:
                raise CheckFailed(f"planner: {what} of rank {rank} are {getattr(planned, what)} bytes; built, {built}")
    worst = max(holdings, key=lambda one: sum(one.bytes.values())).bytes
    note = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in worst.items())
    return Line("planner's bytes", None, len(holdings), f"ranks; most, GiB: {note}")
