"""Dense fp64 oracles, written from the definitions of unisd.md 1.1-1.2, and the comparison that every parity test uses.

Nothing here knows of shards, chunks, custom gradients or the package under test: probabilities are softmaxes over the real
vocabulary, divergences are sums over it, gradients are autograd's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UPSTREAM = ("divergence", "student_log_probs", "entropy")


def log_softmax(logits: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    return torch.log_softmax(logits.double()[..., :vocab_size] / temperature, -1)


def kl(log_p: Tensor, log_q: Tensor, entry_clip: float | None = None) -> Tensor:
    """sum p log(p/q) with 0 log 0 = 0; each summand at most entry_clip."""
    p = log_p.exp()
    return _clipped(torch.where(p == 0, 0, p * (log_p - log_q)), entry_clip).sum(-1)


def _clipped(entries: Tensor, entry_clip: float | None) -> Tensor:
    return entries if entry_clip is None else entries.clamp(max=entry_clip)


def divergence(student: Tensor, teacher: Tensor, alpha: float, entry_clip: float | None = None) -> Tensor:
    """From log-probabilities [..., V]; each entry of the vocabulary contributes at most entry_clip."""
    if alpha == 0:
        return kl(teacher, student, entry_clip)
    if alpha == 1:
        return kl(student, teacher, entry_clip)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    if entry_clip is None:
        return alpha * kl(teacher, mixture) + (1 - alpha) * kl(student, mixture)
    entries = alpha * teacher.exp() * (teacher - mixture) + (1 - alpha) * student.exp() * (student - mixture)
    return _clipped(entries, entry_clip).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -torch.where(p == 0, 0, p * log_p).sum(-1)


@dataclass(frozen=True)
class Answer:
    """Values by name, each [...], and the gradient of sum(upstream * value) with respect to each input by name."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    upstream: dict[str, Tensor],
    *,
    alpha: float,
    temperature: float,
    vocab_size: int | None,
    entry_clip: float | None = None,
) -> Answer:
    """Everything the losses promise, and its gradient with respect to the student's logits."""
    leaf = student_logits.detach().double().requires_grad_()
    values = _values(leaf, teacher_logits, token_ids, alpha, temperature, vocab_size, entry_clip)
    (gradient,) = torch.autograd.grad(sum((values[k] * u.double()).sum() for k, u in upstream.items()), leaf)
    return Answer({k: v.detach() for k, v in values.items()}, {"logits": gradient})


def from_hidden(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    token_ids: Tensor,
    upstream: dict[str, Tensor],
    *,
    alpha: float,
    temperature: float,
    vocab_size: int | None,
    entry_clip: float | None = None,
) -> Answer:
    """The same from hidden states and full heads; gradients with respect to the student's hidden states and head."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, head)]
    logits, teacher_logits = leaves[0] @ leaves[1].t(), teacher_hidden.double() @ teacher_head.double().t()
    values = _values(logits, teacher_logits, token_ids, alpha, temperature, vocab_size, entry_clip)
    gradients = torch.autograd.grad(sum((values[k] * u.double()).sum() for k, u in upstream.items()), leaves)
    return Answer({k: v.detach() for k, v in values.items()}, dict(zip(("hidden", "head"), gradients, strict=True)))


def _values(
    logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    alpha: float,
    temperature: float,
    vocab_size: int | None,
    entry_clip: float | None,
) -> dict[str, Tensor]:
    student, teacher = (log_softmax(x, temperature, vocab_size) for x in (logits, teacher_logits))
    return {
        "divergence": divergence(student, teacher, alpha, entry_clip),
        "student_log_probs": student.gather(-1, token_ids[..., None])[..., 0],
        "teacher_log_probs": teacher.gather(-1, token_ids[..., None])[..., 0],
        "entropy": entropy(student),
    }


def error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest entry expected (or to 1e-3, where all are nearly zero).

    inf for a nan, a wrong shape, or an infinity on one side only.
    """
    if found.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    found, expected = found.double(), expected.double()
    deviation = torch.where(found == expected, 0, (found - expected).abs())  # inf where inf is expected
    scale = expected[expected.isfinite()].abs().max().clamp(min=1e-3) if expected.isfinite().any() else torch.tensor(1.0)
    worst = float((deviation / scale).max())
    return worst if worst == worst else float("inf")


def compare(found: Answer, expected: Answer) -> dict[str, float]:
    """Error of each value and gradient that was found; the one comparison for real and for broken implementations."""
    values = {k: error(v, expected.values[k]) for k, v in found.values.items()}
    return values | {f"d/d{k}": error(v, expected.gradients[k]) for k, v in found.gradients.items()}


def assert_equal(found: Answer, expected: Answer, tolerance: float) -> None:
    wrong = {k: e for k, e in compare(found, expected).items() if not e <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def cut(full: Tensor, rank: int, size: int, width: int, padding: float, dim: int = -1) -> Tensor:
    """This rank's `width` columns of `full` along `dim`; columns past its end hold `padding`."""
    total = width * size
    full = full.movedim(dim, -1)
    padded = full.new_full((*full.shape[:-1], total), padding)
    padded[..., : full.shape[-1]] = full
    return padded[..., rank * width : (rank + 1) * width].movedim(-1, dim).clone().contiguous()
