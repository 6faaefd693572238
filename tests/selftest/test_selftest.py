"""`unisd selftest`: which checks run on which machine, how outputs are judged, what the page does not tell, and a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from unisd_megatron.cli import main
from unisd_megatron.selftest import page, reading, scrub, suite
from unisd_megatron.selftest.checks import CHECKS, Check, Work, reason
from unisd_megatron.selftest.launch import Job, run
from unisd_megatron.selftest.machine import Machine, machine_of

EVERYTHING = frozenset({"torch", "triton", "transformer-engine", "vllm"})
ON_CPU = {"devices", "loss.torch", "loss.floors", "parity.tp2", "parity.pp2", "sync.transformers", "demo", "restart"}
OF_ONE_GPU = (ON_CPU - {"parity.tp2", "parity.pp2"}) | {"loss.triton", "parity.single"}


def that_run(machine: Machine, quick: bool = False) -> set[str]:
    return {check.name for check in CHECKS if reason(check, machine, quick) is None}


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (Machine(), ON_CPU),
        (Machine(packages=frozenset({"triton", "vllm"})), ON_CPU | {"loss.triton", "sync.vllm"}),
        (Machine(packages=EVERYTHING), ON_CPU | {"loss.triton", "sync.vllm"}),
        (Machine(1, (9, 0), frozenset({"triton"})), OF_ONE_GPU),
        (Machine(1, (8, 0), EVERYTHING - {"vllm"}), OF_ONE_GPU | {"parity.te-bf16"}),
        (Machine(1, (9, 0), EVERYTHING - {"vllm"}), OF_ONE_GPU | {"parity.te-bf16", "fp8.teacher", "fp8.student"}),
        (Machine(2, (9, 0)), ON_CPU | {"parity.dp2"}),
        (Machine(4, (9, 0)), ON_CPU | {"parity.dp2", "parity.tp2-pp2"}),
        (Machine(8, (9, 0), EVERYTHING), {check.name for check in CHECKS} - {"parity.single"}),
    ],
)
def test_the_machine_decides_what_runs(machine: Machine, expected: set[str]) -> None:
    assert that_run(machine) == expected


def test_what_does_not_run_says_what_it_needs() -> None:
    reasons = {check.name: reason(check, Machine(1, (8, 0)), quick=False) for check in CHECKS}
    assert reasons["fp8.teacher"] == "needs a GPU of compute capability 9.0 (Hopper) or newer, found 8.0"
    assert reasons["parity.tp2-pp2"] == "needs 4 GPUs, found 1"
    assert reasons["loss.triton"] == "needs triton, not installed"
    hopper = {check.name: reason(check, Machine(1, (9, 0)), quick=False) for check in CHECKS}
    assert hopper["fp8.student"] == "needs transformer-engine, not installed"
    nothing = {check.name: reason(check, Machine(), quick=False) for check in CHECKS}
    assert nothing["fp8.student"] == "needs a GPU of compute capability 9.0 (Hopper) or newer, found no GPU"
    assert that_run(Machine(), quick=True) == ON_CPU - {"parity.pp2", "restart"}


def test_the_weakest_gpu_decides() -> None:
    found = machine_of({"gpus": [{"capability": [9, 0]}, {"capability": [8, 6]}]})
    assert found.gpus == 2 and found.capability == (8, 6)
    assert machine_of(None).gpus == 0


@pytest.mark.parametrize("machine", [Machine(), Machine(1, (9, 0), EVERYTHING), Machine(8, (9, 0), EVERYTHING)])
@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_no_program_asks_for_more_ranks_than_gpus_or_an_unknown_flag(
    machine: Machine, examples: bool, quick: bool, tmp_path: Path
) -> None:
    from unisd_megatron.cli.parser import parse

    machine = Machine(machine.gpus, machine.capability, machine.packages, examples)
    for check in CHECKS:
        if reason(check, machine, quick) is not None:
            continue
        for job in check.jobs(Work(machine, tmp_path, quick)):
            assert (job.ranks or 1) <= (machine.gpus or 2)
            if job.module == "unisd_megatron":
                parse(job.words)


PARITY = """no CUDA: CPU, gloo
case                                     loss   loss error  gradient error   norm error
vanilla                              1.721639     6.60e-08        2.46e-07     3.46e-08
unisd_star, JSD 0.5, clip 0.2        0.471109     1.03e-07        {error}     5.81e-08{verdict}
{held} of 2 hold (relative, 1e-05; fp32 against one fp64 process)
"""


def test_parity_is_read_from_its_table(tmp_path: Path) -> None:
    good = reading.parity(tmp_path, [PARITY.format(error="2.70e-07", verdict="", held=2)])
    assert good.holds and good.numbers["gradient"] == 2.7e-7 and good.found.startswith("2 of 2 cases")
    bad = reading.parity(tmp_path, [PARITY.format(error="3.00e-01", verdict="  FAILS", held=1)])
    assert not bad.holds and "failed: unisd_star" in bad.found
    cut = PARITY.format(error="2.70e-07", verdict="", held=2).rpartition("2 of 2")[0]
    assert not reading.parity(tmp_path, [cut]).holds


def losses(folder: Path, name: str, values: list[float], **more: float) -> None:
    (folder / name).mkdir()
    rows = [{"step": i, "loss": value, "rollout/logp_gap": 1e-7, **more} for i, value in enumerate(values)]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_fp8_holds_only_if_it_was_in_fp8(tmp_path: Path) -> None:
    losses(tmp_path, "run", [1.0], **{reading.DRIFT: 3e-4})
    assert reading.fp8_teacher(tmp_path, []).holds
    losses(tmp_path, "bf16", [1.0, 0.8, 0.6, 0.5])
    losses(tmp_path, "fp8", [1.01, 0.8, 0.61, 0.5])
    found = reading.fp8_student(tmp_path, [])
    assert found.holds and found.numbers["apart"] == pytest.approx(0.02 / 2.9)
    (tmp_path / "fp8/metrics.jsonl").write_text((tmp_path / "bf16/metrics.jsonl").read_text())
    assert not reading.fp8_student(tmp_path, []).holds


def test_without_examples_the_loss_must_fall(tmp_path: Path) -> None:
    losses(tmp_path, "run", [1.0, 0.9, 0.8, 0.7])
    assert reading.demo(tmp_path, []).holds
    (tmp_path / "run/evaluations.jsonl").write_text('{"accuracy": 0.3}\n{"accuracy": 0.2}\n')
    assert not reading.demo(tmp_path, []).holds


def programs(code: str, read: Callable[..., reading.Reading], limit_s: float = 60.0) -> Check:
    def jobs(work: Work) -> list[Job]:
        (work.folder / "program.py").write_text(code)
        return [Job("program", ())]

    return Check("made.up", "a check of this test", lambda *_: None, jobs, read, limit_s)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "exit status -6"),
        ("print('unisd: no such thing'); raise SystemExit(2)", "exit status 2; unisd: no such thing"),
        ("print('nothing of use')", "its output could not be read"),
    ],
)
def test_a_check_that_breaks_costs_one_line(code: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    row = suite._carry_out(programs(code, reading.kernels), Machine(), tmp_path, quick=True)
    assert row.verdict == page.FAILED and words in row.found
    assert row.commands == ["python -m program"]


def test_a_check_that_hangs_ends_with_all_it_started(tmp_path: Path) -> None:
    code = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '1234.5'], start_new_session=True)\ntime.sleep(1234)\n"
    (tmp_path / "program.py").write_text(code)
    ended = run(Job("program", ()), tmp_path / "log", tmp_path, limit_s=8.0)
    assert ended.status is None
    assert not [one for one in psutil.process_iter(["cmdline"]) if "1234.5" in (one.info["cmdline"] or [])]


def test_the_page_names_no_path_host_or_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISD_SERVER_TOKEN", "abcdefgh12345678")
    monkeypatch.setattr(scrub.socket, "gethostname", lambda: "node17.cluster.example")
    monkeypatch.setattr(scrub.getpass, "getuser", lambda: "gwendolyn")
    text = (
        'File "/home/gwendolyn/site/unisd_megatron/cli/x.py", line 3; token abcdefgh12345678; host: node17.cluster.example '
        "rank on node17, gwendolyn@node17, http://me:pw@10.1.2.3:8000/health, /dev/shm/x, 1/9, cuDNN 9.10.2.21"
    )
    shown = scrub.scrub(text)
    for word in ("gwendolyn", "/home", "abcdefgh", "node17", "me:pw", "10.1.2.3"):
        assert word not in shown, shown
    for word in ("x.py", "line 3", "/dev/shm/x", "1/9", "9.10.2.21"):
        assert word in shown, shown


def test_wrong_requests_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["selftest", "--only", "parrots", "--output-dir", str(output)]) == 2
    assert "--only parrots: no such check; use some of devices" in capsys.readouterr().err
    assert not output.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert main(["selftest", "--only", "devices", "--output_dir", str(tmp_path / "full")]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_real_run_writes_one_page(tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["selftest", "--quick", "--only", "loss.torch", "fp8", "sync.transformers", "--output_dir", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "unisd_megatron", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text, found = (output / "selftest.md").read_text(), json.loads((output / "selftest.json").read_text())
    verdicts = {row["name"]: row["verdict"] for row in found["rows"]}
    assert found["complete"] and verdicts["devices"] == verdicts["loss.torch"] == verdicts["sync.transformers"] == "held"
    assert str(tmp_path) not in text + json.dumps(found) and not list(output.glob("*.partial"))
    assert f"{sum(one == 'held' for one in verdicts.values())} held, 0 failed" in text
    assert all(row["numbers"] for row in found["rows"] if row["verdict"] == "held")
    assert not any((output / "work").iterdir())
