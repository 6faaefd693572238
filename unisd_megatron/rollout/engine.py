"""The protocol of rollout engines: HF-named weights in, token ids in, token ids out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from unisd_megatron.batch import Completion


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int  # 0: all
    max_tokens: int
    eos_ids: tuple[int, ...]
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are never drawn; 0: off
    repetition_penalty: float = 1.0  # 1: off


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    example_id: str
    prompt: tuple[int, ...]
    seed: int  # of this sequence alone, so that what is sampled does not depend on batches or ranks


class RolloutEngine(Protocol):
    """Every call is collective over the replica: all its ranks call with the same arguments and get the same answer."""

    def refresh(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Takes the student's weights as a stream of full, HF-named tensors; `step` is the optimizer step they belong to."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""
        ...


def sequence_seed(run_seed: int, step: int, position: int) -> int:
    """The sampling seed of the sequence at `position` of the global batch of `step`; the same under every layout."""
    digest = hashlib.sha256(f"rollout:{run_seed}:{step}:{position}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
