"""The completions of every step: when weights go to the engine, what is asked of it, and what is generated ahead."""

from __future__ import annotations

from collections.abc import Sequence

from unisd_megatron.batch import STUDENT, Completion, Prompts, Sample
from unisd_megatron.data import Sampler
from unisd_megatron.rollout.engine import Request, RolloutEngine, Sampling, sequence_seed
from unisd_megatron.rollout.servers import ServerEngine
from unisd_megatron.train.sync import Sync


class Rollouts:
    """Answers of the student to the questions of each step. Every method is collective over the world.

    With `lag` 0 the student answers with the weights it is about to train. With a lag of L, batches are asked for in blocks of
    L while training goes on: weights are sent when all that was asked for has been answered, so that the weights that sampled
    a batch are at most L optimizer steps older than those that it trains.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sync: Sync,
        sampler: Sampler,
        prompts: Sequence[Prompts],
        sampling: Sampling,
        *,
        seed: int,
        lag: int,
        last: int,
    ) -> None:
        """last: number of steps of the run; nothing is asked for beyond it."""
        self.engine, self.sync, self.sampling = engine, sync, sampling
        self._sampler, self._prompts = sampler, prompts
        self._seed, self._lag, self._last = seed, lag, last
        self._ahead: list[int] = []  # steps whose batches have been asked for

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last sync, and how many servers get prompts (rank 0 knows)."""
        serving = self.engine.serving() if isinstance(self.engine, ServerEngine) else None
        return self.sync.metrics | ({} if serving is None else {"rollout/servers": float(serving)})

    def of_step(self, step: int) -> list[Sample]:
        """The samples of the whole global batch, in the order of its questions, on every rank."""
        if isinstance(self.engine, ServerEngine) and self._lag:
            completions = self._taken(self.engine, step)
        else:
            self.sync.refresh(step)
            completions = self.engine.generate(self._requests(step), self.sampling)
            self.engine.rest()
        asked = self._sampler.batch(step)
        return [Sample(self._prompts[index], said) for index, said in zip(asked, completions, strict=True)]

    def _taken(self, engine: ServerEngine, step: int) -> list[Completion]:
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
        return [
            Request(self._prompts[index].id, self._prompts[index].views[STUDENT], sequence_seed(self._seed, step, position))
            for position, index in enumerate(self._sampler.batch(step))
        ]
