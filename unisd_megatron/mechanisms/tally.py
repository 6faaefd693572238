"""Reported numbers that do not depend on the layout: sums, counts and extremes are kept, and divided once at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from unisd_megatron.mechanisms.histograms import EDGES


class Tally:
    """Accumulates metrics of micro-batches; merged over data-parallel ranks, then read."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.means: dict[str, list[float]] = {}  # name -> [sum, count]
        self.maxima: dict[str, float] = {}
        self.histograms: dict[str, list[int]] = {}  # name -> counts between the edges of `histograms.EDGES`
        self.faults: list[str] = []  # terms that were not finite

    def add_sum(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def add_mean(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Adds the kept entries of `values` to the mean `name`."""
        kept = values.detach() if mask is None else values.detach()[mask.bool()]
        total = self.means.setdefault(name, [0.0, 0.0])
        total[0] += float(kept.double().sum())
        total[1] += kept.numel()

    def add_max(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        kept = values.detach() if mask is None else values.detach()[mask.bool()]
        if kept.numel():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(kept.max()))

    def add_histogram(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Counts the kept entries of `values` between the edges of that name: bin i is [edge i - 1, edge i)."""
        kept = values.detach()[mask.bool()].double()
        edges = torch.tensor(EDGES[name], dtype=torch.float64, device=kept.device)
        counts = torch.bucketize(kept, edges, right=True).bincount(minlength=len(edges) + 1).tolist()
        self.histograms[name] = _added(self.histograms.get(name), counts)

    def check_finite(self, term: str, values: Tensor) -> None:
        """Notes the term as a fault if any value is NaN or infinite."""
        if term not in self.faults and not bool(torch.isfinite(values.detach()).all()):
            self.faults.append(term)

    def plain(self) -> dict[str, Any]:
        """As JSON-safe data, to be sent to other ranks."""
        return {"sums": self.sums, "means": self.means, "maxima": self.maxima} | {
            "histograms": self.histograms,
            "faults": self.faults,
        }

    @staticmethod
    def merge(parts: Iterable[dict[str, Any]]) -> Tally:
        """One tally from the `plain()` of several ranks that hold different sequences."""
        merged = Tally()
        for part in parts:
            for name, value in part["sums"].items():
                merged.add_sum(name, value)
            for name, (total, count) in part["means"].items():
                entry = merged.means.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += count
            for name, value in part["maxima"].items():
                merged.maxima[name] = max(merged.maxima.get(name, float("-inf")), value)
            for name, counts in part["histograms"].items():
                merged.histograms[name] = _added(merged.histograms.get(name), counts)
            merged.faults += [fault for fault in part["faults"] if fault not in merged.faults]
        return merged

    def read(self) -> dict[str, float]:
        """Every metric that is one number."""
        means = {name: total / count for name, (total, count) in self.means.items() if count}
        return {**self.sums, **means, **self.maxima}


def _added(counts: list[int] | None, more: list[int]) -> list[int]:
    return more if counts is None else [a + b for a, b in zip(counts, more, strict=True)]
