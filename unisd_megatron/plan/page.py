"""A plan as text. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisd_megatron.plan.hardware import GIB
from unisd_megatron.validation import teacher_kind

if TYPE_CHECKING:
    from unisd_megatron.plan.plan import Plan


def lines(plan: Plan) -> list[str]:
    """Cluster, layout, bytes by stage and phase, seconds by phase, and what was assumed."""
    from unisd_megatron.plan.plan import describe

    run, cluster, gpu = plan.run, plan.cluster, plan.cluster.gpu
    layout = run.layout
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    replicas = layout.data_parallel_size(cluster.gpus)
    switches = [
        name
        for name, is_on in (
            ("sequence parallel", layout.sequence_parallel),
            ("distributed optimizer", layout.use_distributed_optimizer),
            (f"recompute {layout.recompute_granularity}", layout.recompute_granularity is not None),
            ("bf16", layout.bf16),
            ("fp32", not layout.bf16),
        )
        if is_on
    ]
    return [
        f"{run.model_name} on {cluster.gpus} x {gpu.name} ({cluster.nodes} nodes): {verdict}",
        f"layout   {describe(run)} DP {replicas}, global batch {layout.global_batch_size}; {', '.join(switches)}",
        f"teacher  {_teacher(plan)}; rollouts {_engine(plan)}",
        "",
        *_memory(plan),
        "",
        *_seconds(plan),
        "",
        "Arithmetic, not measurement. Memory: every sequence at its longest "
        f"({run.data.max_prompt_length} + {run.rollout.max_completion_length} tokens). Seconds: "
        f"{plan.assumed.prompt(run)} + {plan.assumed.completion(run)} tokens on average,",
        f"matrix products at {plan.assumed.efficiency:.0%} and bandwidths at {plan.assumed.bandwidth:.0%} of their ratings "
        "(docs/planning.md).",
        *([] if cluster.on_cpu else ["Transformer Engine and flash-attn are taken to be installed."]),
    ]


def _teacher(plan: Plan) -> str:
    kind = teacher_kind(plan.run)
    return "none" if kind is None else f"{kind} {plan.run.teacher.teacher_memory}"


def _engine(plan: Plan) -> str:
    one = plan.engine
    if one.kind == "colocate":
        asleep = ", asleep while training" if not one.always else ""
        return f"vLLM in {one.engines} engines of {one.tensor}{asleep}"
    if one.kind == "server":
        from unisd_megatron.plan.time import server_ranks

        ranks = server_ranks(plan.arch, plan.cluster, 2 if plan.run.layout.bf16 else 4)
        gpus = max(ranks, plan.assumed.server_gpus or plan.cluster.gpus // 4)
        return f"vLLM on servers: {gpus // ranks} of {ranks} GPUs, beside those that train"
    return {"replay": "recorded", "none": "none", "transformers": "transformers, a model on each rank"}[one.kind]


def _memory(plan: Plan) -> list[str]:
    """A column for each kind of stage."""
    ranks = plan.ranks
    stages = plan.run.layout.pipeline_model_parallel_size
    names = {0: "first", stages - 1: "last"} if stages > 1 else {0: "all"}
    head = "".join(f"{names.get(one.stage, 'middle'):>10}" for one in ranks)
    rows = {
        "weights": [one.held.weights for one in ranks],
        "gradients (fp32)": [one.held.gradients for one in ranks],
        "FP8 copies of weights": [one.fp8.copies for one in ranks],
        "optimizer": [one.held.optimizer for one in ranks],
        "teacher": [one.held.teacher for one in ranks],
        "EMA (fp32 shards)": [one.held.ema for one in ranks],
        "of these on the host": [-one.held.host for one in ranks],
        "engine while training": [one.engine.training for one in ranks],
        "activations": [one.activations.saved for one in ranks],
        "teacher's hidden states": [one.activations.heard for one in ranks],
        "loss chunk, gradients": [one.activations.working for one in ranks],
        "CUDA, NCCL, gaps": [one.peak - max(one.phases.values()) for one in ranks],
    }
    out = [f"{'GiB on a rank of stage':26}{head}"]
    out += [_row(name, [value / GIB for value in values]) for name, values in rows.items() if any(values)]
    idle = {"rollout": plan.engine.kind == "none", "teacher": teacher_kind(plan.run) is None}
    for phase in (name for name in ("rollout", "teacher", "student") if not idle.get(name)):
        out.append(_row(f"in all, {phase}", [one.phases[phase] / GIB for one in ranks]))
    peak = _row("peak", [one.peak / GIB for one in ranks])
    return [*out, f"{peak}  of {plan.cluster.gpu.memory / GIB:.1f}"]


def _row(name: str, values: list[float]) -> str:
    return f"{name:26}" + "".join(f"{value:10.2f}" for value in values)


def _seconds(plan: Plan) -> list[str]:
    took = plan.seconds
    phases = {
        "rollout": took.rollout,
        "weight sync": took.sync,
        "teacher, all views": took.teacher,
        "student": took.student,
        "optimizer": took.optimizer,
        "EMA": took.ema,
        "a step": took.step,
    }
    out = [f"{'seconds':26}{'':4}"]
    out += [f"{name:26}{value:10.3f}  {value / took.step:5.0%}" for name, value in phases.items()]
    out.append(f"of which pipeline bubble {took.bubble:.3f}, waiting for other ranks {took.communication:.3f}")
    return out


def table(plans: list[Plan]) -> list[str]:
    """Layouts side by side, the fastest first."""
    head = f"{'':>2} {'TP':>3} {'PP':>3} {'VPP':>3} {'CP':>3} {'EP':>3} {'DP':>4} {'MBS':>3} {'recompute':>9} {'teacher':>7} "
    out = [f"{head}{'rollouts':>14} {'peak GiB':>8} {'s/step':>8} {'rollout':>8} {'teacher':>8} {'student':>8}"]
    for number, plan in enumerate(plans, 1):
        layout, one, took = plan.run.layout, plan.engine, plan.seconds
        rollouts = f"vLLM {one.engines}x{one.tensor}" if one.kind == "colocate" else one.kind
        out.append(
            f"{number:>2} {layout.tensor_model_parallel_size:>3} {layout.pipeline_model_parallel_size:>3} "
            f"{layout.virtual_pipeline_model_parallel_size or 1:>3} {layout.context_parallel_size:>3} "
            f"{layout.expert_model_parallel_size:>3} {layout.data_parallel_size(plan.cluster.gpus):>4} "
            f"{layout.micro_batch_size:>3} {layout.recompute_granularity or 'none':>9} {plan.run.teacher.teacher_memory:>7} "
            f"{rollouts:>14} {plan.memory.peak / GIB:8.1f} {took.step:8.2f} {took.rollout:8.2f} {took.teacher:8.2f} "
            f"{took.student:8.2f}"
        )
    return out
