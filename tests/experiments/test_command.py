"""`unisd experiments` as it is typed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from unisd_megatron.cli import main

MODEL = ["--dataset", "addition", "--model_name", str(Path(__file__).parents[2] / "examples/demo/model")]
GRID = """
name: g
settings: {dataset: addition, model_name: someone/model}
entries: [{mode: vanilla}, {mode: ema}]
seeds: [0, 1]
"""


@pytest.fixture
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which nothing may be started or written."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("what", [["run", "grid.yaml"], ["ema", *MODEL, "--seeds", "0,1"]], ids=["run", "ema"])
def test_a_dry_run_starts_and_writes_nothing_wherever_it_is_asked_for(
    nothing_starts: Path, capsys: pytest.CaptureFixture[str], side: str, what: list[str]
) -> None:
    how = ["--dry-run", "--jobs", "3", "--output_dir", "sweep"]
    words = [*how, *what] if side == "left" else [*what, *how]
    assert main(["experiments", *words]) == 0
    shown = capsys.readouterr().out
    assert "10 nodes: 10 to run" in shown and "layer 1: train" in shown and "layer 3: report" in shown
    assert shown.count("  run   train-ema-addition-") == 2
    assert [path.name for path in nothing_starts.iterdir()] == ["grid.yaml"]


def test_a_dry_run_on_slurm_shows_the_files(nothing_starts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiments", "--slurm", "run", "grid.yaml", "--dry-run", "--slurm-partition", "gpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("#!/bin/bash") == 10 and shown.count("#SBATCH --partition=gpu") == 10
    assert [path.name for path in nothing_starts.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "absent.yaml"], "absent.yaml: no such file"),
        (["run", "grid.yaml", "--slurm-partition", "x"], "does nothing without --slurm"),
        (["run", "grid.yaml", "--jobs", "0"], "--jobs is 0"),
        (["--sbatch-dir", "x", "run", "grid.yaml"], "does nothing without --slurm"),
        (["ema", "--dataset", "addition"], "--model_name is missing"),
        (["ema", *MODEL, "--seeds", "1,1"], "--seeds"),
        (["ema", *MODEL, "--mode", "clip"], "decides --mode"),
        (["ema", *MODEL, "--gamma_agreement", "1.0"], "does nothing in --mode vanilla"),
        (["ema", *MODEL, "--exit_duration_in_mins", "5"], "a stopped one is no result"),
        (["ema", *MODEL, "--tensorboard_dir", "boards"], "one folder for all runs"),
        (["ema", *MODEL, "--seeds", str(2**64)], "must fit in 64 bits"),
        (["work", ".", "train-x"], "no sweep"),
        ([], "EXPERIMENT"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    nothing_starts: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["experiments", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [path.name for path in nothing_starts.iterdir()] == ["grid.yaml"]
