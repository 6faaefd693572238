"""The loss's paths against their definition: dense, fp64, gradients by autograd. Prints one line of JSON.

`python -m unisd_megatron.selftest.kernels '{"paths": ["fused_torch"], "dtypes": ["float32"], "shapes": [[64, 5003, 48]]}'`
A path is `materialized`, `fused_torch` or `triton`; a shape tokens, vocabulary, width. Computed on the GPU if there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from unisd_megatron.losses import FusedDivergence, fused_divergence
from unisd_megatron.losses.readout import Readout, compare
from unisd_megatron.parity import oracle

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest relative error: of a value against 1 + what it should be, of a gradient by its norm."""

PADDING = 5
ALPHAS = (0.0, 0.3, 1.0)
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Case:
    """One comparison; `tokens` x `vocab_size` logits of width `hidden`."""

    path: str
    dtype: str
    alpha: float
    tokens: int
    vocab_size: int
    hidden: int


@dataclass(frozen=True)
class Error:
    """The worst value, the worse of the gradients of hidden states and head, and whether both are within the tolerance."""

    value: float
    gradient: float
    holds: bool


def measure(case: Case, device: torch.device) -> Error:
    """Random hidden states and heads with rows of padding, which hold nan where a path never multiplies by them.

    Every result of the loss receives a gradient.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, case.hidden, generator=generator) * scale

    heads = [normal(case.vocab_size + PADDING, case.hidden**-0.5) for _ in range(2)]
    for head in heads:
        head[case.vocab_size :] = 9.0 if case.path == "materialized" else torch.nan
    inputs = [normal(case.tokens, 2.0), heads[0], normal(case.tokens, 2.0), heads[1]]
    inputs = [one.to(device, getattr(torch, case.dtype)) for one in inputs]
    ids = torch.randint(case.vocab_size, (case.tokens,), generator=generator).to(device)
    upstream = torch.rand(3, case.tokens, generator=generator, dtype=torch.float64).to(device)
    found, found_gradients = _with_gradients(_computed(case, inputs, ids), inputs[:2], upstream)
    expected, gradients = _with_gradients(_defined(case, inputs, ids), inputs[:2], upstream)
    value = max(float(((one - want).abs() / (1 + want.abs())).max()) for one, want in zip(found, expected, strict=True))
    pairs = zip(found_gradients, gradients, strict=True)
    gradient = max(float((one.double() - want.double()).norm() / want.double().norm()) for one, want in pairs)
    tolerance = TOLERANCE[case.dtype]
    return Error(value, gradient, value <= tolerance and gradient <= tolerance)


def _computed(case: Case, inputs: Sequence[Tensor], ids: Tensor) -> FusedDivergence:
    _leaves(inputs)
    alpha, real = case.alpha, case.vocab_size
    if case.path == "triton":  # by name: "auto" would take plain torch where there is no GPU
        return fused_divergence(*inputs, token_ids=ids, alpha=alpha, temperature=TEMPERATURE, vocab_size=real, kernels="triton")
    student, teacher = Readout(*inputs[:2]), Readout(*inputs[2:])
    return compare(
        student,
        teacher,
        token_ids=ids,
        alpha=alpha,
        temperature=TEMPERATURE,
        vocab_size=real,
        group=None,
        path=case.path,
    )


def _defined(case: Case, inputs: Sequence[Tensor], ids: Tensor) -> FusedDivergence:
    _leaves(inputs)
    student, teacher = _logits(inputs[0], inputs[1], case), _logits(inputs[2], inputs[3], case)
    log_probs = (student / TEMPERATURE).log_softmax(-1)
    return FusedDivergence(
        divergence=oracle.contributions(student, teacher.detach(), case.alpha, TEMPERATURE).sum(-1),
        student_log_probs=oracle.log_prob(student, ids, TEMPERATURE),
        teacher_log_probs=oracle.log_prob(teacher.detach(), ids, TEMPERATURE),
        entropy=-(log_probs.exp() * log_probs).sum(-1),
    )


def _logits(hidden: Tensor, head: Tensor, case: Case) -> Tensor:
    """fp64; in half precision rounded as the model's own output layer would, which the gradient does not see."""
    exact = hidden.double() @ head[: case.vocab_size].double().t()
    return exact if case.dtype == "float32" else exact + (exact.to(hidden.dtype).double() - exact).detach()


def _leaves(inputs: Sequence[Tensor]) -> None:
    for one in inputs[:2]:
        one.requires_grad_()


def _with_gradients(
    said: FusedDivergence, leaves: Sequence[Tensor], upstream: Tensor
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    learned = [said.divergence.double(), said.student_log_probs.double(), said.entropy.double()]
    gradients = torch.autograd.grad((torch.stack(learned) * upstream).sum(), list(leaves))
    return [one.detach() for one in (*learned, said.teacher_log_probs.double())], gradients


def main(paths: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
    oracle.without_tf32()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for dtype in dtypes:
        for shape in shapes:
            for path in paths:
                for alpha in ALPHAS:
                    case = Case(path, dtype, alpha, *shape)
                    rows.append(asdict(case) | asdict(measure(case, device)))
    print(json.dumps({"rows": rows, "tolerance": TOLERANCE}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
