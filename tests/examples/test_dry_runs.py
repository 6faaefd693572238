"""Every launch script answers its dry run, whatever is in `examples/`; an impossible request is one line and writes nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/cluster.sh"))
SCRIPTS = sorted(path for folder in FOLDERS for path in folder.iterdir() if path.suffix in (".sh", ".sbatch"))
LAUNCHERS = [path for path in SCRIPTS if path.name != "cluster.sh"]
ISSUE = {"qwen2_5_7b", "llama3_1_8b", "qwen2_5_32b", "llama3_1_70b", "qwen2_5_72b", "llama3_1_405b"}
SETTINGS = {"NODES", "SERVER_NODES", "GPUS_PER_NODE", "GPU", "SERVER_GPUS", "SERVER_MAX_LEN", "OUTPUT_DIR", "MODEL"}


def named(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def dry(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script without a GPU, a hub, Slurm or settings of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS and not name.startswith("SLURM")}
    command = ["bash", str(script), *words]
    environment = {**clean, "PYTHON": sys.executable, "OUTPUT_DIR": "/nowhere/run", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd="/")


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("unisd: "), done.stdout + done.stderr
    assert [word for word in words if word not in lines[0]] == [], lines[0]


def test_every_scale_is_there_and_complete() -> None:
    assert {folder.name for folder in FOLDERS} >= ISSUE
    for folder in FOLDERS:
        assert {path.name for path in folder.iterdir()} >= {"README.md", "config.yaml", "torchrun.sh", "slurm.sbatch"}


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted((EXAMPLES / "common").glob("*.sh"))], ids=named)
def test_scripts_are_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", LAUNCHERS, ids=named)
def test_dry_run(script: Path) -> None:
    done = dry(script, "--dry-run")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    config = yaml.safe_load((script.parent / "config.yaml").read_text())
    layout = config["tensor_model_parallel_size"] * config.get("pipeline_model_parallel_size", 1)
    nodes, gpus = re.search(r"--nnodes (\d+) --nproc-per-node (\d+)", said).groups()  # type: ignore[union-attr]
    assert int(nodes) * int(gpus) % layout == 0 and f"{int(nodes) * int(gpus)} x h" in said
    assert f"model_name = {config['model_name']} (file)" in said
    assert "weights" in said and "optimizer" in said  # the plan
    assert re.search(rf"model +{config['model_name']}: (present|missing)", said)
    assert re.search(r"data +openai/gsm8k: (present|missing)", said)
    assert "output      /nowhere/run: new" in said and not Path("/nowhere").exists()
    if config["fewshot_method"] == "retrieval":
        assert "cache/embeddings/gsm8k-<digest>: missing: run `unisd prepare embeddings --dataset gsm8k`" in said
    servers = len(re.findall(r"http://node\d+:\d+", re.search(r"vllm_server_urls = (.*)", said + "vllm_server_urls = ")[1]))  # type: ignore[index]
    assert (servers > 0) == (config.get("vllm_mode") == "server") == ("serve_vllm.py" in said)


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_slurm_asks_for_the_machines_of_the_scale(folder: Path) -> None:
    header = (folder / "slurm.sbatch").read_text()
    command = f"source {folder}/cluster.sh; echo $NODES $GPUS_PER_NODE"
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    nodes, gpus = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=clean).stdout.split()
    assert f"#SBATCH --nodes={nodes}\n" in header and f"#SBATCH --gpus-per-node={gpus}\n" in header
    assert "#SBATCH --requeue\n" in header and re.search(r"#SBATCH --signal=B:USR1@\d+\n", header)


@pytest.mark.parametrize("script", LAUNCHERS, ids=named)
def test_an_impossible_layout_is_one_line(script: Path) -> None:
    refused(dry(script, "--dry-run", "--tp", "3"), "processes cannot hold tensor-parallel 3")


def test_what_does_not_divide_the_model_or_fit_is_one_line() -> None:
    large = EXAMPLES / "llama3_1_405b" / "torchrun.sh"
    eight = dry(large, "--dry-run", "--pp", "8", "--global-batch-size", "448")
    refused(eight, "pipeline-parallel 8", "126 layers", "7, 9, 14")
    refused(dry(large, "--dry-run", GPU="a100-40"), "a100-40", "40.0")
    refused(dry(large, "--dry-run", GPU="h100"), "rollout server of 8 GPUs", "94.5 GiB", "--server-gpus")
    refused(
        dry(EXAMPLES / "llama3_1_70b" / "torchrun.sh", "--dry-run", "--pp", "1"), "needs", "h100 has 79.6", "nearest that fits"
    )


def test_environment_and_flags_win_over_the_folder(tmp_path: Path) -> None:
    script = EXAMPLES / "qwen2_5_7b" / "torchrun.sh"
    done = dry(
        script,
        "--learning_rate",
        "3e-6",
        DRY_RUN="1",
        NODES="2",
        GPU="h200",
        MODEL="Qwen/Qwen2.5-14B",
        OUTPUT_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    for word in ("--nnodes 2", "Qwen2.5-14B, 16 x h200", "learning_rate = 3e-06 (flag)", f"output      {tmp_path}: "):
        assert word in done.stdout
    (tmp_path / "config.yaml").write_text((script.parent / "config.yaml").read_text().replace("gsm8k", "gsm9k"))
    refused(dry(script, "--dry-run", CONFIG=str(tmp_path / "config.yaml")), "--dataset 'gsm9k'")


def test_files_that_are_there_are_said_to_be(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B-Instruct" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "step_000050").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_000100.0a.partial").mkdir()
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "2\\n#### 2"}\n')
    words = ["--dry-run", "--data_path", str(tmp_path / "data.jsonl")]
    script = EXAMPLES / "qwen2_5_7b" / "torchrun.sh"
    done = dry(script, *words, HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"), OUTPUT_DIR=str(tmp_path / "run"))
    assert f"Qwen/Qwen2.5-7B-Instruct: present in {tmp_path / 'hub'}" in done.stdout, done.stderr
    assert f"{tmp_path / 'data.jsonl'}: present, 1 records" in done.stdout
    assert "a run to be resumed from step_000050" in done.stdout


def test_a_dry_run_loads_no_torch_and_its_flags_mean_nothing_elsewhere(tmp_path: Path) -> None:
    flags = [
        "train",
        "--mode",
        "vanilla",
        "--dataset",
        "addition",
        "--model_name",
        "Qwen2.5-0.5B",
        "--output_dir",
        str(tmp_path),
    ]
    code = f"import sys; from unisd_megatron.cli import main; main({flags} + ['--dry-run']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr
    done = subprocess.run([sys.executable, "-m", "unisd_megatron", *flags, "--gpus", "8"], capture_output=True, text=True)
    refused(done, "--gpus", "--dry-run")
