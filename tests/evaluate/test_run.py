"""`unisd evaluate` of tiny models on real questions: resumed, converted, in another engine, on more ranks, it is the same."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from unisd_megatron.batch import Completion
from unisd_megatron.cli import main
from unisd_megatron.data import TASKS, Verdict
from unisd_megatron.evaluate.results import locked
from unisd_megatron.evaluate.run import TOO_LONG, UNFINISHED
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.grid import Axis
from unisd_megatron.rollout.engine import Request, Sampling
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.tiny import EOS_ID, write_tiny
from world import World

DATA = Path(os.environ.get("UNISD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
GSM8K = DATA / "gsm8k_test.jsonl"
pytestmark = pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not here")

SAMPLED = ["--temperature", "0.8", "--top_p", "0.9", "--samples", "2", "--log_probs"]
BESIDE = ["--retention", "--fit"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` and its `base`, and `megatron`, the first one converted."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny("llama", folder / "model", seed=1)
    write_tiny("llama", folder / "base", seed=0)
    words = ["--model_name", str(folder / "model"), "--output_dir", str(folder / "megatron")]
    assert main(["convert", "import", *words]) == 0
    return folder


def words(model: Path, output: Path, *more: object, examples: int = 5) -> list[str]:
    fixed = ["evaluate", "--dataset", "gsm8k", "--data_path", GSM8K, "--max_examples", examples, "--batch_size", 4]
    return [str(word) for word in [*fixed, "--max_completion_length", 6, "--model_name", model, "--output_dir", output, *more]]


def rows(folder: Path, name: str = "answers") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    """Everything but where it lies."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {name: data.replace(str(folder).encode(), b"OUTPUT") for name, data in found.items()}


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted: ten sampled answers to five questions, in rounds of four."""
    folder = tmp_path_factory.mktemp("whole") / "output"
    assert main(words(models / "model", folder, *SAMPLED, *BESIDE, "--base_model_name", models / "base")) == 0
    return folder


def test_what_is_written(whole: Path, models: Path) -> None:
    found = result(whole)
    answers = rows(whole)
    assert [(one["id"], one["sample"]) for one in answers] == [(f"gsm8k_{i}", s) for i in range(5) for s in range(2)]
    assert len({one["completion"] for one in answers}) == 10
    for one in answers:
        assert one["tokens"] == len(one["token_ids"]) == len(one["log_probs"]) > 0
        assert one["finished"] == (one["token_ids"][-1] == EOS_ID)
        assert (one["failure"] == UNFINISHED) != one["finished"]
        assert one["prompt"].endswith("#### <number>") and "<|im_end|>" not in one["completion"]
    assert (found["examples"], found["answers"], found["dataset"]) == (5, 10, "gsm8k")
    assert found["pass_at_k"].keys() == {"1", "2"} and found["interval_method"] == "Wilson, effective number of answers"
    assert sum(found["failures"].values()) == 10 - found["correct"]
    assert found["digests"].keys() == {"data", "prompts", "model"} and "torch" in found["versions"]
    assert found["retention"]["tokens"] == sum(one["tokens"] for one in answers)
    assert found["retention"]["ppl_ret"] == found["retention"]["ppl_corpus"] > found["retention"]["own_ppl_corpus"]
    assert found["fit"]["completions"] == 5 and found["fit"]["ppl_mean"] > 1
    assert not [path.name for path in whole.iterdir() if path.suffix == ".partial"]


class Spy:
    """What `TransformersEngine` is really asked, and an end of it all after some rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
        self.asked: list[str] = []
        real = TransformersEngine.generate

        def generate(engine: TransformersEngine, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
            if len(self.asked) >= 4 * rounds:
                raise KeyboardInterrupt
            self.asked += [one.example_id for one in requests]
            return real(engine, requests, sampling)

        monkeypatch.setattr(TransformersEngine, "generate", generate)


def test_interrupted_and_resumed_is_as_if_it_never_was(whole: Path, models: Path, tmp_path: Path) -> None:
    """Cut in the second of three rounds, in the middle of a line; then in the reading of the answers."""
    again = tmp_path / "output"
    command = words(models / "model", again, *SAMPLED, *BESIDE, "--base_model_name", models / "base")
    with pytest.MonkeyPatch.context() as monkeypatch:
        Spy(monkeypatch, rounds=1)
        assert main(command) == 130
    assert not (again / "result.json").exists() and len(rows(again)) == 4
    with (again / "answers.jsonl").open("a") as stream:
        stream.write((whole / "answers.jsonl").read_text().splitlines(keepends=True)[4])
        stream.write('{"id": "gsm8k_2", "sam')
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy(monkeypatch, rounds=9)
        assert main(command) == 0
    assert spy.asked == [f"gsm8k_{i}" for i in (2, 2, 3, 3, 4, 4)]
    assert content(again) == content(whole)

    (again / "result.json").unlink()
    (again / "retention.jsonl").write_text("".join((again / "retention.jsonl").read_text().splitlines(keepends=True)[:5]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy(monkeypatch, rounds=0)
        assert main(command) == 0
    assert content(again) == content(whole)


def test_answers_made_anew_are_read_anew(whole: Path, models: Path, tmp_path: Path) -> None:
    """What lies in retention.jsonl is of another sixth answer: it is measured again, and nothing is generated."""
    again = tmp_path / "output"
    shutil.copytree(whole, again)
    answers = rows(again)
    answers[5]["token_ids"].reverse()
    (again / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    with pytest.MonkeyPatch.context() as monkeypatch:
        Spy(monkeypatch, rounds=0)
        assert main(words(models / "model", again, *SAMPLED, *BESIDE, "--base_model_name", models / "base")) == 0
    found, before = rows(again, "retention"), rows(whole, "retention")
    assert [n for n, (one, other) in enumerate(zip(found, before, strict=True)) if one != other] == [5]
    assert found[5]["log_prob"] != before[5]["log_prob"]
    assert (again / "fit.jsonl").read_bytes() == (whole / "fit.jsonl").read_bytes()


def test_a_folder_that_is_being_written_is_refused(whole: Path, models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with locked(whole):
        assert main(words(models / "model", whole, *SAMPLED, *BESIDE, "--base_model_name", models / "base")) == 2
    assert "another process is writing it" in capfd.readouterr().err


def test_a_folder_of_other_settings_is_refused(whole: Path, models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = content(whole)
    for change, words_ in (
        (["--seed", "1"], "seed 0 there, 1 here"),
        (["--max_completion_length", "7"], "max_"),
        (["--semantics", "released"], "semantics"),
    ):
        assert main(words(models / "model", whole, *SAMPLED, *change)) == 2
        error = capfd.readouterr().err.strip().splitlines()
        assert len(error) == 1 and "holds answers of other settings" in error[0] and words_ in error[0], error
    assert main(words(models / "base", whole, *SAMPLED)) == 2
    assert "model" in capfd.readouterr().err
    assert content(whole) == before


def test_a_megatron_checkpoint_answers_as_the_folder_it_was_made_of(whole: Path, models: Path, tmp_path: Path) -> None:
    assert main(words(models / "megatron", tmp_path / "output", *SAMPLED, "--fit")) == 0
    assert rows(tmp_path / "output") == rows(whole)
    assert rows(tmp_path / "output", "fit") == rows(whole, "fit")


def on_two_ranks(rank: int, group: ProcessGroup, command: list[str]) -> int:
    os.environ["RANK"] = str(rank)
    try:
        return main(command)
    finally:
        del os.environ["RANK"]


def test_two_processes_give_the_answers_of_one(whole: Path, models: Path, tmp_path: Path, world: World) -> None:
    command = words(models / "model", tmp_path / "output", *SAMPLED, *BESIDE, "--base_model_name", models / "base")
    assert world.run(2, on_two_ranks, command) == [0, 0]
    for name in ("answers", "retention", "fit"):
        for one, other in zip(rows(tmp_path / "output", name), rows(whole, name), strict=True):
            assert one.pop("log_probs", []) == pytest.approx(other.pop("log_probs", []), abs=1e-5)
            assert one == other


def test_long_prompts_are_wrong_and_never_cut(models: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy(monkeypatch, rounds=9)
        command = words(models / "model", tmp_path / "output", "--max_prompt_length", "400", *BESIDE)
        assert main([*command, "--base_model_name", str(models / "base")]) == 0
    answers = rows(tmp_path / "output")
    long = [one["id"] for one in answers if one["failure"] == TOO_LONG]
    assert 0 < len(long) < 5 and spy.asked == [one["id"] for one in answers if one["id"] not in long]
    assert all(one["token_ids"] == [] and not one["correct"] for one in answers if one["id"] in long)
    found = result(tmp_path / "output")
    assert found["answers"] == 5 and found["failures"][TOO_LONG] == len(long)
    assert found["retention"]["completions"] == 5 - len(long)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.timeout(400)
def test_vllm_gives_the_greedy_answers_of_transformers(models: Path, tmp_path: Path) -> None:
    """In a process of its own: vLLM takes the process group down with itself."""
    assert main(words(models / "model", tmp_path / "transformers", "--fit", "--log_probs")) == 0
    more = ["--engine", "vllm", "--vllm_kv_cache_gib", "0.1", "--fit", "--log_probs"]
    done = subprocess.run(
        [sys.executable, "-m", "unisd_megatron", *words(models / "megatron", tmp_path / "vllm", *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,  # 15 s on two idle cores
    )
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = rows(tmp_path / "vllm")
    for one, other in zip(theirs, rows(tmp_path / "transformers"), strict=True):
        assert one.pop("log_probs") == pytest.approx(other.pop("log_probs"), abs=1e-4)
        assert one == other
    assert len({one["completion"] for one in theirs}) == 5
    assert result(tmp_path / "vllm")["fit"] == result(tmp_path / "transformers")["fit"]
    assert "vllm_kv_cache_gib" in result(tmp_path / "vllm")["settings"]


def test_the_base_s_own_answers_are_read_in_the_other_direction(models: Path, tmp_path: Path) -> None:
    base, one, two = (tmp_path / name for name in ("base", "one", "two"))
    assert main(words(models / "base", base, examples=3)) == 0
    way = ["--retention", "--base_model_name", models / "base", "--base_answers", base]
    assert main(words(models / "model", one, *way, examples=3)) == 0
    there = ["--retention", "--base_model_name", models / "model"]
    assert main(words(models / "base", two, *there, examples=3)) == 0
    assert result(one)["reverse"]["completions"] == 3
    names = ("log_prob", "own_log_prob", "jsd")
    for here, mirrored in zip(rows(one, "reverse"), rows(two, "retention"), strict=True):
        assert [here[name] for name in names] == pytest.approx([mirrored[name] for name in names], abs=1e-5)


def test_two_evaluations_are_compared_question_by_question(
    whole: Path, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """References against a model that knows nothing: every question is better in one of them."""
    fixed = ["evaluate", "--dataset", "gsm8k", "--data_path", str(GSM8K), "--output_dir", str(tmp_path / "gold")]
    assert main([*fixed, "--references", "--max_examples", "5"]) == 0
    assert main(words(models / "model", tmp_path / "output")) == 0
    both = ["--compare", tmp_path / "gold", "--compare", whole]
    assert main(words(models / "model", tmp_path / "output", *both)) == 0
    (found, sampled) = result(tmp_path / "output")["comparisons"]
    assert (found["accuracy"], found["difference"], found["better_here"], found["better_there"]) == (1.0, -1.0, 0, 5)
    assert found["mcnemar_p"] == pytest.approx(2 / 32)
    assert found["interval"] == pytest.approx([-1.0, -0.38555], abs=1e-5)  # sqrt(2) z^2 / (5 + z^2) from the end
    assert found["differ"] == {} and sampled["mcnemar_p"] is None
    assert sampled["differ"].keys() == {"temperature", "top_p", "samples", "log_probs"}
    assert "samples 1 here, 2 there" in capfd.readouterr().out
    assert "| -100.00 |" in (tmp_path / "output" / "table.md").read_text()


def test_evaluations_of_other_questions_are_not_compared(
    whole: Path, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words(models / "model", tmp_path / "output", "--compare", whole, examples=4)) == 2
    assert "other questions (gsm8k_4 is asked there only)" in capfd.readouterr().err
    lines = GSM8K.read_text().splitlines(keepends=True)
    changed = [json.dumps(json.loads(line) | {"answer": "No.\n#### 7"}) + "\n" for line in lines[:5]]
    for name, part, why in (("split", lines[5:10], "are worded otherwise"), ("answers", changed, "other data")):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))  # the same ids: numbers of rows
        gold = ["evaluate", "--dataset", "gsm8k", "--data_path", str(tmp_path / f"{name}.jsonl"), "--references"]
        assert main([*gold, "--output_dir", str(tmp_path / name)]) == 0
        assert main(words(models / "model", tmp_path / "output", "--compare", tmp_path / name)) == 2
        assert why in capfd.readouterr().err
    assert not (tmp_path / "output").exists()


def test_released_semantics_score_what_was_cut_short(models: Path, tmp_path: Path) -> None:
    """Under corrected semantics such answers are not even read."""
    for semantics in ("corrected", "released"):
        assert main(words(models / "model", tmp_path / semantics, "--semantics", semantics)) == 0
    corrected, released = rows(tmp_path / "corrected"), rows(tmp_path / "released")
    assert {one["failure"] for one in corrected if not one["finished"]} == {UNFINISHED}
    assert UNFINISHED not in {one["failure"] for one in released}
    assert any(not one["finished"] for one in released)


def test_references_are_scored_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    command = ["evaluate", "--dataset", "gsm8k", "--data_path", str(GSM8K), "--references", "--output_dir", str(tmp_path / "o")]
    assert main(command) == 0
    before = content(tmp_path / "o")
    assert (result(tmp_path / "o")["correct"], result(tmp_path / "o")["answers"]) == (1319, 1319)
    assert main(command) == 0
    assert content(tmp_path / "o") == before


@pytest.mark.skipif(not (DATA / "mbpp.jsonl").is_file(), reason="mbpp.jsonl is not here")
def test_programs_are_run_and_options_are_read(models: Path, tmp_path: Path) -> None:
    """Real MBPP references, all of the file; a model's answers to MBPP; the options of real CoS-E questions."""
    mbpp = ["evaluate", "--dataset", "mbpp", "--data_path", str(DATA / "mbpp.jsonl"), "--max_examples", "12"]
    assert main([*mbpp, "--references", "--output_dir", str(tmp_path / "gold")]) == 0
    found = result(tmp_path / "gold")
    assert (found["correct"], found["answers"], rows(tmp_path / "gold")[0]["id"]) == (12, 12, "mbpp_1")
    assert found["sandbox"]["protections"]
    assert json.loads((tmp_path / "gold" / "answers.key.json").read_text())["judging"]["unsafe"] is False

    short = ["--model_name", str(models / "model"), "--max_completion_length", "3", "--semantics", "released"]
    assert main([*mbpp, *short, "--output_dir", str(tmp_path / "mbpp")]) == 0
    assert {one["failure"] for one in rows(tmp_path / "mbpp")} <= {"syntax error", "exception", "no answer"}

    questions = ["--dataset", "cos_e", "--data_path", str(DATA / "csqa_v1.0_dev_rand_split.jsonl"), "--max_examples", "6"]
    way = ["--method", "logprobs", "--model_name", str(models / "model"), "--output_dir", str(tmp_path / "cos_e")]
    assert main(["evaluate", *questions, *way]) == 0
    for one in rows(tmp_path / "cos_e"):
        best = max(one["options"], key=one["options"].__getitem__)
        assert one["completion"] == f"Answer: {best}" and len(one["options"]) == 3


ADD = {"task_id": 11, "text": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}


def judged_on_two_ranks(rank: int, group: ProcessGroup) -> tuple[list[Verdict], int]:
    task = TASKS["mbpp"]()
    record = task.parse(ADD, 0)
    told: list[int] = []
    answers = [(record, f"```python\ndef f(x):\n    return x + {number}\n```") for number in (1, 2, 1, 1, 3)]
    return Judge(task, record).verdicts(answers, Axis(rank, 2, group), told.append), told[-1]


def test_ranks_share_the_programs_and_all_have_the_verdicts(world: World) -> None:
    (first, mine), (second, theirs) = world.run(2, judged_on_two_ranks)
    wrong = Verdict(False, "failed assertion")
    assert first == second == [Verdict(True), wrong, Verdict(True), Verdict(True), wrong]
    assert (mine, theirs) == (3, 2)


@pytest.mark.skipif(not (DATA / "mbpp.jsonl").is_file(), reason="mbpp.jsonl is not here")
def test_programs_are_scored_during_training_on_every_rank(models: Path, tmp_path: Path, world: World) -> None:
    data = ["--data_path", str(DATA / "mbpp.jsonl"), "--eval_data_path", str(DATA / "mbpp.jsonl"), "--num_train_examples", "4"]
    sizes = ["--global_batch_size", "2", "--max_steps", "1", "--max_completion_length", "3", "--max_prompt_length", "3000"]
    evaluations = ["--eval_steps", "1", "--eval_examples", "3"]
    where = ["--model_name", str(models / "model"), "--output_dir", str(tmp_path / "run")]
    command = ["train", "--mode", "vanilla", "--dataset", "mbpp", *data, *sizes, *evaluations, *where]
    assert world.run(2, on_two_ranks, command) == [0, 0]
    found = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert found == [{"step": step, "accuracy": 0.0, "examples": 3} for step in (0, 1)]
