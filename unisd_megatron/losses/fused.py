"""Divergence, log-probabilities and entropy straight from hidden states and heads, a chunk of tokens at a time.

Legend: N tokens, n tokens of one chunk, D hidden size (the teacher's may differ), V columns of this rank's shard.

Full logits are never held: a chunk's [n, V] of student and teacher is made, reduced to a few numbers per token, dropped, and
made again in the backward pass. For 8,192 tokens of a 152k vocabulary at TP=1 that is 0.9 GiB of bf16 chunks instead of 4.6.

Who holds what. Hidden states are the same on every rank of `group`, a head is this rank's rows [V, D] of the full matrix, the
results are the same on every rank. **The gradient of the hidden states that leaves here is this rank's part**, the sum over its
own columns of the vocabulary. Whoever made the hidden states must add the parts of all ranks, exactly once:

    hidden = enter_shards(hidden, group)     # replicated over the group: backward all-reduces
    hidden = gather_rows(hidden, group)      # sequence parallel, local rows in: backward reduce-scatters

(never both). The head's gradient is complete: its rows live here only.

Communication: one all-gather per chunk (16 bytes per token: the softmax pairs of both models), one all-reduce per call (16
bytes per token, 20 for the JSD), none backward. What the chunk itself does not need waits for the end, so that C chunks cost
C + 1 collectives, not 2 C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from unisd_megatron.losses.collectives import stack_over, sum_over
from unisd_megatron.losses.divergence import check_alpha, normalize, partial_sums, student_gradient
from unisd_megatron.losses.vocab import (
    Rows,
    VocabShard,
    check_temperature,
    combine_pick,
    computing_dtype,
    entropy_gradient,
    local_pick,
)


@dataclass(frozen=True)
class FusedDivergence:
    """What one walk over the chunks yields, each [N] in nats; teacher_log_probs carries no gradient."""

    divergence: Tensor
    student_log_probs: Tensor
    teacher_log_probs: Tensor
    entropy: Tensor


class _Setting(NamedTuple):
    """What does not change between chunks."""

    temperature: float
    shard: VocabShard
    chunk_tokens: int
    dtype: torch.dtype
    alpha: float = 0.0
    into_main_grad: bool = False

    def rows(self, hidden: Tensor, head: Tensor) -> Rows:
        """The logits [n, real] of a chunk, in the dtype of the model, as its own output layer would produce them."""
        return Rows(hidden @ self.used(head).t(), self.temperature, self.shard, self.dtype)

    def used(self, head: Tensor) -> Tensor:
        """The rows of the head that are vocabulary. Padding rows are cut off, not multiplied by 0: they may hold nan."""
        return head[: self.shard.real]


def fused_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    token_ids: Tensor,
    alpha: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    accumulate_into_main_grad: bool = False,
) -> FusedDivergence:
    """Divergence, log-probabilities of `token_ids` and student entropy of N tokens, without ever holding [N, V] logits.

    student_hidden [N, D], student_head [V/t, D]; teacher_hidden [N, Dt], teacher_head [V/t, Dt]; token_ids [N] int64. The
    values are those of `token_divergence`, `token_log_probs` and `token_entropy` on the logits hidden @ head.T. divergence,
    student_log_probs and entropy may each receive gradient; it reaches student_hidden (this rank's part: wrap it in
    `enter_shards` or `gather_rows`, see the top of this file) and student_head, never the teacher.

    The head's gradient is summed over chunks in fp32. With `accumulate_into_main_grad` it goes straight into
    student_head.main_grad, by Megatron's protocol of fused weight gradients: `grad_added_to_main_grad` is set and autograd gets
    zeros, or None where the parameter lacks that attribute. N = 0 gives empty results that still have a graph.
    Raises ValueError for shapes that do not fit, alpha outside [0, 1], temperature <= 0, chunk_tokens < 1, or token ids outside
    the vocabulary.
    """
    check_alpha(alpha)
    check_temperature(temperature)
    _check_pair(student_hidden, student_head, token_ids, chunk_tokens)
    _check_pair(teacher_hidden, teacher_head, token_ids, chunk_tokens)
    if student_head.shape[0] != teacher_head.shape[0]:
        widths = f"{student_head.shape[0]} vocabulary rows and teacher head {teacher_head.shape[0]}"
        raise ValueError(f"student head has {widths}; pad both to the same width")
    if accumulate_into_main_grad and not hasattr(student_head, "main_grad"):
        raise ValueError("accumulate_into_main_grad needs student_head.main_grad, which Megatron's DDP makes")
    shard = VocabShard.of(student_head.shape[0], vocab_size, group)
    shard.check_tokens(token_ids)
    dtype = computing_dtype(student_hidden, teacher_hidden)
    setting = _Setting(float(temperature), shard, chunk_tokens, dtype, float(alpha), accumulate_into_main_grad)
    teacher = (teacher_hidden.detach(), teacher_head.detach())
    return FusedDivergence(*_FusedDivergence.apply(student_hidden, student_head, *teacher, token_ids, setting))


def fused_log_probs(
    hidden: Tensor,
    head: Tensor,
    *,
    token_ids: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Log-probability (nats) of `token_ids` [N] under hidden [N, D] and this rank's head [V/t, D], without full logits; [N].

    For views of which only the sampled token is wanted (agreement, contrast). One collective per call (12 bytes per token).
    Differentiable in hidden (this rank's part, as above) and head; cheap under no_grad. Errors as `fused_divergence`.
    """
    check_temperature(temperature)
    _check_pair(hidden, head, token_ids, chunk_tokens)
    shard = VocabShard.of(head.shape[0], vocab_size, group)
    shard.check_tokens(token_ids)
    setting = _Setting(float(temperature), shard, chunk_tokens, computing_dtype(hidden))
    return _FusedLogProbs.apply(hidden, head, token_ids, setting)


