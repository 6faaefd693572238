"""The folder of a run: where a start begins in it, and how it is known that the run is over.

RUN/run.json        settings and identity of the run, written before its first step
RUN/finished.json   the same, once the last step, its checkpoint and the exported folder are there
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd_megatron.config import Run
from unisd_megatron.errors import CheckFailed, CheckpointError
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Axis
from unisd_megatron.mechanisms.histograms import EDGES
from unisd_megatron.train import checkpoint
from unisd_megatron.train.build import Prepared
from unisd_megatron.weights.hf import read_json, require_new_folder

RUN_FILE, FINISHED = "run.json", "finished.json"


@dataclass(frozen=True)
class Beginning:
    """Where a start begins: at `first`, with the weights of `resume` or of the model; `finished`: there is nothing to do."""

    output: Path
    resume: Path | None = None
    first: int = 0
    finished: bool = False

    def agree(self, world: Axis) -> None:
        """Raises `CheckFailed`, on every rank, where hosts see different checkpoints. Collective."""
        seen = all_gather_json([str(self.resume), self.first], world)
        if other := next((one for one in seen if one != seen[0]), None):
            raise CheckFailed(
                f"{self.output}: ranks see different checkpoints to resume from ({seen[0][0]} and {other[0]}); the folder must "
                "be the same on every host"
            )


def begin(run: Run, prepared: Prepared) -> Beginning:
    """Reads the run's folder and writes nothing. Raises a `RequestError` if it holds another run, or what is no run."""
    assert run.schedule.output_dir is not None
    output, asked = Path(run.schedule.output_dir), run.schedule.resume_from_checkpoint
    if asked is None:
        if _is_used(output):
            raise CheckpointError(
                f"{output}: not empty; choose a new --output_dir, or continue that run with --resume_from_checkpoint auto"
            )
        return _new(output)
    if asked == "auto":
        return _wherever_it_is(run, prepared, output)
    return _resumed(run, prepared, output, checkpoint.find(output, asked))


def _wherever_it_is(run: Run, prepared: Prepared, output: Path) -> Beginning:
    """The run of this folder, whatever became of it: finished, under way, ended before its first checkpoint, or none."""
    if (output / FINISHED).is_file():
        state = _state(output / FINISHED)
        checkpoint.check_same_run(state, run, prepared.identity, output / FINISHED)
        return Beginning(output, first=int(state["steps_done"]), finished=True)
    if checkpoint.complete(output):
        return _resumed(run, prepared, output, checkpoint.find(output, "latest"))
    if (output / RUN_FILE).is_file():
        checkpoint.check_same_run(_state(output / RUN_FILE), run, prepared.identity, output / RUN_FILE)
        return Beginning(output)
    if _is_used(output) and [path.name for path in output.iterdir()] != [f"{RUN_FILE}.partial"]:
        raise CheckpointError(f"{output}: not empty, and no run that could be continued; choose a new --output_dir")
    return Beginning(output) if output.exists() else _new(output)


def _new(output: Path) -> Beginning:
    if not output.exists():
        require_new_folder(output)
    return Beginning(output)


def _resumed(run: Run, prepared: Prepared, output: Path, path: Path) -> Beginning:
    state = checkpoint.read_state(path)
    checkpoint.check_same_run(state, run, prepared.identity, path)
    if path.resolve().parent.parent != output.resolve() and _is_used(output):
        raise CheckpointError(f"{output}: not empty, and the checkpoint {path} is not of its run; choose a new --output_dir")
    return Beginning(output, path, int(state["steps_done"]))


def _is_used(output: Path) -> bool:
    return output.exists() and (not output.is_dir() or any(output.iterdir()))


def _state(path: Path) -> dict[str, Any]:
    state = read_json(path)
    if not {"settings", "identity"} <= state.keys() or (path.name == FINISHED and "steps_done" not in state):
        raise CheckpointError(f"{path}: not written by this program, or by an older one; choose a new --output_dir")
    return state


def write_run_file(run: Run, identity: dict[str, Any], output: Path, versions: dict[str, str]) -> None:
    """`run.json`: settings with their origins, what else makes the run, versions, edges of histograms; the run is not over.

    `--config run.json` repeats the run.
    """
    (output / FINISHED).unlink(missing_ok=True)
    origins = dict(run.origins)
    content = {"settings": run.flat(), "origins": origins, "identity": identity, "versions": versions, "histograms": EDGES}
    _write(output / RUN_FILE, content)


def write_finished(run: Run, prepared: Prepared, output: Path) -> None:
    """`finished.json`, by which whoever starts runs knows that this one needs no further start. Rank 0 only."""
    _write(output / FINISHED, {"steps_done": prepared.max_steps, "settings": run.flat(), "identity": prepared.identity})


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
