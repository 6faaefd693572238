"""The loss of each baseline, and its gradient, against its paper's formula written out by hand in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unisd_megatron.grid import Axis
from unisd_megatron.losses import enter_shards
from unisd_megatron.losses.readout import Readout, compare, sampled_log_probs
from unisd_megatron.mechanisms.objective import Heard, Objective, TokenStats, loss_settings
from unisd_megatron.mechanisms.tally import Tally
from unisd_megatron.resolve import resolve

LENGTHS, WIDTH, VOCAB = (5, 4, 2), 5, 11
TOKENS = sum(LENGTHS)


class Case:
    """Three completions of 5, 4 and 2 tokens: hidden states [N, 6], heads [V, 6], tokens [N], engine's log-probs [N]."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.hidden = normal(TOKENS, 6).requires_grad_()
        self.head, self.teacher_hidden, self.teacher_head = normal(VOCAB, 6), normal(TOKENS, 6), normal(VOCAB, 6)
        self.ids = torch.randint(VOCAB, (TOKENS,), generator=g)
        self.engine = -3 * torch.rand(TOKENS, generator=g, dtype=torch.float64)

    def log_probs(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Dense log S and log T, [N, V]."""
        student, teacher = self.hidden @ self.head.t(), self.teacher_hidden @ self.teacher_head.t()
        return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)

    def mean(self, values: Tensor, skip: int = 0) -> Tensor:
        """Over the tokens of each sequence from `skip` on, then over the sequences that have one."""
        parts = [part[skip:].mean() for part in values.split(LENGTHS) if part.numel() > skip]
        return torch.stack(parts).mean()


def product(case: Case, mode: str, path: str, **flags: Any) -> Tensor:
    """The loss as the objective composes it from what the losses say."""
    settings = loss_settings(resolve({"mode": mode, "model_name": "m", "loss_path": path, **flags}, {}))
    steps = torch.arange(WIDTH)
    present = steps < torch.tensor(LENGTHS)[:, None]
    mask = present & (steps >= settings.skipped_tokens)

    def placed(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(present, values) * mask

    student = Readout(enter_shards(case.hidden, None), case.head)
    shared: dict[str, Any] = {"token_ids": case.ids, "temperature": settings.temperature, "vocab_size": VOCAB, "group": None}
    if settings.likelihood:
        stats = TokenStats(placed(sampled_log_probs(student, path=path, **shared)))
    else:
        teacher = Readout(case.teacher_hidden, case.teacher_head)
        said = compare(student, teacher, alpha=settings.alpha, path=path, entry_clip=settings.entry_clip, **shared)
        importance = None
        if settings.importance_cap is not None:
            importance = (said.student_log_probs.detach() - case.engine).exp().clamp(max=settings.importance_cap)
        stats = TokenStats(
            *(placed(x) for x in (said.student_log_probs, said.divergence, said.teacher_log_probs, said.entropy)),
            importance=None if importance is None else placed(importance),
        )
    objective = Objective(settings, Axis())
    (shares,) = objective.prepare([Heard(mask, mask)])
    return objective.share_of_loss(stats, shares, Tally())


def sft(case: Case) -> Tensor:
    log_s, _ = case.log_probs(1.0)
    return case.mean(-log_s[torch.arange(TOKENS), case.ids])


def sdft(case: Case) -> Tensor:
    """KL(T || S), times min(S/engine, 2), from the fourth token on: the third sequence has none."""
    log_s, log_t = case.log_probs(1.0)
    ratio = (log_s.detach()[torch.arange(TOKENS), case.ids] - case.engine).exp()
    assert (ratio > 2).any() and (ratio < 2).any()
    return case.mean(ratio.clamp(max=2.0) * (log_t.exp() * (log_t - log_s)).sum(-1), skip=3)


def gkd(case: Case) -> Tensor:
    log_s, log_t = case.log_probs(1.0)
    log_m = (0.5 * log_s.exp() + 0.5 * log_t.exp()).log()
    return case.mean((0.5 * log_t.exp() * (log_t - log_m) + 0.5 * log_s.exp() * (log_s - log_m)).sum(-1))


def opsd(case: Case) -> Tensor:
    log_s, log_t = case.log_probs(1.1)
    entries = log_t.exp() * (log_t - log_s)
    assert (entries > 0.05).any()
    return case.mean(entries.clamp(max=0.05).sum(-1))


FORMULAS: dict[str, Callable[[Case], Tensor]] = {"sft": sft, "sdft": sdft, "gkd": gkd, "ssd": sft, "opsd": opsd}


@pytest.mark.parametrize("path", ["materialized", "fused_torch"])
@pytest.mark.parametrize("mode", FORMULAS)
def test_loss_and_gradient_are_the_papers(mode: str, path: str) -> None:
    case = Case()
    expected, found = FORMULAS[mode](case), product(case, mode, path)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, case.hidden)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_a_likelihood_has_no_teacher_to_read() -> None:
    for mode in ("sft", "ssd"):
        assert loss_settings(resolve({"mode": mode, "model_name": "m"}, {})).teacher_views == {}
    assert len(loss_settings(resolve({"mode": "gkd", "model_name": "m"}, {})).teacher_views) == 1
