"""Contradictions between settings, found before any process group exists. No torch here."""

from __future__ import annotations

import multiprocessing
import re
from typing import Literal

from unisd_megatron.caches import INDUCTION_CACHE, NEGATIVE_CACHE, Caches
from unisd_megatron.config import Accelerator, Layout, Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.modes import BASELINES, MODES


def validate(run: Run, world_size: int) -> None:
    """Raises `ConfigError` for anything about the settings that is known to be wrong in a world of `world_size` processes."""
    validate_objective(run)
    run.layout.validate(world_size)
    validate_accelerator(run, world_size)
    _validate_needs(run)
    _validate_rollout(run, world_size)
    validate_ranges(run)
    validate_caches(run.caches)


def validate_accelerator(run: Run, world_size: int) -> None:
    """Raises `ConfigError` for what contradicts itself on any machine; `mcore.platform.decide` finds what a machine lacks."""
    asked, layout, local = run.accelerator, run.layout, run.accelerator.transformer_impl == "local"
    replicas = layout.data_parallel_size(world_size) * layout.context_parallel_size
    check_replicas(asked, layout, world_size)
    teacher = asked.teacher_fp8
    checks = [
        (not asked.fp8 or layout.bf16, "--fp8-format and --teacher-fp8 cast from bf16; add --bf16"),
        (not (asked.fp8 and local), "FP8 is Transformer Engine's; drop --transformer-impl local"),
        (
            not asked.fp8_param_gather or layout.use_distributed_optimizer,
            "--fp8-param-gather keeps the exact weights in the distributed optimizer alone; add --use-distributed-optimizer",
        ),
        (
            not asked.fp8_param_gather or run.teacher.teacher_memory == "beside" or run.teacher.teacher == "live",
            f"--teacher_memory {run.teacher.teacher_memory} lends the student's weights, and FP8 weights could not be put back "
            "to the bit; use --teacher_memory beside, or drop --fp8-param-gather",
        ),
        (
            not asked.fp8_param_gather or run.method.completions != "starting",
            f"--mode {run.mode} lends starting weights to the student, and FP8 weights could not be put back to the bit; "
            "drop --fp8-param-gather",
        ),
        (not teacher or not run.method.likelihood, f"--teacher-fp8: --mode {run.mode} has no teacher; drop it"),
        (
            not teacher or run.teacher.teacher != "live",
            "--teacher-fp8 with --teacher live: the teacher is the student; use --fp8-format for both",
        ),
        (
            not teacher or asked.fp8_recipe != "delayed",
            "--teacher-fp8 with --fp8-recipe delayed: past maxima are those of a training pass; use tensorwise or blockwise",
        ),
        (
            asked.transformer_impl != "transformer_engine" or layout.bf16,
            "--transformer-impl transformer_engine has no attention for packed rows in fp32; add --bf16",
        ),
        (asked.attention_backend != "flash" or layout.bf16, "--attention-backend flash computes in bf16; add --bf16"),
        (
            asked.attention_backend != "fused" or not local,
            "--attention-backend fused is Transformer Engine's; drop --transformer-impl local, or use flash or unfused",
        ),
        (
            asked.attention_backend != "fused" or layout.bf16,
            "--attention-backend fused is Transformer Engine's, which computes in bf16 here; add --bf16",
        ),
        (
            not asked.overlap_param_gather or layout.use_distributed_optimizer,
            "--overlap-param-gather gathers what the distributed optimizer cuts up; add --use-distributed-optimizer",
        ),
        (
            not (asked.overlap_param_gather and asked.overlap_grad_reduce is False),
            "--overlap-param-gather needs --overlap-grad-reduce, as in Megatron; drop --no-overlap-grad-reduce",
        ),
        (
            not asked.overlap_param_gather or replicas > 1,
            "--overlap-param-gather: with one data-parallel rank nothing is gathered; drop it",
        ),
        *_overlap_checks(run),
    ]
    for holds, message in checks:
        if not holds:
            raise ConfigError(message)


def check_replicas(asked: Accelerator, layout: Layout, world_size: int) -> None:
    """Raises `ConfigError` for gradients that are to be reduced early and have no other rank."""
    if asked.overlap_grad_reduce and layout.data_parallel_size(world_size) * layout.context_parallel_size == 1:
        raise ConfigError("--overlap-grad-reduce: with one data-parallel rank nothing is reduced; drop it")


