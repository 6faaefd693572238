"""The completions of every step: whose they are, when weights go to the engine, what is asked of it and what ahead."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from unisd_megatron.batch import STUDENT, Completion, Prompts, Sample
from unisd_megatron.data import Sampler
from unisd_megatron.grid import Axis
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.rollout.engine import Request, RolloutEngine, Sampling, sequence_seed
from unisd_megatron.rollout.servers import ServerEngine
from unisd_megatron.train.filtering import SampleFilter
from unisd_megatron.train.sync import Sync


@dataclass(frozen=True)
class Origin:
    """Where the completions that are trained on come from.

    share: of the questions that are sampled, the others have their reference as completion; starting: the weights that sample,
    None: the student's; filter: which samples count.
    """

    share: float = 1.0
    starting: Teacher | None = None
    filter: SampleFilter | None = None
    world: Axis = Axis()


class Rollouts:
    """Completions to the questions of each step. Every method is collective over the world.

    With `lag` 0 the student answers with the weights it is about to train. With a lag of L, batches are asked for in blocks of
    L while training goes on: weights are sent when all that was asked for has been answered, so that the weights that sampled
    a batch are at most L optimizer steps older than those that it trains.
    """

    def __init__(
        self,
        engine: RolloutEngine | None,
        sync: Sync | None,
        sampler: Sampler,
        prompts: Sequence[Prompts],
        sampling: Sampling,
        *,
        seed: int,
        lag: int,
        last: int,
        origin: Origin | None = None,
    ) -> None:
        """last: number of steps of the run; nothing is asked for beyond it. Without an engine nothing can be sampled."""
        self.engine, self.sync, self.sampling = engine, sync, sampling
        self._sampler, self._prompts = sampler, prompts
        self._seed, self._lag, self._last = seed, lag, last
        self._origin = origin or Origin()
        self._ahead: list[int] = []  # steps whose batches have been asked for

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last sync, and how many servers get prompts (rank 0 knows)."""
        serving = self.engine.serving() if isinstance(self.engine, ServerEngine) else None
        return (self.sync.metrics if self.sync is not None else {}) | (
            {} if serving is None else {"rollout/servers": float(serving)}
        )

    def of_step(self, step: int) -> list[Sample]:
        """The samples of the whole global batch, in the order of its questions, on every rank."""
        places = self._sampled(step)
        if isinstance(self.engine, ServerEngine) and self._lag:
            completions = self._taken(self.engine, step)
        else:
            completions = self._generated(step) if places else []
        said = dict(zip(places, completions, strict=True))
        samples = [
            Sample(self._prompts[index], said[place] if place in said else _reference(self._prompts[index]))
            for place, index in enumerate(self._sampler.batch(step))
        ]
        return samples if self._origin.filter is None else self._origin.filter(samples, self._origin.world)

    def _generated(self, step: int) -> list[Completion]:
        assert self.engine is not None and self.sync is not None
        starting = self._origin.starting
        with starting.in_place() if starting is not None else contextlib.nullcontext():
            # Zero optimizer steps are what the starting weights have seen, whenever they are sent.
            self.sync.refresh(step if starting is None else 0)
        completions = self.engine.generate(self._requests(step), self.sampling)
        self.engine.rest()
        return completions

    def _sampled(self, step: int) -> list[int]:
        """The places of a step's batch whose completions are sampled; a draw of its own for each."""
        places = range(self._sampler.batch_size)
        if self._origin.share == 1:
            return list(places)
        return [place for place in places if _uniform(self._seed, step, place) < self._origin.share]

    def _taken(self, engine: ServerEngine, step: int) -> list[Completion]:
        assert self.sync is not None
        if not self._ahead:  # the first step, or the first after a restart: nothing could be asked for in time
            self.sync.refresh(step)
            self._ask(engine, [step])
        assert self._ahead[0] == step
        completions = engine.collect()
        self._ahead.pop(0)
        if not self._ahead and step + 1 < self._last:
            self.sync.refresh(step)
            self._ask(engine, range(step + 1, min(step + 1 + self._lag, self._last)))
        return completions

    def _ask(self, engine: ServerEngine, steps: Sequence[int]) -> None:
        for step in steps:
            engine.submit(self._requests(step), self.sampling)
            self._ahead.append(step)

    def _requests(self, step: int) -> list[Request]:
        asked = self._sampler.batch(step)
        return [
            Request(
                self._prompts[asked[place]].id,
                self._prompts[asked[place]].views[STUDENT],
                sequence_seed(self._seed, step, place),
            )
            for place in self._sampled(step)
        ]


def _uniform(seed: int, step: int, place: int) -> float:
    """A number in [0, 1) that depends on nothing else: the same under every layout and after every restart."""
    digest = hashlib.sha256(f"on-policy:{seed}:{step}:{place}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def _reference(prompts: Prompts) -> Completion:
    assert prompts.reference is not None
    return Completion(prompts.reference, (), "stop")
