"""Divergence clipping: no single token may dominate. Source: unisd.md 1.3.

Legend: B sequences, T completion positions. Masks are 1 where a token counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from unisd_megatron.losses.collectives import concat_over

# A batch of (almost) agreeing tokens must not be clipped to nothing: the reference's lower bound of an adaptive ceiling.
FLOOR = 1e-6


def clip_divergence(
    divergence: Tensor,
    mask: Tensor,
    *,
    ceiling: float | None = None,
    quantile: float | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """min(divergence, c) for every token, [B, T]; a token above c keeps the value c and gets zero gradient.

    Exactly one of the two must be given: c = `ceiling` (nats), or c = max(quantile of the kept tokens' divergences, 1e-6),
    detached, where the kept tokens are those with mask 1 on *all* ranks of `group` (data parallel; None: on this rank alone).
    A token at c exactly is not clipped. Without any kept token nothing is clipped. With a quantile every rank of `group` must
    call. Raises ValueError for both or neither, a ceiling <= 0, a quantile outside [0, 1], or shapes that differ.
    """
    if (ceiling is None) == (quantile is None):
        raise ValueError(f"give exactly one of ceiling and quantile, got ceiling={ceiling} and quantile={quantile}")
    if divergence.shape != mask.shape:
        raise ValueError(f"divergence {tuple(divergence.shape)} and mask {tuple(mask.shape)} differ in shape")
    if ceiling is not None:
        if not ceiling > 0:
            raise ValueError(f"the ceiling of a divergence must be positive, got {ceiling}")
        limit = divergence.new_tensor(ceiling)
    else:
        assert quantile is not None
        limit = masked_quantile(divergence, mask, quantile, group).clamp(min=FLOOR).to(divergence.dtype)
    # Not torch.minimum, whose gradient is halved at a tie: the token that sets the quantile is not clipped.
    return torch.where(divergence > limit, limit, divergence)


def masked_quantile(values: Tensor, mask: Tensor, q: float, group: ProcessGroup | None = None) -> Tensor:
    """The q-quantile (linear interpolation) of the values with mask 1, over all ranks of `group`; a detached scalar.

    inf when no rank kept anything, the bound that bounds nothing. Exact, and the same on every rank: the kept values of all
    ranks, however many each has, are gathered and sorted (`torch.quantile` refuses more than 16 million). nan in, nan out.
    Raises ValueError for q outside [0, 1] or shapes that differ. Every rank of `group` must call.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies in [0, 1], got {q}")
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} differ in shape")
    kept = values.detach()[mask.bool()]
    kept = concat_over(kept if kept.dtype == torch.float64 else kept.float(), group)
    if kept.numel() == 0:
        return kept.new_tensor(math.inf)
    ordered = kept.sort().values
    position = q * (kept.numel() - 1)
    low = math.floor(position)
    fraction = position - low
    result = ordered[low]
    if fraction > 0:  # also keeps 0 * inf out of the result
        result = torch.lerp(result, ordered[low + 1], fraction)
    return torch.where(ordered[-1].isnan(), ordered[-1], result)  # nan sorts last
