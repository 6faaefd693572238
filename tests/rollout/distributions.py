"""The sampling distribution, written down from its definition (`rollout/engine.py::Sampling`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unisd_megatron.rollout.engine import Sampling


def distribution(logits: Tensor, seen: Sequence[int], sampling: Sampling) -> Tensor:
    """Probabilities `[V]`, fp64. logits: `[V]`; seen: prompt and completion so far."""
    scores = logits.double().clone()
    for token in set(seen):
        scores[token] = (
            scores[token] / sampling.repetition_penalty if scores[token] > 0 else scores[token] * sampling.repetition_penalty
        )
    probs = torch.softmax(scores / sampling.temperature, -1)
    probs = torch.where(probs < sampling.min_p * probs.max(), 0.0, probs)
    order = probs.argsort(descending=True)
    kept = order[: sampling.top_k] if sampling.top_k else order
    mass = probs[kept].cumsum(0) / probs[kept].sum()
    kept = kept[: int((mass < sampling.top_p).sum()) + 1] if sampling.top_p < 1 else kept
    return torch.zeros_like(probs).index_put((kept,), probs[kept] / probs[kept].sum())


@torch.no_grad()
def log_probs_of(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int], sampling: Sampling) -> list[float]:
    """Of the tokens `ids` behind the prompt."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return [
        float(distribution(row, [*prompt, *ids[:i]], sampling)[token].log())
        for i, (row, token) in enumerate(zip(logits, ids, strict=True))
    ]
