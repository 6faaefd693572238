"""Divergence, log-probabilities and entropy of sharded logits equal the dense fp64 definition, in value and in gradient.

Tolerances are relative to the largest entry. fp64: 1e-12. fp32: 2e-6, a few tens of roundings of 6e-8. bf16 logits are widened
before anything is computed, so only the rounding of the returned gradient to bf16 (2^-9 relative) is added.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import loss_oracles as oracle
from loss_oracles import Answer
from unisd_megatron.losses import token_divergence, token_entropy, token_log_probs, vocab
from world import World

ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)
ROWS = (3, 5)


def make(vocab_size: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "student": (torch.randn(*ROWS, vocab_size, generator=g, dtype=torch.float64) * scale).to(dtype),
        "teacher": (torch.randn(*ROWS, vocab_size, generator=g, dtype=torch.float64) * scale).to(dtype),
        "ids": torch.randint(vocab_size, ROWS, generator=g),
        **{k: torch.randn(ROWS, generator=g, dtype=torch.float64) for k in oracle.UPSTREAM},
    }


def sharded(
    rank: int, group: dist.ProcessGroup | None, case: dict[str, Tensor], width: int, padding: float, setting: dict
) -> tuple:
    """Values and this rank's logit gradient, the divergence's upstream gradient plus those of log-probability and entropy."""
    size = 1 if group is None else dist.get_world_size(group)
    student, teacher = (oracle.cut(case[k], rank, size, width, padding) for k in ("student", "teacher"))
    student.requires_grad_()
    teacher.requires_grad_()
    shared = {k: v for k, v in setting.items() if k not in ("alpha", "entry_clip")} | {"group": group}
    values = {
        "divergence": token_divergence(student, teacher, **setting, group=group),
        "student_log_probs": token_log_probs(student, case["ids"], **shared),
        "entropy": token_entropy(student, **shared),
    }
    sum((v * case[k].to(v.dtype)).sum() for k, v in values.items()).backward()
    assert teacher.grad is None
    return {k: v.detach() for k, v in values.items()}, student.grad


def run(world: World, size: int, case: dict[str, Tensor], width: int, padding: float = math.nan, **setting: object) -> Answer:
    """The answer of `size` shards put together; the ranks must agree bit for bit on every value."""
    setting = {"vocab_size": case["student"].shape[-1]} | setting
    results = world.run(size, sharded, case, width, padding, setting)
    for values, _ in results[1:]:
        assert all(torch.equal(values[k], results[0][0][k]) for k in values)
    gradient = torch.cat([g for _, g in results], -1)
    real = setting["vocab_size"]
    assert (gradient[..., real:] == 0).all(), "padding columns must have exactly zero gradient"
    return Answer(results[0][0], {"logits": gradient[..., :real]})


def expected(case: dict[str, Tensor], alpha: float, temperature: float = 1.0) -> Answer:
    upstream = {k: case[k] for k in oracle.UPSTREAM}
    return oracle.from_logits(
        case["student"], case["teacher"], case["ids"], upstream, alpha=alpha, temperature=temperature, vocab_size=None
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)], ids=str
)
def test_equals_the_dense_definition(world: World, size: int, alpha: float, dtype: torch.dtype, tolerance: float) -> None:
    case = make(44, dtype)
    found = run(world, size, case, 44 // size, alpha=alpha, temperature=0.7)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(v.dtype == want for v in found.values.values()) and found.gradients["logits"].dtype == dtype
    errors = oracle.compare(found, expected(case, alpha, 0.7))
    assert errors.pop("d/dlogits") <= tolerance
    assert max(errors.values()) <= min(tolerance, 2e-6), errors  # values never suffer from half-precision inputs


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e30, 0.0])
@pytest.mark.parametrize(("real", "width"), [(11, 3), (5, 3), (2, 3), (1, 1)])
def test_padding_counts_for_nothing_whatever_it_holds(world: World, real: int, width: int, padding: float) -> None:
    """Four shards; with 5 of 12 columns real, one shard is half padding and two are nothing else."""
    for alpha in (0.0, 0.3, 1.0):
        case = make(real, torch.float64)
        oracle.assert_equal(run(world, 4, case, width, padding, alpha=alpha), expected(case, alpha), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_student_equal_to_teacher_is_exactly_zero(world: World, size: int, dtype: torch.dtype, alpha: float) -> None:
    case = make(1504, dtype, scale=6.0)
    case["teacher"] = case["student"]
    for key in ("student_log_probs", "entropy"):
        case[key] = torch.zeros(ROWS)
    found = run(world, size, case, 1504 // size, alpha=alpha, temperature=0.7)
    assert (found.values["divergence"] == 0).all() and (found.gradients["logits"] == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_near_agreement_the_error_is_relative(alpha: float) -> None:
    """Student = teacher + 1e-3 noise in fp32, divergences near 4e-7: the plain formula in fp32 is off by more than it is."""
    teacher = make(5000, torch.float32)["teacher"]
    student = teacher + 1e-3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    truth = oracle.divergence(oracle.log_softmax(student, 1, None), oracle.log_softmax(teacher, 1, None), alpha)
    relative = (token_divergence(student, teacher, alpha=alpha) / truth - 1).abs().max()
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    m = s if alpha == 0 else t if alpha == 1 else torch.logaddexp(s + math.log(1 - alpha), t + math.log(alpha))
    plain = alpha * (t.exp() * (t - m)).sum(-1) + (1 - alpha) * (s.exp() * (s - m)).sum(-1)
    plain = {0: (t.exp() * (t - s)).sum(-1), 1: (s.exp() * (s - t)).sum(-1)}.get(alpha, plain)
    assert relative < 3e-3 and (plain / truth - 1).abs().max() > 10 * relative


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_huge_logits_survive(world: World, size: int, alpha: float) -> None:
    """Entries of +-1e4, exact in fp32 with their differences, in either model; ties at the top included."""
    case = make(16, torch.float32)
    for k, shift in (("student", 0), ("teacher", 3)):
        case[k][..., shift::4] = 1e4
        case[k][..., shift + 1 :: 5] = -1e4
    oracle.assert_equal(run(world, size, case, 16 // size, alpha=alpha), expected(case, alpha), 2e-6)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_minus_infinity_is_probability_zero(world: World, size: int, alpha: float) -> None:
    """The oracle sees -1000 instead, whose probability is 0 in fp64; where a KL is infinite, inf is what comes out."""
    case = make(8, torch.float32)
    case["student"][..., 5] = case["teacher"][..., 5] = -math.inf  # both
    case["student"][0, ..., :2] = -math.inf  # a whole shard of four, student only
    case["teacher"][1, ..., 2:4] = -math.inf  # another one, teacher only
    case["student"][2, :, 0], case["teacher"][2, :, 0] = -300.0, -math.inf  # 0 in fp32 by underflow against 0 exactly:
    case["student"][2, :, 4], case["teacher"][2, :, 4] = -math.inf, -300.0  # contributes nothing, either way round
    case["ids"][:] = 6
    found = run(world, size, case, 8 // size, alpha=alpha)
    finite = {k: v.nan_to_num(neginf=-1e3) if k in ("student", "teacher") else v for k, v in case.items()}
    want = expected(finite, alpha)
    infinite = {0.0: 0, 1.0: 1}.get(alpha)
    if infinite is not None:
        assert (found.values["divergence"][infinite] == math.inf).all()
        want.values["divergence"][infinite] = math.inf
    if alpha == 1:  # an infinite KL(S||T) has no derivative in s: its rows carry those of the other two terms only
        only = {k: v.clone() for k, v in finite.items()}
        only["divergence"][1] = 0
        want.gradients["logits"][1] = expected(only, alpha).gradients["logits"][1]
    oracle.assert_equal(found, want, 2e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_equals_finite_differences(alpha: float) -> None:
    case = make(7, torch.float64, scale=1.0)
    shared = {"temperature": 0.7, "vocab_size": 6}
    student, ids = case["student"].requires_grad_(), case["ids"] % 6
    assert torch.autograd.gradcheck(lambda x: token_divergence(x, case["teacher"], alpha=alpha, **shared), student)
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, ids, **shared), student)
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, **shared), student)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(40, torch.float64)
    monkeypatch.setattr(vocab, "BLOCK_LOGITS", 90)  # two rows of 40 at a time, 15 rows
    for alpha in ALPHAS:
        values, gradient = sharded(0, None, case, 40, 0.0, {"alpha": alpha})
        oracle.assert_equal(Answer(values, {"logits": gradient}), expected(case, alpha), 1e-12)


def test_layout_of_the_tensor_does_not_matter() -> None:
    """Strided logits are computed like contiguous ones, bit for bit, so that equal values stay exactly zero."""
    x = torch.randn(9, 33)
    strided = torch.randn(33, 9).t().copy_(x)
    assert not strided.is_contiguous()
    for alpha in ALPHAS:
        assert (token_divergence(strided, x, alpha=alpha) == 0).all()


def test_jsd_is_symmetric_at_a_half_and_bounded() -> None:
    case = make(20, torch.float32, scale=30.0)
    pair = case["student"], case["teacher"]
    there, back = token_divergence(*pair, alpha=0.5), token_divergence(*pair[::-1], alpha=0.5)
    assert torch.allclose(there, back, rtol=1e-6) and there.max() <= math.log(2) + 1e-6


def test_empty_and_single_rows() -> None:
    logits = torch.randn(0, 5, requires_grad=True)
    result = token_divergence(logits, torch.randn(0, 5), alpha=0.5)
    result.sum().backward()
    assert result.shape == (0,) and logits.grad.shape == (0, 5)
    assert token_divergence(torch.randn(5), torch.randn(5), alpha=0.0).shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\]"),
        ({"alpha": math.nan}, r"alpha must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"vocab_size": 6}, r"vocab_size 6 must lie in 1\.\.5"),
        ({"vocab_size": 0}, r"vocab_size 0 must lie in 1\.\.5"),
        ({"teacher_logits": torch.zeros(2, 4)}, "must have one shape"),
    ],
)
def test_wrong_requests_are_one_line(change: dict, message: str) -> None:
    request = {"student_logits": torch.zeros(2, 5), "teacher_logits": torch.zeros(2, 5), "alpha": 0.5} | change
    with pytest.raises(ValueError, match=message) as caught:
        token_divergence(**request)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[-1, 0], [0, 4], [-100, 0]])
def test_tokens_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.3"):
        token_log_probs(torch.zeros(2, 5), torch.tensor(ids), vocab_size=4)
    with pytest.raises(ValueError, match="must match the rows"):
        token_log_probs(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
