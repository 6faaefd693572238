"""The results as one page, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unisd_megatron.selftest.scrub import scrub

HELD, FAILED, NOT_RUN = "held", "FAILED", "not run"
TAIL_LINES = 25


@dataclass(frozen=True)
class Row:
    """A check's line. tail: the end of what it printed, and `commands` what was started, where it did not hold."""

    name: str
    shows: str
    verdict: str
    found: str
    seconds: float = 0.0
    numbers: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    tail: str = ""


@dataclass(frozen=True)
class Surroundings:
    """The machine, in words: facts by name, variables that are set, GPUs as the driver lists them, their topology."""

    facts: Mapping[str, str]
    variables: Mapping[str, str]
    gpus: Sequence[str]
    topology: str | None


def summary(rows: Sequence[Row]) -> str:
    """Counts in one line."""
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (HELD, FAILED, NOT_RUN)}
    names = ", ".join(row.name for row in rows if row.verdict == FAILED)
    return f"{counts[HELD]} held, {counts[FAILED]} failed, {counts[NOT_RUN]} not run" + (f"; failed: {names}" if names else "")


def write(folder: Path, rows: Sequence[Row], surroundings: Surroundings, when: str, complete: bool) -> None:
    """`selftest.md` and `selftest.json` in `folder`, scrubbed; each is whole at any moment."""
    content = {"when": when, "complete": complete, "machine": asdict(surroundings), "rows": [asdict(row) for row in rows]}
    pages = {
        "selftest.md": scrub(markdown(rows, surroundings, when, complete)),
        "selftest.json": json.dumps(_scrubbed(content), indent=1) + "\n",
    }
    for name, text in pages.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _scrubbed(content: Any) -> Any:
    if isinstance(content, str):
        return scrub(content)
    if isinstance(content, Mapping):
        return {key: _scrubbed(value) for key, value in content.items()}
    return [_scrubbed(one) for one in content] if isinstance(content, list | tuple) else content


def markdown(rows: Sequence[Row], surroundings: Surroundings, when: str, complete: bool) -> str:
    """The page."""
    state = summary(rows) if complete else f"stopped early: {summary(rows)} so far"
    lines = ["# unisd selftest", "", f"{when}: {state}", "", "| check | | seconds | found |", "|---|---|---|---|"]
    for row in rows:
        seconds = f"{row.seconds:.0f}" if row.verdict != NOT_RUN else ""
        lines.append(f"| {row.name} | {row.verdict} | {seconds} | {_cell(row.found)} |")
    lines += ["", "What each shows:", ""]
    lines += [f"- `{row.name}`: {row.shows}" for row in rows]
    for row in rows:
        if row.verdict == FAILED:
            lines += ["", f"## {row.name} failed", "", "```", *(f"$ {command}" for command in row.commands), row.tail, "```"]
    lines += ["", "## Machine", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in surroundings.facts.items()]
    lines += [f"| GPU {number} | {_cell(one)} |" for number, one in enumerate(surroundings.gpus)] or ["| GPU | none |"]
    lines += [f"| `{name}` | {_cell(value)} |" for name, value in surroundings.variables.items()]
    if surroundings.topology:
        lines += ["", "```", surroundings.topology, "```"]
    return "\n".join(lines) + "\n"


def tail(output: str) -> str:
    """The end of what a program printed, without empty lines."""
    return "\n".join([line.rstrip() for line in output.splitlines() if line.strip()][-TAIL_LINES:])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
