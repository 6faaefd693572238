"""Every setting of a run: one frozen dataclass per concern, each default in exactly one place. No torch here.

A field's name is its flag (`--like_this` or `--like-this`); its metadata carries the help text. `resolve.resolve` makes a `Run`
of what was asked for; `validation.validate` sees contradictions before any process group exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from unisd_megatron.accelerator import Accelerator as Accelerator
from unisd_megatron.caches import Caches
from unisd_megatron.errors import ConfigError
from unisd_megatron.modes import MODES, Mode
from unisd_megatron.setting import setting
from unisd_megatron.setting import setting_type as setting_type


@dataclass(frozen=True)
class Layout:
    """How the model and the batch are cut over ranks (Megatron's names)."""

    tensor_model_parallel_size: int = setting(1, "ranks that share each weight matrix", short="--tp")
    pipeline_model_parallel_size: int = setting(1, "stages the layers are cut into", short="--pp")
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, "chunks of layers on each stage, for a smaller pipeline bubble (interleaved schedule)", short="--vpp"
    )
    context_parallel_size: int = setting(1, "ranks that share each sequence", short="--cp")
    expert_model_parallel_size: int = setting(
        1, "ranks, of those with the same weights, that the experts of a mixture are dealt out over", short="--ep"
    )
    account_for_embedding_in_pipeline_split: bool = setting(
        False, "the embedding takes the place of a layer on the first stage"
    )
    account_for_loss_in_pipeline_split: bool = setting(False, "head and loss count as a layer of the last stage")
    sequence_parallel: bool = setting(False, "keep activations between matrix products sharded over sequence positions")
    micro_batch_size: int = setting(1, "sequences per forward pass (with packing, on average)")
    packing: bool = setting(
        True, "sequences of a micro-batch share one row without padding, blind to one another; not with --semantics released"
    )
    global_batch_size: int = setting(16, "sequences per optimizer step, over all ranks")
    use_distributed_optimizer: bool = setting(False, "shard optimizer state over data-parallel ranks")
    recompute_granularity: Literal["full", "selective"] | None = setting(None, "recompute activations in the backward pass")
    bf16: bool = setting(False, "bf16 weights and activations (fp32 main parameters, losses and EMA); fp32 without")

    def validate(self, world_size: int) -> None:
        """Raises `ConfigError` where the layout contradicts itself or does not fit the number of processes."""
        self.validate_sizes()
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "--sequence-parallel shards over tensor-parallel ranks; it needs --tensor-model-parallel-size 2 or more"
            )
        if self.context_parallel_size > 1 and not self.packing:
            raise ConfigError("--context-parallel-size cuts packed rows; leave --packing on")
        self.expert_data_parallel_size(world_size)
        if self.expert_model_parallel_size > 1 and self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            raise ConfigError("--expert-model-parallel-size with tensor parallelism needs --sequence-parallel")
        count = self.micro_batches(world_size)
        chunks, stages = self.virtual_pipeline_model_parallel_size, self.pipeline_model_parallel_size
        if chunks is not None and chunks < 2:
            raise ConfigError(f"--virtual-pipeline-model-parallel-size is {chunks}; it must be at least 2, or left out")
        if chunks is not None and stages < 2:
            raise ConfigError(
                "--virtual-pipeline-model-parallel-size cuts pipeline stages; it needs --pipeline-model-parallel-size 2 or more"
            )
        if self.pipeline_ends and stages < 2:
            ends = "embedding" if self.account_for_embedding_in_pipeline_split else "loss"
            raise ConfigError(
                f"--account-for-{ends}-in-pipeline-split deals layers out to stages; it needs --pipeline-model-parallel-size 2 "
                "or more"
            )
        if chunks is not None and count % stages:
            raise ConfigError(
                f"the interleaved schedule takes a multiple of {stages} micro-batches (its pipeline stages), not {count} per "
                "replica; change --global-batch-size or --micro-batch-size"
            )

    def validate_sizes(self) -> None:
        """Raises `ConfigError` for a size below 1."""
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        for name in (*names, "expert_model_parallel_size", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share a batch: tensor x pipeline x context."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def virtual_stages(self) -> int:
        """Parts the layers are cut into: pipeline stages, times chunks on each."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    @property
    def pipeline_ends(self) -> int:
        """Places of layers that the embedding and the loss take."""
        return self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas in a world of `world_size` ranks; `ConfigError` if the layout does not fill it evenly."""
        if world_size % self.model_parallel_size:
            raise ConfigError(
                f"{world_size} processes cannot hold tensor-parallel {self.tensor_model_parallel_size} x pipeline-parallel "
                f"{self.pipeline_model_parallel_size} x context-parallel {self.context_parallel_size}; start a multiple of "
                f"{self.model_parallel_size}"
            )
        return world_size // self.model_parallel_size

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Ranks that have the same experts; `ConfigError` if expert parallelism does not divide those with the same weights."""
        experts, same = self.expert_model_parallel_size, self.data_parallel_size(world_size) * self.context_parallel_size
        if same % experts:
            raise ConfigError(
                f"--expert-model-parallel-size {experts} does not divide the {same} ranks with the same weights (data-parallel "
                "x context-parallel) that it deals the experts out over"
            )
        return same // experts

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per replica and optimizer step."""
        replicas = self.data_parallel_size(world_size)
        if self.global_batch_size % (self.micro_batch_size * replicas):
            raise ConfigError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} x {replicas} data-parallel ranks"
            )
        return self.global_batch_size // (self.micro_batch_size * replicas)


