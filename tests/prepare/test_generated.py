"""What a model writes before training: by a real (random, tiny) model, kept, resumed, found again by the run that needs it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd_megatron.caches import Caches
from unisd_megatron.cli import main
from unisd_megatron.config import Data
from unisd_megatron.data import TASKS, Record
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.prepare import negatives
from unisd_megatron.prepare.generate import Writer
from unisd_megatron.prepare.order import Order
from unisd_megatron.rollout.engine import Sampling, sequence_seed
from unisd_megatron.rollout.replay import ReplayEngine, rollout_file
from unisd_megatron.weights.tiny import EOS_ID, byte_tokenizer, write_tiny
from world import World

pytestmark = pytest.mark.usefixtures("no_queue_for_later_workers")

pytest.importorskip("xgrammar")
ALONE = Grid(*[Axis()] * 9, torch.device("cpu"))
CHOICES = ["a bank", "a river", "a garden"]
ROWS = [
    {
        "question": f"Where are {n} coins?",
        "choices": CHOICES,
        "answer": CHOICES[n % 3],
        "abstractive_explanation": "so",
    }
    for n in range(6)
]
SHORT = ["--dataset", "cos_e", "--data_path", "rows.jsonl", "--model_name", "model", "--negatives_per_example", "2"]
SHORT += ["--negative_max_length", "150"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare") / "model"
    write_tiny("qwen2", folder, seed=0)
    return folder


@pytest.fixture
def desk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the rows of a task and a model in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "model").symlink_to(model)
    return tmp_path


def only_file(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def wait_for(path: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(one.read_bytes().count(b"\n") >= lines for one in path.glob("*.partial")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no {lines} lines in {path}; the process ended with {process.poll()}")


def test_a_killed_preparation_is_resumed_to_the_same_cache(desk: Path) -> None:
    words = ["prepare", "negatives", *SHORT, "--batch_size", "2", "--negative_tries", "1"]
    assert main([*words, "--cache_dir", "whole"]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "unisd_megatron", *words, "--cache_dir", "killed"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(desk / "killed" / "negatives", 3, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    partial = only_file(desk / "killed" / "negatives")
    assert partial.suffix == ".partial"
    with partial.open("ab") as stream:
        stream.write(b'{"id": "cos_e_')  # a line that the kill has torn
    assert main([*words, "--cache_dir", "killed"]) == 0
    whole, killed = only_file(desk / "whole" / "negatives"), only_file(desk / "killed" / "negatives")
    assert (whole.name, whole.read_bytes()) == (killed.name, killed.read_bytes())


def test_the_cache_says_what_was_asked_and_what_came_of_it(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "negatives", *SHORT]) == 0
    header, *rows = map(json.loads, only_file(desk / "cache" / "negatives").read_text().splitlines())
    assert header["model"] == "model" and header["cache_seed"] == 42 and header["task"] == "cos_e"
    assert [row["id"] for row in rows] == [f"cos_e_{n}" for n in range(6)]
    slots = [one for row in rows for one in row["negatives"]]
    assert len(slots) == 12 and {one["kind"][:-1] for one in slots} == {"wrong option "}
    task, usable = TASKS["cos_e"](), 0
    records = task.load("train", "rows.jsonl")
    for record, row in zip(records, rows, strict=True):
        for one in row["negatives"]:
            assert one["kind"] in {kind.kind for kind in task.corruptions(record)} and CHOICES[0] in one["prompt"]
            assert len(one["rejected"]) == 3 if one["solution"] is None else len(one["rejected"]) < 3
            if one["solution"] is not None:
                usable += 1
                assert one["check"] == "wrong answer" and not task.judge(record, one["solution"]).correct  # type: ignore[union-attr]
                assert json.loads(one["output"], strict=False)["reasoning"].strip() in one["solution"]
    assert usable > 0 and f"{usable} of 12 wrong solutions" in capsys.readouterr().out


def test_one_wrong_solution_per_slot_is_drawn_until_it_is_wrong(tmp_path: Path) -> None:
    """Three answers, recorded: one that passes the answer check, one that makes no call, and a wrong one."""
    call = {"Action": "look_up", "Action_Input": '{"key": "red"}'}
    prompt = "Tools: look_up(key), drop(key)\nThe tool is one of: look_up, drop\nQuestion: Find red.\nBegin!"
    row = {"prompt": prompt, "instruction": "Find red.", "golden_response": [], "golden_answer": [call]}
    order = Order(Data(dataset="tooluse"), "corrected", Caches(), "model")
    record, tokenizer = order.task.parse(row, 0), byte_tokenizer()
    same = call | {"Action_Input": '{"key": " red "}'}
    answers = [same, "I cannot.", {"Action": "drop", "Action_Input": "{}"}]
    slot = negatives.Slot(record, order.task.corruptions(record)[0], (5, 6), number=7)
    rollout_file(tmp_path, 0).write_text(
        "".join(json.dumps(recorded(tokenizer, sequence_seed(42, i, 7), said)) + "\n" for i, said in enumerate(answers))
    )
    writer = Writer(ReplayEngine(tmp_path), tokenizer, ALONE)
    negatives._fill([slot], order, writer, Sampling(0.7, 1.0, 0, 200, (EOS_ID,)), room=99, tries=3)
    assert slot.rejected == ["passes the answer check", "not usable"]
    assert slot.solution is not None and "drop" in slot.solution and slot.check != ""
    again = negatives.Slot(record, slot.corruption, (5, 6), number=7)
    negatives._fill([again], order, writer, Sampling(0.7, 1.0, 0, 200, (EOS_ID,)), room=99, tries=2)
    assert again.solution is None and again.rejected == slot.rejected  # left without one, never with a right one


def recorded(tokenizer: Any, seed: int, answer: object) -> dict[str, Any]:
    said = answer if isinstance(answer, str) else json.dumps({"tool_calls": [answer]})
    ids = [*tokenizer.encode(json.dumps({"reasoning": "Hm.", "answer": said})), EOS_ID]
    return {"seed": seed, "prompt": [5, 6], "completion": ids, "log_probs": [0.0] * len(ids), "finish_reason": "stop"}


def test_induction_groups_are_disjoint_and_their_examples_are_shown(desk: Path) -> None:
    words = ["--dataset", "cos_e", "--data_path", "rows.jsonl", "--model_name", "model", "--num_demos", "2"]
    assert main(["prepare", "induction", *words, "--induction_max_length", "20"]) == 0
    header, *rows = map(json.loads, only_file(desk / "cache" / "induction").read_text().splitlines())
    assert header["num_demos"] == 2 and len(rows) == header["rows"] == 3
    assert [*json.loads((desk / "cache" / "weights.json").read_text())] == [str((desk / "model/model.safetensors").resolve())]
    assert sorted(name for row in rows for name in row["examples"]) == [f"cos_e_{n}" for n in range(6)]
    records = {record.id: record for record in TASKS["cos_e"]().load("train", "rows.jsonl")}
    for row in rows:
        shown: list[Record] = [records[name] for name in row["examples"]]
        assert all(record.fields["question"] in row["prompt"] for record in shown)
        assert row["instruction"] == row["output"].strip()


def prepare_in_a_rank(rank: int, group: Any, folder: Path, cache: Path) -> str:
    data = Data(dataset="cos_e", data_path=str(folder / "rows.jsonl"))
    caches = Caches(cache_dir=str(cache), negatives_per_example=2, negative_max_length=100, negative_tries=1)
    return negatives.prepare(Order(data, "corrected", caches, str(folder / "model")), batch_size=8)


def test_two_processes_write_what_one_writes(world: World, desk: Path) -> None:
    said = world.run(2, prepare_in_a_rank, desk, desk / "two")
    assert len(set(said)) == 1
    world.run(1, prepare_in_a_rank, desk, desk / "one")
    one, two = only_file(desk / "one" / "negatives"), only_file(desk / "two" / "negatives")
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())


def train_words(changes: Mapping[str, str]) -> list[str]:
    settings = {"--mode": "unisd_star", "--output_dir": "run", "--max_completion_length": "4", "--max_steps": "1"}
    settings |= {"--num-auxiliary-contexts": "2", "--fewshot_method": "induction", "--num_demos": "2"}
    settings |= {"--induction_max_length": "20", "--max_prompt_length": "3000", "--global-batch-size": "2"}
    return ["train", *SHORT, *(word for setting in (settings | changes).items() for word in setting)]


def test_train_names_the_commands_that_it_lacks_and_they_are_enough(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = []
    for _ in range(2):
        capsys.readouterr()
        assert main(train_words({})) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "not prepared yet" in line and not (desk / "run").exists()
        needed.append(shlex.split(line.split("`")[1]))
        assert needed[-1][0] == "unisd" and main(needed[-1][1:]) == 0
    assert {words[2] for words in needed} == {"induction", "negatives"}
    assert main(train_words({})) == 0
    assert main(train_words({"--output_dir": "other", "--negative_tries": "2"})) == 2  # shaped by something else
