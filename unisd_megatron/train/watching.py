"""The numbers of a run on Weights & Biases, for whoever has it. Rank 0 only."""

from __future__ import annotations

import secrets
from pathlib import Path

from unisd_megatron.config import Run

ID_FILE = "wandb_id"


def display_name(folder: Path) -> str:
    """The folder's; of a sweep's run, in <mode>-<dataset>-<digest>/seed<N>/train, the two before it: all are `train` there."""
    name, *above = reversed(folder.resolve().parts)
    return "-".join(reversed(above[:2])) if name == "train" and above[0].startswith("seed") else name


class WandbCurves:
    """One curve for each number of a step. A resumed run goes on with the same curves: its folder keeps their id."""

    def __init__(self, run: Run, folder: Path) -> None:
        import wandb

        path = folder / ID_FILE
        if not path.is_file():
            path.write_text(secrets.token_hex(8) + "\n")
        name = path.read_text().strip()
        self._curves = wandb.init(
            project=run.schedule.wandb_project,
            id=name,
            resume="allow",
            name=display_name(folder),
            dir=str(folder),
            config=run.flat(),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._curves.log(metrics, step=step)

    def close(self) -> None:
        self._curves.finish()
