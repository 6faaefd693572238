"""What the subcommands do. Heavy imports are inside: `--help` and a wrong flag load no torch."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

from unisd_megatron.cli.dry_run import ONLY_HERE, dry_run
from unisd_megatron.config import Accelerator, Layout
from unisd_megatron.errors import ConfigError
from unisd_megatron.resolve import resolve
from unisd_megatron.validation import check_replicas, validate


def leads() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if leads():
        print(text, flush=True)


def train(stated: tuple[dict[str, Any], dict[str, Any], str], request: argparse.Namespace) -> int:
    run = resolve(*stated)
    if request.dry_run:
        for line in dry_run(run, request):
            say(line)
        return 0
    for name in ONLY_HERE:
        if getattr(request, name) is not None:
            raise ConfigError(f"--{name} describes the machines of a dry run; add --dry-run, or drop it")
    validate(run, int(os.environ.get("WORLD_SIZE", "1")))  # before torch is loaded
    prepare_libraries()
    from unisd_megatron.train.loop import train as carry_out

    if rest := carry_out(run):
        say(rest)
    return 0


def _end_by_exception() -> None:
    """A TERM signal becomes an exception, so that what was begun is ended and removed: processes, servers, half a folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def tiny(request: argparse.Namespace) -> int:
    prepare_libraries()
    _end_by_exception()
    from unisd_megatron.weights.tiny import write_tiny

    write_tiny(request.family, Path(request.output_dir), request.seed)
    say(f"{request.output_dir}: tiny {request.family}, random weights, byte tokenizer")
    return 0


def convert_import(request: argparse.Namespace) -> int:
    prepare_libraries()
    _end_by_exception()
    from unisd_megatron.convert.checkpoints import import_folder

    layout = Layout(
        request.tensor_model_parallel_size,
        request.pipeline_model_parallel_size,
        expert_model_parallel_size=request.expert_model_parallel_size,
    )
    import_folder(
        request.model_name,
        Path(request.output_dir),
        layout,
        config_from=request.config_from,
        allow_pickle=request.allow_pickle,
    )
    say(f"{request.output_dir}: Megatron distributed checkpoint; loads at any layout")
    return 0


def convert_export(request: argparse.Namespace) -> int:
    shard_bytes = _size(request.max_shard_size)
    prepare_libraries()
    _end_by_exception()
    from unisd_megatron.convert.checkpoints import export_folder

    target = Path(request.output_dir)
    export_folder(Path(request.model_name), target, shard_bytes=shard_bytes, config_from=request.config_from)
    say(f"{request.output_dir}: Hugging Face folder")
    return 0


def _size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1GiB."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("BKMGIbkmgi ")
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        size = int(float(number) * units[text[len(number) :].strip().upper()])
        if size >= 1:
            return size
    raise ConfigError(f"--max_shard_size {text!r} is no size; write it as 5GB, 500MB or 1GiB")


def verify(request: argparse.Namespace) -> int:
    if not request.tolerance >= 0:
        raise ConfigError(f"--tolerance is {request.tolerance}; it must not be negative")
    prepare_libraries()
    from unisd_megatron.convert.verify import Reading, Verification

    holds = True
    checkpoints = Verification(
        request.model_name,
        Path(request.against),
        config_from=request.config_from,
        allow_pickle=request.allow_pickle,
        length=request.max_prompt_length,
    )
    for found in checkpoints.run(request.tolerance):
        if isinstance(found, Reading):
            holds &= found.holds
            say(found.describe())
            continue
        differing = sorted((one for one in found if not one.is_none), key=lambda one: -one.largest)
        holds &= not differing
        for one in differing[:20]:
            say(one.describe())
        say(f"{len(found) - len(differing)} of {len(found)} tensors equal bit for bit")
    say("verified" if holds else "NOT verified: tensors must be equal, and logits within the tolerance")
    return 0 if holds else 1


