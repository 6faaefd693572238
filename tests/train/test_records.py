"""What a run records for its report: histograms, the teacher's distance, memory, held-out answers; TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from runs import QUICK, STAR, TINY, run
from unisd_megatron.errors import ConfigError
from unisd_megatron.resolve import resolve
from unisd_megatron.train.build import prepare
from unisd_megatron.train.metrics import HELD_OUT, Journal
from unisd_megatron.train.watching import display_name
from unisd_megatron.weights.tiny import write_tiny
from world import World

FLAGS = {**STAR, "max_steps": 4, "save_steps": 2, "save_total_limit": 0, "eval_steps": 2, "eval_examples": 6}


@pytest.fixture(scope="module")
def recorded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    run(world, 2, folder / "run", **FLAGS, tensorboard_dir=str(folder / "board"))
    return folder / "run"


def test_every_token_and_sequence_is_in_the_histograms(recorded: Path) -> None:
    edges = json.loads((recorded / "run.json").read_text())["histograms"]
    for line in (recorded / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("agreement/weight_histogram", "divergence/histogram"):
            assert len(row[name]) == len(edges[name]) + 1 and sum(row[name]) == row["completions/tokens"]
        middle = [0.0, *edges["agreement/weight_histogram"], 1.0]
        mean = sum(n * (a + b) / 2 for n, a, b in zip(row["agreement/weight_histogram"], middle, middle[1:], strict=False))
        assert mean / row["completions/tokens"] == pytest.approx(row["agreement/weight_mean"], abs=0.025)  # half a bin
        assert ("teacher/distance" in row) == bool(row["teacher/moved"]) == (row["step"] % 2 == 1)
        assert row["memory/peak_bytes"] > 2**26


def test_answers_are_those_that_were_counted(recorded: Path) -> None:
    scores = [json.loads(line) for line in (recorded / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in scores] == [0, 2, 4]
    for score in scores:
        path = recorded / "answers" / f"step_{score['step']:06d}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == score["examples"] == 6
        assert sum(row["correct"] for row in rows) / 6 == score["accuracy"]
        assert all(isinstance(row["completion"], str) and row["prompt"].startswith("Q:") for row in rows)


def test_a_resumed_run_goes_on_with_the_same_curves(world: World, recorded: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not (recorded / "tensorboard").exists()
    shutil.copytree(recorded, tmp_path / "run")
    shutil.copytree(recorded.parent / "board", tmp_path / "board")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    (tmp_path / "run" / "answers" / "step_000003.jsonl").write_text("{}\n")  # of an --eval_steps that is stated no more
    rows = run(world, 2, tmp_path / "run", **FLAGS, tensorboard_dir=str(tmp_path / "board"), resume_from_checkpoint="latest")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    curve = [(one.step, one.value) for one in board.Scalars("loss")]
    assert curve == [(row["step"], pytest.approx(row["loss"])) for row in rows] and len(curve) == 4
    scores = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    held_out = [(one.step, one.value) for one in board.Scalars(HELD_OUT)]
    assert held_out == [(row["step"], pytest.approx(row["accuracy"])) for row in scores] and len(held_out) == 3
    assert sorted(path.stem for path in (tmp_path / "run" / "answers").iterdir()) == [
        "step_000000",
        "step_000002",
        "step_000004",
    ]
    assert (tmp_path / "run" / "answers" / "step_000004.jsonl").read_text() == (
        recorded / "answers/step_000004.jsonl"
    ).read_text()


def test_whoever_watches_is_told_steps_and_scores(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told: list[tuple[int, dict[str, float]]] = []

    class Listener:
        def log(self, step: int, metrics: dict[str, float]) -> None:
            told.append((step, metrics))

        def close(self) -> None: ...

    journal = Journal(tmp_path, 0, 1, watcher=Listener())
    metrics = {"loss": 0.5, "tokens_per_second": 7.0}
    journal.score(0, 0.25, 4)
    journal.record(0, metrics, {})
    journal.score(1, 0.75, 4)
    journal.close()
    assert told == [(0, {HELD_OUT: 0.25}), (0, metrics), (1, {HELD_OUT: 0.75})]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(one.step, one.value) for one in board.Scalars(HELD_OUT)] == [(0, 0.25), (1, 0.75)]


def test_runs_of_a_sweep_have_names_of_their_own_on_wandb(tmp_path: Path) -> None:
    assert display_name(tmp_path / "sweep/runs/clip-gsm8k-0123/seed1/train") == "clip-gsm8k-0123-seed1"
    assert display_name(tmp_path / "mine") == "mine" and display_name(tmp_path / "train") == "train"


def test_wandb_is_refused_where_it_is_not_installed(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    if not TINY.exists():
        write_tiny("qwen2", TINY, seed=0)
    flags = {**QUICK, "mode": "vanilla", "max_steps": 1, "output_dir": str(tmp_path / "run"), "wandb_project": "p"}
    with pytest.raises(ConfigError, match="--wandb_project: wandb is not installed; pip install wandb"):
        prepare(resolve(flags, {}), 1)


def test_wandb_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from unisd_megatron.train.watching import WandbCurves

    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = resolve({**QUICK, "mode": "vanilla", "wandb_project": "p"}, {})
    for steps in ((0, 1), (1, 2)):  # the second as a resumed run: step 1 once more
        curves = WandbCurves(settings, tmp_path)
        for step in steps:
            curves.log(step, {"loss": 1.0 / (step + 1)})
        curves.close()
    found = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert found and {name.rsplit("-", 1)[1] for name in found} == {(tmp_path / "wandb_id").read_text().strip()}
