"""What a plan is asked about beside the run: the cluster, how long sequences are, what is assumed. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError


@dataclass(frozen=True)
class Assumed:
    """What arithmetic cannot know. Each may be stated.

    efficiency: part of the rated matrix-product rate that a training step reaches; bandwidth: part of rated bandwidths;
    mean_prompt_length, mean_completion_length: tokens (None: half of the longest); server_gpus: GPUs of the same kind that
    rollout servers have (None: a quarter of those that train, at least what one engine needs); reserved: bytes of a GPU that
    CUDA and NCCL take; fragmentation: of what is planned, lost between the allocator's blocks.
    """

    efficiency: float = 0.6
    bandwidth: float = 0.8
    mean_prompt_length: int | None = None
    mean_completion_length: int | None = None
    server_gpus: int | None = None
    reserved: float = 2.5 * 2**30
    fragmentation: float = 0.05

    def __post_init__(self) -> None:
        for name in ("efficiency", "bandwidth"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it lies in (0, 1]")

        if self.server_gpus is not None and self.server_gpus < 1:
            raise ConfigError(f"--server_gpus is {self.server_gpus}; it must be at least 1")

    def prompt(self, run: Run) -> int:
        """Mean tokens of a prompt. `ConfigError` for a mean beyond the longest."""
        return _mean("prompt", self.mean_prompt_length, run.data.max_prompt_length)

    def completion(self, run: Run) -> int:
        """Mean tokens of a completion. `ConfigError` for a mean beyond the longest."""
        return _mean("completion", self.mean_completion_length, run.rollout.max_completion_length)


def _mean(what: str, stated: int | None, longest: int) -> int:
    if stated is None:
        return max(1, longest // 2)
    if not 1 <= stated <= longest:
        raise ConfigError(f"--mean_{what}_length is {stated}; it lies between 1 and --max_{what}_length {longest}")
    return stated


def views(run: Run) -> int:
    """Views that the teacher reads of each sequence: the primary one, auxiliary ones, the negative; none without a teacher."""
    if run.method.likelihood:
        return 0
    gamma = run.objective.gamma_agreement or 0.0
    auxiliary = run.data.num_auxiliary_contexts if run.agreement is not None and gamma > 0 else 0
    return 1 + auxiliary + run.needs_negative
