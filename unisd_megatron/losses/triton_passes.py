"""The three passes of `passes` as Triton kernels: one read of the logits each, and one write for the gradient.

Legend: n tokens, V columns of this rank. Logits are row-major [n, V] in the model's dtype, everything else is fp32. A program
owns one token and walks its columns BLOCK at a time (the gradient: one block of one token). With the two matrix products, a
chunk's logits cross the memory bus three times forward and three times backward, whatever the divergence.

The formulas are those of `divergence` and `vocab`, where they are derived; `expm1` and `log1p` are spelled out because a GPU's
fast exp and log lose all digits near 0 and 1, where student and teacher agree. Where TRITON_INTERPRET=1 was set before this
file was imported, the same kernels run on a CPU, slowly; that is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisd_megatron.losses.divergence import has_mean
from unisd_megatron.losses.passes import Said, Upstream
from unisd_megatron.losses.vocab import nan_of

BLOCK = 2048
WARPS = 8
FAR = tl.constexpr(100.0)  # see divergence.FAR
# Which divergence: constants of the kernels' compilation.
NONE, FORWARD_KL, REVERSE_KL, JSD = (tl.constexpr(i) for i in range(4))


class TritonPasses:
    """`Passes` for fp32 statistics on a GPU; fp64 ones belong to `TorchPasses`."""

    def logits(self, hidden: Tensor, head: Tensor, storage: Tensor) -> Tensor:
        logits = storage[: hidden.shape[0] * head.shape[0]].view(hidden.shape[0], head.shape[0])
        return torch.mm(hidden, head.t(), out=logits)

    def softmax(self, logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
        tokens, columns = logits.shape
        out = logits.new_empty((2, tokens), dtype=dtype)
        if not tokens:
            return out
        with torch.cuda.device_of(logits):
            _softmax[(tokens,)](logits, out, tokens, columns, temperature, BLOCK=BLOCK, num_warps=WARPS)
        return out

    def sums(self, student: Said, teacher: Said, alpha: float, temperature: float, entry_clip: float | None) -> Tensor:
        tokens, columns = student.logits.shape
        kind = _kind(alpha)
        out = student.norms.new_empty((2 + has_mean(alpha, entry_clip), tokens))
        norms = torch.cat([student.norms, teacher.norms])
        if tokens:
            with torch.cuda.device_of(student.logits):
                _sums[(tokens,)](
                    student.logits, teacher.logits, norms, out, tokens, columns, alpha, temperature, entry_clip or 0.0,
                    KIND=kind, CLIP=entry_clip is not None, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
        # A GPU's minimum and maximum drop nan, which must be seen.
        return out.add_(nan_of(student.norms, teacher.norms))

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
        tokens, columns = student.logits.shape
        if not tokens or not columns:
            return
        zeros = student.norms.new_zeros(tokens)
        divergence = None if teacher is None or totals is None else upstream.divergence
        norms = torch.cat([student.norms, student.norms if teacher is None else teacher.norms])
        mean, entropy = (zeros, zeros) if totals is None else (totals[-2], totals[-1])
        per_token = torch.stack([zeros if x is None else x for x in (mean, entropy, divergence, *upstream[1:])])
        with torch.cuda.device_of(student.logits):
            _to_gradient[(tokens, triton.cdiv(columns, BLOCK))](
                student.logits,
                student.logits if teacher is None else teacher.logits,
                norms, per_token, column.int(), tokens, columns, alpha, temperature, entry_clip or 0.0,
                KIND=NONE.value if divergence is None else _kind(alpha), CLIP=entry_clip is not None,
                OF_LOG_PROBS=upstream.log_probs is not None, OF_ENTROPY=upstream.entropy is not None,
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


def _kind(alpha: float) -> int:
    return int((FORWARD_KL if alpha == 0 else REVERSE_KL if alpha == 1 else JSD).value)


@triton.jit
def _load(logits, row, offsets, columns, temperature):
    """Scores of one row at the given columns, -inf past the last."""
    address = logits + row.to(tl.int64) * columns + offsets
    scores = tl.load(address, mask=offsets < columns, other=float("-inf")).to(tl.float32)
    # Rounded as torch rounds it, in every place: at logits of 1e4 one unit in the last place is 1e-3 of a log-probability.
    return tl.div_rn(scores, temperature)


@triton.jit
def _shift(peak):
    """-inf - -inf would be nan; what has no probability is shifted by 0."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _expm1(x):
    """exp(x) - 1 to fp32 accuracy."""
    series = 1.0 + x / 8 * (1.0 + x / 9)
    for k in tl.static_range(7, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) to fp32 accuracy: 2 atanh(x / (2 + x)) near 0."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 1.0 / 15 + square / 17
    for k in tl.static_range(13, -1, -2):
        series = 1.0 / k + square * series
    return tl.where(tl.abs(x) < 0.5, 2.0 * ratio * series, tl.log(1.0 + x))


