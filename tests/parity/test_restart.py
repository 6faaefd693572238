"""`unisd parity restart`: a killed and resumed run is the run, nothing is left running, and one bit would be noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from unisd_megatron.cli import main
from unisd_megatron.parity.restart import differences

pytestmark = pytest.mark.timeout(600)  # four starts of torchrun, each of them all imports: minutes on a busy machine
RESTART = ["parity", "restart"]
LATE = ["--kills", "1", "--steps", "6", "--seed", "12"]  # this seed's kill comes when there is a checkpoint to resume from


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and what was printed."""
    folder = tmp_path_factory.mktemp("restart") / "proof"
    command = [sys.executable, "-m", "unisd_megatron", *RESTART, *LATE, "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_killed_run_is_the_unbroken_run(proof: tuple[Path, str]) -> None:
    folder, said = proof
    assert said.splitlines()[-1] == "1 kill, 0 differences"
    assert "SIGKILL" in said and "not killed: resumed from step_" in said, said
    assert [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])] == []


def test_one_bit_is_a_difference(proof: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = proof
    metrics, weights = folder / "broken" / "metrics.jsonl", folder / "broken" / "hf" / "model.safetensors"
    honest = metrics.read_text(), weights.read_bytes()
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, weights, metadata={"format": "pt"})
    rows = honest[0].splitlines(keepends=True)
    metrics.write_text("".join(rows[:2] + [rows[2].replace('"loss": ', '"loss": 1')] + rows[3:]))
    found = differences(folder / "unbroken", folder / "broken", lambda line: None)
    metrics.write_text(honest[0])
    weights.write_bytes(honest[1])
    assert [line.partition(":")[0] for line in found] == ["step 2 loss", f"exported {name}"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kills", "0"], "at least 1 kill"),
        (["--steps", "1"], "2 steps"),
        (["--nproc", "3"], "--global-batch-size 8"),
        (["--tp", "3", "--nproc", "3"], "tensor"),
        (["--output_dir", "."], "exists already"),
    ],
)
def test_wrong_requests(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RESTART, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("unisd: ") and message in error and error.count("\n") == 1, error
