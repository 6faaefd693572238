"""Divergence, log-probabilities and entropy straight from hidden states and heads, a chunk of tokens at a time.

Legend: N tokens, n tokens of one chunk, D hidden size (the teacher's may differ), V columns of this rank's shard.

Full logits are never held: a chunk's [n, V] of student and teacher is made, reduced to a few numbers per token, dropped, and
made again in the backward pass. For 8,192 tokens of a 152k vocabulary at TP=1 that is 0.5 GiB of bf16 chunks instead of 4.6.

Who holds what. Hidden states are the same on every rank of `group`, a head is this rank's rows [V, D] of the full matrix, the
results are the same on every rank. **The gradient of the hidden states that leaves here is this rank's part**, the sum over its
own columns of the vocabulary. Whoever made the hidden states must add the parts of all ranks, exactly once:

    hidden = enter_shards(hidden, group)     # replicated over the group: backward all-reduces
    hidden = gather_rows(hidden, group)      # sequence parallel, local rows in: backward reduce-scatters

(never both). The head's gradient is complete: its rows live here only.

Communication: one all-gather per chunk (16 bytes per token: the softmax pairs of both models), one all-reduce per call (16
bytes per token, 20 for the JSD or with clipped entries), none backward. What the chunk itself does not need waits for the end,
so that C chunks cost C + 1 collectives, not 2 C.
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
from unisd_megatron.losses.divergence import bounded, check_alpha, check_entry_clip, has_mean
from unisd_megatron.losses.passes import Passes, Said, Upstream, choose_passes
from unisd_megatron.losses.vocab import VocabShard, check_temperature, combine_pick, combine_softmax, computing_dtype

# Logits of one chunk of one model: 96 MiB of fp32 on a CPU, where wider products are no faster; 256 MiB of bf16 elsewhere.
CPU_CHUNK_LOGITS = 3 << 23
CHUNK_LOGITS = 1 << 27
# Of a half-precision product that is added to an fp32 gradient: 32 MiB at a time.
PRODUCT_ELEMENTS = 1 << 24


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
    passes: Passes
    alpha: float = 0.0
    entry_clip: float | None = None

    def chunks(self, tokens: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk_tokens, tokens)) for i in range(0, tokens, self.chunk_tokens))

    def used(self, head: Tensor) -> Tensor:
        """The rows of the head that are vocabulary. Padding rows are cut off, not multiplied by 0: they may hold nan."""
        return head[: self.shard.real]

    def softmax(self, logits: Tensor) -> Tensor:
        return self.passes.softmax(logits, self.temperature, self.dtype)

    def column(self, token_ids: Tensor) -> Tensor:
        """Where each token's logit is in this shard, -1 if it is in another; [n]."""
        column, here = self.shard.locate(token_ids)
        return torch.where(here, column, -1)


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
    chunk_tokens: int | None = None,
    kernels: str = "auto",
    entry_clip: float | None = None,
) -> FusedDivergence:
    """Divergence, log-probabilities of `token_ids` and student entropy of N tokens, without ever holding [N, V] logits.

    student_hidden [N, D], student_head [V/t, D]; teacher_hidden [N, Dt], teacher_head [V/t, Dt]; token_ids [N] int64. The
    values are those of `token_divergence`, `token_log_probs` and `token_entropy` on the logits hidden @ head.T. divergence,
    student_log_probs and entropy may each receive gradient; it reaches student_hidden (this rank's part: wrap it in
    `enter_shards` or `gather_rows`, see the top of this file) and student_head, never the teacher.

    The head's gradient is summed over chunks in fp32. Where student_head has a `main_grad` (Megatron's DDP makes it) it is
    summed straight into that, and autograd gets zeros, or None outside Megatron's DDP. N = 0 gives empty results that still
    have a graph. vocab_size is one for both models; their heads have the same rows.
    chunk_tokens: tokens whose logits exist at once; by default as many as make chunks of a good size for the device. kernels:
    "torch", "triton", or "auto": Triton on a GPU that has it, except for fp64.
    Raises ValueError for shapes that do not fit, alpha outside [0, 1], temperature <= 0, entry_clip < 0, chunk_tokens < 1,
    token ids outside the vocabulary, or kernels that cannot run here.
    """
    check_alpha(alpha)
    check_entry_clip(entry_clip)
    check_temperature(temperature)
    _check_pair(student_hidden, student_head, token_ids, chunk_tokens)
    _check_pair(teacher_hidden, teacher_head, token_ids, chunk_tokens)
    if student_head.shape[0] != teacher_head.shape[0]:
        widths = f"{student_head.shape[0]} vocabulary rows and teacher head {teacher_head.shape[0]}"
        how = "both must have one vocabulary; if only the padding differs, cut the wider one and pass vocab_size"
        raise ValueError(f"student head has {widths}; {how}")
    shard = VocabShard.of(student_head.shape[0], vocab_size, group)
    shard.check_tokens(token_ids)
    dtype = computing_dtype(student_hidden, teacher_hidden)
    chunk_tokens = chunk_tokens or _chunk_tokens(student_hidden.device, shard)
    passes = choose_passes(kernels, student_hidden.device, dtype)
    setting = _Setting(float(temperature), shard, chunk_tokens, dtype, passes, float(alpha), entry_clip)
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
    chunk_tokens: int | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Log-probability (nats) of `token_ids` [N] under hidden [N, D] and this rank's head [V/t, D], without full logits; [N].

    For views of which only the sampled token is wanted (agreement, contrast). One collective per call (12 bytes per token).
    Differentiable in hidden (this rank's part, as above) and head; cheap under no_grad. Errors as `fused_divergence`.
    """
    check_temperature(temperature)
    _check_pair(hidden, head, token_ids, chunk_tokens)
    shard = VocabShard.of(head.shape[0], vocab_size, group)
    shard.check_tokens(token_ids)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden.device, shard)
    dtype = computing_dtype(hidden)
    setting = _Setting(float(temperature), shard, chunk_tokens, dtype, choose_passes(kernels, hidden.device, dtype))
    return _FusedLogProbs.apply(hidden, head, token_ids, setting)


def _check_pair(hidden: Tensor, head: Tensor, token_ids: Tensor, chunk_tokens: int | None) -> None:
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or hidden.dtype != head.dtype:
        given = f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(head.shape)} {head.dtype}"
        raise ValueError(f"hidden [N, D] and head [V, D] must share D and dtype, got {given}")
    if hidden.dtype == torch.float16:  # a gradient of the logits below 6e-8 would be 0
        raise ValueError("hidden and head are float16, too narrow for gradients of logits; use bfloat16 or float32")
    if token_ids.shape != hidden.shape[:1]:
        raise ValueError(f"token_ids {tuple(token_ids.shape)} must hold one id per row of hidden {tuple(hidden.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _chunk_tokens(device: torch.device, shard: VocabShard) -> int:
    """As many tokens as give chunks of the usual size; a multiple of 32, the same on every rank."""
    logits = CPU_CHUNK_LOGITS if device.type == "cpu" else CHUNK_LOGITS
    return max(32, logits // shard.width // 32 * 32)


class _FusedDivergence(torch.autograd.Function):
    """Saves its inputs and 8-9 numbers per token; every logit is made again in the backward."""

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
        tokens, group = hidden.shape[0], setting.shard.group
        walks = _Walk(hidden, head, setting), _Walk(teacher_hidden, teacher_head, setting)
        column = setting.column(token_ids)
        norms = hidden.new_zeros((2, 2, tokens), dtype=setting.dtype)  # student, teacher
        partial = hidden.new_zeros((4 + has_mean(setting.alpha, setting.entry_clip), tokens), dtype=setting.dtype)
        for chunk in setting.chunks(tokens):
            logits = [walk.logits(chunk) for walk in walks]
            stacked = stack_over(torch.stack([setting.softmax(one) for one in logits]), group)
            # One model after the other, so that equal logits are added up in the same order.
            norms[:, :, chunk] = torch.stack([combine_softmax(stacked[:, i].contiguous()) for i in (0, 1)])
            student, teacher = (Said(one, norm) for one, norm in zip(logits, norms[:, :, chunk], strict=True))
            for row, one in zip(partial, (student, teacher), strict=False):
                score = _score_here(one.logits, column[chunk], setting)
                row[chunk] = torch.where(column[chunk] >= 0, (score - one.norms[0]) - one.norms[1], 0)
            partial[2:, chunk] = setting.passes.sums(student, teacher, setting.alpha, setting.temperature, setting.entry_clip)
        student_log_probs, teacher_log_probs, *rest = totals = sum_over(partial, group)
        ctx.save_for_backward(hidden, head, teacher_hidden, teacher_head, column, norms, totals)
        ctx.setting = setting
        ctx.owner = _owner(head)
        ctx.set_materialize_grads(False)
        # Copies, so that in-place use of a result cannot reach what the backward reads.
        divergence = bounded(rest[0], setting.alpha, setting.entry_clip)
        outputs = (divergence, student_log_probs.clone(), teacher_log_probs.clone(), rest[-1].clone())
        ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_divergence: Tensor | None, of_log_probs: Tensor | None, _: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, head, teacher_hidden, teacher_head, column, norms, totals = ctx.saved_tensors
        setting: _Setting = ctx.setting
        student = _Walk(hidden, head, setting)
        teacher = None if of_divergence is None else _Walk(teacher_hidden, teacher_head, setting)

        def of_chunk(chunk: slice) -> Tensor:
            """dL/dlogits [n, real]: the three upstream gradients, added before anything is rounded."""
            logits = student.logits(chunk)
            setting.passes.to_gradient(
                Said(logits, norms[0, :, chunk]),
                None if teacher is None else Said(teacher.logits(chunk), norms[1, :, chunk]),
                totals=totals[2:, chunk],
                column=column[chunk],
                upstream=Upstream(*(None if x is None else x[chunk] for x in (of_divergence, of_log_probs, of_entropy))),
                alpha=setting.alpha,
                temperature=setting.temperature,
                entry_clip=setting.entry_clip,
            )
            return logits

        return *_input_gradients(ctx, hidden, head, of_chunk), None, None, None, None


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, token_ids: Tensor, setting: _Setting) -> Tensor:
        walk, column = _Walk(hidden, head, setting), setting.column(token_ids)
        local = hidden.new_zeros((3, hidden.shape[0]), dtype=setting.dtype)
        for chunk in setting.chunks(hidden.shape[0]):
            logits = walk.logits(chunk)
            local[:2, chunk] = setting.softmax(logits)
            local[2, chunk] = _score_here(logits, column[chunk], setting)
        log_probs, norms = combine_pick(stack_over(local, setting.shard.group))
        ctx.save_for_backward(hidden, head, column, norms)
        ctx.setting, ctx.owner = setting, _owner(head)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, column, norms = ctx.saved_tensors
        setting: _Setting = ctx.setting
        walk = _Walk(hidden, head, setting)

        def of_chunk(chunk: slice) -> Tensor:
            logits = walk.logits(chunk)
            setting.passes.to_gradient(
                Said(logits, norms[:, chunk]),
                None,
                totals=None,
                column=column[chunk],
                upstream=Upstream(log_probs=grad[chunk]),
                alpha=0.0,
                temperature=setting.temperature,
            )
            return logits

        return *_input_gradients(ctx, hidden, head, of_chunk), None, None


class _Walk:
    """A model's logits, chunk after chunk in the same memory: each call overwrites what the last one returned."""

    def __init__(self, hidden: Tensor, head: Tensor, setting: _Setting) -> None:
        self._hidden, self._head, self._passes = hidden, setting.used(head), setting.passes
        # Allocated once: on a CPU, fresh pages cost half as much as the product that fills them.
        self._storage = hidden.new_empty(min(setting.chunk_tokens, hidden.shape[0]) * setting.shard.real)

    def logits(self, chunk: slice) -> Tensor:
        """[n, real] in the dtype of the model, as its own output layer would produce them."""
        return self._passes.logits(self._hidden[chunk], self._head, self._storage)


def _score_here(logits: Tensor, column: Tensor, setting: _Setting) -> Tensor:
    """logit / temperature of the sampled token where this rank holds it, else 0; [n]."""
    if not logits.shape[1]:
        return logits.new_zeros(logits.shape[0], dtype=setting.dtype)
    score = logits.gather(1, column.clamp(min=0)[:, None])[:, 0].to(setting.dtype)
    if setting.temperature != 1.0:  # by a tensor: on a GPU torch divides by a number through its reciprocal
        score = score / torch.full_like(score, setting.temperature)
    return torch.where(column >= 0, score, 0)


def _input_gradients(
    ctx: Any, hidden: Tensor, head: Tensor, of_chunk: Callable[[slice], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """(this rank's part of dL/dhidden [N, D], dL/dhead [V, D]) from dL/dlogits [n, real] of each chunk."""
    wants_hidden, wants_head = ctx.needs_input_grad[:2]
    owner, setting = ctx.owner, ctx.setting
    of_hidden = torch.zeros_like(hidden) if wants_hidden else None
    of_head = None
    if wants_head:
        in_place = owner is not None and owner.main_grad.dtype.itemsize >= setting.dtype.itemsize
        of_head = owner.main_grad if in_place else torch.zeros_like(head, dtype=setting.dtype)
    for chunk in setting.chunks(hidden.shape[0]):
        of_logits = of_chunk(chunk)
        if of_hidden is not None:
            torch.mm(of_logits, setting.used(head), out=of_hidden[chunk])
        if of_head is not None:
            _add_product_(setting.used(of_head), of_logits.t(), hidden[chunk])
    if of_head is None or owner is None:
        return of_hidden, None if of_head is None else of_head.to(head.dtype)
    if of_head is not owner.main_grad:
        owner.main_grad.add_(of_head)
    return of_hidden, _already_accumulated(owner)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; a half-precision product is rounded once (it accumulates in fp32 inside) and added in fp32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    step = max(1, PRODUCT_ELEMENTS // max(1, right.shape[1]))
    for i in range(0, left.shape[0], step):
        total[i : i + step].add_(left[i : i + step] @ right)


def _already_accumulated(owner: Tensor) -> Tensor | None:
    """What autograd is told about a head whose gradient is in main_grad already.

    Zeros where Megatron's DDP adds what autograd finds to main_grad (it marks its parameters). Its flag for gradients that are
    there already stays as it is: raised, it would drop what other uses of the weight (a tied embedding) contribute.
    """
    return torch.zeros_like(owner) if hasattr(owner, "grad_added_to_main_grad") else None


def _owner(head: Tensor) -> Tensor | None:
    """The head, if it has a buffer for its gradient."""
    return head if getattr(head, "main_grad", None) is not None else None