@dataclass(frozen=True)
class Data:
    """Which questions, and what the teacher sees beside them."""

    dataset: str | None = setting(None, "task to train on; a wrong name lists them")
    data_path: str | None = setting(None, "read the data set from this JSON or JSONL file (or .gz) instead of the hub")
    fewshot_method: Literal["random", "retrieval", "induction"] | None = setting(
        None, "how donors of auxiliary contexts are chosen"
    )
    num_auxiliary_contexts: int = setting(0, "K, auxiliary contexts per example")
    demo_k: int = setting(1, "solved examples in each auxiliary context")
    auxiliary_gold: bool = setting(False, "auxiliary contexts show the reference solution too, as the teacher's does")
    negatives: Literal["generated", "corrupted"] | None = setting(
        None, "wrong solutions: written by a model, or made by the task's rule; default: its rule, if it has one"
    )
    max_prompt_length: int = setting(1024, "tokens; an example with a longer prompt in any view is dropped and counted")
    num_train_examples: int | None = setting(None, "use only the first n examples")


@dataclass(frozen=True)
class Rollout:
    """How the student's completions are sampled."""

    rollout: Literal["transformers", "replay"] = setting(
        "transformers", "engine: embedded Hugging Face generation, or completions recorded by an earlier run"
    )
    replay_path: str | None = setting(None, "`rollouts` folder of an earlier run, for --rollout replay")
    temperature: float = setting(0.7, "sampling temperature; student, teacher and negative logits are divided by it")
    top_p: float = setting(1.0, "nucleus sampling mass")
    top_k: int = setting(0, "sample among the k likeliest tokens; 0: all")
    min_p: float = setting(0.0, "drop tokens less likely than this part of the likeliest; 0: none")
    repetition_penalty: float = setting(1.0, "logits of tokens that occurred are divided (negative ones multiplied) by it")
    max_completion_length: int = setting(1024, "tokens; a completion is cut there")
    on_policy_share: float | None = setting(
        None, "share of the completions that the student samples, the others are references"
    )
    sample_filter: Literal["stubs", "correct", "none"] | None = setting(
        None, "samples to train on: all but empty ones and programs of one line, those that are right, or all"
    )
    num_loss_tokens_to_skip: int = setting(0, "first tokens of each completion that are left out of the loss")
    mask_truncated_completions: bool = setting(False, "leave completions that were cut out of the loss")
    max_logp_gap: float | None = setting(
        None,
        "stop when the engine's log-probs of the sampled tokens differ from Megatron's by more than this, "
        "mean over tokens, nats; default 1e-3 in fp32, 0.1 in bf16",
    )
    importance_sampling_cap: float | None = setting(
        None, "weigh each token by the student's probability over the engine's, at most this (truncated importance sampling)"
    )
    max_rollout_lag: int = setting(
        0, "generate ahead while training, with weights at most this many optimizer steps old (--vllm_mode server)"
    )


