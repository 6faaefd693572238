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
    reference: tuple[int, ...] | None = None  # the reference solution as a completion, where it is trained on


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returned for one prompt, or a reference in its place."""

    token_ids: tuple[int, ...]  # end of sequence included if it was sampled
    log_probs: tuple[float, ...]  # of the sampled tokens under the sampling distribution, nats; none: nobody sampled it
    finish_reason: str  # "stop": an end-of-sequence id was sampled; "length": cut
    version: int = 0  # optimizer steps that the weights had seen which sampled it

    @property
    def sampled(self) -> bool:
        """False of a reference."""
        return len(self.log_probs) > 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence of a step."""

    prompts: Prompts
    completion: Completion
    counts: bool = True  # False: a filter keeps it out of the loss


@dataclass(frozen=True, slots=True)
class View:
    """`[prompt | completion]` of several sequences, as a model reads them in one go.

    Under context parallel each rank has its part of a packed row, cut as Megatron does: every segment into 2 cp chunks, of
    which rank r has chunks r and 2 cp - 1 - r. `segments` keeps counting whole segments.

    Padded: a row for each sequence, right padding. Attention is causal, so nothing that counts can see the padding and there
    is no attention mask. Packed: one row, the sequences one after the other; `segments` says where each ends, and attention
    stays inside a segment. Padding at the end of a packed row is a segment of its own.
    """

    tokens: Tensor  # int64 [B, S], or [1, S] packed; under context parallel this rank's [1, S / cp]
    predictors: Tensor  # int64 [N, 2]: (row, position) whose output predicts the n-th kept completion token
    segments: Tensor | None = None  # int32 [segments + 1] on the device, cumulative lengths from 0 to S; None: padded
    longest: int = 0  # of the segments
    dealt: Dealt | None = None  # under context parallel: which of the N rows `predictors` has, and which this rank wants


@dataclass(frozen=True, slots=True)
class Dealt:
    """The rows of a view over context-parallel ranks: sequence shards decide where they arise, the loss wants even shares."""

    owned: Tensor  # int64 [n]: the kept tokens that are predicted on this rank, in the order of `predictors`
    total: int  # N
    share: slice | Tensor  # of the N (or int64 places among them): what this rank computes


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """B sequences as the student reads them. The N kept tokens are the true entries of `mask` in row-major order.

    Context-parallel ranks hold the same micro-batch and share its loss: each computes the kept tokens `mine`, an even part.
    """

    ids: Sequence[str]
    completion: Tensor  # int64 [B, T], 0 where padded
    mask: Tensor  # bool [B, T], True where the loss counts
    mine: Tensor  # bool [B, T], True where this rank computes it; `mask` without context parallel
    token_ids: Tensor  # int64 [n], the kept completion tokens that are `mine`
    engine_log_probs: Tensor  # fp32 [n], nats, of the rollout engine; 0 where it did not sample the token
    sampled: Tensor  # bool [n], whether it did
    view: View


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of kept tokens behind one view: rows `here` of a reading are tokens `there` of what is `mine` of a micro-batch."""

    batch: int
    name: str
    here: slice
    there: slice


@dataclass(frozen=True, slots=True)
class Reading:
    """What the teacher reads in one go: sequences of any views and micro-batches, in rows of equal work."""

    view: View
    pieces: Sequence[Piece]
