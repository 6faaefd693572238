"""The table and the picture of docs/study.md, from a finished study: `python tools/study_page.py runs/study`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unisd_megatron.errors import UnisdError
from unisd_megatron.report import comparison, drawing, pages, plots
from unisd_megatron.report.comparison import Line
from unisd_megatron.report.reading import Sweep, read_sweep

DATASET, EARLY = "addition", 30
"""EARLY: the steps after which the settings are furthest apart; at the end many are near 100 %."""
BEGIN, END = "<!-- begin: tools/study_page.py -->\n", "<!-- end -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/study.md"))
    request = parser.parse_args()
    try:
        study = read_sweep(request.sweep)
    except UnisdError as problem:
        print(problem, file=sys.stderr)
        return 2
    if missing := [cell.title for cell in study.cells if cell.missing]:
        print(f"{request.sweep}: without a result: {', '.join(missing)}; finish the study first", file=sys.stderr)
        return 1
    bases = list(study.before(DATASET).values())
    if len(bases) != 1:
        print(f"{request.sweep}: {len(bases)} results before training, expected one; finish the study first", file=sys.stderr)
        return 1
    lines, before = comparison.lines(study, DATASET), bases[0].result["accuracy"]
    drawn = plots.sweep(lines, DATASET, before)
    assert drawn is not None
    drawing.write([drawing.Picture("study", drawn.title, drawn.note, drawn.svg, drawn.png)], request.page.parent)
    head, _, rest = request.page.read_text(encoding="utf-8").partition(BEGIN)
    text = head + BEGIN + "\n".join([*table(study, lines, before), ""]) + END + rest.partition(END)[2]
    request.page.write_text(text, encoding="utf-8")
    return 0


def table(study: Sweep, lines: list[Line], before: float) -> list[str]:
    """Markdown. Seconds and tokens are left out: two runs shared two cores."""
    found = [
        f"| setting | after {EARLY} steps, % | at the end, % | 95 % | each seed | minus vanilla | 95 % | p, questions (Holm) |",
        "|---|---|---|---|---|---|---|---|",
        f"| before training | | {pages.percent(before)} | | | | | |",
    ]
    for line in lines:
        cells = [f"**{line.name}**" if line.is_control else line.name, pages.percent(_early(study, line.name))]
        cells += [pages.percent(line.mean), pages.percents(line.interval, len(line.accuracies))]
        cells.append(", ".join(pages.percent(share) for share in line.accuracies.values()))
        against = line.against
        if against is None:
            cells += ["control", "", ""]
        else:
            over_seeds = pages.differences(against.interval, len(against.seeds))
            cells += [pages.points(against.mean), over_seeds, pages.p_value(against.p_holm)]
        found.append(f"| {' | '.join(cells)} |")
    found += [f"| {row['mode']} | | not run | | | | | |" for row in study.not_run]
    return found


def _early(study: Sweep, name: str) -> float:
    """Held-out accuracy of a setting after EARLY steps, mean over its seeds."""
    records = [cell.record for cell in study.cells if cell.row["name"] == name and cell.record is not None]
    shares = [row["accuracy"] for record in records for row in record.evaluations if row["step"] == EARLY]
    return sum(shares) / len(records)


if __name__ == "__main__":
    sys.exit(main())