@triton.jit
def _gap(p, q):
    """p - q, 0 where both are -inf; nan stays."""
    return tl.where(p == q, 0.0, p - q)


@triton.jit
def _kl_terms(p, q):
    """See divergence._kl_terms."""
    gap = _gap(p, q)
    distance = tl.abs(gap)
    near = tl.minimum(distance, FAR)
    shrink = _expm1(-near)
    larger = tl.exp(tl.maximum(p, q))
    terms = tl.where(gap >= 0, distance + shrink, -(near + shrink + near * shrink))
    return tl.where(larger == 0, 0.0, terms * larger)


@triton.jit
def _log_ratio_to_mixture(student, teacher, alpha):
    """(log S/M, log T/M). See divergence._log_ratios_to_mixture."""
    gap = tl.minimum(tl.maximum(_gap(teacher, student), -FAR), FAR)
    above = -_log1p(tl.where(gap >= 0, 1.0 - alpha, alpha) * _expm1(-tl.abs(gap)))
    return above - tl.maximum(gap, 0.0), above + tl.minimum(gap, 0.0)


@triton.jit
def _entry(student, teacher, alpha, KIND: tl.constexpr):
    """Summands of the divergence, before clipping. See divergence.divergence_terms."""
    if KIND == JSD:
        student_ratio, teacher_ratio = _log_ratio_to_mixture(student, teacher, alpha)
        entry = alpha * tl.exp(teacher) * teacher_ratio + (1.0 - alpha) * (tl.exp(student) * student_ratio)
    elif KIND == REVERSE_KL:
        entry = _kl_terms(student, teacher)
    else:
        entry = _kl_terms(teacher, student)
    return entry


@triton.jit
def _limit(student, teacher, ceiling, KIND: tl.constexpr):
    """What a summand may be at most. See divergence._terms_and_limit."""
    if KIND == JSD:
        limit = tl.zeros_like(student) + ceiling
    elif KIND == REVERSE_KL:
        limit = ceiling + (tl.exp(teacher) - tl.exp(student))
    else:
        limit = ceiling + (tl.exp(student) - tl.exp(teacher))
    return limit


