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
from unisd_megatron.evaluate.settings import VLLM_SETTINGS

_OF_DATA = ("dataset", "data_path", "split", "max_examples")
_OF_BOTH = (*_OF_DATA, "output_dir", "semantics", "unsafe", "workers")
_SHOWN_FAILURES = 20


def add_evaluate(subparsers: Any) -> None:
    """The subcommand. A flag that was not given is absent from the request: `Settings` has the defaults."""
    parser = command(subparsers, "evaluate", evaluate, "Scores a checkpoint, or the reference solutions, on a task.")
    what, how, more, engine = (parser.add_argument_group(name) for name in ("what", "how", "beside the accuracy", "engine"))
    flag(what, "dataset", required=True, help="task; a wrong name lists them")
    _add(what, "data_path", metavar="FILE", help="its file (JSON, JSONL, either with .gz, or parquet) instead of the hub")
    _add(what, "model_name", help="Hugging Face or Megatron checkpoint folder")
    _add(what, "references", action="store_true", help="score the reference solutions themselves")
    _add(what, "output_dir", help="folder for answers and results; the same command again goes on where it was cut short")
    _add(what, "max_examples", type=int, metavar="N", help="only the first n questions")
    _add(what, "split", choices=["test", "train", "all"], help="of the file (test; --references of programs: all)")
    _add(what, "semantics", choices=["corrected", "released"], help="prompts and scoring: docs/semantics.md (corrected)")
    _add(how, "method", choices=["extraction", "logprobs"], help="multiple choice: generated text, or options (extraction)")
    _add(how, "temperature", type=float, metavar="X", help="0: greedy (0)")
    _add(how, "top_p", type=float, metavar="X", help="with a temperature: the likeliest tokens of that mass (1)")
    _add(how, "samples", type=int, metavar="N", help="answers to each question, for pass@k (1)")
    _add(how, "seed", type=int, metavar="N", help="seed of sampling (0)")
    _add(
        how, "max_prompt_length", type=int, metavar="N", help="tokens; longer questions count as wrong (4096, room permitting)"
    )
    _add(how, "max_completion_length", type=int, metavar="N", help="tokens (512)")
    _add(how, "unsafe", action="store_true", help="run programs although this machine cannot confine them")
    _add(how, "workers", type=int, metavar="N", help="programs run at a time (one for each processor)")
    _add(more, "log_probs", action="store_true", help="log-prob of every sampled token in answers.jsonl")
    _add(more, "retention", action="store_true", help="perplexity and divergence of the answers under the base model")
    _add(more, "base_model_name", help="retention: the base, Hugging Face or Megatron folder")
    _add(more, "base_answers", metavar="DIR", help="retention: finished evaluation of the base, for the reverse direction")
    _add(more, "fit", action="store_true", help="perplexity of the reference solutions")
    _add(more, "compare", action="append", metavar="DIR", help="finished evaluation of the same questions; may be repeated")
    _add(engine, "engine", choices=["transformers", "vllm"], help="what generates (transformers)")
    _add(engine, "batch_size", type=int, metavar="N", help="answers made and written at a time (64; vllm 512)")
    for field in dataclasses.fields(Vllm):
        if field.name in VLLM_SETTINGS:
            kind = int if isinstance(field.default, int) else float
            _add(engine, field.name, type=kind, metavar="N", help=f"{field.metadata['help']} ({field.default})")


def _add(group: Any, name: str, **options: Any) -> None:
    flag(group, name, default=argparse.SUPPRESS, **options)


def evaluate(request: argparse.Namespace) -> int:
    """Carries out the request; says one line and, where programs or references failed, which."""
    from unisd_megatron.data import TASKS

    given = {name: value for name, value in vars(request).items() if name not in ("command", "subcommand")}
    if given["dataset"] not in TASKS:
        raise ConfigError(f"unknown --dataset {given['dataset']!r}; use one of {', '.join(TASKS)}")
    references = given.pop("references", False)
    if references == ("model_name" in given):
        raise ConfigError("give either --references or --model_name")
    for name in ("max_examples", "workers"):
        if given.get(name, 1) < 1:
            raise ConfigError(f"--{name} is {given[name]}; it must be at least 1")
    if "output_dir" in given:
        given["output_dir"] = Path(given["output_dir"])
    return _references(given) if references else _model(given)


def _references(given: dict[str, Any]) -> int:
    for name in given:
        if name not in _OF_BOTH:
            raise ConfigError(f"--{name} does nothing with --references, which needs no model; drop it")
    if not commands.leads():
        return 0
    from unisd_megatron.evaluate import references, report

    task, records = _load(given | {"split": given.get("split") or _split_of_references(given)})
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
    from unisd_megatron.evaluate.settings import Settings

    vllm = {name: given[name] for name in VLLM_SETTINGS if name in given}
    elsewhere = (*VLLM_SETTINGS, *_OF_DATA)
    own = {name: value for name, value in given.items() if name not in elsewhere}
    if "base_answers" in own:
        own["base_answers"] = Path(own["base_answers"])
    settings = Settings(**own | {"compare": tuple(map(Path, own.get("compare", []))), "vllm": Vllm(**vllm)})
    settings.check()
    for name in vllm:
        if settings.engine != "vllm":
            raise ConfigError(f"--{name} does nothing with --engine transformers; add --engine vllm, or drop it")
    task, records = _load(given)
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
    task, records = _load(given)
    return "all" if isinstance(task.judge(records[0], task.reference(records[0])), Program) else "test"


def _load(given: dict[str, Any]) -> tuple[Any, Any]:
    from unisd_megatron.data import TASKS

    task = TASKS[given["dataset"]](given.get("semantics", "corrected"))
    return task, task.load(given.get("split", "test"), given.get("data_path"))[: given.get("max_examples")]
