"""What was asked for -> a `Run`: dataclass default < mode row (`modes.MODES`) < `--config` file < command line. No torch here.

The origin of each value is kept. A setting that would be ignored is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from unisd_megatron.caches import EMBEDDING_CACHE, INDUCTION_CACHE, NEGATIVE_CACHE, WRITTEN_CACHE
from unisd_megatron.config import (
    GROUPS,
    VLLM_COLOCATE,
    VLLM_SERVER,
    Run,
    Vllm,
    all_settings,
)
from unisd_megatron.errors import ConfigError
from unisd_megatron.modes import MODES
from unisd_megatron.setting import checked
from unisd_megatron.validation import needs_engine, samples


def resolve(flags: Mapping[str, Any], file_values: Mapping[str, Any], file_name: str = "--config") -> Run:
    """The run that the command line and a configuration file ask for.

    Args: flags: values given on the command line, by field name; file_values: the same from a file.
    Raises `ConfigError` for unknown names, wrong types, an unknown mode, and flags of mechanisms that are off.
    """
    known = {item.name: (group, item) for group, item in all_settings()}
    for name in file_values:
        if name not in known and name not in ("mode", "model_name"):
            raise ConfigError(f"{file_name}: unknown setting {name!r}; `unisd train --help` lists them")
    if _LENGTHS & flags.keys():  # how long a run is, is said in one place: the command line before the file
        file_values = {name: value for name, value in file_values.items() if name not in _LENGTHS}
    given = {**file_values, **flags}
    mode = given.get("mode", "unisd_star")
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(f"unknown --mode {mode!r}; use one of {', '.join(MODES)}")
    if not given.get("model_name"):
        raise ConfigError("--model_name is missing; give a Hugging Face folder or hub id")
    if not isinstance(given["model_name"], str):
        raise ConfigError(f"{file_name}: model_name is {given['model_name']!r}; expected str")
    row = dict(MODES[mode].defaults)
    if given.get("token_clip_quantile") is not None:
        row.pop("token_clip", None)  # the mode's static ceiling yields to the quantile that was asked for
    if given.get("rollout") == "replay":
        row.pop("importance_sampling_cap", None)  # recorded log-probs are of other weights than those that train
    if given.get("semantics") == "released":
        row["packing"] = False  # its loss is a mean over the rows of a micro-batch, and packing deals them out unevenly
    values: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    origins = {
        name: "flag" if name in flags else "file" if name in file_values else "default" for name in ("mode", "model_name")
    }
    for name, (group, item) in known.items():
        source, origin = next(
            ((s, o) for s, o in ((flags, "flag"), (file_values, "file"), (row, "mode")) if name in s),
            ({name: item.default}, "default"),
        )
        stated = f"--{name}" if origin == "flag" else f"{file_name if origin == 'file' else origin}: {name}"
        values[group][name] = checked(GROUPS[group], name, source[name], stated)
        origins[name] = origin
    run = Run(
        mode=mode,
        model_name=given["model_name"],
        origins=origins,
        **{group: cls(**values[group]) for group, cls in GROUPS.items()},
    )
    _refuse_idle_flags(run)
    return run


def _idle_caches(run: Run) -> list[tuple[bool, Set[str], str]]:
    """`(whether, settings, what they act with)` of what is read from caches. Which tasks have a rule is not known here."""
    method, negatives = run.data.fewshot_method, run.needs_negative and run.data.negatives != "corrupted"
    released = run.objective.semantics == "released"
    return [
        (method == "induction", {"demo_k"}, "--fewshot_method random or retrieval"),
        (method == "random" and released, {"demo_k"}, "--fewshot_method retrieval, or --semantics corrected"),
        (not run.needs_negative, {"negatives"}, "--contrastive_weight, mode contrastive and unisd_star"),
        (not negatives, NEGATIVE_CACHE, "--negatives generated in a mode with negatives"),
        (method != "induction", INDUCTION_CACHE, "--fewshot_method induction"),
        (method != "retrieval", EMBEDDING_CACHE, "--fewshot_method retrieval"),
        (not negatives and method != "induction", WRITTEN_CACHE, "--negatives generated or --fewshot_method induction"),
        (
            not negatives and method not in ("retrieval", "induction"),
            {"cache_dir"},
            "--negatives generated, --fewshot_method retrieval or induction",
        ),
    ]


_LENGTHS = frozenset({"max_steps", "num_train_epochs"})
_SAMPLING = frozenset({"top_p", "top_k", "min_p", "repetition_penalty", "mask_truncated_completions"})


def _idle_by_method(run: Run) -> list[tuple[bool, Set[str], str]]:
    """The same of what a mode trains on, and of what only a divergence or a teacher has."""
    method = run.method
    divergence = {"alpha", "entry_clip", "token_clip", "token_clip_quantile"}
    return [
        (run.divergence_weight == 0, divergence, "modes that have a divergence"),
        (method.likelihood, {"teacher", "teacher_memory", "contrastive_weight"}, "modes that have a teacher"),
        (method.likelihood, {"importance_sampling_cap", "max_rollout_lag"}, "modes that train on the student's samples"),
        (method.completions != "mixed", {"on_policy_share"}, "mode gkd"),
        (method.completions != "starting", {"sample_filter"}, "mode ssd"),
        (not samples(run), _SAMPLING | {"rollout", "importance_sampling_cap"}, "modes that train on samples"),
        (not samples(run) and method.likelihood, {"temperature"}, "modes that train on samples or have a teacher"),
        (not needs_engine(run), {"use_vllm", "max_logp_gap"}, "modes that train on samples, or --eval_steps"),
    ]


def _refuse_idle_flags(run: Run) -> None:
    """A setting that would be ignored is an error (the released code ignores it silently)."""
    asked = {name for name, origin in run.origins.items() if origin in ("flag", "file")}
    teacher = run.teacher.teacher
    idle = [
        (run.agreement is None, {"gamma_agreement", "agreement_stat"}, "the agreement modes and unisd_star"),
        (
            run.objective.contrastive_weight == 0,
            {"contrastive_margin"},
            "--contrastive_weight, mode contrastive and unisd_star",
        ),
        (not MODES[run.mode].matching, {"final_layer_distill_weight"}, "modes match_joint, match_repr and unisd_star"),
        (teacher != "ema", {"ref_model_sync_steps", "ref_model_mixup_beta"}, "modes ema and unisd_star, or --teacher ema"),
        (teacher == "live", {"teacher_memory"}, "--teacher frozen or ema"),
        (not run.accelerator.fp8, {"fp8_recipe"}, "--fp8-format or --teacher-fp8"),
        (run.accelerator.fp8_format is None, {"fp8_param_gather"}, "--fp8-format"),
        (run.rollout.rollout != "replay", {"replay_path"}, "--rollout replay"),
        (not run.vllm.use_vllm, {f.name for f in dataclasses.fields(Vllm)} - {"use_vllm"}, "--use_vllm"),
        (run.vllm.vllm_mode == "server", VLLM_COLOCATE, "--vllm_mode colocate"),
        (run.vllm.vllm_mode == "colocate", VLLM_SERVER, "--use_vllm --vllm_mode server"),
        (run.data.num_auxiliary_contexts == 0, {"demo_k", "fewshot_method", "auxiliary_gold"}, "--num-auxiliary-contexts"),
        *_idle_caches(run),
        (run.schedule.max_steps is not None, {"num_train_epochs"}, "--max_steps left out"),
        (run.schedule.eval_steps == 0, {"eval_examples", "eval_data_path"}, "--eval_steps"),
        *_idle_by_method(run),
        (run.agreement is None, {"num_auxiliary_contexts"}, "the agreement modes and unisd_star"),
    ]
    flat = run.flat()
    defaults = {item.name: item.default for _, item in all_settings()}
    for off, names, switch in idle:
        for name in sorted(names & asked):
            # A file may state a default for the record; only a value that differs from it asks for something.
            if off and not (run.origins[name] == "file" and flat[name] in (None, 0, defaults[name])):
                raise ConfigError(f"--{name} does nothing in --mode {run.mode} as configured; it acts with {switch}")
