"""Golden vectors of the released loss: raw logits in, the authors' numbers out, reproduced by `semantics="released"`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisd_megatron.errors import DataError
from unisd_megatron.grid import Axis
from unisd_megatron.losses import token_divergence, token_entropy, token_log_probs
from unisd_megatron.mechanisms import feature_distance
from unisd_megatron.mechanisms.objective import Heard, LossSettings, Objective, TokenStats, loss_settings
from unisd_megatron.mechanisms.tally import Tally
from unisd_megatron.resolve import resolve

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Reproduction:
    """One golden case: its name and the largest absolute difference of each of its outputs."""

    name: str
    errors: dict[str, float]


def reproduce(path: Path) -> list[Reproduction]:
    """All cases of a file. Raises `DataError` if it is not a golden-vector file."""
    try:
        golden = json.loads(path.read_text())
        return [_reproduce(golden, case) for case in golden["cases"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a golden-vector file ({type(error).__name__}: {error})") from error


def _reproduce(golden: dict[str, Any], case: dict[str, Any]) -> Reproduction:
    settings = _settings(golden, case)
    stats, heard = _inputs(golden, settings)
    objective, tally = Objective(settings, Axis()), Tally()
    (shares,) = objective.prepare([heard])
    loss = objective.share_of_loss(stats, shares, tally)
    metrics = tally.read()
    found: dict[str, Any] = {
        "loss": loss,
        "kl_approx": metrics["kl_approx"],
        "entropy": metrics["entropy"],
        "agreement_weights": shares.weights * heard.mask if settings.agreement == "sequence" else shares.weights,
        "disagreement": shares.disagreement,
    }
    if settings.contrastive_weight:
        found["contrastive/loss"] = (
            metrics["loss/contrastive"] / settings.contrastive_weight if "loss/contrastive" in metrics else loss
        )
    if settings.matching_weight:
        found["final_layer_distill/loss"] = metrics.get("loss/matching", metrics["loss"]) / settings.matching_weight
    return Reproduction(
        f"{case['mode']} {case['params']}",
        {name: _error(found[name], case[name]) for name in case if name not in ("mode", "params")},
    )


def _error(found: Any, expected: Any) -> float:
    return float((torch.as_tensor(found).double() - torch.as_tensor(expected, dtype=torch.float64)).abs().max())


def _settings(golden: dict[str, Any], case: dict[str, Any]) -> LossSettings:
    # In the golden cases of mode `clip`, a ceiling that is not given is off.
    flags = {"mode": case["mode"], "model_name": "golden", "semantics": "released", "temperature": golden["temperature"]}
    ceiling = {"token_clip": None} if case["mode"] == "clip" else {}
    agreement = {"num_auxiliary_contexts": golden["K"]} if case["mode"].startswith(("agreement", "unisd")) else {}
    return loss_settings(resolve({**flags, **ceiling, **agreement, **case["params"]}, {}))


def _inputs(golden: dict[str, Any], settings: LossSettings) -> tuple[TokenStats, Heard]:
    def tensor(name: str) -> Tensor:
        return torch.tensor(golden[name], dtype=torch.float32)

    ids, mask = torch.tensor(golden["completion_ids"]), torch.tensor(golden["completion_mask"]).bool()
    student, teacher = tensor("student_logits"), tensor("teacher_logits")
    cool = settings.temperature
    stats = TokenStats(
        divergence=token_divergence(student, teacher, alpha=settings.alpha, temperature=cool),
        student_log_probs=token_log_probs(student, ids, temperature=cool),
        teacher_log_probs=token_log_probs(teacher, ids, temperature=cool),
        entropy=token_entropy(student, temperature=cool),
        feature=feature_distance(tensor("student_hidden"), tensor("teacher_hidden")) if settings.matching_weight else None,
    )
    auxiliary = torch.stack([token_log_probs(view, ids) for view in tensor("aux_teacher_logits")])
    return stats, Heard(mask, mask, auxiliary, token_log_probs(tensor("bad_teacher_logits"), ids, temperature=cool))
