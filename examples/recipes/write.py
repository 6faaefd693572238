"""Writes the recipes beside this file from the table in `unisd_megatron/experiments/recipes.py`."""

from __future__ import annotations

from pathlib import Path

from unisd_megatron.experiments.recipes import LAUNCHES, PUBLISHED, SEMANTICS, text


def main() -> None:
    for launch in LAUNCHES:
        for semantics in SEMANTICS:
            folder = Path(__file__).parent / launch / semantics
            folder.mkdir(parents=True, exist_ok=True)
            for mode in PUBLISHED:
                (folder / f"{mode}.yaml").write_text(text(mode, launch, semantics))


if __name__ == "__main__":
    main()