def _overlap_checks(run: Run) -> list[tuple[bool, str]]:
    """Of tensor-parallel communication under matrix products."""
    asked, layout = run.accelerator, run.layout
    on = asked.tp_comm_overlap
    return [
        (
            not on or layout.tensor_model_parallel_size > 1,
            "--tp-comm-overlap hides communication of tensor-parallel ranks; it needs --tensor-model-parallel-size 2 or more",
        ),
        (not on or layout.sequence_parallel, "--tp-comm-overlap overlaps gathering and scattering; add --sequence-parallel"),
        (not on or layout.bf16, "--tp-comm-overlap is Transformer Engine's, which computes in bf16 here; add --bf16"),
        (
            not on or asked.transformer_impl != "local",
            "--tp-comm-overlap is Transformer Engine's; drop --transformer-impl local",
        ),
        (
            not (on and asked.fp8 and asked.fp8_recipe == "blockwise"),
            "--tp-comm-overlap has no buffers for --fp8-recipe blockwise; use tensorwise, or drop one",
        ),
    ]


def samples(run: Run) -> bool:
    """Whether an engine samples what is trained on."""
    return run.method.completions != "reference" and run.rollout.on_policy_share != 0


def needs_engine(run: Run) -> bool:
    """Whether anything is generated: to train on, or to evaluate."""
    return samples(run) or run.schedule.eval_steps > 0


def teacher_kind(run: Run) -> Literal["frozen", "ema", "live"] | None:
    """The teacher of a run, if any. Under released semantics the EMA teacher never moves, as in the authors' LoRA runs."""
    if run.method.likelihood:
        return None
    assert run.teacher.teacher is not None
    released = run.objective.semantics == "released"
    return "frozen" if released and run.teacher.teacher == "ema" else run.teacher.teacher


def validate_objective(run: Run) -> None:
    """Raises `ConfigError` for settings of the loss that cannot be, or exclude each other."""
    objective = run.objective
    if objective.semantics == "released" and run.mode in BASELINES:
        raise ConfigError(f"--semantics released is what UniSD's authors' code does, without --mode {run.mode}; leave it out")
    if objective.semantics == "released" and run.layout.context_parallel_size > 1:
        raise ConfigError("--semantics released normalises on each rank by itself, which --context-parallel-size would change")
    if objective.semantics == "released" and run.layout.packing:
        raise ConfigError("--semantics released takes means over micro-batches of one size, which --packing gives up; drop it")
    if not 0.0 <= objective.alpha <= 1.0:
        raise ConfigError(f"--alpha is {objective.alpha}; it lies between 0 and 1")
    if objective.token_clip is not None and objective.token_clip_quantile is not None:
        raise ConfigError("--token_clip and --token_clip_quantile exclude each other; give one")
    if objective.token_clip is not None and objective.token_clip <= 0:
        raise ConfigError(f"--token_clip is {objective.token_clip}; a ceiling must be positive")
    if objective.entry_clip is not None and objective.entry_clip <= 0:
        raise ConfigError(f"--entry_clip is {objective.entry_clip}; a ceiling must be positive")
    if objective.token_clip_quantile is not None and not 0.0 < objective.token_clip_quantile < 1.0:
        raise ConfigError(f"--token_clip_quantile is {objective.token_clip_quantile}; it lies between 0 and 1")
    if (objective.gamma_agreement or 0.0) < 0:
        raise ConfigError(f"--gamma_agreement is {objective.gamma_agreement}; it must not be negative")
    if objective.contrastive_weight < 0 or (objective.final_layer_distill_weight or 0.0) < 0:
        raise ConfigError("--contrastive_weight and --final_layer_distill_weight must not be negative")


def _validate_needs(run: Run) -> None:
    _validate_own_mechanism(run)
    if run.data.dataset is None:
        raise ConfigError("--dataset is missing; give a task, such as gsm8k")
    if run.schedule.output_dir is None:
        raise ConfigError("--output_dir is missing; give a new folder for the run")
    method = MODES[run.mode].defaults.get("fewshot_method", run.data.fewshot_method)
    if run.data.fewshot_method != method:
        raise ConfigError(
            f"--mode {run.mode} takes {method} contexts; --fewshot_method {run.data.fewshot_method} contradicts it"
        )
    if run.agreement is not None and (run.data.num_auxiliary_contexts < 1 or run.data.fewshot_method is None):
        raise ConfigError(
            f"--mode {run.mode} weights tokens by the agreement of auxiliary contexts and has none; "
            "add --num-auxiliary-contexts K (2 or more) and --fewshot_method random, retrieval or induction"
        )
    if run.schedule.async_save and "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError("--async_save writes from forked processes and this platform cannot fork; drop it")
    if run.teacher.teacher == "ema":
        steps, beta = run.teacher.ref_model_sync_steps, run.teacher.ref_model_mixup_beta
        if steps is None or steps < 1 or beta is None or not 0.0 <= beta < 1.0:
            raise ConfigError(
                f"the EMA teacher needs --ref_model_sync_steps of at least 1 "
                f"and --ref_model_mixup_beta in [0, 1); got {steps} and {beta}"
            )


