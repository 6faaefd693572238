"""The command line. Flags of `train` are derived from the settings in `config.py`; every flag may use dashes or underscores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from unisd_megatron import stated
from unisd_megatron.cli import commands, planning
from unisd_megatron.cli.dry_run import ONLY_HERE
from unisd_megatron.cli.evaluating import add_evaluate
from unisd_megatron.cli.experimenting import add_experiments
from unisd_megatron.cli.flags import Parser, command, flag
from unisd_megatron.cli.preparing import add_prepare
from unisd_megatron.cli.reporting import add_report
from unisd_megatron.cli.scaling import add_scale
from unisd_megatron.config import GROUPS, all_settings, setting_type
from unisd_megatron.errors import ConfigError
from unisd_megatron.modes import MODES


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The request: `.command` is the function to call with it."""
    parser = Parser(prog="unisd", description="UniSD self-distillation on Megatron-core.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND", parser_class=Parser)
    _add_train(subparsers)
    _add_plan(subparsers)
    _add_tiny(subparsers)
    _add_convert(subparsers)
    _add_verify(subparsers)
    _add_parity(subparsers)
    add_evaluate(subparsers)
    add_prepare(subparsers)
    add_report(subparsers)
    add_experiments(subparsers, lambda one: _add_settings(one, but={"output_dir", "seed", "resume_from_checkpoint"}), _stated)
    _add_bench(subparsers)
    _add_selftest(subparsers)
    return parser.parse_args(_subcommand_words(arguments))


def _subcommand_words(arguments: Sequence[str]) -> list[str]:
    """Flags in one spelling; `parity FLAGS` is the layout check, `parity golden FILE` another subcommand of that name."""
    words = [_underscored(word) for word in arguments]
    if words[:1] == ["parity"] and words[1:2] not in (["golden"], ["layout"], ["restart"], ["scale"], ["-h"], ["--help"]):
        words.insert(1, "layout")
    return words


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _add_train(subparsers: Any) -> None:
    parser = command(subparsers, "train", lambda request: commands.train(given_settings(request), request), "One training run.")
    _add_dry_run(parser)
    _add_settings(parser)


def _add_plan(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "plan",
        lambda request: planning.plan(request, given_settings(request)),
        "Memory and time of a run on a cluster, by arithmetic: the layout that is stated, or the best. Takes train's flags.",
    )
    planning.add_flags(parser)
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser, but: frozenset[str] | set[str] = frozenset()) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of settings, such as an earlier run.json; flags win"
    )
    parser.add_argument("--mode", default=argparse.SUPPRESS, help=f"one of {', '.join(MODES)} (unisd_star)")
    flag(parser, "model_name", default=argparse.SUPPRESS, help="Hugging Face folder or hub id")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for group, item in all_settings():
        if item.name not in but:
            _add_setting(groups[group], GROUPS[group], item)


def _stated(request: argparse.Namespace) -> dict[str, Any]:
    """Settings of a request and its --config, as one: a sweep writes them to files of its own."""
    flags, file_values, _ = given_settings(request)
    return file_values | flags


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dry run")
    flag(group, "dry_run", action="store_true", help="check settings, layout and memory, name the files needed, start nothing")
    flag(group, "gpus", type=int, metavar="N", help="GPUs to train on (1)")
    flag(group, "gpus_per_node", type=int, metavar="N", help="of these, in one host (8)")
    flag(group, "gpu", metavar="NAME", help="what they are; a wrong name lists them (h100)")
    flag(group, "server_gpus", type=int, metavar="N", help="GPUs of each rollout server")


def _add_setting(group: Any, cls: type, item: Any) -> None:
    kind, choices, _ = setting_type(cls, item.name)
    help_text = item.metadata["help"].replace("%", "%%")
    if item.default is not None:
        help_text += f" ({str(item.default).replace('%', '%%')})"
    short = [item.metadata["short"]] if "short" in item.metadata else []
    if kind is bool:
        # What is on by default is switched off: `--help` shows the form that does something, or both where neither is default.
        yes, no = (argparse.SUPPRESS, f"without it: {help_text}") if item.default else (help_text, argparse.SUPPRESS)
        no = "never" if item.default is None else no
        flag(group, item.name, *short, action="store_true", default=argparse.SUPPRESS, help=yes)
        names = f"--no-{item.name.replace('_', '-')}", f"--no_{item.name}"
        group.add_argument(*names, dest=item.name, action="store_false", default=argparse.SUPPRESS, help=no)
        return
    flag(
        group,
        item.name,
        *short,
        type=kind,
        choices=choices,
        default=argparse.SUPPRESS,
        help=help_text,
        metavar=_metavar(kind, choices),
    )


