"""Fixtures of the whole suite."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when triton is first imported, which torch does: the GPU kernels' tests run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")
from world import World

# Imported before the workers are forked; each costs seconds per worker otherwise.
PRELOAD = ("transformers", "unisd_megatron.train.loop", "unisd_megatron.parity.layout")

WORLD = World(4, preload=PRELOAD)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Forks the workers' nursery before any test has run: a process that used CUDA or many threads must not fork any more."""
    if not session.config.option.collectonly and any("world" in getattr(item, "fixturenames", ()) for item in session.items):
        WORLD.start()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Four forked gloo workers; see world.py."""
    yield WORLD
    WORLD.close()


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """What the released UniSD trainer computed on fixed tensors (unisd.md 1.13)."""
    return json.loads((Path(__file__).parent / "golden" / "released_loss.json").read_text())


@pytest.fixture(scope="module")
def no_queue_for_later_workers() -> Iterator[None]:
    """Megatron's checkpoint writer keeps a queue in its process; workers forked from this one must not share it."""
    yield
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = None
