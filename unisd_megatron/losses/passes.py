"""What happens to the logits of one chunk between two matrix products, in plain torch: also the oracle of the Triton kernels.

Legend: n tokens of the chunk, V columns of this rank that are vocabulary, v columns of one block.

Three passes over logits that are never copied as a whole:

    softmax      [n, V] -> (m_r, s_r) of this rank's columns
    sums         student and teacher, normalised over all ranks -> summands of D, of what its gradient needs, and of H
    to_gradient  overwrites the student's logits with dL/dlogits

`triton_passes` has the same three; `Passes` is what both promise. Here a chunk lies in memory as [V, n], and what is handed on
is its transpose: a block of columns is then contiguous and fits a CPU's second-level cache however large the vocabulary, and
the products with a [V, D] head run a fifth faster. Blocks are combined with each other as shards are.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from unisd_megatron.losses.divergence import divergence_terms, has_mean, student_gradient
from unisd_megatron.losses.vocab import entropy_gradient, entropy_terms, finite_shift, merge_softmax, nan_of

# Logits of one block. On a CPU 512 KiB of fp32, a part of a core's L2 cache; elsewhere launches cost more than memory.
CPU_BLOCK_LOGITS = 1 << 17
BLOCK_LOGITS = 1 << 23


class Said(NamedTuple):
    """A model's logits [n, V] of a chunk, in its dtype, and their (m, log s) [2, n] over the whole vocabulary."""

    logits: Tensor
    norms: Tensor


class Upstream(NamedTuple):
    """dL/d(result) of each token, [n]; None where a result received no gradient."""

    divergence: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None


class Passes(Protocol):
    """Logits [n, V] are this rank's real columns; statistics are in the dtype of the norms, fp32 or fp64."""

    def logits(self, hidden: Tensor, head: Tensor, storage: Tensor) -> Tensor:
        """hidden [n, D] @ head [V, D].T, a view [n, V] of `storage` (flat, at least n V) laid out as these passes want it."""

    def softmax(self, logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        """(m_r, s_r) [2, n] in `dtype`."""

    def sums(self, student: Said, teacher: Said, alpha: float, temperature: float, entry_clip: float | None) -> Tensor:
        """This rank's summands of (D, H), [2, n], or (D, what its gradient needs, H) if `has_mean`, [3, n]."""

    def to_gradient(
        self,
        student: Said,
        teacher: Said | None,
        *,
        totals: Tensor | None,
        column: Tensor,
        upstream: Upstream,
        alpha: float,
        temperature: float,
        entry_clip: float | None = None,
    ) -> None:
        """Overwrites student.logits with the gradient with respect to them.

        totals: `sums` added up over the ranks, needed for the gradients of divergence (with teacher) and entropy; column [n]:
        where the sampled token's logit is in this shard, -1 if it is in another.
        """


class TorchPasses:
    """The passes as a few torch operations per block."""

    def logits(self, hidden: Tensor, head: Tensor, storage: Tensor) -> Tensor:
        logits = storage[: head.shape[0] * hidden.shape[0]].view(head.shape[0], hidden.shape[0])
        return torch.mm(head, hidden.t(), out=logits).t()

    def softmax(self, logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        nothing = torch.tensor([-torch.inf, 0.0], dtype=dtype, device=logits.device)
        parts = [nothing[:, None].expand(2, logits.shape[0])]
        for columns in _blocks(logits):
            scores = _scores(logits, columns, temperature, dtype)
            peak = scores.amax(0)
            parts.append(torch.stack([peak, scores.sub_(finite_shift(peak)).exp_().sum(0)]))
        return merge_softmax(torch.stack(parts))

    def sums(self, student: Said, teacher: Said, alpha: float, temperature: float, entry_clip: float | None) -> Tensor:
        total = student.norms.new_zeros((2 + has_mean(alpha, entry_clip), student.logits.shape[0]))
        for columns in _blocks(student.logits):
            of_student, of_teacher = (_log_probs(one, columns, temperature) for one in (student, teacher))
            terms = *divergence_terms(of_student, of_teacher, alpha, entry_clip), entropy_terms(of_student)
            total.add_(torch.stack([one.sum(0) for one in terms]))
        return total.add_(nan_of(student.norms, teacher.norms))

    def to_gradient(
        self,
        student: Said,
        teacher: Said | None,
        *,
        totals: Tensor | None,
        column: Tensor,
        upstream: Upstream,
        alpha: float,
        temperature: float,
        entry_clip: float | None = None,
    ) -> None:
        for columns in _blocks(student.logits):
            logps = _log_probs(student, columns, temperature)
            grad = torch.zeros_like(logps)
            if upstream.divergence is not None and teacher is not None and totals is not None:
                of_teacher = _log_probs(teacher, columns, temperature)
                grad.addcmul_(student_gradient(logps, of_teacher, alpha, totals[-2], entry_clip), upstream.divergence)
            if upstream.entropy is not None and totals is not None:
                grad.addcmul_(entropy_gradient(logps, totals[-1]), upstream.entropy)
            if upstream.log_probs is not None:
                grad.addcmul_(_one_hot_minus(logps.exp_(), column - columns.start), upstream.log_probs)
            student.logits.t()[columns] = grad if temperature == 1.0 else grad.div_(temperature)


def choose_passes(kernels: str, device: torch.device, dtype: torch.dtype) -> Passes:
    """The passes named "torch" or "triton", or by "auto" the fastest that run on `device` with statistics in `dtype`.

    Raises ValueError for another name, and for "triton" where it cannot run or for fp64.
    """
    if kernels not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels must be auto, torch or triton, got {kernels!r}")
    present = importlib.util.find_spec("triton") is not None
    runs = present and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if kernels == "triton" and not runs:
        raise ValueError(f"kernels='triton' needs triton and a GPU; found {'triton' if present else 'no triton'} and {device}")
    if kernels == "triton" and dtype == torch.float64:
        raise ValueError("the Triton kernels compute in fp32; for fp64 inputs use kernels='torch'")
    if kernels == "torch" or dtype == torch.float64 or not runs or (kernels == "auto" and device.type != "cuda"):
        return TorchPasses()
    from unisd_megatron.losses.triton_passes import TritonPasses

    return TritonPasses()


def _blocks(logits: Tensor) -> Iterator[slice]:
    tokens, columns = logits.shape
    size = CPU_BLOCK_LOGITS if logits.device.type == "cpu" else BLOCK_LOGITS
    step = max(1, size // max(1, tokens))
    return (slice(i, min(i + step, columns)) for i in range(0, columns, step))


def _scores(logits: Tensor, columns: slice, temperature: float, dtype: torch.dtype) -> Tensor:
    """logits / temperature of a block, a fresh [v, n].

    Contiguity is not for speed: strided kernels may round differently, and student == teacher must be exact.
    """
    scores = logits.t()[columns].to(dtype, copy=True, memory_format=torch.contiguous_format)
    return scores if temperature == 1.0 else scores.div_(temperature)


def _log_probs(said: Said, columns: slice, temperature: float) -> Tensor:
    return _scores(said.logits, columns, temperature, said.norms.dtype).sub_(said.norms[0]).sub_(said.norms[1])


def _one_hot_minus(probs: Tensor, row: Tensor) -> Tensor:
    """1[v = token] - p_v, overwriting `probs` [v, n]; `row` [n] is the token's place, not in this block where out of range."""
    here = (row >= 0) & (row < probs.shape[0])
    return probs.neg_().scatter_add_(0, torch.where(here, row, 0)[None], here.to(probs.dtype)[None])
