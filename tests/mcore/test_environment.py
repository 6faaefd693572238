"""Variables of the environment: what Megatron would stumble over is refused, and what CUDA must be told is set in time."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import AttnBackend

from test_accelerator import BF16, BLACKWELL, CPU, FULL
from unisd_megatron.config import Accelerator, Layout
from unisd_megatron.errors import ConfigError
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore.platform import Probe, choose, decide


@pytest.mark.parametrize("backend", ["auto", "flash", "fused", "unfused"])
def test_variables_that_megatron_would_stumble_over_are_refused(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Every value of every variable, against what Megatron itself does with it."""
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    model = SimpleNamespace(config=SimpleNamespace(attention_backend=AttnBackend[backend], flash_attention_version=None))
    for name in names:
        for value in ("0", "1"):
            for one in names:  # Megatron sets them
                monkeypatch.delenv(one, raising=False)
            monkeypatch.setenv(name, value)
            found = dataclasses.replace(FULL, environment={name: value})
            asked = Accelerator(attention_backend=backend)
            try:
                LanguageModule._set_attention_backend(model)
            except AssertionError:
                with pytest.raises(ConfigError, match=f"has {name}={value}, and Megatron wants .* unset"):
                    decide(asked, BF16, found)
            else:
                decide(asked, BF16, found)


def test_the_environment_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(ConfigError, match="the environment has NVTE_FLASH_ATTN=0, and Megatron wants 1"):
        choose()


@pytest.mark.parametrize(
    ("found", "layout", "set_to", "expected", "said"),
    [
        (FULL, Layout(2, bf16=True), None, "1", "CUDA_DEVICE_MAX_CONNECTIONS: 1"),
        (FULL, Layout(bf16=True, context_parallel_size=2), None, "1", "CUDA_DEVICE_MAX_CONNECTIONS: 1"),
        (FULL, Layout(2, bf16=True), "8", "8", "CUDA_DEVICE_MAX_CONNECTIONS: 8; with 1, communication would start"),
        (FULL, Layout(1, 2, bf16=True), None, None, ""),
        (BLACKWELL, Layout(2, bf16=True), None, None, ""),
        (CPU, Layout(2, bf16=True), None, None, ""),
    ],
)
def test_kernels_of_shared_layers_go_through_one_queue(
    monkeypatch: pytest.MonkeyPatch, found: Probe, layout: Layout, set_to: str | None, expected: str | None, said: str
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, set_to or "")  # so that it is put back
    if set_to is None:
        monkeypatch.delenv(name)

    def probed() -> Probe:
        seen = os.environ.get(name)
        assert seen is not None or layout.tensor_model_parallel_size * layout.context_parallel_size == 1  # CUDA starts here
        return dataclasses.replace(found, environment={name: seen} if seen else {})

    monkeypatch.setattr(platforms, "probe", probed)
    platform = choose(None, layout, 2)
    assert os.environ.get(name) == expected
    lines = [line for line in platform.lines if name in line]
    assert bool(lines) is bool(said) and all(line.startswith(said) for line in lines)