def parity_layout(request: argparse.Namespace) -> int:
    layout = Layout(
        tensor_model_parallel_size=request.tensor_model_parallel_size,
        pipeline_model_parallel_size=request.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=request.virtual_pipeline_model_parallel_size,
        account_for_embedding_in_pipeline_split=request.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=request.account_for_loss_in_pipeline_split,
        context_parallel_size=request.context_parallel_size,
        expert_model_parallel_size=request.expert_model_parallel_size,
        sequence_parallel=request.sequence_parallel,
        packing=not request.no_packing,
        micro_batch_size=request.micro_batch_size,
        global_batch_size=8,
        recompute_granularity=request.recompute_granularity,
        bf16=request.bf16,
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout.validate(world)
    asked = Accelerator(overlap_grad_reduce=getattr(request, "overlap_grad_reduce", None))
    check_replicas(asked, layout, world)
    prepare_libraries()
    from unisd_megatron.mcore import platform as platforms
    from unisd_megatron.mcore import start
    from unisd_megatron.parity.layout import BF16_GRADIENT_TOLERANCE, BF16_TOLERANCE, TOLERANCE, Case, Rig, compare

    platform = platforms.choose(asked, layout, world)
    with start.world(platform, layout, seed=1) as grid:
        data = layout.data_parallel_size(world)
        overlap = ", gradients reduced under the backward pass" if platform.overlap_grad_reduce else ""
        say(f"{platform.reason}; TP {grid.tensor.size}, PP {grid.pipeline.size}, DP {data}, {_rest(layout)}{overlap}")
        say(f"{'case':32} {'loss':>12} {'loss error':>12} {'gradient error':>15} {'norm error':>12}")

        def line(case: Case) -> None:
            verdict = "" if case.holds else "  FAILS"
            errors = f"{case.loss_error:12.2e} {case.gradient_error:15.2e} {case.norm_error:12.2e}"
            say(f"{case.name:32} {case.loss:12.6f} {errors}{verdict}")

        results = compare(Rig(layout, platform, grid, request.family, request.loss_path), line)
    failed = [case.name for case in results if not case.holds]
    bound, dtype = f"{TOLERANCE:g}", "fp32"
    if layout.bf16:
        bound, dtype = f"{BF16_TOLERANCE:g}, of a gradient tensor {BF16_GRADIENT_TOLERANCE:g}", "bf16"
    say(f"{len(results) - len(failed)} of {len(results)} hold (relative, {bound}; {dtype} against one fp64 process)")
    return 1 if failed else 0


def _rest(layout: Layout) -> str:
    vpp, cp = layout.virtual_pipeline_model_parallel_size, layout.context_parallel_size
    ep = layout.expert_model_parallel_size
    return f"VPP {vpp or 1}, CP {cp}, EP {ep}, SP {layout.sequence_parallel}, {'packed' if layout.packing else 'padded'}"


def parity_golden(request: argparse.Namespace) -> int:
    from unisd_megatron.parity.golden import TOLERANCE, reproduce

    worst = 0.0
    for case in reproduce(Path(request.file)):
        say(f"{max(case.errors.values()):10.2e}  {case.name}")
        worst = max(worst, *case.errors.values())
    say(f"max error {worst:.2e} (at most {TOLERANCE:g})")
    return 0 if worst <= TOLERANCE else 1


def parity_restart(request: argparse.Namespace) -> int:
    import tempfile

    prepare_libraries()
    from unisd_megatron.parity.restart import Plan, prove
    from unisd_megatron.weights.hf import require_new_folder

    def plan(folder: str) -> Plan:
        layout = Layout(request.tensor_model_parallel_size, request.pipeline_model_parallel_size)
        return Plan(Path(folder).absolute(), request.kills, request.steps, request.nproc, layout, request.seed)

    plan(".").check()
    if request.output_dir is not None:
        require_new_folder(Path(request.output_dir))
    _end_by_exception()
    with contextlib.ExitStack() as stack:
        folder = request.output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="unisd-restart-"))
        differences = prove(plan(folder), say)
    for line in differences[:20]:
        say(f"differs: {line}")
    say(f"{request.kills} kill{'s' * (request.kills > 1)}, {len(differences)} difference{'s' * (len(differences) != 1)}")
    return 1 if differences else 0


def bench(request: argparse.Namespace) -> int:
    return {"loss": _bench_loss, "step": _bench_step, "rollout": _bench_rollout}[request.what](request)


def _bench_rollout(request: argparse.Namespace) -> int:
    prepare_libraries()
    from unisd_megatron.bench import rollout

    sizes = rollout.Sizes(request.width, request.layers, request.vocabulary, request.sequences, request.new_tokens)
    trainers = request.tensor_sizes or rollout.trainers()
    sizes.check(trainers)
    _end_by_exception()
    results = rollout.measure_all(sizes, request.engines, trainers, say)
    say("\n" + rollout.write(sizes, results, Path(request.output_dir)))
    return 0


def _bench_step(request: argparse.Namespace) -> int:
    from unisd_megatron.bench import step
    from unisd_megatron.data import TASKS

    if request.dataset not in TASKS:
        raise ConfigError(f"unknown --dataset {request.dataset!r}; use one of {', '.join(TASKS)}")
    TASKS[request.dataset]().load("train", request.data_path)
    table = step.markdown(step.measure_all(request.dataset, request.data_path, say))
    output = Path(request.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"step_{request.dataset}.md").write_text(table + "\n")
    say("\n" + table)
    return 0


def _bench_loss(request: argparse.Namespace) -> int:
    from unisd_megatron.bench import loss, report

    sizes = loss.sizes_for_this_machine()
    for name, given in (
        ("tokens", request.tokens),
        ("vocab_sizes", request.vocab_sizes),
        ("hidden_sizes", request.hidden_sizes),
    ):
        if given is not None and min(given) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {min(given)}")
    tensor = request.tensor_sizes or sizes.tensor
    for shards, vocab_size in itertools.product(tensor, request.vocab_sizes or sizes.vocab_sizes):
        if shards < 1 or vocab_size % shards:
            raise ConfigError(f"--tensor_sizes {shards} must divide the vocabulary {vocab_size}")
    costs = loss.measure_all(
        request.tokens or sizes.tokens,
        request.vocab_sizes or sizes.vocab_sizes,
        request.hidden_sizes or sizes.hidden,
        tensor,
        request.alpha,
        sizes.dtype,
        say,
    )
    say("\n" + report.write(costs, Path(request.output_dir), sizes.machine))
    return 0


def selftest(request: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("selftest starts its processes itself; call it without torchrun")
    _end_by_exception()
    from unisd_megatron.selftest.suite import selftest as carry_out

    return 0 if carry_out(Path(request.output_dir), request.only, request.quick, say) else 1


def prepare_libraries() -> None:
    """Checks megatron-core before it is imported, and keeps libraries' start-up notices off the screen."""
    import logging
    import warnings

    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    from unisd_megatron.mcore.platform import check_megatron

    check_megatron()
