"""Divergence between student and teacher at each token, exact over a sharded vocabulary, with a hand-derived gradient.

Legend: N rows, V columns of this rank's shard, n rows of one block. S, T the student's and teacher's probabilities, both at
logits / temperature, over the real columns; M = (1 - alpha) S + alpha T. Source: unisd.md 1.2 (paper Eq. 7-8; alpha weights
the teacher).

    alpha = 0      D = sum_v T (log T - log S)                                  dD/dz_v = S_v - T_v
    alpha = 1      D = sum_v S (log S - log T)                                  dD/dz_v = S_v (log S_v/T_v - E_S[log S/T])
    0 < alpha < 1  D = alpha sum_v T (log T - log M)                            dD/dz_v = (1 - alpha) S_v
                     + (1 - alpha) sum_v S (log S - log M)                                (log S_v/M_v - E_S[log S/M])

z is the student's logits / temperature. The last line: dD/dS_v = (1-alpha)[log S_v - log M_v + 1 - (alpha T_v + (1-alpha) S_v)
/ M_v] and the bracket's last two terms cancel, M being what it is; then the softmax Jacobian S_v (x_v - E_S[x]). The one number
per row that couples the shards, E_S[...], is summed together with D in the forward pass, so the backward communicates nothing.

Numerics. Each sum is written so that no summand is negative and equal log-probabilities give exactly 0: a KL as
sum T (log T - log S) - T + S (the added terms sum to zero), the JSD per column. A KL summed naively in fp32 has an error near
1e-7 whatever its size, which is all of it when student and teacher almost agree, the regime of self-distillation; here the
error is relative, and a rounding error of either normaliser cancels to first order.

With `entry_clip` c each entry's contribution d_v (the summand of D above, without the added terms) counts as min(d_v, c), and
has no gradient where d_v > c. With k_v = 1 where d_v <= c and 0 where it is clipped,

    D = sum_v k_v d_v + (1 - k_v) c        dD/dz_v = k_v g_v - S_v sum_u k_u g_u,    g_v = dd_v / d log S_v

    alpha = 0      g_v = -T_v          sum_u k_u g_u = C - 1,                C = sum of the T_u that are clipped
    alpha = 1      g_v = d_v + S_v     sum_u k_u g_u = 1 + C,                C = sum_u k_u d_u - the S_u that are clipped
    0 < alpha < 1  g_v = (1 - alpha) S_v log S_v/M_v

C is the second number per row that couples the shards then (E_S[log S/M] over kept entries for the JSD). D of a clipped KL may
be negative: its contributions have both signs, and only the positive ones are cut. Where nothing is clipped C is what it is
without clipping, to the bit, and so are value and gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from unisd_megatron.losses.collectives import stack_over, sum_over
from unisd_megatron.losses.vocab import Rows, VocabShard, check_temperature, combine_softmax, computing_dtype, nan_of

# Beyond this distance the smaller of two probabilities is below 4e-44 of the larger one: nothing in fp64, and finite.
FAR = 100.0


def token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    entry_clip: float | None = None,
) -> Tensor:
    """Divergence D (nats, >= 0) of student and teacher at each token: [...] from two shards of logits [..., V/t].

    alpha 0: KL(teacher || student); 1: KL(student || teacher); between: the JSD in which alpha weights the teacher (its limits
    at 0 and 1 are 0, not the KLs). The temperature divides both. entry_clip: nats, the most that one entry of the vocabulary
    contributes; a clipped entry has no gradient, and a clipped KL may be negative.
    The result is the same on every rank of `group`; the gradient
    reaches the student only. Two collectives forward (16 and at most 8 bytes per token), none backward.

    Student and teacher bit-equal: D and its gradient are exactly 0. A logit of -inf is probability 0, and 0 log 0 = 0. Where
    the second distribution of a KL is 0 and the first is not, D is inf; its gradient is S - T for alpha = 0, and for alpha = 1,
    where none exists, 0 (so that a clipped or masked row cannot turn into nan). Keeps both logits alive until the backward pass
    and adds 5-6 numbers per token to them. In fp32 the JSD loses digits as alpha approaches 0: the gradient's relative error is
    2e-5 at alpha = 1e-3 and 5e-4 at 1e-4.
    Raises ValueError for alpha outside [0, 1], temperature <= 0, a negative entry_clip, or shapes that differ.
    """
    check_alpha(alpha)
    check_entry_clip(entry_clip)
    check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must have one shape, got {shapes}")
    shard = VocabShard.of(student_logits.shape[-1], vocab_size, group)
    student, teacher = (x.reshape(-1, shard.width) for x in (student_logits, teacher_logits.detach()))
    flat = _TokenDivergence.apply(student, teacher, float(alpha), float(temperature), shard, entry_clip)
    return flat.view(student_logits.shape[:-1])


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1] (0: KL(teacher||student), 1: KL(student||teacher)), got {alpha}")


def check_entry_clip(entry_clip: float | None) -> None:
    if entry_clip is not None and not entry_clip >= 0:
        raise ValueError(f"entry_clip must not be negative, got {entry_clip}")


def has_mean(alpha: float, entry_clip: float | None) -> bool:
    """Whether the gradient needs a sum of its own beside D; a KL that is not clipped makes do with D."""
    return entry_clip is not None or alpha not in (0, 1)


def divergence_terms(student: Tensor, teacher: Tensor, alpha: float, entry_clip: float | None = None) -> tuple[Tensor, ...]:
    """Summands over v of (D,), or of (D, the sum that the gradient needs) if `has_mean`; elementwise from log-probabilities.

    nan counts as 0: the caller adds `nan_of` the normalizers to the sums.
    """
    if entry_clip is not None:
        return _clipped_terms(student, teacher, alpha, entry_clip)
    if alpha == 0:
        return (_kl_terms(teacher, student),)
    if alpha == 1:
        return (_kl_terms(student, teacher),)
    student_ratio, teacher_ratio = _log_ratios_to_mixture(student, teacher, alpha)
    student_part = student_ratio.mul_(student.exp())
    return teacher_ratio.mul_(teacher.exp()).mul_(alpha).add_(student_part, alpha=1 - alpha), student_part


def student_gradient(student: Tensor, teacher: Tensor, alpha: float, mean: Tensor, entry_clip: float | None = None) -> Tensor:
    """dD/dz, z = student logits / temperature, elementwise; `mean` is the last sum of `divergence_terms`, broadcast to it."""
    if entry_clip is not None:
        return _clipped_gradient(student, teacher, alpha, mean, entry_clip)
    if alpha == 0:
        return student.exp().sub_(teacher.exp())
    if alpha == 1:
        grad = _gap(student, teacher).sub_(mean).mul_(student.exp())
        # Where D is inf no gradient exists; 0 keeps a clipped or masked row from becoming nan.
        return grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).add_(mean.nan_to_num(nan=torch.nan, posinf=0.0) * 0)
    student_ratio, _ = _log_ratios_to_mixture(student, teacher, alpha)
    return student_ratio.sub_(mean).mul_(student.exp()).mul_(1 - alpha)


def _clipped_terms(student: Tensor, teacher: Tensor, alpha: float, ceiling: float) -> tuple[Tensor, Tensor]:
    """`divergence_terms` with clipped entries. What is added to a KL's summands is in their limit too: c - P + Q."""
    terms, limit = _terms_and_limit(student, teacher, alpha, ceiling)
    kept = terms[0] <= limit
    divergence = torch.where(kept, terms[0], limit)
    if alpha == 0:
        return divergence, teacher.exp().masked_fill_(kept, 0)
    if alpha == 1:
        return divergence, torch.where(kept, terms[0], teacher.exp() - 2 * student.exp())
    return divergence, terms[1].masked_fill_(~kept, 0)


