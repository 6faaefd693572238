"""A sweep on Slurm: the engine's own plug-in submits to a stand-in, and asks for what the shown sbatch files ask for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import slurm_stand_in
from standins import evaluate, graph, train
from unisd_megatron.errors import CheckFailed
from unisd_megatron.experiments.graph import Node, Sweep
from unisd_megatron.experiments.run import Manner, perform
from unisd_megatron.experiments.slurm import Cluster

CLUSTER = Cluster(account="lab", partition="gpu", minutes=90, gpus_per_rank=1, cpus_per_rank=6, memory_per_rank=10)
ASKED = {"-A": "--account", "-p": "--partition", "-t": "--time"}


def two_modes_two_seeds(sweep: Path) -> Sweep:
    names = [f"{mode}{seed}" for mode in ("vanilla", "ema") for seed in (0, 1)]
    fails = {"ema1": "echo no such luck; false"}
    return graph(sweep, [node for one in names for node in (train(sweep, one, fails.get(one, "true")), evaluate(sweep, one))])


def scripts(built: Sweep, sweep: Path, folder: Path) -> dict[str, str]:
    perform(built, Manner(sweep, cluster=CLUSTER, scripts=folder), lambda _: None)
    return {path.stem: path.read_text() for path in folder.iterdir()}


def requested(words: list[str]) -> dict[str, str]:
    """`--name value` and `--name=value`, under their long names, but for what names and logs the job."""
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            found[ASKED.get(name, name)] = value if equals else following
    return {name: found[name] for name in found if name in {*ASKED.values(), "--mem", "--nodes", "--cpus-per-task", "--gpus"}}


def of_script(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return requested([word for line in lines for word in line.split(" ", 1)])


def test_a_sweep_is_submitted_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "sweep"
    built = two_modes_two_seeds(sweep)
    shown = scripts(built, sweep, tmp_path / "scripts")
    assert not list(sweep.rglob("*.done.json")) and len(shown) == 8
    for name, value in slurm_stand_in.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    with pytest.raises(CheckFailed, match="1 failed .train-ema1., 1 not run"):
        perform(built, Manner(sweep, cluster=CLUSTER), said.append)
    assert sum("50.00" in line for line in said) == 3 and "    no such luck" in said
    submitted: list[dict[str, Any]] = slurm_stand_in.jobs(tmp_path / "slurm")  # type: ignore[assignment]
    assert len(submitted) == 7
    for job in submitted:
        name = job["words"][job["words"].index("--comment") + 1].removeprefix("rule_").replace("_", "-")
        assert requested(job["words"]) == of_script(shown[name]), name
    assert requested(submitted[0]["words"])["--account"] == "lab"


def test_the_files_run_as_they_are(tmp_path: Path) -> None:
    """By hand, without the engine: the same worker, the same receipts."""
    sweep = tmp_path / "sweep"
    built = graph(sweep, [train(sweep, "a", "true")])
    shown = scripts(built, sweep, tmp_path / "scripts")
    assert (sweep / "runs/a/seed0").is_dir()  # of the log, which Slurm would not make
    assert subprocess.run(["bash", "-c", shown["train-a"]], timeout=100).returncode == 0
    assert (sweep / "runs/a/seed0/train.done.json").is_file()


def test_gpus_are_asked_for_by_rank_and_cores_where_there_are_none() -> None:
    from unisd_megatron.experiments import slurm

    node = Node("train-a", "train", "x", ("true",), "a", ranks=4)
    log = Path("log")
    assert of_script(slurm.script(node, CLUSTER, "true", log))["--gpus"] == "4"
    assert of_script(slurm.script(node, CLUSTER, "true", log))["--cpus-per-task"] == "24"
    assert "--gpus" not in slurm.script(node, Cluster(gpus_per_rank=0), "true", log)