def _metavar(kind: type, choices: Sequence[str] | None) -> str | None:
    return None if choices else {int: "N", float: "X", str: "S"}[kind]


def given_settings(request: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], str]:
    """`(flags, file values, file name)`: what the user stated, apart by origin."""
    ignored = {"config", "command", "subcommand", "dry_run", *ONLY_HERE}
    flags = {name: value for name, value in vars(request).items() if name not in ignored}
    return flags, _read_config(request.config) if request.config else {}, request.config or "--config"


def _read_config(name: str) -> dict[str, Any]:
    content = stated.load(name, f"--config {name}")
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):
        # The run.json of an earlier run: what was asked for. Defaults and what its mode brought come back by themselves, or
        # with another mode do not.
        unasked = {name for name, origin in content.get("origins", {}).items() if origin in ("mode", "default")}
        dropped = {"output_dir", "resume_from_checkpoint"} | unasked - {"mode", "model_name"}
        content = {name: value for name, value in content["settings"].items() if name not in dropped}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {name}: expected settings as `name: value`")
    return stated.underscored(content, f"--config {name}")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    flag(parser, "tensor_model_parallel_size", "--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (1)")
    flag(parser, "pipeline_model_parallel_size", "--pp", type=int, default=1, metavar="N", help="pipeline stages (1)")


def _add_experts(parser: argparse.ArgumentParser) -> None:
    flag(parser, "expert_model_parallel_size", "--ep", type=int, default=1, metavar="N", help="ranks that share experts (1)")


def _add_tiny(subparsers: Any) -> None:
    parser = command(subparsers, "tiny", commands.tiny, "Writes a tiny random Hugging Face checkpoint with a tokenizer.")
    flag(parser, "family", required=True, help="model family; a wrong name lists them")
    flag(parser, "output_dir", required=True, help="new folder")
    flag(parser, "seed", type=int, default=0, metavar="N", help="seed of the weights (0)")


def _add_convert(subparsers: Any) -> None:
    parser = subparsers.add_parser("convert", help="Hugging Face -> Megatron distributed checkpoint, and back.")
    ways = parser.add_subparsers(dest="way", required=True, metavar="import|export", parser_class=Parser)
    into = command(ways, "import", commands.convert_import, "Hugging Face folder -> Megatron distributed checkpoint.")
    out = command(ways, "export", commands.convert_export, "Megatron distributed checkpoint -> Hugging Face folder.")
    for one in (into, out):
        flag(one, "model_name", required=True, help="checkpoint to read")
        flag(one, "output_dir", required=True, help="new folder")
        _add_config_from(one)
    _add_allow_pickle(into)
    _add_layout(into)
    _add_experts(into)
    flag(out, "max_shard_size", default="5GB", metavar="SIZE", help="of a safetensors file, such as 500MB (5GB)")


def _add_config_from(parser: argparse.ArgumentParser) -> None:
    flag(parser, "config_from", metavar="DIR", help="of a Megatron-LM checkpoint: a Hugging Face folder of its model")


def _add_allow_pickle(parser: argparse.ArgumentParser) -> None:
    flag(parser, "allow_pickle", action="store_true", help="read pytorch_model.bin too, weights only")


def _add_verify(subparsers: Any) -> None:
    parser = command(
        subparsers, "verify", commands.verify, "Compares a Hugging Face checkpoint with another: tensors and logits."
    )
    flag(parser, "model_name", required=True, help="Hugging Face folder")
    flag(parser, "against", required=True, help="Megatron or Hugging Face folder")
    flag(parser, "tolerance", type=float, default=1e-4, metavar="X", help="largest difference of fp32 logits (1e-4)")
    flag(parser, "max_prompt_length", type=int, default=64, metavar="N", help="tokens of each prompt (64)")
    _add_config_from(parser)
    _add_allow_pickle(parser)


