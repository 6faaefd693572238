"""`unisd parity scale`: its flags, and what it does."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from unisd_megatron.cli.flags import command, flag
from unisd_megatron.config import Layout
from unisd_megatron.errors import ConfigError

SIZES = {
    "tensor_model_parallel_size": "--tp",
    "pipeline_model_parallel_size": "--pp",
    "virtual_pipeline_model_parallel_size": "--vpp",
    "context_parallel_size": "--cp",
    "expert_model_parallel_size": "--ep",
}
SWITCHES = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "sequence_parallel",
    "use_distributed_optimizer",
)


def add_scale(ways: Any) -> None:
    parser = command(ways, "scale", parity_scale, "Every rank of a large layout, built here: do they make the published model?")
    flag(parser, "model_name", required=True, metavar="MODEL", help="published name, config.json or folder with one")
    flag(parser, "gpus", type=int, required=True, metavar="N", help="ranks of the world")
    fields = {field.name: field for field in dataclasses.fields(Layout)}
    for name, short in SIZES.items():
        item = fields[name]
        flag(parser, name, short, type=int, default=item.default, metavar="N", help=item.metadata["help"])
    for name in SWITCHES:
        flag(parser, name, action="store_true", help=fields[name].metadata["help"])
    flag(parser, "no_bf16", action="store_true", help="fp32 weights instead of bf16")
    flag(parser, "processes", type=int, default=2, metavar="P", help="processes that build ranks (2)")


def layout_of(request: argparse.Namespace) -> Layout:
    """The layout asked for, with a batch that fits it. Raises `ConfigError` where it does not fit itself or the GPUs."""
    if request.gpus < 1 or request.processes < 1:
        raise ConfigError(f"--gpus {request.gpus} --processes {request.processes}: both are at least 1")
    layout = Layout(bf16=not request.no_bf16, **{name: getattr(request, name) for name in (*SIZES, *SWITCHES)})
    layout.validate_sizes()
    batch = layout.data_parallel_size(request.gpus) * layout.pipeline_model_parallel_size
    layout = dataclasses.replace(layout, global_batch_size=batch)
    layout.validate(request.gpus)
    return layout


def parity_scale(request: argparse.Namespace) -> int:
    from unisd_megatron.cli.commands import prepare_libraries, say
    from unisd_megatron.plan import find_arch

    layout = layout_of(request)
    name, arch = find_arch(request.model_name)
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    arch.check_layout(tensor, layout.virtual_stages, name, expert, layout.pipeline_ends)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("parity scale is one process that stands for all ranks; start it without torchrun")
    prepare_libraries()
    from unisd_megatron.mcore import platform as platforms
    from unisd_megatron.parity.scale import build_ranks, check_all, model_of

    model = model_of(arch, layout)
    data = layout.data_parallel_size(request.gpus)
    sizes = f"TP {tensor}, PP {layout.pipeline_model_parallel_size}, CP {layout.context_parallel_size}, EP {expert}, DP {data}"
    say(f"{name}: {model.elements:,} parameters in {len(model.mappings)} weights; {request.gpus} ranks: {sizes}")
    holdings = build_ranks(model, platforms.choose(), request.gpus, request.processes, say)
    say(f"{'each element once in':36} {'elements':>18} {'parts':>8}")
    for line in check_all(model, holdings):
        elements = "" if line.elements is None else f"{line.elements:,}"
        say(f"{line.what:36} {elements:>18} {line.parts:8,}  {line.note}".rstrip())
    return 0
