"""From hidden states to what the loss needs, along one of three paths.

A *readout* is a model's hidden states at the N kept tokens and its head's vocabulary shard. All paths give the same numbers:
`fused` walks the tokens in chunks (Triton kernels where they run), `fused_torch` does so in plain torch everywhere, and
`materialized`, the readable one, holds the `[N, V/t]` logits of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor
from torch.distributed import ProcessGroup

from unisd_megatron.losses.divergence import token_divergence
from unisd_megatron.losses.fused import FusedDivergence, fused_divergence, fused_log_probs
from unisd_megatron.losses.vocab import token_entropy, token_log_probs

KERNELS = {"fused": "auto", "fused_torch": "torch"}
"""The `kernels` of each path that walks the vocabulary in chunks; "materialized" is the one that does not."""


class _Shared(TypedDict):
    temperature: float
    vocab_size: int
    group: ProcessGroup | None


@dataclass(frozen=True)
class Readout:
    """Hidden states `[N, h]` (replicated over the vocabulary group) and this rank's head shard `[V/t, h]`.

    For gradients, hidden states must come out of `enter_shards` or `gather_rows`: what flows back is this rank's part.
    """

    hidden: Tensor
    head: Tensor


def compare(
    student: Readout,
    teacher: Readout,
    *,
    token_ids: Tensor,
    alpha: float,
    temperature: float,
    vocab_size: int,
    group: ProcessGroup | None,
    path: str,
    entry_clip: float | None = None,
) -> FusedDivergence:
    """Divergence, sampled-token log-probs of both, and the student's entropy, `[N]` fp32 each, replicated over `group`."""
    if path in KERNELS:
        return fused_divergence(
            student.hidden,
            student.head,
            teacher.hidden,
            teacher.head,
            token_ids=token_ids,
            alpha=alpha,
            temperature=temperature,
            vocab_size=vocab_size,
            group=group,
            kernels=KERNELS[path],
            entry_clip=entry_clip,
        )
    logits, teacher_logits = student.hidden @ student.head.t(), (teacher.hidden @ teacher.head.t()).detach()
    shared = _Shared(temperature=temperature, vocab_size=vocab_size, group=group)
    return FusedDivergence(
        divergence=token_divergence(logits, teacher_logits, alpha=alpha, entry_clip=entry_clip, **shared),
        student_log_probs=token_log_probs(logits, token_ids, **shared),
        teacher_log_probs=token_log_probs(teacher_logits, token_ids, **shared),
        entropy=token_entropy(logits, **shared),
    )


def sampled_log_probs(
    model: Readout, *, token_ids: Tensor, temperature: float, vocab_size: int, group: ProcessGroup | None, path: str
) -> Tensor:
    """Log-probs of the sampled tokens, `[N]` fp32, nats, replicated over `group`."""
    if path in KERNELS:
        return fused_log_probs(
            model.hidden,
            model.head,
            token_ids=token_ids,
            temperature=temperature,
            vocab_size=vocab_size,
            group=group,
            kernels=KERNELS[path],
        )
    return token_log_probs(
        model.hidden @ model.head.t(), token_ids, temperature=temperature, vocab_size=vocab_size, group=group
    )
