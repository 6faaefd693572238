"""Versions and platform are checked at start, and the CPU adaptation stays away from machines with CUDA."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from unisd_megatron.errors import MissingDependency
from unisd_megatron.mcore import platform as platforms


@pytest.mark.parametrize(
    ("version", "word"), [("0.15.3", "too old"), ("0.16.0", "too old"), ("0.20.0", "too new"), ("1.0.0", "too new")]
)
def test_a_megatron_outside_the_measured_range_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, word: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(MissingDependency, match=f"megatron-core {version} is {word}"):
        platforms.check_megatron()


def test_the_installed_megatron_is_accepted() -> None:
    assert platforms.check_megatron() == importlib.metadata.version("megatron-core")


def test_an_empty_transformer_engine_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    libraries = tmp_path / "transformer_engine" / "wheel_lib"
    libraries.mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('Found empty meta package')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="transformer-engine is installed without its torch part") as caught:
        platforms.check_megatron()
    assert "\n" not in str(caught.value)
    (libraries / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    platforms.check_megatron()


def test_the_cpu_adaptation_does_nothing_where_cuda_is_available() -> None:
    code = (
        "import torch; torch.cuda.is_available = lambda: True; before = torch.empty, torch.Tensor.type, torch.cuda.Stream\n"
        "from unisd_megatron.mcore import cpu\n"
        "assert cpu.install() is False\n"
        "assert before == (torch.empty, torch.Tensor.type, torch.cuda.Stream)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
