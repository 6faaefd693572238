"""The published settings of every mode, as the direct command and as the authors' orchestrator state them. No torch.

One table; `examples/recipes/` holds what it gives, a file for each. A recipe is of a 7B, whose batch is 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from unisd_megatron.modes import MODES

Launch = Literal["direct", "orchestrator"]
Semantics = Literal["corrected", "released"]
LAUNCHES: tuple[Launch, ...] = ("direct", "orchestrator")
SEMANTICS: tuple[Semantics, ...] = ("corrected", "released")

COMMON: Mapping[str, Any] = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "num_train_epochs": 1.0,
    "temperature": 0.7,
    "global_batch_size": 16,
}
LENGTHS: Mapping[Launch, Mapping[str, int]] = {
    "direct": {"max_prompt_length": 1024, "max_completion_length": 2048},
    "orchestrator": {"max_prompt_length": 3072, "max_completion_length": 1024},
}
MACHINE: Mapping[str, Any] = {
    "model_name": "Qwen/Qwen2.5-7B-Instruct",
    "dataset": "scienceqa",
    "micro_batch_size": 4,
    "bf16": True,
    "use_vllm": True,
    "vllm_gpu_memory_utilization": 0.3,
}
"""What the published runs were made with; not a part of the method."""
_MICRO_BATCHES = 4  # to an optimizer step, in every published run

_EMA = {"ref_model_sync_steps": 10, "ref_model_mixup_beta": 0.9}
_K = {"num_auxiliary_contexts": 3}
_WRITTEN = {"negatives": "generated"}  # a model wrote them for every data set; a task's rule would be the default
_OWN: Mapping[str, Mapping[Launch, Mapping[str, Any]]] = {
    "ema": {"direct": _EMA, "orchestrator": _EMA},
    "contrastive": dict.fromkeys(LAUNCHES, {"contrastive_weight": 0.1, "contrastive_margin": 0.5, **_WRITTEN}),
    "match_joint": dict.fromkeys(LAUNCHES, {"final_layer_distill_weight": 0.1}),
    "clip": dict.fromkeys(LAUNCHES, {"token_clip": 10.0, "alpha": 0.0}),
    "unisd_star": {
        "direct": {
            **_K,
            "fewshot_method": "retrieval",
            "gamma_agreement": 1.0,
            "contrastive_weight": 0.1,
            "contrastive_margin": 0.5,
            **_WRITTEN,
            "final_layer_distill_weight": 0.1,
            **_EMA,
        },
        "orchestrator": {
            **_K,
            "fewshot_method": "retrieval",
            "gamma_agreement": 0.001,
            "contrastive_weight": 0.01,
            "contrastive_margin": 0.1,
            **_WRITTEN,
            "final_layer_distill_weight": 0.01,
            "ref_model_sync_steps": 10,
            "ref_model_mixup_beta": 0.98,
        },
    },
}
PUBLISHED: tuple[str, ...] = (
    "vanilla",
    *(f"agreement_{part}_{method}" for part in ("seq", "tok") for method in ("random", "retrieval", "induction")),
    *("ema", "contrastive", "match_joint", "match_repr", "clip", "unisd_star"),
)
"""Modes that have a recipe: the twelve of the paper, and the control it lacks."""


def method(mode: str, launch: Launch, semantics: Semantics) -> dict[str, Any]:
    """The settings of a mode without the machine's. A mode without a recipe has the common ones alone.

    Released semantics averages over micro-batches of equally many sequences, so there they are a part of the method.
    """
    values = {"mode": mode, "semantics": semantics, **COMMON, **LENGTHS[launch], **_of_mode(mode, launch)}
    if mode not in PUBLISHED:
        del values["temperature"]  # a baseline samples as its own paper says
    if mode == "unisd_star":
        if semantics == "corrected":
            values["token_clip"] = 10.0  # part of UniSD* in the paper, not in the released code
        elif launch == "orchestrator":
            values["global_batch_size"] = 8  # half of the other modes', without a word
    if semantics == "released":
        values |= {"micro_batch_size": values["global_batch_size"] // _MICRO_BATCHES, "packing": False}
    return values


def _of_mode(mode: str, launch: Launch) -> dict[str, Any]:
    if mode not in MODES or MODES[mode].agreement is None or mode == "unisd_star":
        return dict(_OWN.get(mode, {}).get(launch, {}))
    gamma = {"direct": 1.0, "orchestrator": 0.01}[launch]
    demos = {"num_demos": {"direct": 5, "orchestrator": 3}[launch]} if mode.endswith("induction") else {}
    return {"gamma_agreement": gamma, **_K, **demos}


def text(mode: str, launch: Launch, semantics: Semantics) -> str:
    """The file of a recipe, as `unisd train --config` reads it."""
    import yaml

    said = {"direct": "the authors' training command as it comes", "orchestrator": "the authors' orchestrator"}[launch]
    head = f"# {mode}: the settings of {said}, {semantics} semantics (docs/experiments.md).\n"
    values = method(mode, launch, semantics)
    machine = {name: value for name, value in MACHINE.items() if name not in values}
    tail = "\n# What it ran on; choose your own.\n" + yaml.safe_dump(machine, sort_keys=False)
    return head + yaml.safe_dump(values, sort_keys=False) + tail
