"""A job that its time limit stops is requeued if it got anywhere: one that only waited for servers would wait for ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launching import SCALE, Desk, started, watch

# Stands in for Python: servers that serve nothing, and a trainer that waits for them until the job is told to stop. The script
# then finds that it is asked to stop, and ends well; a checkpoint is there by then, or is not.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    tools/serve_vllm.py*) exec sleep 60 ;;
    "- "*)
        touch "$FOLDER/waiting"
        until [[ -e $STOP_FILE ]]; do sleep 0.1; done
        [[ -z $MAKES ]] || mkdir -p "$OUTPUT_DIR/checkpoints/$MAKES"
        ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node1\nnode2\n'; else echo "$@" >>"$SLURM_STANDIN/scontrol.log"; fi
"""


@pytest.mark.parametrize(
    ("there", "makes", "requeued"),
    [
        ("", "", False),
        ("", "step_000001", True),
        ("step_000002", "", False),
        ("step_000002", "step_000004", True),
        ("step_000002", "step_000004.abc.partial", False),
    ],
)
def test_only_a_start_that_made_a_checkpoint_is_requeued(tmp_path: Path, there: str, makes: str, requeued: bool) -> None:
    desk, output = Desk(tmp_path, tmp_path), tmp_path / "run"
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    if there:
        (output / "checkpoints" / there).mkdir(parents=True)
    nodes = {"NODES": "2", "SERVER_NODES": "1", "SERVER_GPUS": "2", "SERVER_MAX_LEN": "8", "SLURMD_NODENAME": "node2"}
    words = {"PYTHON": str(tmp_path / "python"), "FOLDER": str(tmp_path), "MODEL": str(tmp_path), "MAKES": makes}
    log = tmp_path / "job.log"
    with started(SCALE / "slurm.sbatch", desk.slurm(output) | nodes | words, log) as process:
        watch(process, log, (tmp_path / "waiting").exists)
        os.kill(process.pid, signal.SIGUSR1)
        status = process.wait(60)
    assert desk.requeued == (["requeue 7"] if requeued else []), log.read_text()
    assert (status == 0) is requeued
    assert ("this start has made no checkpoint" in log.read_text()) is not requeued
