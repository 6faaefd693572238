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
) -> Tensor:
    """Divergence D (nats, >= 0) of student and teacher at each token: [...] from two shards of logits [..., V/t].

    alpha 0: KL(teacher || student); 1: KL(student || teacher); between: the JSD in which alpha weights the teacher (its limits
    at 0 and 1 are 0, not the KLs). The temperature divides both. The result is the same on every rank of `group`; the gradient
    reaches the student only. Two collectives forward (16 and at most 8 bytes per token), none backward.

    Student and teacher bit-equal: D and its gradient are exactly 0. A logit of -inf is probability 0, and 0 log 0 = 0. Where
    the second distribution of a KL is 0 and the first is not, D is inf; its gradient is S - T for alpha = 0, and for alpha = 1,
    where none exists, 0 (so that a clipped or masked row cannot turn into nan). Keeps both logits alive until the backward pass
    and adds 5-6 numbers per token to them. In fp32 the JSD loses digits as alpha approaches 0: the gradient's relative error is
    2e-5 at alpha = 1e-3 and 5e-4 at 1e-4.
    Raises ValueError for alpha outside [0, 1], temperature <= 0, or shapes that differ.
    """
    check_alpha(alpha)
    check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must have one shape, got {shapes}")
    shard = VocabShard.of(student_logits.shape[-1], vocab_size, group)
    student, teacher = (x.reshape(-1, shard.width) for x in (student_logits, teacher_logits.detach()))
    flat = _TokenDivergence.apply(student, teacher, float(alpha), float(temperature), shard)
    return flat.view(student_logits.shape[:-1])


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1] (0: KL(teacher||student), 1: KL(student||teacher)), got {alpha}")


def divergence_terms(student: Tensor, teacher: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """Summands over v of (D,) for a KL or (D, E_S[log S/M]) for the JSD, elementwise from log-probabilities of one shape.

    nan counts as 0: the caller adds `nan_of` the normalizers to the sums.
    """
    if alpha == 0:
        return (_kl_terms(teacher, student),)
    if alpha == 1:
        return (_kl_terms(student, teacher),)
    student_ratio, teacher_ratio = _log_ratios_to_mixture(student, teacher, alpha)
    student_part = student_ratio.mul_(student.exp())
    return teacher_ratio.mul_(teacher.exp()).mul_(alpha).add_(student_part, alpha=1 - alpha), student_part


def student_gradient(student: Tensor, teacher: Tensor, alpha: float, mean: Tensor) -> Tensor:
    """dD/dz, z = student logits / temperature, elementwise; `mean` is the last sum of `divergence_terms`, broadcast to it."""
    if alpha == 0:
        return student.exp().sub_(teacher.exp())
    if alpha == 1:
        grad = _gap(student, teacher).sub_(mean).mul_(student.exp())
        # Where D is inf no gradient exists; 0 keeps a clipped or masked row from becoming nan.
        return grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).add_(mean.nan_to_num(nan=torch.nan, posinf=0.0) * 0)
    student_ratio, _ = _log_ratios_to_mixture(student, teacher, alpha)
    return student_ratio.sub_(mean).mul_(student.exp()).mul_(1 - alpha)


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
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, alpha: float, temperature: float, shard: VocabShard
    ) -> Tensor:
        dtype = computing_dtype(student_logits, teacher_logits)
        student, teacher = (Rows(logits, temperature, shard, dtype) for logits in (student_logits, teacher_logits))
        student_norm, teacher_norm = normalize(student, teacher)
        partial = student_logits.new_zeros((1 if alpha in (0, 1) else 2, student_logits.shape[0]), dtype=dtype)
        for part in student.blocks():
            logps = student.log_probs(part, student_norm), teacher.log_probs(part, teacher_norm)
            partial[:, part] = torch.stack([terms.sum(-1) for terms in divergence_terms(*logps, alpha)])
        totals = sum_over(partial, shard.group) + nan_of(student_norm, teacher_norm)
        ctx.save_for_backward(student_logits, teacher_logits, student_norm, teacher_norm, totals)
        ctx.setting = (alpha, temperature, shard)
        return totals[0].clamp(min=0)  # rounding may leave -1e-15; the totals kept for the gradient stay as they are

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, student_norm, teacher_norm, totals = ctx.saved_tensors
        alpha, temperature, shard = ctx.setting
        student, teacher = (Rows(logits, temperature, shard, grad.dtype) for logits in (student_logits, teacher_logits))

        def of_rows(part: slice) -> Tensor:
            logps = student.log_probs(part, student_norm), teacher.log_probs(part, teacher_norm)
            return student_gradient(*logps, alpha, totals[-1, part, None]).mul_(grad[part, None])

        return student.fill_gradient(torch.empty_like(student_logits), of_rows), None, None, None, None
