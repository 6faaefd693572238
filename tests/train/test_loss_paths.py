"""The fused and the materialised loss train alike: every mode, ten steps of sampling, teacher and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import STAR, curve, run
from unisd_megatron.modes import MODES
from world import World

CONTEXTS = {"num_auxiliary_contexts": 2, "fewshot_method": "random"}
OF_MODE: dict[str, dict[str, Any]] = {
    "agreement_seq_random": CONTEXTS,
    "agreement_tok_random": CONTEXTS,
    "ema": {"ref_model_sync_steps": 2},
    "clip": {"token_clip": 1.0},
    "unisd_star": STAR,
    "sft": {"max_completion_length": 40},  # references are longer than what the other modes sample here
    "gkd": {"max_completion_length": 40},
}
RUNNABLE = [mode for mode in MODES if not mode.endswith(("_retrieval", "_induction"))]  # the same losses on other contexts


@pytest.mark.parametrize("mode", RUNNABLE)
def test_same_curve(world: World, tmp_path: Path, mode: str) -> None:
    flags = {"micro_batch_size": 2, "global_batch_size": 4, "max_steps": 10, **OF_MODE.get(mode, {}), "mode": mode}
    fused, materialized = (run(world, 1, tmp_path / path, **flags, loss_path=path) for path in ("fused", "materialized"))
    assert len(fused) == 10
    for found, wanted in zip(curve(fused), curve(materialized), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)
