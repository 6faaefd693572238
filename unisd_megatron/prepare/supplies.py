"""What a training run reads from caches, or the command that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unisd_megatron.config import Run
from unisd_megatron.data.contexts import Instruction, Nearest
from unisd_megatron.prepare import embeddings, induction, negatives
from unisd_megatron.prepare.needs import kinds_of
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
    kinds = kinds_of(run, order.task)
    nearest, instructions, generated = None, None, None
    if "embeddings" in kinds:
        vectors = embeddings.read(order)

        def nearest(count: int) -> list[list[int]]:
            return embeddings.nearest(vectors, count)

    if "induction" in kinds:
        instructions = induction.read(order)
    if "negatives" in kinds:
        generated = negatives.read(order)
    return Supplies(nearest, instructions, generated)
