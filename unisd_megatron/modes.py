"""The values of `--mode` as one table: what each switches on, with the defaults of UniSD's direct command. No torch here.

`vanilla` is the control that the paper lacks: on-policy forward KL from the frozen teacher, nothing else. `BASELINES` are other
authors' methods, with the defaults of their papers or code: docs/baselines.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Mode:
    """One row: the mechanisms that have no weight of their own, and default values of settings."""

    agreement: Literal["token", "sequence"] | None = None
    matching: bool = False
    divergence_weight: float = 1.0
    likelihood: bool = False
    """The loss is the negative log-likelihood of the completion's tokens; there is no teacher."""

    completions: Literal["student", "reference", "mixed", "starting"] = "student"
    """What is trained on: the student's samples, references, a share of each, or samples of the starting model."""

    defaults: Mapping[str, Any] = field(default_factory=dict)


_FROZEN = {"teacher": "frozen"}
_EMA = {"teacher": "ema", "ref_model_sync_steps": 10, "ref_model_mixup_beta": 0.9}
_CONTRAST = {"contrastive_weight": 0.1, "contrastive_margin": 0.5}
_GAMMA = {"gamma_agreement": 1.0}


def _agreement(granularity: Literal["token", "sequence"], method: str) -> Mode:
    return Mode(agreement=granularity, defaults=_FROZEN | _GAMMA | {"fewshot_method": method})


MODES: dict[str, Mode] = {
    "vanilla": Mode(defaults=_FROZEN),
    "agreement_seq_random": _agreement("sequence", "random"),
    "agreement_seq_retrieval": _agreement("sequence", "retrieval"),
    "agreement_seq_induction": _agreement("sequence", "induction"),
    "agreement_tok_random": _agreement("token", "random"),
    "agreement_tok_retrieval": _agreement("token", "retrieval"),
    "agreement_tok_induction": _agreement("token", "induction"),
    "ema": Mode(defaults=_EMA),
    "contrastive": Mode(defaults=_FROZEN | _CONTRAST),
    "match_joint": Mode(matching=True, defaults=_FROZEN | {"final_layer_distill_weight": 0.1}),
    "match_repr": Mode(matching=True, divergence_weight=0.0, defaults=_FROZEN | {"final_layer_distill_weight": 1.0}),
    "clip": Mode(defaults=_FROZEN | {"token_clip": 10.0}),
    "unisd_star": Mode(
        agreement="token", matching=True, defaults=_EMA | _CONTRAST | _GAMMA | {"final_layer_distill_weight": 0.1}
    ),
}

BASELINES: dict[str, Mode] = {
    "sft": Mode(completions="reference", likelihood=True, divergence_weight=0.0),
    "sdft": Mode(
        defaults={"teacher": "ema", "ref_model_sync_steps": 1, "ref_model_mixup_beta": 0.99}
        | {"temperature": 1.0, "importance_sampling_cap": 2.0, "num_loss_tokens_to_skip": 3}
    ),
    "gkd": Mode(completions="mixed", defaults=_FROZEN | {"alpha": 0.5, "temperature": 1.0, "on_policy_share": 0.5}),
    "ssd": Mode(
        completions="starting",
        likelihood=True,
        divergence_weight=0.0,
        defaults={"temperature": 1.6, "top_p": 0.8, "top_k": 20, "sample_filter": "stubs"},
    ),
    "opsd": Mode(defaults=_FROZEN | {"entry_clip": 0.05, "temperature": 1.1, "top_p": 0.95, "top_k": 20}),
}
MODES |= BASELINES
