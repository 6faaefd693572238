"""Settings of GPUs that contradict each other, the layout, or this machine, which has none: one line, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from test_requests import Desk, command, desk, tiny_folder
from unisd_megatron.cli.parser import given_settings, parse
from unisd_megatron.config import Accelerator, setting_type
from unisd_megatron.resolve import resolve

__all__ = ["desk", "tiny_folder"]  # fixtures

FP8 = {"--fp8-format": "hybrid", "--bf16": ""}
SHARDED = {"--use-distributed-optimizer": "", "WORLD_SIZE": "2"}
OVERLAP = {"--tp-comm-overlap": "", "--tp": "2", "--sequence-parallel": "", "--bf16": "", "WORLD_SIZE": "2"}
EMA = {"--mode": "ema"}
REFUSED: dict[str, tuple[dict[str, str | None], str, str]] = {
    "FP8 without bf16": ({"--fp8-format": "e4m3"}, "--fp8-format", "add --bf16"),
    "teacher FP8 without bf16": ({"--teacher-fp8": "", **EMA}, "--teacher-fp8", "add --bf16"),
    "FP8 of local layers": ({**FP8, "--transformer-impl": "local"}, "Transformer Engine's", "drop --transformer-impl local"),
    "recipe of nothing": ({"--fp8-recipe": "delayed"}, "--fp8_recipe does nothing", "--teacher-fp8"),
    "FP8 parameters of nothing": ({"--fp8-param-gather": ""}, "--fp8_param_gather does nothing", "--fp8-format"),
    "FP8 parameters, whole optimizer": ({**FP8, "--fp8-param-gather": ""}, "exact", "--use-distributed-optimizer"),
    "FP8 parameters lent": (
        {**FP8, **SHARDED, **EMA, "--fp8-param-gather": "", "--teacher_memory": "swap"},
        "--teacher_memory swap",
        "beside",
    ),
    "FP8 parameters lent to sample": (
        {**FP8, **SHARDED, "--fp8-param-gather": "", "--mode": "ssd"},
        "starting weights",
        "drop --fp8-param-gather",
    ),
    "teacher FP8 of no teacher": ({"--teacher-fp8": "", "--bf16": "", "--mode": "sft"}, "has no teacher", "drop it"),
    "FP8 of a live teacher": (
        {"--teacher-fp8": "", "--bf16": "", "--teacher": "live"},
        "the teacher is the student",
        "--fp8-format",
    ),
    "delayed teacher": (
        {"--teacher-fp8": "", "--bf16": "", **EMA, "--fp8-recipe": "delayed"},
        "--fp8-recipe delayed",
        "tensorwise or blockwise",
    ),
    "engine in fp32": ({"--transformer-impl": "transformer_engine"}, "fp32", "add --bf16"),
    "flash in fp32": ({"--attention-backend": "flash"}, "bf16", "add --bf16"),
    "fused in fp32": ({"--attention-backend": "fused"}, "bf16", "add --bf16"),
    "fused, local": (
        {"--attention-backend": "fused", "--transformer-impl": "local", "--bf16": ""},
        "Transformer Engine's",
        "flash or unfused",
    ),
    "overlap of one replica": ({"--overlap-grad-reduce": ""}, "one data-parallel rank", "drop it"),
    "gathering of one replica": (
        {"--overlap-param-gather": "", "--use-distributed-optimizer": ""},
        "one data-parallel rank",
        "drop it",
    ),
    "gathering of whole weights": (
        {"--overlap-param-gather": "", "WORLD_SIZE": "2"},
        "--overlap-param-gather",
        "--use-distributed-optimizer",
    ),
    "gathering without reducing": (
        {"--overlap-param-gather": "", "--no-overlap-grad-reduce": "", **SHARDED},
        "--overlap-param-gather needs --overlap-grad-reduce",
        "drop --no-overlap-grad-reduce",
    ),
    "TP overlap of one": ({**OVERLAP, "--tp": None, "--sequence-parallel": None}, "--tp-comm-overlap", "2 or more"),
    "TP overlap without SP": ({**OVERLAP, "--sequence-parallel": None}, "--tp-comm-overlap", "add --sequence-parallel"),
    "TP overlap in fp32": ({**OVERLAP, "--bf16": None}, "--tp-comm-overlap", "add --bf16"),
    "TP overlap, local": ({**OVERLAP, "--transformer-impl": "local"}, "--tp-comm-overlap", "drop --transformer-impl local"),
    "TP overlap in blocks": ({**OVERLAP, **FP8, "--fp8-recipe": "blockwise"}, "no buffers", "tensorwise"),
    # What this machine lacks.
    "FP8 on a CPU": (FP8, "--fp8-format needs a GPU", "drop it"),
    "teacher FP8 on a CPU": ({"--teacher-fp8": "", "--bf16": "", **EMA}, "--teacher-fp8 needs a GPU", "drop it"),
    "fusion on a CPU": ({"--gradient-accumulation-fusion": ""}, "--gradient-accumulation-fusion needs a GPU", "drop it"),
    "TP overlap on a CPU": (OVERLAP, "--tp-comm-overlap needs a GPU", "drop it"),
    "flash on a CPU": ({"--attention-backend": "flash", "--bf16": ""}, "--attention-backend flash needs a GPU", "drop it"),
    "an unknown format": ({"--fp8-format": "e5m2"}, "e5m2", "hybrid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_one_line(desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes, what, right = REFUSED[name]
    if "WORLD_SIZE" in changes:
        monkeypatch.setenv("WORLD_SIZE", str(changes["WORLD_SIZE"]))
    desk.refused(command(changes), what, right)


def test_a_flag_of_three_states_is_asked_for_refused_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("overlap_grad_reduce: null\n")

    def state(*words: str) -> bool | None:
        request = parse(["train", "--model_name", "m", *words])
        return resolve(*given_settings(request)).accelerator.overlap_grad_reduce

    assert setting_type(Accelerator, "overlap_grad_reduce") == (bool, None, True)
    assert [state(), state("--overlap-grad-reduce"), state("--no-overlap-grad-reduce")] == [None, True, False]
    assert state("--config", str(tmp_path / "one.yaml")) is None