def _validate_rollout(run: Run, world_size: int) -> None:
    rollout, vllm = run.rollout, run.vllm
    if rollout.rollout == "replay":
        if vllm.use_vllm:
            raise ConfigError("--use_vllm samples and --rollout replay repeats what was sampled; drop one")
        if rollout.replay_path is None:
            raise ConfigError("--rollout replay needs --replay_path, the `rollouts` folder of an earlier run")
        if run.schedule.eval_steps:
            raise ConfigError("--eval_steps generates answers and --rollout replay cannot; drop one")
        if rollout.importance_sampling_cap is not None:
            raise ConfigError("--importance_sampling_cap needs log-probs of the weights that sampled; drop --rollout replay")
    share = rollout.on_policy_share
    if run.method.completions == "mixed" and (share is None or not 0.0 <= share <= 1.0):
        raise ConfigError(f"--on_policy_share is {share}; it lies between 0 and 1")
    if run.method.completions == "starting" and rollout.sample_filter is None:
        raise ConfigError(f"--mode {run.mode} needs --sample_filter stubs, correct or none")
    if run.method.completions == "mixed" and rollout.max_rollout_lag:
        raise ConfigError(
            f"--max_rollout_lag asks ahead for whole batches, of which --mode {run.mode} samples a part; leave it out"
        )
    if not vllm.use_vllm:
        return
    if run.origins.get("rollout") == "flag":
        raise ConfigError(f"--use_vllm and --rollout {rollout.rollout} are two engines; drop one")
    if rollout.temperature < 0.01:
        raise ConfigError(
            f"--temperature {rollout.temperature}: vLLM samples at 0.01 at least; raise it, or leave --use_vllm out"
        )
    if vllm.vllm_mode == "server" and not server_urls(run):
        raise ConfigError("--vllm_mode server needs --vllm_server_urls http://host:port[,...]; tools/serve_vllm.py starts one")
    silent_s = 2 * max(60.0, vllm.vllm_server_timeout)
    if vllm.vllm_mode == "server" and 60 * run.schedule.distributed_timeout_minutes < silent_s:
        raise ConfigError(
            f"--distributed-timeout-minutes {run.schedule.distributed_timeout_minutes:g} is too short: the others wait while "
            f"rank 0 learns that a server is lost; use {silent_s / 60:g} or more, or a smaller --vllm_server_timeout"
        )
    wrong = [url for url in server_urls(run) if not url.startswith(("http://", "https://"))]
    if wrong:
        raise ConfigError(f"--vllm_server_urls: {wrong[0]} is no URL; use http://host:port")
    if len(set(server_urls(run))) < len(server_urls(run)):
        raise ConfigError("--vllm_server_urls names a server twice")
    if vllm.vllm_mode == "colocate" and world_size % vllm.vllm_tensor_parallel_size:
        fits = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(
            f"--vllm_tensor_parallel_size {vllm.vllm_tensor_parallel_size} does not divide {world_size} processes; "
            f"use {', '.join(fits)}"
        )


def server_urls(run: Run) -> list[str]:
    """The addresses of `--vllm_server_urls`."""
    return [url.strip().rstrip("/") for url in (run.vllm.vllm_server_urls or "").split(",") if url.strip()]


def _validate_own_mechanism(run: Run) -> None:
    """A mode that is named after one mechanism has that mechanism on; `unisd_star` may go without some of its own."""
    objective = run.objective
    holds, flag = {
        "ema": (run.teacher.teacher == "ema", "--teacher ema"),
        "contrastive": (objective.contrastive_weight > 0, "a positive --contrastive_weight"),
        "match_joint": ((objective.final_layer_distill_weight or 0.0) > 0, "a positive --final_layer_distill_weight"),
        "match_repr": ((objective.final_layer_distill_weight or 0.0) > 0, "a positive --final_layer_distill_weight"),
        "clip": (objective.token_clip is not None or objective.token_clip_quantile is not None, "a ceiling"),
    }.get(run.mode, (True, ""))
    if run.mode.startswith("agreement"):
        holds, flag = (objective.gamma_agreement or 0.0) > 0, "a positive --gamma_agreement"
    if not holds:
        raise ConfigError(f"--mode {run.mode} without its mechanism is another mode; give it {flag}, or use --mode vanilla")


