"""The loss of a step, written from the definitions: one process, dense, fp64, no padding, no sharing of code with the product.

Reads like the paper, runs slowly, and is what `unisd parity` compares every layout with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisd_megatron.batch import NEGATIVE, STUDENT, TEACHER, Sample, auxiliary
from unisd_megatron.mechanisms.objective import LossSettings


def without_tf32() -> None:
    """Products in fp32 of this process are fp32. On GPUs they may be TF32, with ten bits of mantissa, and NVIDIA's
    containers switch that on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


@dataclass(frozen=True)
class Said:
    """What a model says about one completion behind one prompt, at its T tokens."""

    logits: Tensor  # [T, V] fp64
    hidden: Tensor  # [T, h] fp64


def read(model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Said:
    """A `transformers` model on one sequence alone."""
    ids = torch.tensor([[*prompt, *completion]])
    hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    return Said(model.lm_head(hidden), hidden)


def step_loss(
    heard: Sequence[Mapping[str, Said]], samples: Sequence[Sample], settings: LossSettings, mask_truncated: bool
) -> Tensor:
    """The corrected loss over all samples of a global batch; a scalar with a gradient to the student.

    Args: heard: what is said behind each view of each sample: by the student behind its own, else by the teacher.
    """
    skip = settings.skipped_tokens
    kept = [
        i
        for i, s in enumerate(samples)
        if s.counts and not (mask_truncated and s.completion.finish_reason == "length") and len(s.completion.token_ids) > skip
    ]
    tokens = {i: torch.tensor(samples[i].completion.token_ids[skip:]) for i in kept}
    heard = [{name: Said(said.logits[skip:], said.hidden[skip:]) for name, said in views.items()} for views in heard]
    token_weights, sequence_weights = _agreement({i: heard[i] for i in kept}, tokens, settings)
    total = torch.zeros((), dtype=torch.float64)
    for i in kept:
        of_student, of_teacher = heard[i][STUDENT], heard[i][TEACHER]
        if settings.likelihood:
            total = total - log_prob(of_student.logits, tokens[i], 1.0).mean() / len(kept)
            continue
        entries = contributions(of_student.logits, of_teacher.logits, settings.alpha, settings.temperature)
        value = (entries if settings.entry_clip is None else entries.clamp(max=settings.entry_clip)).sum(-1)
        if settings.token_clip is not None:
            value = value.clamp(max=settings.token_clip)
        ratio = torch.ones_like(value)
        if settings.importance_cap is not None and samples[i].completion.log_probs:
            sampled = log_prob(of_student.logits.detach(), tokens[i], settings.temperature)
            ratio = (sampled - torch.tensor(samples[i].completion.log_probs[skip:])).exp().clamp(max=settings.importance_cap)
        weights = token_weights[i]
        main = (weights * ratio * value).sum() / weights.sum()
        total = total + settings.divergence_weight * sequence_weights[i] * main / sum(sequence_weights.values())
        if settings.contrastive_weight:
            s, p, n = (
                log_prob(said.logits, tokens[i], settings.temperature) for said in (of_student, of_teacher, heard[i][NEGATIVE])
            )
            hinge = (settings.contrastive_margin + (s - p).abs() - (s - n).abs()).clamp(min=0)
            total = total + settings.contrastive_weight * (ratio * hinge).mean() / len(kept)
        if settings.matching_weight:
            feature = (ratio * (of_student.hidden - of_teacher.hidden).pow(2).mean(-1)).mean()
            total = total + settings.matching_weight * feature / len(kept)
    return total


def log_prob(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1)[torch.arange(len(tokens)), tokens]


def contributions(student: Tensor, teacher: Tensor, alpha: float, temperature: float) -> Tensor:
    """What each entry of the vocabulary contributes to the divergence, `[T, V]`."""
    log_s, log_t = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if alpha == 0:
        return log_t.exp() * (log_t - log_s)
    if alpha == 1:
        return log_s.exp() * (log_s - log_t)
    log_m = ((1 - alpha) * log_s.exp() + alpha * log_t.exp()).log()
    return alpha * log_t.exp() * (log_t - log_m) + (1 - alpha) * log_s.exp() * (log_s - log_m)


def _agreement(
    heard: Mapping[int, Mapping[str, Said]], tokens: Mapping[int, Tensor], settings: LossSettings
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Token weights inside each sequence, and weights of the sequences."""
    one = torch.ones((), dtype=torch.float64)
    token_weights = {i: torch.ones(len(ids), dtype=torch.float64) for i, ids in tokens.items()}
    sequence_weights = dict.fromkeys(tokens, one)
    if settings.agreement is None or settings.gamma <= 0:
        return token_weights, sequence_weights
    views = {
        i: torch.stack([log_prob(heard[i][auxiliary(k)].logits, ids, 1.0) for k in range(settings.views)])
        for i, ids in tokens.items()
    }
    if settings.agreement == "sequence":
        means = {i: view.mean(1) for i, view in views.items()}
        spread = {
            i: m.max() - m.min() if settings.agreement_stat == "range" else m.var(unbiased=False) for i, m in means.items()
        }
        return token_weights, {i: (-settings.gamma * d).exp().clamp(min=1e-6) for i, d in spread.items()}
    if settings.agreement_stat == "range":
        spreads = {i: view.max(0).values - view.min(0).values for i, view in views.items()}
    else:
        spreads = {i: view.var(0, unbiased=True) for i, view in views.items()}
    scale = torch.cat(list(spreads.values())).quantile(0.95).clamp(min=1e-6)
    weights = {i: (1 / (1 + settings.gamma * (d / scale).clamp(max=10))).clamp(min=0.01) for i, d in spreads.items()}
    return weights, sequence_weights
