"""Time and peak memory of the loss, forward and backward, in fresh processes: one per rank for every cell of the table."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import psutil
import torch
import torch.distributed as dist

from unisd_megatron.bench.memory import PeakMemory
from unisd_megatron.bench.processes import measure_in_fresh_processes
from unisd_megatron.bench.ways import WAYS
from unisd_megatron.losses import enter_shards

# What eager code was seen to hold, bytes per logit of the full vocabulary; only decides whether it is tried.
EAGER_BYTES_PER_LOGIT = 75
TIMEOUT = datetime.timedelta(minutes=20)


@dataclass(frozen=True)
class Cell:
    """One measurement. V is the whole vocabulary, `tensor` the number of shards."""

    way: str
    tokens: int
    vocab_size: int
    hidden: int
    tensor: int
    alpha: float
    dtype: str


@dataclass(frozen=True)
class Cost:
    """Of the slowest rank: seconds of forward and backward, peak bytes beyond the inputs."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """What is measured on this machine, and the machine in words."""

    machine: str
    tokens: Sequence[int]
    vocab_sizes: Sequence[int]
    hidden: Sequence[int]
    tensor: Sequence[int]
    dtype: str


def sizes_for_this_machine() -> Sizes:
    """T to 2,048 in fp32 on a CPU; T to 16,384 and H to 8,192 in bf16 on a GPU."""
    versions = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, bf16, {versions}"
        tensor = [n for n in (1, 2) if n <= torch.cuda.device_count()]
        return Sizes(machine, (2048, 16384), (32000, 151936), (896, 8192), tensor, "bfloat16")
    machine = f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, fp32, {versions}"
    return Sizes(machine, (512, 2048), (32000, 151936), (896,), (1, 2), "float32")


def measure_all(
    tokens: Sequence[int], vocab_sizes: Sequence[int], hidden: Sequence[int], tensor: Sequence[int], alpha: float, dtype: str,
    tell: Callable[[str], None],
) -> dict[Cell, Cost | None]:  # fmt: skip
    """Every combination; None where eager code would not fit into this machine's memory."""
    costs: dict[Cell, Cost | None] = {}
    for h in hidden:
        for v in vocab_sizes:
            for t in tokens:
                for shards in tensor:
                    for way in WAYS:
                        cell = Cell(way, t, v, h, shards, alpha, dtype)
                        costs[cell] = measure(cell)
                        tell(_line(cell, costs[cell]))
    return costs


def measure(cell: Cell) -> Cost | None:
    """Runs the cell in `cell.tensor` fresh processes."""
    if cell.way == "eager" and not _eager_fits(cell):
        return None
    costs = measure_in_fresh_processes("unisd_megatron.bench.loss", asdict(cell), cell.tensor)
    return Cost(max(c["seconds"] for c in costs), max(c["bytes"] for c in costs))


def run(cell: Cell) -> Cost:
    """This rank's cost; the processes of all ranks run it together. A small warm-up first, then one measured pass."""
    rank = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    group = None
    if cell.tensor > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        group = dist.group.WORLD
    _pass(cell, 64, rank, group, device)
    return _pass(cell, cell.tokens, rank, group, device)


def _pass(cell: Cell, tokens: int, rank: int, group: dist.ProcessGroup | None, device: torch.device) -> Cost:
    generator, dtype = torch.Generator(device).manual_seed(rank), getattr(torch, cell.dtype)
    shared = torch.Generator(device).manual_seed(99)  # hidden states and ids are the same on every rank

    def normal(rows: int, scale: float, source: torch.Generator) -> torch.Tensor:
        return (torch.randn(rows, cell.hidden, device=device, generator=source) * scale).to(dtype)

    columns = cell.vocab_size // cell.tensor
    head = normal(columns, cell.hidden**-0.5, generator)
    teacher_head = head + normal(columns, 0.1 * cell.hidden**-0.5, generator)
    hidden, teacher_hidden = normal(tokens, 3.0, shared), normal(tokens, 3.0, shared)
    ids = torch.randint(cell.vocab_size, (tokens,), device=device, generator=shared)
    weights = torch.rand(tokens, device=device, generator=shared)
    hidden.requires_grad_()
    head.requires_grad_()
    _wait(device, group)
    with PeakMemory(device) as peak:
        start = time.perf_counter()
        entered = enter_shards(hidden, group)
        values = WAYS[cell.way](entered, head, teacher_hidden, teacher_head, alpha=cell.alpha, group=group, token_ids=ids)
        (values * weights).sum().backward()
        _wait(device, None)
        seconds = time.perf_counter() - start
    return Cost(seconds, peak.bytes)


def _wait(device: torch.device, group: dist.ProcessGroup | None) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if group is not None:
        dist.barrier(group)


def _eager_fits(cell: Cell) -> bool:
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available // cell.tensor
    return cell.tokens * cell.vocab_size * EAGER_BYTES_PER_LOGIT < free


def _line(cell: Cell, cost: Cost | None) -> str:
    found = "does not fit" if cost is None else f"{cost.seconds:8.2f} s {cost.bytes / 1e9:8.3f} GB"
    return f"T {cell.tokens:6d}  V {cell.vocab_size:7d}  H {cell.hidden:5d}  TP {cell.tensor}  {cell.way:12} {found}"


if __name__ == "__main__":
    print(json.dumps(asdict(run(Cell(**json.loads(sys.argv[1]))))))
