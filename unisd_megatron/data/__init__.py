"""Text in, text out: tasks, the prompts made from them, and the order in which they are met. No tokenizer, no torch."""

from unisd_megatron.data.addition import Addition
from unisd_megatron.data.contexts import build_examples
from unisd_megatron.data.example import Example
from unisd_megatron.data.gsm8k import Gsm8k
from unisd_megatron.data.mbpp import Mbpp
from unisd_megatron.data.sampler import Sampler
from unisd_megatron.data.task import Record, Task

TASKS: dict[str, type[Task]] = {
    "addition": Addition,
    "gsm8k": Gsm8k,
    "mbpp": Mbpp,
}

__all__ = ["TASKS", "Example", "Record", "Sampler", "Task", "build_examples"]
