"""Slurm as far as a sweep speaks with it: `sbatch` starts a job here, `sacct` tells its state, `scancel` ends it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "squeue", "scancel", "scontrol", "sinfo", "sacctmgr", "sshare")
STATE = "STAND_IN_SLURM"  # the folder with a JSON file for each job


def install(folder: Path) -> dict[str, str]:
    """Writes the commands; the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(__file__)} {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", STATE: str(folder / "jobs")}


def jobs(folder: Path) -> list[dict[str, object]]:
    """What was submitted, in order: its arguments and its state."""
    paths = sorted((folder / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in paths]


def sbatch(folder: Path, words: list[str]) -> None:
    number = len(list(folder.glob("*.json"))) + 1
    path = folder / f"{number}.json"
    options = {name: value for name, value in zip(words, [*words[1:], ""], strict=True) if name.startswith("-")}
    wrap = (
        next(word.partition("=")[2] for word in words if word.startswith("--wrap="))
        if "--wrap" not in options
        else options["--wrap"]
    )
    job = {"id": number, "name": options["--job-name"], "state": "RUNNING", "words": words}
    path.write_text(json.dumps(job))
    log = Path(options["--output"].replace("%j", str(number)))
    log.parent.mkdir(parents=True, exist_ok=True)
    if os.fork() == 0:  # the node
        os.setsid()
        with log.open("w") as stream, open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0), os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
            environment = os.environ | {"SLURM_JOB_ID": str(number), "SLURM_JOB_NAME": job["name"]}
            path.write_text(json.dumps(job | {"pid": os.getpid()}))
            status = subprocess.run(["bash", "-c", wrap], cwd=options["-D"], env=environment).returncode
        path.write_text(json.dumps(job | {"state": "FAILED" if status else "COMPLETED"}))
        return
    print(number)


def srun(_: Path, words: list[str]) -> None:
    first = next(i for i, word in enumerate(words) if not word.startswith("-"))
    os.execvp(words[first], words[first:])


def sacct(folder: Path, words: list[str]) -> None:
    for path in folder.glob("*.json"):
        job = json.loads(path.read_text() or "{}")
        if "--name" in words and job.get("name") == words[words.index("--name") + 1]:
            print(f"{job['id']}|{job['state']}")


def scancel(folder: Path, words: list[str]) -> None:
    for word in words:
        path = folder / f"{word}.json"
        if path.is_file() and (job := json.loads(path.read_text()))["state"] == "RUNNING":
            path.write_text(json.dumps(job | {"state": "CANCELLED"}))
            os.killpg(job["pid"], signal.SIGTERM)


def sacctmgr(_: Path, words: list[str]) -> None:
    print("lab")


if __name__ == "__main__":
    name, words = sys.argv[1], sys.argv[2:]
    if name in ("scontrol", "squeue"):
        sys.exit(1)
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scancel": scancel, "sacctmgr": sacctmgr}.get(name, lambda *_: None)(
        Path(os.environ[STATE]), words
    )
