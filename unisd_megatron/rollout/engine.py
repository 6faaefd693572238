"""The protocol of rollout engines: HF-named weights in, token ids in, token ids out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from unisd_megatron.batch import Completion


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy.

    In this order, as vLLM does it: the repetition penalty divides positive and multiplies negative logits of tokens that occur
    in the prompt or the completion; the temperature; `min_p` drops tokens less likely than that part of the likeliest; `top_k`;
    `top_p`. The rest is renormalised: the sampling distribution.
    """

    temperature: float
    top_p: float
    top_k: int  # 0: all
    max_tokens: int
    eos_ids: tuple[int, ...]
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    json_schema: str | None = None
    """Completions are JSON of this schema, without free whitespace, and end where it does (or are cut); None: free text."""

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the softmax at the temperature itself, all of it."""
        shaping = (self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.json_schema)
        return shaping == (1.0, 0, 0.0, 1.0, None)


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    example_id: str
    prompt: tuple[int, ...]
    seed: int  # of this sequence alone, so that what is sampled does not depend on batches, ranks or engines


class Weights(Protocol):
    """The student's weights as buckets of full, HF-named tensors; see `weights/buckets.py`.

    label: nothing for the weights themselves; of others, what the version that an engine reports ends in.
    """

    label: str

    def __len__(self) -> int: ...

    def stage(self, number: int) -> int: ...

    def contents(self, number: int) -> tuple[list[str], list[list[int]], str]: ...

    def everywhere(self) -> Iterator[list[tuple[str, Tensor]]]: ...

    def flat(self, number: int) -> Tensor | None: ...


class RolloutEngine(Protocol):
    """Every call is collective over the world: all ranks call with the same arguments and get the same answer."""

    def refresh(self, weights: Weights, step: int) -> None:
        """Takes the student's weights; `step` is the number of optimizer steps they have seen. Drops every cache of the old."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""
        ...

    def members(self) -> list[str]:
        """Names of what holds weights of its own since the last refresh; none: they are held as they came, nothing to prove."""
        ...

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """By member, digests of the weights that it computes with: this rank's share. A member that is lost has none."""
        ...

    def parts(self, wanted: dict[str, list[int]]) -> dict[str, list[tuple[str, int]]]:
        """By engine, `part_sums` of the live weights that are wanted: HF names, and the columns of matrices.

        An engine leaves out what has no module of its own in it, and may say the same part several times (each worker's).
        """
        ...

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """What each engine says to all of the requests, where there are several that share the work of `generate`.

        `CheckFailed` if an engine had more of a prompt in its cache than the other prompts can have put there.
        """
        ...

    def rest(self) -> None:
        """Gives memory back until the next refresh, where it can."""
        ...

    def close(self) -> None:
        """Ends what the engine started."""
        ...


def common_prefixes(requests: Sequence[Request]) -> list[int]:
    """How many tokens of each prompt another of the prompts begins with: more than that, an emptied cache cannot have."""
    prompts = [one.prompt for one in requests]
    return [max((_common(mine, p) for j, p in enumerate(prompts) if j != i), default=0) for i, mine in enumerate(prompts)]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def sequence_seed(run_seed: int, step: int, position: int) -> int:
    """The sampling seed of the sequence at `position` of the global batch of `step`; the same under every layout."""
    digest = hashlib.sha256(f"rollout:{run_seed}:{step}:{position}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
