"""Layouts of a run on a cluster: those that fit, the fastest by arithmetic first. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from unisd_megatron.config import VLLM_COLOCATE, Layout, Run, Vllm, all_settings
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import Arch
from unisd_megatron.plan.hardware import GIB, Cluster
from unisd_megatron.plan.plan import Plan, plan_run
from unisd_megatron.plan.request import Assumed
from unisd_megatron.plan.rollout import Engine
from unisd_megatron.plan.rollout import engine as engine_of
from unisd_megatron.validation import needs_engine, teacher_kind

CUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "context_parallel_size",
    "expert_model_parallel_size",
)
ENDS = frozenset({CUT[3], CUT[4]})
CHOSEN = frozenset({*CUT, "sequence_parallel", "micro_batch_size", "use_distributed_optimizer", "recompute_granularity"})
"""Settings of the layout that the search chooses; where one is stated, the stated layout is judged instead."""

_LONG = 16384  # tokens of a sequence from which on it is worth cutting over ranks


def propose(run: Run, arch: Arch, cluster: Cluster, assumed: Assumed, fixed: frozenset[str] = frozenset()) -> list[Plan]:
    """All layouts that fit, by predicted seconds of a step. fixed: settings that stay as the run has them."""
    found = list(_plans(run, arch, cluster, assumed, fixed))
    # Of two with the same time the one with more room, and before that the one with fewer cuts.
    return sorted(found, key=lambda one: (round(one.seconds.step, 3), one.run.layout.model_parallel_size, one.memory.peak))


def distinct(plans: list[Plan], count: int) -> list[Plan]:
    """The best of each way to cut the model, so that a short list shows different ones."""
    best: dict[tuple[Any, ...], Plan] = {}
    for one in plans:
        best.setdefault(tuple(getattr(one.run.layout, name) for name in CUT), one)
    return list(best.values())[:count]


def nearest(run: Run, arch: Arch, cluster: Cluster, assumed: Assumed) -> Plan | None:
    """The layout that fits and differs from the run's in the fewest settings; of those the fastest. None: none fits."""
    flat = run.flat()

    def distance(one: Plan) -> int:
        other = one.run.flat()
        return sum(flat[name] != other[name] for name in flat)

    plans = propose(run, arch, cluster, assumed)
    return min(plans, key=lambda one: (distance(one), one.seconds.step), default=None)


def smallest(run: Run, arch: Arch, cluster: Cluster, assumed: Assumed) -> int | None:
    """The fewest GPUs, in whole nodes beyond one, on which some layout fits; None up to 4096."""
    sizes = [2**i for i in range(13)]
    for gpus in sizes:
        if gpus <= cluster.gpus or (gpus > cluster.gpus_per_node and gpus % cluster.gpus_per_node):
            continue
        larger = dataclasses.replace(cluster, gpus=gpus)
        if next(_plans(run, arch, larger, assumed, frozenset()), None) is not None:
            return gpus
    return None


def refuse(plan: Plan) -> None:
    """Raises `ConfigError` for a plan that does not fit: the worst rank's bytes, and the nearest layout that does."""
    try:
        plan.require_fit()
    except ConfigError as error:
        near = nearest(plan.run, plan.arch, plan.cluster, plan.assumed)
        if near is None:
            raise ConfigError(f"{error}; {nothing_fits(plan.run, plan.arch, plan.cluster, plan.assumed)}") from None
        raise ConfigError(f"{error}; nearest that fits: {flags(near, plan.run)} ({near.memory.peak / GIB:.1f} GiB)") from None


def nothing_fits(run: Run, arch: Arch, cluster: Cluster, assumed: Assumed) -> str:
    """What would: the smallest number of these GPUs."""
    fewest = smallest(run, arch, cluster, assumed)
    where = f"no layout fits {cluster.gpus} x {cluster.gpu.name}"
    if fewest is None:
        return f"{where}, nor up to 4096; lower --max_completion_length, --max_prompt_length or the batch"
    return f"{where}; {fewest} are the fewest that do"


