"""The nouns of one step: a completion sampled by the student, read again behind different prompts.

Shapes: B sequences of a micro-batch, T completion positions (padded), S positions of a view (padded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STUDENT, TEACHER, NEGATIVE = "student", "teacher", "negative"


def auxiliary(k: int) -> str:
    """Name of the k-th auxiliary view."""
    return f"aux.{k}"


@dataclass(frozen=True, slots=True)
class Prompts:
    """One example as token ids: the prompt of every view; made once, before training."""

    id: str
    views: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returned for one prompt."""

    token_ids: tuple[int, ...]  # end of sequence included if it was sampled
    log_probs: tuple[float, ...]  # of the sampled tokens, nats, at the sampling temperature, before top-p and top-k
    finish_reason: str  # "stop": an end-of-sequence id was sampled; "length": cut


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence of a step."""

    prompts: Prompts
    completion: Completion


@dataclass(frozen=True, slots=True)
class View:
    """`[prompt | completion]` of each sequence of a micro-batch behind one kind of prompt.

    Padded: a row for each sequence, right padding. Attention is causal, so nothing that counts can see the padding and there
    is no attention mask. Packed: one row, the sequences one after the other; `segments` says where each ends, and attention
    stays inside a segment. Padding at the end of a packed row is a segment of its own.
    """

    tokens: Tensor  # int64 [B, S], or [1, S] packed
    predictors: Tensor  # int64 [N, 2]: (row, position) whose output predicts the n-th kept completion token
    segments: Tensor | None = None  # int32 [segments + 1] on the device, cumulative lengths from 0 to S; None: padded
    longest: int = 0  # of the segments


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B sequences with all their views. The N kept tokens are the true entries of `mask` in row-major order."""

    ids: Sequence[str]
    completion: Tensor  # int64 [B, T], 0 where padded
    mask: Tensor  # bool [B, T], True where the loss counts
    token_ids: Tensor  # int64 [N], the kept completion tokens
    engine_log_probs: Tensor  # fp32 [N], nats, of the rollout engine
    views: Mapping[str, View]
