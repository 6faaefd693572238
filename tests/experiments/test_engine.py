"""The graph on this machine: order, skipping, failures, memory, kills. Nodes are shell commands, the engine is real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT, alive, descendants, kill_tree, wait_until
from standins import evaluate, graph, train
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.experiments import engine, state
from unisd_megatron.experiments.graph import Node, Sweep
from unisd_megatron.experiments.run import Manner, perform
from unisd_megatron.experiments.work import ran_out


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return tmp_path / "sweep"


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Where the commands of a graph write that they ran."""
    (tmp_path / "traces").mkdir()
    return tmp_path / "traces"


def run(built: Sweep, sweep: Path, jobs: int = 2) -> list[str]:
    said: list[str] = []
    perform(built, Manner(sweep, jobs=jobs), said.append)
    return said


def ran(traces: Path) -> dict[str, int]:
    return {path.name: len(path.read_text().splitlines()) for path in traces.iterdir()}


def pairs(sweep: Path, traces: Path, *names: str) -> list[Node]:
    return [
        node
        for one in names
        for node in (
            train(sweep, one, f"echo x >> {traces}/train-{one}"),
            evaluate(sweep, one, f"echo x >> {traces}/evaluate-{one}"),
        )
    ]


def test_what_is_done_is_not_done_again_even_without_its_checkpoint(sweep: Path, traces: Path) -> None:
    built = graph(sweep, pairs(sweep, traces, "a", "b"))
    first = run(built, sweep)
    assert ran(traces) == dict.fromkeys(("train-a", "train-b", "evaluate-a", "evaluate-b"), 1)
    subprocess.run(["rm", "-r", *map(str, sweep.glob("runs/*/seed0/train"))], check=True)
    again = run(built, sweep)
    assert set(ran(traces).values()) == {1} and "0 to run" in again[0]
    assert [line for line in first if "50.00" in line] == [line for line in again if "50.00" in line] != []
    assert not (sweep / ".engine").exists()
    # An evaluation that is still to be done does need the checkpoint.
    (sweep / "runs/a/seed0/evaluate.done.json").unlink()
    run(built, sweep)
    assert ran(traces) == {"train-a": 2, "evaluate-a": 2, "train-b": 1, "evaluate-b": 1}


def test_a_failure_shows_its_end_and_stops_what_follows_it_alone(sweep: Path, traces: Path) -> None:
    bad = train(sweep, "bad", "echo beginning; echo the reason >&2; test -e $0.fixed")
    built = graph(sweep, [bad, evaluate(sweep, "bad", f"echo x >> {traces}/evaluate-bad"), *pairs(sweep, traces, "good")])
    said: list[str] = []
    with pytest.raises(CheckFailed, match="1 failed .train-bad., 1 not run"):
        perform(built, Manner(sweep, jobs=2), said.append)
    assert "    the reason" in said and any("FAILED  train-bad" in line for line in said)
    assert ran(traces) == {"train-good": 1, "evaluate-good": 1}
    found = {one.node.name: one.why for one in state.survey(sweep, built.nodes)}
    assert found["train-bad"] == "failed the last time" and found["evaluate-good"] == "evaluated"
    (sweep / "runs/bad/seed0/train.fixed").touch()
    run(built, sweep)
    assert ran(traces) == {"train-good": 1, "evaluate-good": 1, "evaluate-bad": 1}


LESS = 'for last; do :; done; test "$1" = --micro-batch-size || last={full}; echo $last >> {log}; '
CUDA = "test $last -le 2 || {{ echo torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB; exit 1; }}"
KILLED = "test $last -le 2 || kill -9 $$"


@pytest.mark.parametrize("end", [CUDA.replace("{{", "{").replace("}}", "}"), KILLED], ids=["cuda", "killed"])
def test_out_of_memory_is_tried_again_at_smaller_micro_batches_of_the_same_batch(sweep: Path, traces: Path, end: str) -> None:
    stated = {"dataset": "addition", "model_name": "m", "mode": "vanilla", "global_batch_size": 24, "micro_batch_size": 12}
    log = traces / "sizes"
    built = graph(sweep, [train(sweep, "a", LESS.format(full=12, log=log) + end), evaluate(sweep, "a")], stated)
    said = run(built, sweep)
    assert log.read_text().split() == ["12", "6", "3", "1"]  # each divides 24
    receipt = json.loads((sweep / "runs/a/seed0/train.done.json").read_text())
    assert (receipt["attempts"], receipt["micro_batch_size"]) == (4, 1)
    assert any("train-a" in line and "--micro-batch-size 1" in line for line in said)


@pytest.mark.parametrize(
    ("stated", "attempts"),
    [
        ({"micro_batch_size": 64, "global_batch_size": 64}, 4),  # no more than so many
        ({"micro_batch_size": 2, "global_batch_size": 4}, 2),  # there is nothing below one
        ({"micro_batch_size": 64, "global_batch_size": 64, "semantics": "released"}, 1),  # it would be another run
    ],
)
def test_attempts_are_bounded(sweep: Path, traces: Path, stated: dict[str, object], attempts: int) -> None:
    script = f"echo x >> {traces}/tries; echo CUDA out of memory; exit 1"
    settings = {"dataset": "addition", "model_name": "m", "mode": "vanilla", **stated}
    with pytest.raises(CheckFailed):
        run(graph(sweep, [train(sweep, "a", script)], settings), sweep)
    assert ran(traces) == {"tries": attempts}