def flags(plan: Plan, before: Run | None = None) -> str:
    """The plan's settings as flags of `train`; only what differs from `before` where that is given."""
    here = plan.run.flat()
    defaults = {item.name: item.default for _, item in all_settings()}
    there = defaults if before is None else before.flat()
    names = [*CUT, *sorted(CHOSEN - set(CUT)), "bf16", "teacher_memory", "use_vllm", "vllm_mode"]
    names += sorted(VLLM_COLOCATE & {"vllm_tensor_parallel_size", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"})
    out = []
    for name in names:
        value, idle = here[name], name in VLLM_COLOCATE and here["vllm_mode"] == "server"
        if idle or there[name] == value:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            out.append(flag if value else f"--no-{name.replace('_', '-')}")
        else:
            out.append(f"without {flag}" if value is None else f"{flag} {value}")
    return " ".join(out)


def _plans(run: Run, arch: Arch, cluster: Cluster, assumed: Assumed, fixed: frozenset[str]) -> Iterator[Plan]:
    """What fits of all layouts; of each layout the cheapest of the other settings with which it does."""
    engines = [(one.vllm, engine_of(one, arch, cluster)) for one in _engines(run, fixed)]
    for layout in _layouts(run, arch, cluster, fixed):
        for again in _choices(run.layout.recompute_granularity, (None, "selective", "full"), "recompute_granularity", fixed):
            cut = dataclasses.replace(run, layout=dataclasses.replace(layout, recompute_granularity=again))
            # What does not divide this model or this cluster is no candidate.
            with contextlib.suppress(ConfigError):
                if (found := _fitting(cut, arch, cluster, assumed, fixed, engines)) is not None:
                    yield found
                    break


def _fitting(
    run: Run, arch: Arch, cluster: Cluster, assumed: Assumed, fixed: frozenset[str], engines: list[tuple[Vllm, Engine]]
) -> Plan | None:
    """With the teacher's weights where they cost the least time, and an engine, such that it fits."""
    for kept in _memories(run, fixed):
        plan = plan_run(kept, arch, cluster, assumed)
        if not plan.with_engine(kept, Engine("replay")).fits:
            continue
        for vllm, engine in engines:
            one = plan.with_engine(dataclasses.replace(kept, vllm=vllm), engine)
            if one.fits:
                return one
    return None


def _choices(stated: Any, others: tuple[Any, ...], name: str, fixed: frozenset[str]) -> tuple[Any, ...]:
    return (stated,) if name in fixed else others


def _layouts(run: Run, arch: Arch, cluster: Cluster, fixed: frozenset[str]) -> Iterator[Layout]:
    stated = run.layout

    def sizes(name: str, most: int, limit: int = 0) -> list[Any]:
        if name in fixed:
            return [getattr(stated, name)]
        return [n for n in range(1, (limit or most) + 1) if most % n == 0 and n <= cluster.gpus]

    longest = run.data.max_prompt_length + run.rollout.max_completion_length
    contexts = sizes("context_parallel_size", 8) if longest >= _LONG else sizes("context_parallel_size", 1)
    experts = sizes("expert_model_parallel_size", arch.experts.count if arch.experts else 1, 64)
    tensors = [t for t in sizes("tensor_model_parallel_size", 8) if t <= cluster.gpus_per_node]
    stages = (
        sizes("pipeline_model_parallel_size", 1, 64)
        if CUT[1] in fixed
        else sorted({*arch.pipeline_sizes(), *arch.pipeline_sizes(2)})
    )
    batches = _choices(stated.micro_batch_size, (1, 2, 4, 8), "micro_batch_size", fixed)
    for tensor, stage, context, expert, batch in itertools.product(tensors, stages, contexts, experts, batches):
        ranks = tensor * stage * context
        if cluster.gpus % ranks or stage > 64 or cluster.gpus // ranks * context % expert:
            continue
        if stated.global_batch_size % (batch * (cluster.gpus // ranks)):
            continue
        for chunks, ends in _stage_forms(arch, stated, stage, fixed):
            yield dataclasses.replace(
                stated,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=stage,
                virtual_pipeline_model_parallel_size=chunks,
                account_for_embedding_in_pipeline_split=ends
                if not fixed & ENDS
                else stated.account_for_embedding_in_pipeline_split,
                account_for_loss_in_pipeline_split=ends if not fixed & ENDS else stated.account_for_loss_in_pipeline_split,
                context_parallel_size=context,
                expert_model_parallel_size=expert,
                micro_batch_size=batch,
                sequence_parallel=stated.sequence_parallel if "sequence_parallel" in fixed else tensor > 1,
                use_distributed_optimizer=(
                    stated.use_distributed_optimizer
                    if "use_distributed_optimizer" in fixed
                    else cluster.gpus // ranks * context > 1
                ),
            )


def _stage_forms(arch: Arch, stated: Layout, stages: int, fixed: frozenset[str]) -> Iterator[tuple[int | None, bool]]:
    """`(virtual chunks, whether embedding and loss count as layers)` that cut the layers evenly."""
    if fixed & {CUT[2], *ENDS}:
        yield stated.virtual_pipeline_model_parallel_size, stated.pipeline_ends > 0
        return
    for chunks in (None, 2, 3, 4, 5, 6, 7):
        if stages == 1 and chunks is not None:
            return
        if stages * (chunks or 1) in arch.pipeline_sizes():
            yield chunks, False
        elif stages > 1 and stages * (chunks or 1) in arch.pipeline_sizes(2):
            yield chunks, True


def _memories(run: Run, fixed: frozenset[str]) -> Iterator[Run]:
    """Where the teacher's weights are kept, the cheapest in time first."""
    kinds = ("beside",) if teacher_kind(run) in (None, "live") else ("beside", "swap", "host")
    for kind in _choices(run.teacher.teacher_memory, kinds, "teacher_memory", fixed):
        yield dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, teacher_memory=kind))


def _engines(run: Run, fixed: frozenset[str]) -> Iterator[Run]:
    """Rollout engines: what was asked for, or vLLM in the training processes, asleep while they train, on ever more
    ranks; servers where none of these fits."""
    if not needs_engine(run) or fixed & {"rollout", "use_vllm", "vllm_mode", "vllm_tensor_parallel_size"}:
        yield run
        return
    for ranks, part in itertools.product((1, 2, 4, 8, 16), (0.3, 0.5, 0.7)):
        vllm = dataclasses.replace(
            run.vllm,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_tensor_parallel_size=ranks,
            vllm_gpu_memory_utilization=part,
            vllm_enable_sleep_mode=True,
        )
        yield dataclasses.replace(run, vllm=vllm)
    plain = type(run.vllm)
    yield dataclasses.replace(run, vllm=plain(use_vllm=True, vllm_mode="server", vllm_server_urls=run.vllm.vllm_server_urls))
