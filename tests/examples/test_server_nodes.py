"""A node of rollout servers: one that ends leaves the others at work, and the node says when the last has ended."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

COMMON = Path(__file__).parent.parent.parent / "examples" / "common" / "launch.sh"

# Stands in for Python: of the two servers one fails at once, the other goes on for a while after that.
SERVER = """#!/usr/bin/env bash
[[ $1 == tools/serve_vllm.py ]] || exit 0
case "$*" in
    *"--port 8000"*) exit 3 ;;
    *"--port 8001"*) for _ in $(seq 100); do [[ -e $FOLDER/failed ]] || sleep 0.1; done; sleep 1; touch "$FOLDER/served" ;;
esac
"""


def test_a_server_that_ends_leaves_the_others(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(SERVER.replace("exit 3", 'touch "$FOLDER/failed"; exit 3'))
    python.chmod(0o755)
    words = {"NODES": 1, "GPUS_PER_NODE": 2, "SERVER_NODES": 1, "SERVER_GPUS": 1, "SERVER_MAX_LEN": 8, "OUTPUT_DIR": "/nowhere"}
    environment = os.environ | {name: str(value) for name, value in words.items()}
    environment |= {"PYTHON": str(python), "MODEL": str(tmp_path), "FOLDER": str(tmp_path), "SLURMD_NODENAME": "node1"}
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {COMMON}; serve"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert (tmp_path / "served").exists(), done.stderr
    assert done.returncode == 1 and "launch: all rollout servers of node1 have ended" in done.stderr
    assert "unbound" not in done.stderr