@pytest.mark.parametrize(
    "said",
    [
        "torch.AcceleratorError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL WARN Cuda failure 2 'out of memory'",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0",
    ],
)
def test_what_is_said_when_memory_runs_out(said: str) -> None:
    assert ran_out(1, f"step 3\n{said}\nexit\n")
    assert not ran_out(1, "a MemoryError was not seen")


def test_a_training_that_was_asked_to_stop_is_not_done(sweep: Path, traces: Path) -> None:
    script = f'echo x >> {traces}/tries; test -e "$0" || {{ mkdir -p "$0/checkpoints/step_1"; exit 0; }}'
    built = graph(sweep, [train(sweep, "a", script), evaluate(sweep, "a")])
    said: list[str] = []
    with pytest.raises(CheckFailed, match="1 failed .train-a., 1 not run"):
        perform(built, Manner(sweep, jobs=2), said.append)
    assert any("was asked to stop before its last step" in line for line in said)
    assert {one.node.name: one.why for one in state.survey(sweep, built.nodes)}["train-a"] == "goes on from step_1"
    run(built, sweep)
    assert ran(traces) == {"tries": 2}


def test_a_worker_that_cannot_begin_says_why(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    node = Node("train-a", "train", "runs/a/seed0/train", ("true",), "a", ranks=2)
    with pytest.raises(ConfigError, match="2 ranks and 1 GPUs"):
        run(graph(sweep, [node]), sweep)
    assert not sweep.exists()
    # As where another host carries it out.
    said: list[str] = []
    with engine.alone(sweep) as lock:
        state.write(sweep / "sweep.json", graph(sweep, [node]).content())
        found = engine.carry_out(sweep, [node], jobs=2, cluster=None, lock=lock, say=said.append)
    assert found.failed == ["train-a"] and any("2 ranks and 1 GPUs on this machine" in line for line in said)


def test_a_wrong_request_is_not_tried_again(sweep: Path, traces: Path) -> None:
    with pytest.raises(CheckFailed):
        run(graph(sweep, [train(sweep, "a", f"echo x >> {traces}/tries; exit 2")]), sweep)
    assert ran(traces) == {"tries": 1}


# Counts to ten in a checkpoint of its own, a step each; `latest` goes on from there.
STEPS = (
    'mkdir -p "$0/checkpoints"; n=$(ls "$0/checkpoints" | wc -l); '
    'test $n = 0 || test "$1 $2" = "--resume_from_checkpoint latest" || exit 3; '
    'while test $n -lt 10; do n=$((n + 1)); echo $n >> {log}; mkdir "$0/checkpoints/step_$n"; sleep 0.2; done'
)
START = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from standins import evaluate, graph, train
from unisd_megatron.cli import main
from unisd_megatron.experiments.run import Manner, perform
sweep = Path({sweep!r})
nodes = []
for one in ("a", "b"):
    nodes += [train(sweep, one, {script!r}.replace("LOG", {traces!r} + "/" + one)), evaluate(sweep, one)]
perform(graph(sweep, nodes), Manner(sweep, jobs=2), lambda line: print(line, flush=True))
"""


def start(sweep: Path, traces: Path) -> subprocess.Popen[str]:
    code = START.format(tests=str(Path(__file__).parent), sweep=str(sweep), traces=str(traces), script=STEPS.format(log="LOG"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def steps(traces: Path) -> int:
    return sum(ran(traces).values())


def test_killed_twice_it_goes_on_from_its_checkpoints_to_the_same_table(sweep: Path, traces: Path) -> None:
    for enough in (3, 8):
        master = start(sweep, traces)
        wait_until(lambda enough=enough: steps(traces) >= enough)
        kill_tree(master)
    last = start(sweep, traces)
    said, _ = last.communicate(timeout=200)
    assert last.returncode == 0 and said.count("50.00   50.00") == 2
    for one in ("a", "b"):  # every step once: what was cut went on
        assert (traces / one).read_text().split() == [str(n) for n in range(1, 11)]


def test_a_signal_ends_everything_that_was_started(sweep: Path, traces: Path) -> None:
    master = start(sweep, traces)
    wait_until(lambda: len(ran(traces)) == 2)
    started = descendants(master.pid)
    master.send_signal(signal.SIGTERM)
    said, _ = master.communicate(timeout=100)
    assert master.returncode == 143 and "stopping" in said
    assert not alive(started)
    assert not list(sweep.rglob("*.failed.json"))


def test_nothing_goes_on_when_nobody_reads(sweep: Path, traces: Path) -> None:
    master = start(sweep, traces)
    wait_until(lambda: len(ran(traces)) == 2)
    started = descendants(master.pid)
    assert master.stdout is not None
    master.stdout.close()
    assert master.wait(100) != 0
    assert not alive(started)


def test_two_processes_do_not_carry_out_one_sweep(sweep: Path, traces: Path) -> None:
    built = graph(sweep, pairs(sweep, traces, "a"))
    with engine.alone(sweep), pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ \(or what it started\)"):
        run(built, sweep)
    assert ran(traces) == {}


def test_a_training_of_more_ranks_than_jobs_is_refused(sweep: Path) -> None:
    node = Node("train-a", "train", "runs/a/seed0/train", ("true",), "a", ranks=4)
    with pytest.raises(ConfigError, match="--jobs 4 or more"):
        run(graph(sweep, [node]), sweep)
    assert not sweep.exists()