def validate_caches(caches: Caches) -> None:
    """Raises `ConfigError` for a setting of a cache that cannot be."""
    for name in sorted(NEGATIVE_CACHE | INDUCTION_CACHE):
        if getattr(caches, name) < 1:
            raise ConfigError(f"--{name} is {getattr(caches, name)}; it must be at least 1")
    if caches.cache_temperature < 0.01:  # the least that vLLM samples at
        raise ConfigError(f"--cache_temperature is {caches.cache_temperature}; it must be at least 0.01")


def is_hub_id(name: str) -> bool:
    """Whether a model that is no folder here can be one of the hub's: `owner/name`."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) is not None


def check_seed(seed: int) -> None:
    """Raises `ConfigError` for a seed that torch's generators do not take."""
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"--seed is {seed}; it must fit in 64 bits")


def validate_ranges(run: Run) -> None:
    """Raises `ConfigError` for a number that is out of its range, whatever the others are."""
    check_seed(run.schedule.seed)
    checks = [
        (run.rollout.temperature > 0, "--temperature must be positive"),
        (0 < run.rollout.top_p <= 1, "--top_p lies in (0, 1]"),
        (run.rollout.top_k >= 0, "--top_k must not be negative"),
        (0 <= run.rollout.min_p < 1, "--min_p lies in [0, 1)"),
        (run.rollout.repetition_penalty > 0, "--repetition_penalty must be positive"),
        (
            run.rollout.importance_sampling_cap is None or run.rollout.importance_sampling_cap > 0,
            "--importance_sampling_cap must be positive",
        ),
        (run.rollout.max_rollout_lag >= 0, "--max_rollout_lag must not be negative"),
        (run.vllm.vllm_tensor_parallel_size >= 1, "--vllm_tensor_parallel_size must be at least 1"),
        (0 < run.vllm.vllm_gpu_memory_utilization <= 1, "--vllm_gpu_memory_utilization lies in (0, 1]"),
        (run.vllm.vllm_kv_cache_gib > 0, "--vllm_kv_cache_gib must be positive"),
        (run.vllm.vllm_server_timeout > 0, "--vllm_server_timeout must be positive"),
        (run.rollout.max_completion_length >= 1, "--max_completion_length must be at least 1"),
        (run.rollout.num_loss_tokens_to_skip >= 0, "--num_loss_tokens_to_skip must not be negative"),
        (run.data.max_prompt_length >= 1, "--max_prompt_length must be at least 1"),
        (run.data.num_auxiliary_contexts >= 0, "--num-auxiliary-contexts must not be negative"),
        (run.data.demo_k >= 1, "--demo_k must be at least 1"),
        (run.data.num_train_examples is None or run.data.num_train_examples >= 1, "--num_train_examples must be at least 1"),
        ((run.objective.contrastive_margin or 0.0) >= 0, "--contrastive_margin must not be negative"),
        (run.rollout.max_logp_gap is None or run.rollout.max_logp_gap > 0, "--max_logp_gap must be positive"),
        (run.optimization.weight_decay >= 0, "--weight_decay must not be negative"),
        (run.optimization.adam_epsilon > 0, "--adam_epsilon must be positive"),
        (0 <= run.optimization.adam_beta1 < 1 and 0 <= run.optimization.adam_beta2 < 1, "--adam_beta1 and 2 lie in [0, 1)"),
        (run.optimization.learning_rate > 0, "--learning_rate must be positive"),
        (0 <= run.optimization.warmup_ratio <= 1, "--warmup_ratio lies in [0, 1]"),
        (run.optimization.max_grad_norm >= 0, "--max_grad_norm must not be negative"),
        (run.schedule.max_steps is None or run.schedule.max_steps >= 1, "--max_steps must be at least 1"),
        (run.schedule.num_train_epochs > 0, "--num_train_epochs must be positive"),
        (
            min(run.schedule.save_steps, run.schedule.eval_steps, run.schedule.save_total_limit) >= 0,
            "step counts must not be negative",
        ),
        (run.schedule.distributed_timeout_minutes > 0, "--distributed-timeout-minutes must be positive"),
        (
            run.schedule.exit_duration_in_mins is None or run.schedule.exit_duration_in_mins > 0,
            "--exit-duration-in-mins must be positive",
        ),
        (run.schedule.eval_examples >= 1, "--eval_examples must be at least 1"),
    ]
    for holds, message in checks:
        if not holds:
            raise ConfigError(message)
