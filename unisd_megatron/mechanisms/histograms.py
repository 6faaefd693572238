"""Inner edges of the histograms that a run records, fixed once, so that counts of ranks and of steps can be added.

n edges make n + 1 bins: below the first edge, between two of them (the lower one included), from the last one on. `run.json`
holds these numbers beside the counts that `metrics.jsonl` has of every step.
"""

from __future__ import annotations

WEIGHTS = "agreement/weight_histogram"
"""Agreement weights, in (0, 1], by twentieths. Token weights never fall below 0.01 (first bin), nor, with the cap of 10 times
the 0.95 quantile, below 1 / (1 + 10 gamma); sequence weights go down to 1e-6. The last bin, from 0.95 on, is agreement."""
DIVERGENCES = "divergence/histogram"
"""Divergences of tokens before clipping, nats: two bins to a power of ten."""

EDGES: dict[str, tuple[float, ...]] = {
    WEIGHTS: tuple(i / 20 for i in range(1, 20)),
    DIVERGENCES: tuple(10 ** (i / 2) for i in range(-12, 5)),
}
