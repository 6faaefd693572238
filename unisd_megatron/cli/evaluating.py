"""`unisd evaluate`: its flags, which of them go together, and what it prints. Heavy imports are inside."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from unisd_megatron.cli import commands
from unisd_megatron.cli.flags import command, flag
from unisd_megatron.config import Vllm
from unisd_megatron.errors import ConfigError
from unisd_megatron.evaluate.settings import VLLM_SETTINGS, Questions, Settings
from unisd_megatron.setting import setting_type

_OF_DATA = tuple(field.name for field in dataclasses.fields(Questions))
_OF_BOTH = (*_OF_DATA, "output_dir", "semantics", "unsafe", "workers")
_SHOWN_FAILURES = 20


def add_evaluate(subparsers: Any) -> None:
    """The subcommand. A flag that was not given is absent from the request: `Settings` has the defaults."""
    parser = command(subparsers, "evaluate", evaluate, "Scores a checkpoint, or the reference solutions, on a task.")
    what, how, more, engine = (parser.add_argument_group(name) for name in ("what", "how", "beside the accuracy", "engine"))
    flag(what, "dataset", required=True, help="task; a wrong name lists them")
    _add(what, "data_path", metavar="FILE", help="its file (JSON, JSONL, either with .gz, or parquet) instead of the hub")
    _add(what, "model_name", metavar="MODEL", help="Hugging Face or Megatron checkpoint folder")
    flag(what, "references", action="store_true", default=argparse.SUPPRESS, help="score the reference solutions themselves")
    _add(
        what,
        "output_dir",
        metavar="DIR",
        help="folder for answers and results; the same command again goes on where it was cut short",
    )
    _add(what, "max_examples", help="only the first n questions")
    _add(what, "split", help="of the file (test; --references of programs: all)")
    _add(what, "semantics", help="prompts and scoring: docs/semantics.md (corrected)")
    _add(how, "method", help="multiple choice: generated text, or options (extraction)")
    _add(how, "temperature", help="0: greedy (0)")
    _add(how, "top_p", help="with a temperature: the likeliest tokens of that mass (1)")
    _add(how, "samples", help="answers to each question, for pass@k (1)")
    _add(how, "seed", help="seed of sampling (0)")
    _add(how, "max_prompt_length", help="tokens; longer questions count as wrong (4096, room permitting)")
    _add(how, "max_completion_length", help="tokens (512)")
    _add(how, "unsafe", help="run programs although this machine cannot confine them")
    _add(how, "workers", help="programs run at a time (one for each processor)")
    _add(more, "log_probs", help="log-prob of every sampled token in answers.jsonl")
    _add(more, "retention", help="perplexity and divergence of the answers under the base model")
    _add(more, "base_model_name", metavar="MODEL", help="retention: the base, Hugging Face or Megatron folder")
    _add(more, "base_answers", metavar="DIR", help="retention: finished evaluation of the base, for the reverse direction")
    _add(more, "fit", help="perplexity of the reference solutions")
    compared = "finished evaluation of the same questions; may be repeated"
    flag(more, "compare", action="append", default=argparse.SUPPRESS, metavar="DIR", help=compared)
    _add(engine, "engine", help="what generates (transformers)")
    _add(engine, "batch_size", help="answers made and written at a time (64; vllm 512)")
    for field in dataclasses.fields(Vllm):
        if field.name in VLLM_SETTINGS:
            _add(engine, field.name, cls=Vllm, help=f"{field.metadata['help']} ({field.default})")


def _add(group: Any, name: str, help: str, cls: type | None = None, metavar: str | None = None) -> None:
    """A flag of the type that its field has; absent from the request where it is not given."""
    owner = cls or (Questions if name in _OF_DATA else Settings)
    kind, choices, _ = setting_type(owner, name)
    if kind is bool:
        flag(group, name, action="store_true", default=argparse.SUPPRESS, help=help)
        return
    shown = None if choices else metavar or {int: "N", float: "X"}[kind]
    flag(group, name, type=kind, choices=choices, default=argparse.SUPPRESS, metavar=shown, help=help)


def evaluate(request: argparse.Namespace) -> int:
    """Carries out the request; says one line and, where programs or references failed, which."""
    given = {name: value for name, value in vars(request).items() if name not in ("command", "subcommand")}
    _questions(given).check()
    references = given.pop("references", False)
    if references == ("model_name" in given):
        raise ConfigError("give either --references or --model_name")
    if given.get("workers", 1) < 1:
        raise ConfigError(f"--workers is {given['workers']}; it must be at least 1")
    return _references(given) if references else _model(given)


def _references(given: dict[str, Any]) -> int:
    for name in given:
        if name not in _OF_BOTH:
            raise ConfigError(f"--{name} does nothing with --references, which needs no model; drop it")
    if not commands.leads():
        return 0
    from unisd_megatron.evaluate import references, report

    split = given.get("split") or _split_of_references(given)
    task, records = _questions(given | {"split": split}).load(given.get("semantics", "corrected"))
    output = given.get("output_dir")
    began = time.monotonic()
    result, rows = references.evaluate(task, records, output, unsafe=given.get("unsafe", False), workers=given.get("workers"))
    commands.say(f"{report.headline(result)}, in {time.monotonic() - began:.1f} s")
    _say_confinement(result)
    failed = [one for one in rows if not one["correct"]]
    for one in failed[:_SHOWN_FAILURES]:
        commands.say(f"  {one['id']}: {one['failure']}")
    if len(failed) > _SHOWN_FAILURES:
        commands.say(f"  and {len(failed) - _SHOWN_FAILURES} more")
    return 0


def _model(given: dict[str, Any]) -> int:
    vllm = {name: given[name] for name in VLLM_SETTINGS if name in given}
    elsewhere = (*VLLM_SETTINGS, *_OF_DATA)
    own = {name: value for name, value in given.items() if name not in elsewhere}
    settings = Settings(**own | {"compare": tuple(map(Path, own.get("compare", []))), "vllm": Vllm(**vllm)})
    settings.check()
    for name in vllm:
        if settings.engine != "vllm":
            raise ConfigError(f"--{name} does nothing with --engine transformers; add --engine vllm, or drop it")
    task, records = _questions(given).load(settings.semantics)
    commands.prepare_libraries()
    from unisd_megatron.evaluate import report
    from unisd_megatron.evaluate.model import evaluate as carry_out

    result = carry_out(settings, task, records)
    commands.say(report.headline(result))
    _say_confinement(result)
    for name in ("retention", "reverse", "fit"):
        if name in result:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in result[name].items())
            commands.say(f"  {name}: {shown}")
    for found in result["comparisons"]:
        p = "" if found["mcnemar_p"] is None else f", McNemar p {found['mcnemar_p']:.3g}"
        low, high = (100 * bound for bound in found["interval"])
        others = f"; other settings: {report.apart(found)}" if found["differ"] else ""
        commands.say(f"  against {found['with']}: {100 * found['difference']:+.1f} % ({low:+.1f} to {high:+.1f}){p}{others}")
    return 0


def _say_confinement(result: dict[str, Any]) -> None:
    missing = (result["sandbox"] or {}).get("missing")
    if missing:
        commands.say(f"  --unsafe: programs were run without {'; '.join(missing)}")


def _split_of_references(given: dict[str, Any]) -> str:
    """Programs that are shown to a teacher have to pass too: of those, every record of the file."""
    from unisd_megatron.data import Program

    if "data_path" not in given:
        return "test"
    task, records = _questions(given).load(given.get("semantics", "corrected"))
    return "all" if isinstance(task.judge(records[0], task.reference(records[0])), Program) else "test"


def _questions(given: dict[str, Any]) -> Questions:
    return Questions(**{name: given[name] for name in _OF_DATA if name in given})