def _clipped_gradient(student: Tensor, teacher: Tensor, alpha: float, mean: Tensor, ceiling: float) -> Tensor:
    terms, limit = _terms_and_limit(student, teacher, alpha, ceiling)
    kept = terms[0] <= limit
    probs = student.exp()
    if alpha == 0:
        return probs.sub(teacher.exp().masked_fill_(~kept, 0)).sub_(probs.mul_(mean))
    of_clipped = probs.mul_(1 + mean).neg_() if alpha == 1 else probs.mul_(mean).mul_(alpha - 1)
    return torch.where(kept, student_gradient(student, teacher, alpha, mean), of_clipped)


def _terms_and_limit(student: Tensor, teacher: Tensor, alpha: float, ceiling: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """The summands without clipping, and what the first of them may be at most."""
    terms = divergence_terms(student, teacher, alpha)
    if alpha not in (0, 1):
        return terms, torch.full_like(terms[0], ceiling)
    first, second = (teacher, student) if alpha == 0 else (student, teacher)
    return terms, second.exp().sub_(first.exp()).add_(ceiling)


def bounded(divergence: Tensor, alpha: float, entry_clip: float | None) -> Tensor:
    """A copy of the sums D as they are handed out: rounding may leave -1e-15 of what cannot be negative."""
    return divergence.clone() if entry_clip is not None and alpha in (0, 1) else divergence.clamp(min=0)


def _gap(p: Tensor, q: Tensor) -> Tensor:
    """p - q, and 0 where both are -inf."""
    return (p - q).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _kl_terms(p: Tensor, q: Tensor) -> Tensor:
    """Summands of KL(p || q) in the form P log(P/Q) - P + Q >= 0, from log-probabilities.

    With x = |log P - log Q|, e = exp(-x) - 1, factored by the larger probability so that nothing overflows:
    P >= Q: P (x + e);  P < Q: -Q (x + e + x e). The choice is made by products: masks are slow on a CPU.
    """
    gap = _gap(p, q)
    q_larger = torch.lt(gap, 0, out=torch.empty_like(gap))  # 0.0 or 1.0
    distance = gap.clamp_(min=-FAR).abs_()  # inf where Q = 0 < P
    near = distance.clamp(max=FAR)
    shrink = torch.expm1(-near)
    mixed = near.mul_(shrink).mul_(q_larger)
    terms = distance.add_(shrink).mul_(q_larger.mul_(-2).add_(1)).sub_(mixed)
    return terms.mul_(torch.maximum(p, q).exp_()).nan_to_num_(nan=0.0, posinf=torch.inf)  # 0 inf: a probability of 0


def _log_ratios_to_mixture(student: Tensor, teacher: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(log S/M, log T/M), accurate however close S and T are; differences beyond FAR count as FAR.

    With d = |log T - log S|: the larger of the two lies w = -log(1 + a (exp(-d) - 1)) above M and the smaller d - w below it,
    where a is the weight in M of the smaller one. At d = 0 both are exactly 0; a log-sum-exp for log M would leave 1e-7.
    """
    gap = _gap(teacher, student).clamp_(-FAR, FAR)
    smaller_weight = torch.ge(gap, 0, out=torch.empty_like(gap)).mul_(1 - 2 * alpha).add_(alpha)
    above = gap.abs().neg_().expm1_().mul_(smaller_weight).log1p_().neg_()
    return above - gap.clamp(min=0), above.add_(gap.clamp_(max=0))


def normalize(student: Rows, teacher: Rows) -> tuple[Tensor, Tensor]:
    """The normalizers [2, N] of both distributions over all shards, in one collective."""
    stacked = stack_over(torch.stack([student.local_softmax(), teacher.local_softmax()]), student.shard.group)
    return combine_softmax(stacked[:, 0].contiguous()), combine_softmax(stacked[:, 1].contiguous())


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        alpha: float,
        temperature: float,
        shard: VocabShard,
        entry_clip: float | None,
    ) -> Tensor:
        dtype = computing_dtype(student_logits, teacher_logits)
        student, teacher = (Rows(logits, temperature, shard, dtype) for logits in (student_logits, teacher_logits))
        student_norm, teacher_norm = normalize(student, teacher)
        partial = student_logits.new_zeros((1 + has_mean(alpha, entry_clip), student_logits.shape[0]), dtype=dtype)
        for part in student.blocks():
            logps = student.log_probs(part, student_norm), teacher.log_probs(part, teacher_norm)
            partial[:, part] = torch.stack([terms.sum(-1) for terms in divergence_terms(*logps, alpha, entry_clip)])
        totals = sum_over(partial, shard.group) + nan_of(student_norm, teacher_norm)
        ctx.save_for_backward(student_logits, teacher_logits, student_norm, teacher_norm, totals)
        ctx.setting = (alpha, temperature, shard, entry_clip)
        return bounded(totals[0], alpha, entry_clip)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, student_norm, teacher_norm, totals = ctx.saved_tensors
        alpha, temperature, shard, entry_clip = ctx.setting
        student, teacher = (Rows(logits, temperature, shard, grad.dtype) for logits in (student_logits, teacher_logits))

        def of_rows(part: slice) -> Tensor:
            logps = student.log_probs(part, student_norm), teacher.log_probs(part, teacher_norm)
            return student_gradient(*logps, alpha, totals[-1, part, None], entry_clip).mul_(grad[part, None])

        return student.fill_gradient(torch.empty_like(student_logits), of_rows), None, None, None, None, None