@dataclass(frozen=True)
class Vllm:
    """vLLM as the rollout engine."""

    use_vllm: bool = setting(False, "sample with vLLM instead of `transformers`")
    vllm_mode: Literal["colocate", "server"] = setting(
        "colocate", "in the training processes, or on servers started by tools/serve_vllm.py"
    )
    vllm_tensor_parallel_size: int = setting(1, "colocate: ranks that share one engine; divides the number of processes")
    vllm_gpu_memory_utilization: float = setting(0.3, "colocate on GPUs: part of the memory that an engine may take")
    vllm_kv_cache_gib: float = setting(1.0, "colocate on CPUs: memory of an engine's key-value cache")
    vllm_enable_sleep_mode: bool = setting(False, "colocate on GPUs: free the engine's memory while training")
    vllm_server_urls: str | None = setting(None, "server: `http://host:port` of each, separated by commas")
    vllm_server_timeout: float = setting(300.0, "server: seconds until one that does not answer or take weights counts as lost")


@dataclass(frozen=True)
class Objective:
    """The loss (paper sections 2.1-2.3); what each mode switches on is in `modes.MODES`."""

    alpha: float = setting(
        0.0, "0: KL(teacher||student), 1: KL(student||teacher), between: JSD with weight alpha on the teacher"
    )
    token_clip: float | None = setting(None, "ceiling of a token's divergence, nats")
    entry_clip: float | None = setting(None, "most that one entry of the vocabulary adds to a token's divergence, nats")
    token_clip_quantile: float | None = setting(None, "ceiling as a quantile of the previous step's divergences")
    gamma_agreement: float | None = setting(None, "strength of the agreement weights")
    agreement_stat: Literal["var", "range"] = setting("var", "disagreement of the K views: variance or range")
    contrastive_weight: float = setting(0.0, "weight of the token-level contrast against the negative demonstration")
    contrastive_margin: float | None = setting(None, "margin of the contrast, nats (0.5)")
    final_layer_distill_weight: float | None = setting(None, "weight of final-layer feature matching")
    loss_path: Literal["fused", "fused_torch", "materialized"] = setting(
        "fused", "walk the tokens in chunks (Triton kernels on a GPU), the same in plain torch, or hold all logits"
    )
    semantics: Literal["corrected", "released"] = setting(
        "corrected", "what the names promise, or what the authors' code computes"
    )


@dataclass(frozen=True)
class Teacher:
    """Which weights the teacher reads with."""

    teacher: Literal["frozen", "ema", "live"] | None = setting(None, "frozen base, moving average, or the student itself")
    ref_model_sync_steps: int | None = setting(None, "optimizer steps between EMA updates (10)")
    ref_model_mixup_beta: float | None = setting(None, "EMA weight of the old teacher (0.9)")
    teacher_memory: Literal["beside", "swap", "host"] = setting(
        "beside",
        "the teacher's weights: next to the student's, in the student's place while it reads (the rest cut over data-parallel "
        "ranks), or so with the rest in host memory; the numbers are the same",
    )


