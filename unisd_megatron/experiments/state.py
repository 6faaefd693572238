"""What of a sweep is done, and why the rest is not: judged by receipts that are written last, and by nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unisd_megatron.experiments.graph import LAYERS, Node

Status = Literal["done", "run", "idle"]


@dataclass(frozen=True)
class Found:
    """A node's status: done, to be run, or a cache that nobody is going to read; and why."""

    node: Node
    status: Status
    why: str


def beside(sweep: Path, node: Node, suffix: str) -> Path:
    """A node's file of that suffix."""
    path = sweep / node.folder
    return path.with_name(f"{path.name}.{suffix}")


def receipt(sweep: Path, node: Node) -> dict[str, Any] | None:
    """What a finished node left, None if it is not finished or was finished for another identity."""
    try:
        content = json.loads(beside(sweep, node, "done.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("identity") == node.identity else None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def survey(sweep: Path, nodes: Sequence[Node]) -> list[Found]:
    """Every node with its status, in the order of the layers. Reads receipts, writes nothing.

    A finished evaluation needs its checkpoint no more, so a run is trained again only where something still to be done reads
    its export. Caches are asked for with every training that reads them: `prepare` itself knows what is there.
    """
    found: dict[str, Found] = {}
    for node in (one for one in nodes if one.kind == "evaluate"):
        complete = receipt(sweep, node) is not None and (sweep / node.folder / "result.json").is_file()
        found[node.name] = Found(node, "done", "evaluated") if complete else Found(node, "run", _unfinished(sweep, node))
    waiting = {need for one in found.values() if one.status == "run" for need in one.node.needs}
    for node in (one for one in nodes if one.kind == "train"):
        found[node.name] = _train(sweep, node, node.name in waiting)
    reading = {need for one in found.values() if one.status == "run" for need in one.node.needs}
    for node in (one for one in nodes if one.kind == "prepare"):
        idle = Found(node, "idle", "no training that is to run reads it")
        found[node.name] = Found(node, "run", "read by a training that is to run") if node.name in reading else idle
    anything = any(one.status == "run" for one in found.values())
    for node in (one for one in nodes if one.kind == "report"):
        complete = receipt(sweep, node) is not None and not anything
        found[node.name] = Found(node, "done", "written") if complete else Found(node, "run", "follows what runs")
    return [one for layer in LAYERS for one in found.values() if one.node.kind == layer]


def _train(sweep: Path, node: Node, waited_for: bool) -> Found:
    if receipt(sweep, node) is None:
        return Found(node, "run", _unfinished(sweep, node))
    if waited_for and not (sweep / node.folder / "hf" / "config.json").is_file():
        return Found(node, "run", "its exported folder is gone, and an evaluation needs it")
    return Found(node, "done", "trained")


def _unfinished(sweep: Path, node: Node) -> str:
    if node.kind == "train" and (last := last_checkpoint(sweep / node.folder)) is not None:
        return f"goes on from {last.name}"
    return "failed the last time" if beside(sweep, node, "failed.json").is_file() else "not done yet"


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    folder = output / "checkpoints"
    complete = [path for path in folder.glob("step_*") if path.name[5:].isdigit()] if folder.is_dir() else []
    return max(complete, key=lambda path: int(path.name[5:]), default=None)


def is_finished(output: Path) -> bool:
    """Whether a run came to its end, export included (`train/folder.py`); one that was asked to stop did not."""
    return (output / "finished.json").is_file()


def layers(found: Sequence[Found]) -> list[str]:
    """The lines of a dry run."""
    running = sum(one.status == "run" for one in found)
    lines = [f"{len(found)} nodes: {running} to run, {len(found) - running} done or not needed"]
    for number, layer in enumerate(LAYERS):
        of_layer = [one for one in found if one.node.kind == layer]
        if of_layer:
            lines.append(f"layer {number}: {layer}")
        lines += [f"  {one.status:4}  {one.node.name}  ({one.why})" for one in of_layer]
    return lines


def tail(path: Path, lines: int = 30) -> list[str]:
    """The last lines of a log; what a progress bar overwrote is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()][-lines:]