@triton.jit
def _softmax(logits, out, tokens, columns, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        scores = _load(logits, row, start + tl.arange(0, BLOCK), columns, temperature)
        higher = tl.maximum(peak, scores)
        total = total * tl.exp(peak - _shift(higher)) + tl.exp(scores - _shift(higher))
        peak = higher
    highest = tl.max(peak, 0)
    tl.store(out + row, highest)
    tl.store(out + tokens + row, tl.sum(total * tl.exp(peak - _shift(highest)), 0))


@triton.jit
def _sums(
    student_logits, teacher_logits, norms, out, tokens, columns, alpha, temperature, ceiling,
    KIND: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    student_peak, student_log = tl.load(norms + row), tl.load(norms + tokens + row)
    teacher_peak, teacher_log = tl.load(norms + 2 * tokens + row), tl.load(norms + 3 * tokens + row)
    divergence = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    entropy = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        student = _load(student_logits, row, offsets, columns, temperature) - student_peak - student_log
        teacher = _load(teacher_logits, row, offsets, columns, temperature) - teacher_peak - teacher_log
        probs = tl.exp(student)
        entropy -= tl.where(probs == 0, 0.0, probs * student)
        if KIND == JSD:
            student_ratio, _ = _log_ratio_to_mixture(student, teacher, alpha)
            part = probs * student_ratio
        else:
            part = tl.zeros((BLOCK,), tl.float32)
        entry = _entry(student, teacher, alpha, KIND)
        if CLIP:
            limit = _limit(student, teacher, ceiling, KIND)
            kept = entry <= limit
            if KIND == JSD:
                part = tl.where(kept, part, 0.0)
            elif KIND == REVERSE_KL:
                part = tl.where(kept, entry, tl.exp(teacher) - 2.0 * probs)
            else:
                part = tl.where(kept, 0.0, tl.exp(teacher))
            entry = tl.where(kept, entry, limit)
        mean += part
        divergence += entry
    tl.store(out + row, tl.sum(divergence, 0))
    if KIND == JSD or CLIP:
        tl.store(out + tokens + row, tl.sum(mean, 0))
        tl.store(out + 2 * tokens + row, tl.sum(entropy, 0))
    else:
        tl.store(out + tokens + row, tl.sum(entropy, 0))


@triton.jit
def _to_gradient(
    student_logits, teacher_logits, norms, per_token, column, tokens, columns, alpha, temperature, ceiling,
    KIND: tl.constexpr, CLIP: tl.constexpr, OF_LOG_PROBS: tl.constexpr, OF_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """per_token [5, n]: the sum that the gradient needs, H, and upstream gradients of divergence, log-probability, entropy."""
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    student = _load(student_logits, row, offsets, columns, temperature) - tl.load(norms + row) - tl.load(norms + tokens + row)
    probs = tl.exp(student)
    grad = tl.zeros((BLOCK,), tl.float32)
    if KIND != NONE:
        teacher = _load(teacher_logits, row, offsets, columns, temperature)
        teacher = teacher - tl.load(norms + 2 * tokens + row) - tl.load(norms + 3 * tokens + row)
        mean, of_divergence = tl.load(per_token + row), tl.load(per_token + 2 * tokens + row)
        if KIND == FORWARD_KL:
            slope = probs - tl.exp(teacher)
        elif KIND == REVERSE_KL:
            # Where D is inf no gradient exists; 0 keeps a clipped or masked row from becoming nan.
            slope = tl.where(probs == 0, 0.0, probs * (_gap(student, teacher) - mean))
            slope = tl.where(mean == float("inf"), 0.0, slope)
        else:
            student_ratio, _ = _log_ratio_to_mixture(student, teacher, alpha)
            slope = (1.0 - alpha) * probs * (student_ratio - mean)
        if CLIP:
            kept = _entry(student, teacher, alpha, KIND) <= _limit(student, teacher, ceiling, KIND)
            if KIND == FORWARD_KL:
                slope = probs - tl.where(kept, tl.exp(teacher), 0.0) - probs * mean
            elif KIND == REVERSE_KL:
                slope = tl.where(kept, slope, -probs * (1.0 + mean))
            else:
                slope = tl.where(kept, slope, -(1.0 - alpha) * probs * mean)
        grad += slope * of_divergence
    if OF_ENTROPY:
        entropy, of_entropy = tl.load(per_token + tokens + row), tl.load(per_token + 4 * tokens + row)
        grad -= tl.where(probs == 0, 0.0, probs * (student + entropy)) * of_entropy
    if OF_LOG_PROBS:
        token = (offsets == tl.load(column + row)).to(tl.float32)
        grad += (token - probs) * tl.load(per_token + 3 * tokens + row)
    address = student_logits + row.to(tl.int64) * columns + offsets
    tl.store(address, (grad / temperature).to(student_logits.dtype.element_ty), mask=offsets < columns)