def _check_pair(hidden: Tensor, head: Tensor, token_ids: Tensor, chunk_tokens: int) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or hidden.dtype != head.dtype:
        given = f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(head.shape)} {head.dtype}"
        raise ValueError(f"hidden [N, D] and head [V, D] must share D and dtype, got {given}")
    if token_ids.shape != hidden.shape[:1]:
        raise ValueError(f"token_ids {tuple(token_ids.shape)} must hold one id per row of hidden {tuple(hidden.shape)}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(i, min(i + chunk_tokens, tokens)) for i in range(0, tokens, chunk_tokens))


class _FusedDivergence(torch.autograd.Function):
    """Saves its inputs and 7-9 numbers per token; every logit is made again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        token_ids: Tensor,
        setting: _Setting,
    ) -> tuple[Tensor, ...]:
        tokens = hidden.shape[0]
        terms = 1 if setting.alpha in (0, 1) else 2
        normalizers = hidden.new_zeros((2, 2, tokens), dtype=setting.dtype)  # student, teacher
        partial = hidden.new_zeros((terms + 3, tokens), dtype=setting.dtype)  # D, (E_S[log S/M]), log s_y, log t_y, H
        for chunk in _chunks(tokens, setting.chunk_tokens):
            pair = setting.rows(hidden[chunk], head), setting.rows(teacher_hidden[chunk], teacher_head)
            norms = normalize(*pair)
            normalizers[0, :, chunk], normalizers[1, :, chunk] = norms
            partial[:, chunk] = _partial(pair, norms, token_ids[chunk], setting.alpha)
        totals = sum_over(partial, setting.shard.group)
        ctx.save_for_backward(hidden, head, teacher_hidden, teacher_head, token_ids, normalizers, totals)
        ctx.setting = setting
        ctx.owner = head if setting.into_main_grad else None
        ctx.set_materialize_grads(False)
        # Copies, so that in-place use of a result cannot reach what the backward reads.
        outputs = (totals[0].clamp(min=0), totals[terms].clone(), totals[terms + 1].clone(), totals[terms + 2].clone())
        ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_divergence: Tensor | None, of_log_probs: Tensor | None, _: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, head, teacher_hidden, teacher_head, token_ids, normalizers, totals = ctx.saved_tensors
        setting: _Setting = ctx.setting

        def of_chunk(chunk: slice) -> Tensor:
            """dL/dlogits [n, real] of one chunk: the three upstream gradients, added per block before anything is rounded."""
            student = setting.rows(hidden[chunk], head)
            teacher = None if of_divergence is None else setting.rows(teacher_hidden[chunk], teacher_head)
            norms, sums, ids = normalizers[:, :, chunk], totals[:, chunk], token_ids[chunk]

            def of_rows(block: slice) -> Tensor:
                logps = student.log_probs(block, norms[0])
                grad = torch.zeros_like(logps)
                if teacher is not None and of_divergence is not None:
                    teacher_logps = teacher.log_probs(block, norms[1])
                    slope = student_gradient(logps, teacher_logps, setting.alpha, sums[:-3, block])
                    grad.addcmul_(slope, of_divergence[chunk][block, None])
                if of_entropy is not None:
                    grad.addcmul_(entropy_gradient(logps, sums[-1, block]), of_entropy[chunk][block, None])
                if of_log_probs is not None:
                    grad.addcmul_(student.one_hot_minus(logps.exp_(), ids[block]), of_log_probs[chunk][block, None])
                return grad

            return student.fill_gradient(torch.empty_like(student.logits), of_rows)

        return *_input_gradients(ctx, hidden, head, of_chunk), None, None, None, None


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, token_ids: Tensor, setting: _Setting) -> Tensor:
        local = hidden.new_zeros((3, hidden.shape[0]), dtype=setting.dtype)
        for chunk in _chunks(hidden.shape[0], setting.chunk_tokens):
            local[:, chunk] = local_pick(setting.rows(hidden[chunk], head), token_ids[chunk])
        log_probs, normalizer = combine_pick(stack_over(local, setting.shard.group))
        ctx.save_for_backward(hidden, head, token_ids, normalizer)
        ctx.setting, ctx.owner = setting, None
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, token_ids, normalizer = ctx.saved_tensors

        def of_chunk(chunk: slice) -> Tensor:
            rows = ctx.setting.rows(hidden[chunk], head)

            def of_rows(block: slice) -> Tensor:
                probs = rows.log_probs(block, normalizer[:, chunk]).exp_()
                return rows.one_hot_minus(probs, token_ids[chunk][block]).mul_(grad[chunk][block, None])

            return rows.fill_gradient(torch.empty_like(rows.logits), of_rows)

        return *_input_gradients(ctx, hidden, head, of_chunk), None, None


def _partial(pair: tuple[Rows, Rows], norms: tuple[Tensor, ...], token_ids: Tensor, alpha: float) -> Tensor:
    """This rank's summands, [4 or 5, n]: `partial_sums`, student and teacher log-probability of the token, entropy."""
    blocks = []
    for block in pair[0].blocks():
        student, teacher = (rows.log_probs(block, norm) for rows, norm in zip(pair, norms, strict=True))
        picked = [rows.pick(logps, token_ids[block]) for rows, logps in zip(pair, (student, teacher), strict=True)]
        entropy = torch.special.entr(student.exp()).sum(-1)
        blocks.append(torch.cat([partial_sums(student, teacher, alpha), torch.stack([*picked, entropy])]))
    return torch.cat(blocks, dim=1)


def _input_gradients(
    ctx: Any, hidden: Tensor, head: Tensor, of_chunk: Callable[[slice], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """(this rank's part of dL/dhidden [N, D], dL/dhead [V, D]) from dL/dlogits [n, real] of each chunk."""
    wants_hidden, wants_head = ctx.needs_input_grad[:2]
    owner, setting = ctx.owner, ctx.setting
    of_hidden = torch.zeros_like(hidden) if wants_hidden else None
    of_head = None
    if wants_head:
        of_head = owner.main_grad if owner is not None else torch.zeros_like(head, dtype=setting.dtype)
    for chunk in _chunks(hidden.shape[0], setting.chunk_tokens):
        of_logits = of_chunk(chunk)
        if of_hidden is not None:
            torch.mm(of_logits, setting.used(head), out=of_hidden[chunk])
        if of_head is not None:
            _add_product_(setting.used(of_head), of_logits.t(), hidden[chunk])
    if of_head is None or owner is None:
        return of_hidden, None if of_head is None else of_head.to(head.dtype)
    return of_hidden, _already_accumulated(owner)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; a half-precision product is rounded once (it accumulates in fp32 inside) and added in fp32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _already_accumulated(owner: Tensor) -> Tensor | None:
    """What autograd is told about a head whose gradient is in main_grad already (Megatron's fused weight-gradient protocol).

    Zeros, not Megatron's uninitialised dummy: a tied embedding adds its own gradient to this one before any hook sees it.
    """
    if not hasattr(owner, "grad_added_to_main_grad"):
        return None
    owner.grad_added_to_main_grad = True
    return torch.zeros_like(owner)
