"""What the loss costs beside what it cannot go below. Prints one line of JSON.

Memory: the gradients that it has to give (of hidden states and head). Time: the four matrix products that the result needs
(logits of both models, the two gradients; 8 x tokens x vocabulary x width operations), nothing made twice, at the rate of one
large product measured here. `python -m unisd_megatron.selftest.floors '{"tokens": 2048, "vocab_size": 32000, "hidden": 128}'`
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict

import torch

from unisd_megatron.bench.loss import Cell, measure, sizes_for_this_machine

WAYS = ("materialized", "fused")


def product_rate(tokens: int, hidden: int, dtype: torch.dtype) -> float:
    """Operations per second of a product of the loss's shape, best of five."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, columns = min(tokens, 4096), 16384
    left, right = (torch.randn(n, hidden, device=device).to(dtype) for n in (rows, columns))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        left @ right.t()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * rows * columns * hidden / best


def main(tokens: int, vocab_size: int, hidden: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)  # as the processes that are measured
    name = sizes_for_this_machine().dtype
    dtype = getattr(torch, name)
    rate = product_rate(tokens, hidden, dtype)
    print(
        json.dumps(
            {
                "tokens": tokens,
                "vocab_size": vocab_size,
                "hidden": hidden,
                "dtype": name,
                "rate": rate,
                "floor_seconds": 8.0 * tokens * vocab_size * hidden / rate,
                "floor_bytes": (vocab_size + tokens) * hidden * dtype.itemsize,
                "logits_bytes": 2 * tokens * vocab_size * dtype.itemsize,
            }
            | {way: _cost(Cell(way, tokens, vocab_size, hidden, 1, 0.5, name)) for way in WAYS}
        )
    )


def _cost(cell: Cell) -> dict[str, float]:
    found = measure(cell)
    assert found is not None  # only eager code is left out for want of memory
    return asdict(found)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
