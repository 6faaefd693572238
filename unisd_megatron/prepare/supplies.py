"""What a training run reads from caches, or the command that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unisd_megatron.caches import NEGATIVE_CACHE
from unisd_megatron.config import Run
from unisd_megatron.data.contexts import Instruction, Nearest
from unisd_megatron.errors import ConfigError
from unisd_megatron.prepare import embeddings, induction, negatives
from unisd_megatron.prepare.order import Order


@dataclass(frozen=True)
class Supplies:
    """For `build_examples`; None where the run does not need it."""

    nearest: Nearest | None = None
    instructions: Sequence[Instruction] | None = None
    generated: Mapping[str, Sequence[str]] | None = None


def order_of(run: Run) -> Order:
    """What the run's caches are made of."""
    return Order(run.data, run.objective.semantics, run.caches, run.model_name)


def supplies(run: Run, order: Order) -> Supplies:
    """Reads the caches. Raises `ConfigError` with the command for one that is missing."""
    method = run.data.fewshot_method if run.agreement is not None else None
    nearest, instructions, generated = None, None, None
    if method == "retrieval":
        vectors = embeddings.read(order)

        def nearest(count: int) -> list[list[int]]:
            return embeddings.nearest(vectors, count)

    if method == "induction":
        instructions = induction.read(order)
    if run.needs_negative and generates(run, order):
        generated = negatives.read(order)
    return Supplies(nearest, instructions, generated)


def generates(run: Run, order: Order) -> bool:
    """Whether the run's wrong solutions are a model's. Raises `ConfigError` where no rule makes them, or settings are idle."""
    rule = order.task.has_rule()
    chosen = run.data.negatives or ("corrupted" if rule else "generated")
    if chosen == "corrupted" and not rule:
        raise ConfigError(f"--negatives corrupted: --dataset {order.task.name} has no rule for wrong solutions; use generated")
    idle = [name for name in sorted(NEGATIVE_CACHE) if run.origins.get(name) == "flag"]
    if chosen == "corrupted" and idle:
        raise ConfigError(f"--{idle[0]} does nothing with --negatives corrupted, the choice for {order.task.name}; drop it")
    return chosen == "generated"
