"""Tensors of a `transformers` module under the names that its checkpoints give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def published(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Views of the tensors by checkpoint name: modules stack the experts of a layer, checkpoints have them one by one."""
    out: dict[str, Tensor] = {}
    for name, tensor in named:
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(".experts"):
            out[name] = tensor
            continue
        for i, of_expert in enumerate(tensor):
            parts = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {kind: 0}
            halves = of_expert.chunk(len(parts))
            out |= {f"{stem}.{i}.{part}.weight": halves[place] for part, place in parts.items()}
    return out