def _add_parity(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "parity", help="Losses and gradients under a layout against one process; `parity golden FILE`; `restart`; `scale`."
    )
    ways = parser.add_subparsers(dest="way", required=True, metavar="layout|golden|restart|scale", parser_class=Parser)
    layout = command(ways, "layout", commands.parity_layout, "Every mode, loss and gradient, against one process.")
    _add_layout(layout)
    flag(layout, "virtual_pipeline_model_parallel_size", "--vpp", type=int, metavar="N", help="chunks of layers per stage")
    for end in ("embedding", "loss"):
        flag(layout, f"account_for_{end}_in_pipeline_split", action="store_true", help=f"the {end} takes the place of a layer")
    flag(layout, "context_parallel_size", "--cp", type=int, default=1, metavar="N", help="ranks that share each sequence (1)")
    _add_experts(layout)
    flag(layout, "sequence_parallel", action="store_true", help="sequence parallelism")
    flag(layout, "no_packing", action="store_true", help="a padded row for each sequence")
    flag(layout, "micro_batch_size", type=int, default=1, metavar="N", help="sequences per forward pass (1)")
    flag(layout, "recompute_granularity", choices=["full", "selective"], help="recompute activations")
    flag(
        layout,
        "bf16",
        action="store_true",
        help="weights and activations in bf16 (on a GPU: Transformer Engine), looser bounds",
    )
    item = next(item for _, item in all_settings() if item.name == "overlap_grad_reduce")
    _add_setting(layout, GROUPS["accelerator"], item)
    flag(layout, "family", default="qwen2", help="model family of the tiny model (qwen2)")
    flag(
        layout,
        "loss_path",
        default="fused",
        choices=["fused", "fused_torch", "materialized"],
        help="how the loss reads the vocabulary (fused)",
    )
    golden = command(ways, "golden", commands.parity_golden, "Reproduces a golden-vector file of the released loss.")
    golden.add_argument("file", metavar="FILE", help="golden vectors, JSON")
    restart = command(ways, "restart", commands.parity_restart, "A run killed at random points against the same run unbroken.")
    flag(restart, "kills", type=int, default=5, metavar="K", help="SIGKILLs, each followed by a resumption (5)")
    flag(restart, "steps", type=int, default=8, metavar="N", help="optimizer steps of the run (8)")
    flag(restart, "seed", type=int, default=0, metavar="N", help="seed of the run and of the points (0)")
    flag(restart, "nproc", type=int, default=2, metavar="P", help="processes; what TP x PP leaves is data-parallel (2)")
    flag(restart, "output_dir", help="new folder to keep both runs and their logs in (a temporary one)")
    _add_layout(restart)
    add_scale(ways)


def _add_bench(subparsers: Any) -> None:
    parser = command(
        subparsers, "bench", commands.bench, "What the loss, the passes of a step and rollout engines cost, measured."
    )
    parser.add_argument(
        "what",
        choices=["loss", "step", "rollout"],
        help="the loss three ways, teacher and student passes, or weight syncs and generation",
    )
    flag(parser, "output_dir", default="runs/bench", metavar="DIR", help="for tables and pictures (runs/bench)")
    flag(parser, "dataset", default="addition", help="step: the task whose texts make the batch (addition)")
    flag(parser, "data_path", metavar="FILE", help="step: its file; otherwise from the hub")
    defaults = "on a CPU; larger on a GPU"
    flag(parser, "tokens", type=int, nargs="+", metavar="T", help=f"completion tokens (512 2048 {defaults})")
    flag(parser, "vocab_sizes", type=int, nargs="+", metavar="V", help="vocabularies (32000 151936)")
    flag(parser, "hidden_sizes", type=int, nargs="+", metavar="H", help=f"hidden sizes (896 {defaults})")
    flag(
        parser, "tensor_sizes", type=int, nargs="+", metavar="TP", help="vocabulary shards, a process each (1 2; 1 on one GPU)"
    )
    flag(parser, "alpha", type=float, default=0.5, help="the divergence (0.5, a JSD)")
    engines = ["transformers", "vllm", "vllm-server"]
    flag(parser, "engines", nargs="+", choices=engines, default=engines, help="rollout: which (all that are installed)")
    flag(parser, "width", type=int, default=512, metavar="H", help="rollout: the model's hidden size (512)")
    flag(parser, "layers", type=int, default=8, metavar="L", help="rollout: the model's layers (8)")
    flag(parser, "vocabulary", type=int, default=16000, metavar="V", help="rollout: the model's vocabulary (16000)")
    flag(parser, "sequences", type=int, default=64, metavar="N", help="rollout: sequences of a batch (64)")
    flag(parser, "new_tokens", type=int, default=64, metavar="T", help="rollout: tokens of each, after some 100 (64)")


def _add_selftest(subparsers: Any) -> None:
    parser = command(
        subparsers, "selftest", commands.selftest, "What holds on this machine: one page of results, to attach to a bug report."
    )
    flag(parser, "output_dir", default="runs/selftest", metavar="DIR", help="new folder for the page and logs (runs/selftest)")
    flag(parser, "only", nargs="+", metavar="NAME", help="checks, or groups of them such as parity; a wrong name lists them")
    flag(parser, "quick", action="store_true", help="smaller sizes, and without what takes longest")
