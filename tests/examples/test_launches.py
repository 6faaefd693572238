"""The launch scripts, carried out: stopped before the time limit, a rank killed, and still the run that nothing happened to."""

from __future__ import annotations

import os
import signal

import pytest

from launching import COURSE, SCALE, TIMEOUT_S, Desk, course, ranks, started, steps, watch
from unisd_megatron.train import checkpoint
from unisd_megatron.weights.tiny import write_tiny

pytestmark = pytest.mark.timeout(900)  # several starts of torchrun, each of them all imports: minutes on a busy machine


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("launch")
    write_tiny("qwen2", folder / "tiny", seed=0)
    return Desk(folder, folder / "tiny")


def test_signalled_requeued_killed_restarted_and_finished(desk: Desk) -> None:
    whole, output = desk.folder / "whole", desk.folder / "broken"
    log = desk.folder / "whole.log"
    with started(SCALE / "torchrun.sh", desk.environment(whole), log) as process:
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    assert (whole / "finished.json").is_file() and "is finished" in log.read_text()

    # The job's limit comes near: USR1 to the batch script, here while its ranks are still loading. The signal must neither end
    # them nor be lost: they make a step, write a checkpoint and end well, and the job is requeued.
    log = desk.folder / "signalled.log"
    with started(SCALE / "slurm.sbatch", desk.slurm(output), log) as process:
        watch(process, log, lambda: len(ranks(process.pid)) == 2)
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    stopped_after = steps(output)
    assert 1 <= stopped_after < COURSE["max_steps"]
    assert checkpoint.complete(output)[-1].name == f"step_{stopped_after:06d}"
    assert f"stopped after step {stopped_after} of 10 (SIGUSR1)" in log.read_text()
    assert desk.requeued == ["requeue 7"] and not (output / "hf").exists()

    # The same job again. A rank dies; torchrun starts all of them from the last complete checkpoint, to the end.
    log = desk.folder / "killed.log"
    with started(SCALE / "slurm.sbatch", desk.slurm(output), log) as process:
        watch(process, log, lambda: steps(output) >= stopped_after + 4)
        ranks(process.pid)[0].kill()
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    text = log.read_text()
    assert (
        f"resumed from {output}/checkpoints/step_{stopped_after:06d}" in text
        and text.count(f"resumed from {output}/checkpoints/") == 2
    ), text
    assert course(output) == course(whole)
    assert (output / "hf" / "model.safetensors").read_bytes() == (whole / "hf" / "model.safetensors").read_bytes()
    assert desk.requeued == ["requeue 7"]

    # And once more: there is nothing to do.
    log = desk.folder / "finished.log"
    before = (output / "metrics.jsonl").stat().st_mtime_ns
    with started(SCALE / "slurm.sbatch", desk.slurm(output), log) as process:
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    assert "finished after 10 steps; nothing to do" in log.read_text()
    assert (output / "metrics.jsonl").stat().st_mtime_ns == before and desk.requeued == ["requeue 7"]
