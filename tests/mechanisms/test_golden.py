"""Losses and mechanisms reproduce the numbers of the released trainer (tests/golden/released_loss.json, unisd.md 1.13).

The normalisation that turns tokens into a loss is written out here from unisd.md 1.5-1.7; fp32 on both sides, 2e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unisd_megatron.losses import token_divergence, token_entropy, token_log_probs
from unisd_megatron.mechanisms import agreement_weights, clip_divergence, contrastive_hinge, feature_distance

TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def tensor(golden: dict[str, Any], name: str) -> Tensor:
    return torch.tensor(golden[name])


def mean_of_means(values: Tensor, weights: Tensor) -> Tensor:
    return ((values * weights).sum(1) / weights.sum(1).clamp(min=1)).mean()


def cases_with(golden: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = [case for case in golden["cases"] if key in case or key in case["params"]]
    assert found, f"the golden file has no case with {key}"
    return found


def divergence(golden: dict[str, Any], alpha: float) -> Tensor:
    pair = tensor(golden, "student_logits"), tensor(golden, "teacher_logits")
    return token_divergence(*pair, alpha=alpha, temperature=golden["temperature"])


def log_probs(golden: dict[str, Any], name: str, temperature: float) -> Tensor:
    return token_log_probs(tensor(golden, name), tensor(golden, "completion_ids"), temperature=temperature)


def aux_log_probs(golden: dict[str, Any]) -> Tensor:
    logits = tensor(golden, "aux_teacher_logits")
    return token_log_probs(logits, tensor(golden, "completion_ids").expand(logits.shape[:-1]))


def test_divergence_and_static_clip(golden: dict[str, Any]) -> None:
    mask = tensor(golden, "completion_mask").float()
    seen = [case for case in golden["cases"] if case["mode"] == "clip"]
    assert {case["params"]["alpha"] for case in seen} == {0.0, 0.5, 1.0}
    for case in seen:
        d = divergence(golden, case["params"]["alpha"])
        if "token_clip" in case["params"]:
            d = clip_divergence(d, mask, ceiling=case["params"]["token_clip"])
        assert mean_of_means(d, mask).item() == pytest.approx(case["loss"], rel=2e-6)


def test_entropy_and_kl_approx(golden: dict[str, Any]) -> None:
    mask = tensor(golden, "completion_mask").bool()
    entropy = token_entropy(tensor(golden, "student_logits"), temperature=golden["temperature"])[mask].mean()
    gap = log_probs(golden, "teacher_logits", 0.7) - log_probs(golden, "student_logits", 0.7)
    for case in golden["cases"]:
        assert entropy.item() == pytest.approx(case["entropy"], rel=2e-6)
        assert (gap.exp() - gap - 1)[mask].mean().item() == pytest.approx(case["kl_approx"], rel=5e-6)


def test_agreement_weights_disagreement_and_loss(golden: dict[str, Any]) -> None:
    mask = tensor(golden, "completion_mask")
    for case in cases_with(golden, "agreement_weights"):
        params = case["params"]
        found = agreement_weights(
            aux_log_probs(golden),
            mask,
            granularity="sequence" if "_seq_" in case["mode"] else "token",
            statistic=params.get("agreement_stat", "var"),
            gamma=params["gamma_agreement"],
        )
        torch.testing.assert_close(found.weights, torch.tensor(case["agreement_weights"]), **TOLERANCE)
        torch.testing.assert_close(found.disagreement, torch.tensor(case["disagreement"]), rtol=5e-6, atol=2e-6)
        if case["mode"] != "unisd_star":
            assert mean_of_means(divergence(golden, 0.0), found.weights * mask).item() == pytest.approx(case["loss"], rel=5e-6)


def test_contrastive_loss(golden: dict[str, Any]) -> None:
    names = ("student_logits", "teacher_logits", "bad_teacher_logits")
    for case in cases_with(golden, "contrastive/loss"):
        hinge = contrastive_hinge(*(log_probs(golden, n, 0.7) for n in names), margin=case["params"]["contrastive_margin"])
        found = mean_of_means(hinge, tensor(golden, "completion_mask").float())
        assert found.item() == pytest.approx(case["contrastive/loss"], rel=2e-6)


def test_feature_loss(golden: dict[str, Any]) -> None:
    distance = feature_distance(tensor(golden, "student_hidden"), tensor(golden, "teacher_hidden"))
    for case in cases_with(golden, "final_layer_distill/loss"):
        found = mean_of_means(distance, tensor(golden, "completion_mask").float())
        assert found.item() == pytest.approx(case["final_layer_distill/loss"], rel=2e-6)