@dataclass(frozen=True)
class Optimization:
    """AdamW and its schedule."""

    learning_rate: float = setting(2e-5, "peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting("cosine", "decay after warm-up, to zero")
    warmup_ratio: float = setting(0.1, "share of the steps with a rising learning rate")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    adam_beta1: float = setting(0.9, "first-moment decay")
    adam_beta2: float = setting(0.999, "second-moment decay")
    adam_epsilon: float = setting(1e-8, "denominator floor")
    max_grad_norm: float = setting(1.0, "global gradient norm is clipped to this; 0: no clipping")


@dataclass(frozen=True)
class Schedule:
    """How long, how often saved, where to."""

    output_dir: str | None = setting(None, "folder of the run; must not hold another run")
    max_steps: int | None = setting(None, "optimizer steps; default: --num_train_epochs passes over the data")
    num_train_epochs: float = setting(1.0, "passes over the data; instead of --max_steps")
    distributed_timeout_minutes: float = setting(10.0, "minutes that a rank waits for the others before it takes them for lost")
    seed: int = setting(42, "seed of data order, sampling and contexts")
    save_steps: int = setting(0, "optimizer steps between checkpoints; 0: only at the end")
    save_total_limit: int = setting(2, "checkpoints kept; 0: all")
    async_save: bool = setting(False, "write checkpoints from forked processes while training goes on (host memory for a copy)")
    eval_steps: int = setting(0, "optimizer steps between held-out evaluations; 0: none")
    eval_examples: int = setting(300, "held-out questions per evaluation")
    eval_data_path: str | None = setting(None, "file with the held-out questions; default: the task's test split")
    resume_from_checkpoint: str | None = setting(
        None,
        "a checkpoint folder of this run, `latest`, or `auto`: the latest, else the start; nothing if the run is finished",
    )
    exit_duration_in_mins: float | None = setting(None, "minutes since the start; then stop after the step, with a checkpoint")
    export_hf: bool = setting(True, "write a Hugging Face folder at the end")
    save_rollouts: bool = setting(True, "record the completions of every step, for --rollout replay")
    tensorboard_dir: str | None = setting(None, "folder of TensorBoard's files; default: `tensorboard` in the run's folder")
    wandb_project: str | None = setting(None, "send the numbers of each step to this project of Weights & Biases too")


@dataclass(frozen=True)
class Run:
    """A whole training run."""

    mode: str
    model_name: str
    layout: Layout
    accelerator: Accelerator
    data: Data
    caches: Caches
    rollout: Rollout
    vllm: Vllm
    objective: Objective
    teacher: Teacher
    optimization: Optimization
    schedule: Schedule
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def method(self) -> Mode:
        """What the mode switches on."""
        return MODES[self.mode]

    @property
    def agreement(self) -> Literal["token", "sequence"] | None:
        return MODES[self.mode].agreement

    @property
    def divergence_weight(self) -> float:
        return MODES[self.mode].divergence_weight

    @property
    def needs_negative(self) -> bool:
        return self.objective.contrastive_weight > 0

    @property
    def logp_gap_limit(self) -> float:
        """Largest accepted mean log-prob gap between engine and trainer, nats."""
        if self.rollout.max_logp_gap is not None:
            return self.rollout.max_logp_gap
        return 0.1 if self.layout.bf16 else 1e-3

    def flat(self) -> dict[str, Any]:
        """All settings by flag name, as `run.json` holds them."""
        values: dict[str, Any] = {"mode": self.mode, "model_name": self.model_name}
        for group in GROUPS:
            values |= dataclasses.asdict(getattr(self, group))
        return values


GROUPS: dict[str, type] = {
    "layout": Layout,
    "accelerator": Accelerator,
    "data": Data,
    "caches": Caches,
    "rollout": Rollout,
    "vllm": Vllm,
    "objective": Objective,
    "teacher": Teacher,
    "optimization": Optimization,
    "schedule": Schedule,
}

VLLM_SERVER = frozenset({"vllm_server_urls", "vllm_server_timeout", "max_rollout_lag"})
VLLM_COLOCATE = frozenset(f.name for f in dataclasses.fields(Vllm)) - VLLM_SERVER - {"use_vllm", "vllm_mode"}
"""Settings of one place of vLLM that mean nothing in the other."""

RESUME_MAY_CHANGE = frozenset(
    {f.name for f in dataclasses.fields(Layout)} - {"global_batch_size", "bf16", "use_distributed_optimizer"}
    | {"output_dir", "save_steps", "save_total_limit", "async_save", "eval_steps", "eval_examples", "eval_data_path"}
    | {
        "resume_from_checkpoint",
        "distributed_timeout_minutes",
        "exit_duration_in_mins",
        "export_hf",
        "save_rollouts",
        "tensorboard_dir",
        "wandb_project",
        "max_logp_gap",
        "rollout",
        "replay_path",
    }
    | {"data_path", "model_name", "retrieval_model"}  # their contents stand in the checkpoint: digests of weights and prompts
    | {"cache_dir", "loss_path", "teacher_memory"}
    | {f.name for f in dataclasses.fields(Vllm)}
    | {f.name for f in dataclasses.fields(Accelerator)} - {"fp8_format", "fp8_recipe", "fp8_param_gather", "teacher_fp8"}
)
"""Settings that a resumed run may state differently without becoming another run."""

RELEASED_MAY_NOT_CHANGE = frozenset(
    {f.name for f in dataclasses.fields(Layout)}
    - {"sequence_parallel", "recompute_granularity", "expert_model_parallel_size", "use_distributed_optimizer"}
)
"""Of these: not under `--semantics released`, which normalises over each micro-batch of each rank by itself."""


def all_settings() -> Iterator[tuple[str, dataclasses.Field]]:
    """`(group, field)` of every flag of `train` except mode and model_name."""
    for group, cls in GROUPS.items():
        for item in dataclasses.fields(cls):
            yield group, item
