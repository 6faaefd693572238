"""Text in, text out: tasks, the prompts made from them, and the order in which they are met. No tokenizer, no torch."""

import importlib
import pkgutil

from unisd_megatron.data import tasks
from unisd_megatron.data.contexts import build_examples
from unisd_megatron.data.example import Example
from unisd_megatron.data.sampler import Sampler
from unisd_megatron.data.task import Corruption, Program, Record, Task, Verdict


def _all_tasks() -> dict[str, type[Task]]:
    """Every class that has a name of its own in a file of `tasks/`."""
    modules = [importlib.import_module(f"{tasks.__name__}.{found.name}") for found in pkgutil.iter_modules(tasks.__path__)]
    classes = [one for module in modules for one in vars(module).values() if isinstance(one, type) and issubclass(one, Task)]
    return {cls.name: cls for cls in sorted(classes, key=lambda cls: vars(cls).get("name", "")) if "name" in vars(cls)}


TASKS: dict[str, type[Task]] = _all_tasks()

__all__ = ["TASKS", "Corruption", "Example", "Program", "Record", "Sampler", "Task", "Verdict", "build_examples"]
