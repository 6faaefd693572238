"""Trainings at the same time have GPUs of their own."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unisd_megatron.errors import ConfigError
from unisd_megatron.experiments import devices


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6a")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def shown(claim: devices.Claim) -> str:
    return claim.environment["CUDA_VISIBLE_DEVICES"]


def claim_in_background(count: int) -> tuple[threading.Thread, list[str], threading.Event]:
    """The thread that asks, what it was given, and what lets it give that back."""
    given: list[str] = []
    done = threading.Event()

    def ask() -> None:
        with devices.claim(count) as claim:
            given.append(shown(claim))
            done.wait(60)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, given, done


def test_a_gpu_is_given_once_and_again_when_it_is_free() -> None:
    with devices.claim(1) as first, devices.claim(1) as second:
        assert {shown(first), shown(second)} == {"4", "GPU-6a"}
        thread, given, done = claim_in_background(2)
        thread.join(0.5)
        assert thread.is_alive() and not given
    done.set()
    thread.join(60)
    assert given == ["4,GPU-6a"]


def test_a_command_that_outlives_its_worker_keeps_its_gpus() -> None:
    with devices.claim(2) as claim:
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=tuple(claim.locks))
    thread, given, done = claim_in_background(1)
    thread.join(0.5)
    assert thread.is_alive() and not given
    orphan.communicate(b"\n", timeout=60)
    done.set()
    thread.join(60)
    assert given == ["4"]


def test_what_is_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"3 ranks and 2 GPUs on this machine \(4, GPU-6a\)"), devices.claim(3):
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with devices.claim(3) as claim:
        assert claim == devices.Claim({}, ())


def test_jobs_of_a_cluster_count_their_gpus_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with devices.claim(1) as first, devices.claim(1) as second:
        assert {shown(first), shown(second)} == {"4", "GPU-6a"}
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with devices.claim(2) as other:
            assert shown(other) == "4,GPU-6a"
