"""One picture twice: SVG for the page, where text stays text, and PNG beside it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#2a6fb0", "#d9822b", "#3a8f5c", "#c23b3b", "#7a828c"
COLORS = (BLUE, ORANGE, GREEN, RED, GREY)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name would begin a formula
    "svg.hashsalt": "unisd",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa2ac",
    "axes.labelcolor": "#3c434b",
    "xtick.color": "#3c434b",
    "ytick.color": "#3c434b",
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Picture:
    """`svg` goes into the page as it is; `png` into the file `name`.png."""

    name: str
    title: str
    note: str
    svg: str
    png: bytes


def picture(name: str, title: str, note: str, draw: Callable[[Any], None], size: tuple[float, float] = (6.0, 2.9)) -> Picture:
    """Calls `draw` with the axes of an empty picture. size: inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        draw(figure.subplots())
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # keeps the places it has found, or each format would look for them again
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        figure.savefig(png, format="png", dpi=110, facecolor="white")
    return Picture(name, title, note, _inline(svg.getvalue(), title), png.getvalue())


def _inline(text: str, title: str) -> str:
    """The element alone, as wide as the page lets it, with a name for those who do not see it."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'


def write(pictures: Sequence[Picture], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in pictures:
        (folder / f"{one.name}.png").write_bytes(one.png)
