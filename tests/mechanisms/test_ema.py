"""The teacher really moves, by the closed form, in fp32, and never silently averages over nothing."""

from __future__ import annotations

import math

import pytest
import torch

from unisd_megatron.mechanisms import mix_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_closed_form_after_n_mixes(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=g)
    student = torch.randn(50, generator=g).to(dtype)
    master = start.clone()
    for _ in range(40):
        mix_([master], [student], 0.9)
    expected = 0.9**40 * start.double() + (1 - 0.9**40) * student.double()
    # Each mix rounds to fp32 (6e-8 of |x| < 3) and the next ones forget a tenth of it: at most ten roundings stand.
    torch.testing.assert_close(master.double(), expected, rtol=0, atol=2e-6)
    assert master.dtype == torch.float32


def test_small_steps_arrive_where_bf16_stalls() -> None:
    """unisd.md 1.8: 40 mixes toward a student 1e-4 away; the released form keeps the average in bf16."""
    g = torch.Generator().manual_seed(0)
    start = (torch.randn(10_000, generator=g) * 0.02).bfloat16()
    student = start.float() + 1e-4 * torch.randn(10_000, generator=g)
    master, released = start.float(), start.clone()
    for _ in range(40):
        mix_([master], [student], 0.9)
        released.mul_(0.9).add_(student.bfloat16(), alpha=0.1)
    ideal, distance = 1 - 0.9**40, student - start.float()

    def moved(average: torch.Tensor) -> float:
        return float(((average.float() - start.float()) * distance).sum() / (distance * distance).sum())

    assert moved(master) == pytest.approx(ideal, abs=1e-3)
    assert moved(released) < 0.8 * ideal


def test_equal_tensors_stay_bit_equal_and_the_ends_are_exact() -> None:
    x, other = torch.randn(1000), torch.randn(1000)
    master = x.clone()
    for beta in (0.1, 0.5, 0.9, 0.999):
        mix_([master], [x], beta)
        assert torch.equal(master, x)
    mix_([master], [other], 1.0)
    assert torch.equal(master, x)
    mix_([master], [other], 0.0)
    assert torch.equal(master, other)


def test_works_in_place_on_parameters_and_generators() -> None:
    model = torch.nn.Linear(3, 2)
    masters = [p.detach().clone().zero_() for p in model.parameters()]
    pointers = [m.data_ptr() for m in masters]
    mix_((m for m in masters), model.parameters(), 0.75)
    assert [m.data_ptr() for m in masters] == pointers and not any(m.requires_grad for m in masters)
    for m, p in zip(masters, model.parameters(), strict=True):
        torch.testing.assert_close(m, 0.25 * p.detach())


@pytest.mark.parametrize(
    ("masters", "students", "beta", "message"),
    [
        ([], [], 0.9, "got 0 masters and 0 students"),
        ([torch.zeros(2)], [], 0.9, "got 1 masters and 0 students"),
        ([torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(2)], 0.9, r"tensor 1: master \(3,\) and student \(2,\)"),
        ([torch.zeros(2), torch.zeros(2).bfloat16()], [torch.ones(2)] * 2, 0.9, "tensor 1: a moving average must be kept"),
        ([torch.zeros(2)], [torch.ones(2)], 1.1, r"lies in \[0, 1\]"),
        ([torch.zeros(2)], [torch.ones(2)], math.nan, r"lies in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_changes_nothing(masters: list, students: list, beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix_(masters, students, beta)
    assert all((m == 0).all() for m in masters)
