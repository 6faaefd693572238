"""Agreement weights: tokens or sequences on which the teacher's other contexts disagree count less. Source: unisd.md 1.4.

Legend: K auxiliary views of the same completion, B sequences, T completion positions; a[k] the teacher's log-probability of the
sampled token behind view k (temperature 1), m the mask (1 where a token counts).

    token     d = var_k(a) (unbiased) or max_k a - min_k a              [B, T]
              w = max(1 / (1 + gamma min(d / max(q95(d), 1e-6), cap)), 0.01)
    sequence  d = var_k(L) (biased) or max_k L - min_k L                [B],  L[k] = sum_t m a[k] / max(sum_t m, 1)
              w = max(exp(-gamma d), 1e-6) m

The two maps and the two variance estimators differ in the authors' code; the paper gives neither map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from unisd_megatron.mechanisms.clipping import masked_quantile

SCALE_FLOOR = 1e-6  # of the token quantile: identical views must not divide by zero
TOKEN_FLOOR = 0.01
SEQUENCE_FLOOR = 1e-6


@dataclass(frozen=True)
class Agreement:
    """weights [B, T]; disagreement before any scaling, [B, T] for tokens, [B] for sequences. Neither carries gradient."""

    weights: Tensor
    disagreement: Tensor


def agreement_weights(
    view_log_probs: Tensor,
    mask: Tensor,
    *,
    granularity: str,
    statistic: str,
    gamma: float,
    quantile: float = 0.95,
    cap: float = 10.0,
    group: ProcessGroup | None = None,
) -> Agreement:
    """Weights [B, T] in (0, 1] and the disagreement behind them, from log-probabilities [K, B, T] (nats) and a mask [B, T].

    granularity "token" or "sequence"; statistic "var" or "range"; gamma >= 0, 0 meaning that every kept token counts 1. The
    quantile that scales token disagreement is taken over the kept tokens of all ranks of `group` (data parallel; None: this
    rank alone), so with granularity "token" every rank of it must call. `quantile` and `cap` do nothing for sequences. K = 1
    has no disagreement: 0, weight 1. No kept token anywhere: token weights are 1. As in the reference, token weights
    are not masked and sequence weights are. fp32, or fp64 for fp64 input; detached.
    Raises ValueError for an unknown granularity or statistic, gamma < 0, cap <= 0, K = 0, or shapes that do not fit.
    """
    if statistic not in ("var", "range"):
        raise ValueError(f'statistic must be "var" or "range", got {statistic!r}')
    if granularity not in ("token", "sequence"):
        raise ValueError(f'granularity must be "token" or "sequence", got {granularity!r}')
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    if view_log_probs.dim() != 3 or view_log_probs.shape[0] == 0 or view_log_probs.shape[1:] != mask.shape:
        shapes = f"{tuple(view_log_probs.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"view_log_probs must be [K, B, T] with K >= 1 and mask [B, T], got {shapes}")
    views = view_log_probs.detach()
    views = views if views.dtype == torch.float64 else views.float()
    if granularity == "token":
        return _of_tokens(views, mask.bool(), statistic, gamma, quantile, cap, group)
    return _of_sequences(views, mask.bool(), statistic, gamma)


def _of_tokens(
    views: Tensor, kept: Tensor, statistic: str, gamma: float, quantile: float, cap: float, group: ProcessGroup | None
) -> Agreement:
    disagreement = _spread(views, statistic, unbiased=True)
    # A masked position may hold -inf or nan; its weight must still be a number that a mask can multiply away.
    disagreement = torch.where(kept | disagreement.isfinite(), disagreement, 0)
    scale = masked_quantile(disagreement, kept, quantile, group).clamp(min=SCALE_FLOOR)  # inf without kept tokens: weight 1
    relative = (disagreement / scale).clamp(max=cap)
    return Agreement((1 / (1 + gamma * relative)).clamp(min=TOKEN_FLOOR), disagreement)


def _of_sequences(views: Tensor, kept: Tensor, statistic: str, gamma: float) -> Agreement:
    # where, not multiplication: what stands at a masked position may be -inf or nan.
    means = torch.where(kept, views, 0).sum(-1) / kept.sum(-1).clamp(min=1)
    disagreement = _spread(means, statistic, unbiased=False)
    weights = torch.exp(-gamma * disagreement).clamp(min=SEQUENCE_FLOOR)
    return Agreement(weights[:, None] * kept, disagreement)


def _spread(views: Tensor, statistic: str, *, unbiased: bool) -> Tensor:
    """Variance or range over dim 0; 0 for a single view, where the unbiased variance would be nan (unisd.md A5)."""
    if views.shape[0] == 1:
        return torch.zeros_like(views[0])
    if statistic == "var":
        return views.var(dim=0, unbiased=unbiased)
    return views.amax(0) - views.amin(0)
