"""Log-probabilities and entropies over a vocabulary that is sharded by columns.

Legend: N rows (flattened tokens), V columns *of this rank's shard*, real <= V columns that are vocabulary and not padding.

With z = logits / temperature and the sum over the real columns of all ranks

    log p_v = (z_v - m) - log s,    m = max_v z_v,    s = sum_v exp(z_v - m)

Each rank reduces its own columns to the pair (m_r, s_r); one exchange of pairs gives (m, log s) on every rank. The pair is kept
apart, never folded into one log-sum-exp: with logits of 1e4 the fold costs three decimal digits of every log-probability.
The pairs are gathered and then combined in rank order, not all-reduced, so equal logits give bit-equal normalisers wherever
their rows lie in the buffer: student == teacher is then exactly zero, not zero up to the order of additions of a ring.

Columns whose global index is >= vocab_size are never read: whatever they hold (garbage, inf, nan) cannot matter, and their
gradient is exactly zero. Half-precision and fp32 logits are computed and returned in fp32, fp64 logits in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from unisd_megatron.losses.collectives import group_rank, group_size, stack_over, sum_over

# Elementwise work walks blocks of rows with about this many logits, so that its fp32 temporaries stay near 32 MiB each (they
# fit a large GPU's L2 cache) however many rows are asked for.
BLOCK_LOGITS = 1 << 18


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds: [start, start + width), of which the first `real` are no padding."""

    start: int
    width: int
    real: int
    vocab_size: int
    group: ProcessGroup | None

    @staticmethod
    def of(width: int, vocab_size: int | None, group: ProcessGroup | None) -> VocabShard:
        """The shard of this rank when every rank of `group` holds `width` columns, contiguous in rank order."""
        columns = width * group_size(group)
        size = columns if vocab_size is None else int(vocab_size)
        if not 0 < size <= columns:
            raise ValueError(f"vocab_size {size} must lie in 1..{columns}, the columns of {group_size(group)} shard(s)")
        start = width * group_rank(group)
        return VocabShard(start, width, min(max(size - start, 0), width), size, group)

    def locate(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(column in this shard, whether the token is here); the column is 0 where the token lives on another rank."""
        local = token_ids - self.start
        here = (local >= 0) & (local < self.real)
        return torch.where(here, local, 0), here

    def check_tokens(self, token_ids: Tensor) -> None:
        """Raises ValueError when a token id is outside [0, vocab_size): it would silently count as probability one."""
        if token_ids.numel() == 0:
            return
        low, high = (int(x) for x in token_ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            given = f"got {low}..{high}; give masked positions any valid id"
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}, {given}")


@dataclass(frozen=True)
class Rows:
    """This rank's logits [N, V] of N tokens, read block by block in the computing dtype."""

    logits: Tensor
    temperature: float
    shard: VocabShard
    dtype: torch.dtype

    def blocks(self) -> Iterator[slice]:
        step = max(1, BLOCK_LOGITS // max(1, self.shard.real))
        return (slice(i, i + step) for i in range(0, self.logits.shape[0], step))

    def scores(self, rows: slice) -> Tensor:
        """logits / temperature of the real columns, a fresh contiguous [n, real].

        Contiguity is not for speed: strided kernels may round differently, and student == teacher must be exact.
        """
        scores = self.logits[rows, : self.shard.real].to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        return scores if self.temperature == 1.0 else scores.div_(self.temperature)

    def local_softmax(self) -> Tensor:
        """(m_r, s_r) of this rank's columns, [2, N]; (-inf, 0) where it holds nothing of positive probability."""
        result = self.logits.new_zeros((2, self.logits.shape[0]), dtype=self.dtype)
        result[0] = -torch.inf
        if self.shard.real:
            for rows in self.blocks():
                scores = self.scores(rows)
                peak = scores.amax(-1)
                result[0, rows] = peak
                result[1, rows] = scores.sub_(finite_shift(peak)[:, None]).exp_().sum(-1)
        return result

    def log_probs(self, rows: slice, normalizer: Tensor) -> Tensor:
        """log p of the real columns, [n, real], given the (m, log s) [2, N] of `combine_softmax`."""
        return self.scores(rows).sub_(normalizer[0, rows, None]).sub_(normalizer[1, rows, None])

    def pick(self, values: Tensor, token_ids: Tensor) -> Tensor:
        """values [n, real] at the token where this rank owns it, else 0: summing over ranks yields the owner's. [n]"""
        if not self.shard.real:
            return values.new_zeros(values.shape[0])
        column, here = self.shard.locate(token_ids)
        return torch.where(here, values.gather(1, column[:, None])[:, 0], 0)

    def one_hot_minus(self, probs: Tensor, token_ids: Tensor) -> Tensor:
        """1[v = token] - p_v, overwriting `probs` [n, real]: the gradient of log p_token with respect to z."""
        if not self.shard.real:
            return probs
        column, here = self.shard.locate(token_ids)
        return probs.neg_().scatter_add_(1, column[:, None], here.to(probs.dtype)[:, None])

    def fill_gradient(self, grad: Tensor, of_rows: Callable[[slice], Tensor]) -> Tensor:
        """Writes dL/dlogits into `grad` [N, V] from dL/dz given per block [n, real]; padding columns become exactly zero."""
        grad[:, self.shard.real :] = 0
        for rows in self.blocks():
            block = of_rows(rows)
            grad[rows, : self.shard.real] = block if self.temperature == 1.0 else block.div_(self.temperature)
        return grad


def combine_softmax(stacked: Tensor) -> Tensor:
    """(m, log s) [2, N] of the whole vocabulary from the (m_r, s_r) of each rank, [ranks, 2, N] in rank order."""
    peak, total = merge_softmax(stacked)
    return torch.stack([peak, total.log()])


def merge_softmax(stacked: Tensor) -> Tensor:
    """(m, s) [2, N] of several parts of the vocabulary together from theirs, [parts, 2, N]; (-inf, 0) is a part without any."""
    peak = stacked[:, 0].amax(0)
    scale = (stacked[:, 0] - finite_shift(peak)).exp_()
    return torch.stack([peak, (stacked[:, 1] * scale).sum(0)])


def finite_shift(peak: Tensor) -> Tensor:
    """`peak`, and 0 where it is -inf: -inf - -inf would be nan, where exp(-inf - 0) is the 0 that is meant."""
    return peak.masked_fill(peak == -torch.inf, 0)


def computing_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any argument is, else fp32: losses never run in half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability (nats) of each given token: [...] from this rank's logits [..., V/t] and token ids [...].

    log p_y = z_y - logsumexp(z), z = logits / temperature, over the columns below `vocab_size`. One collective forward, none
    backward; d/dlogits_v = (1[v = y] - p_v) / temperature. The result is the same on every rank of `group`.
    Raises ValueError for shapes that differ, a temperature <= 0, or a token id outside [0, vocab_size): masked positions need
    some valid id too.
    """
    check_temperature(temperature)
    if token_ids.shape != logits.shape[:-1]:
        raise ValueError(f"token_ids {tuple(token_ids.shape)} must match the rows of logits {tuple(logits.shape)}")
    shard = VocabShard.of(logits.shape[-1], vocab_size, group)
    shard.check_tokens(token_ids)
    flat = _TokenLogProbs.apply(logits.reshape(-1, shard.width), token_ids.reshape(-1), float(temperature), shard)
    return flat.view(token_ids.shape)


def token_entropy(
    logits: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Entropy (nats) of each row's distribution: [...] from this rank's logits [..., V/t].

    H = -sum_v p_v log p_v with 0 log 0 = 0. Two collectives forward, none backward;
    d/dlogits_v = -p_v (log p_v + H) / temperature. The same on every rank of `group`. Raises ValueError for temperature <= 0.
    """
    check_temperature(temperature)
    shard = VocabShard.of(logits.shape[-1], vocab_size, group)
    flat = _TokenEntropy.apply(logits.reshape(-1, shard.width), float(temperature), shard)
    return flat.view(logits.shape[:-1])


def local_pick(rows: Rows, token_ids: Tensor) -> Tensor:
    """(m_r, s_r, z of the token if it is here, else 0), [3, N]: what this rank contributes to `combine_pick`."""
    picked = rows.logits.new_zeros((1, rows.logits.shape[0]), dtype=rows.dtype)
    for part in rows.blocks():
        picked[0, part] = rows.pick(rows.scores(part), token_ids[part])
    return torch.cat([rows.local_softmax(), picked])


def combine_pick(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of the tokens [N], normalizer [2, N]) from the `local_pick` of each rank, [ranks, 3, N]."""
    normalizer = combine_softmax(stacked[:, :2])
    return (stacked[:, 2].sum(0) - normalizer[0]) - normalizer[1], normalizer


def entropy_terms(log_probs: Tensor) -> Tensor:
    """-p log p with 0 log 0 = 0, elementwise; nan counts as 0 too, so that the caller adds `nan_of` the normalizer."""
    return log_probs.exp().mul_(log_probs).neg_().nan_to_num_(nan=0.0)


def entropy_gradient(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """dH/dz = -p (log p + H), elementwise with `entropy` broadcast to it; 0 where p is 0, also at log p = -inf."""
    grad = log_probs.add(entropy).mul_(log_probs.exp()).neg_().nan_to_num_(nan=0.0)
    return grad.add_(entropy * 0)


def nan_of(*normalizers: Tensor) -> Tensor:
    """0 [N], or nan where a (m, log s) [2, N] has no meaning: there a logit is nan or +inf, or all are -inf.

    The sums over the vocabulary write nan as 0, because a probability of 0 times a logarithm of -inf is 0. Adding this to them
    keeps a nan that came in with the logits visible. (On a CPU ten times as fast as masks made by comparing.)
    """
    return torch.stack(normalizers).sum((0, 1)) * 0


class _TokenLogProbs(torch.autograd.Function):
    """Saves the logits it was given and [2, N] numbers; probabilities are recomputed block by block."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float, shard: VocabShard) -> Tensor:
        rows = Rows(logits, temperature, shard, computing_dtype(logits))
        log_probs, normalizer = combine_pick(stack_over(local_pick(rows, token_ids), shard.group))
        ctx.save_for_backward(logits, token_ids, normalizer)
        ctx.setting = (temperature, shard)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, normalizer = ctx.saved_tensors
        temperature, shard = ctx.setting
        rows = Rows(logits, temperature, shard, grad.dtype)

        def of_rows(part: slice) -> Tensor:
            return rows.one_hot_minus(rows.log_probs(part, normalizer).exp_(), token_ids[part]).mul_(grad[part, None])

        return rows.fill_gradient(torch.empty_like(logits), of_rows), None, None, None


class _TokenEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, shard: VocabShard) -> Tensor:
        rows = Rows(logits, temperature, shard, computing_dtype(logits))
        normalizer = combine_softmax(stack_over(rows.local_softmax(), shard.group))
        entropy = logits.new_zeros(logits.shape[0], dtype=rows.dtype)
        for part in rows.blocks():
            entropy[part] = entropy_terms(rows.log_probs(part, normalizer)).sum(-1)
        entropy = sum_over(entropy, shard.group) + nan_of(normalizer)
        ctx.save_for_backward(logits, normalizer, entropy.clone())  # a copy: Megatron divides returned losses in place
        ctx.setting = (temperature, shard)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, normalizer, entropy = ctx.saved_tensors
        temperature, shard = ctx.setting
        rows = Rows(logits, temperature, shard, grad.dtype)

        def of_rows(part: slice) -> Tensor:
            return entropy_gradient(rows.log_probs(part, normalizer), entropy[part, None]).mul_(grad[part, None])

        return rows.fill_gradient(torch.empty_like(logits), of_rows), None, None
