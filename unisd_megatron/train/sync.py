"""Weights to the rollout engine, and the proof that they arrived.

After every sync the engine samples a few fixed prompts and Megatron reads them: the log-probs of the sampled tokens must agree.
The prompts stay the same through a run, so an engine that kept a cache of the old weights answers from it and is found out. At
the first sync every tensor is proven as well: after a sync the engine's live weights are fingerprinted, after a sync of
scrambled weights every fingerprint must differ, after another sync of the true ones each must be back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unisd_megatron.batch import STUDENT, Completion, Prompts, Sample
from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.losses.readout import Readout, sampled_log_probs
from unisd_megatron.mcore import schedule
from unisd_megatron.rollout.engine import Request, RolloutEngine, Sampling, Weights, sequence_seed
from unisd_megatron.train.collate import Form, lay_out
from unisd_megatron.train.learner import Learner

PROBES, PROBE_TOKENS, AMONG = 8, 16, 256


class Scrambled:
    """The same stream with every number x sent as 1 - x: nothing that it reaches stays what it was."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __len__(self) -> int:
        return len(self._weights)

    def stage(self, number: int) -> int:
        return self._weights.stage(number)

    def contents(self, number: int) -> tuple[list[str], list[list[int]], str]:
        return self._weights.contents(number)

    def everywhere(self) -> Iterator[list[tuple[str, Tensor]]]:
        for bucket in self._weights.everywhere():
            yield [(name, 1 - tensor) for name, tensor in bucket]

    def flat(self, number: int) -> Tensor | None:
        flat = self._weights.flat(number)
        return None if flat is None else 1 - flat


class Sync:
    """Keeps an engine's weights those of the student. Every method is collective over the world."""

    def __init__(
        self,
        learner: Learner,
        layout: Layout,
        engine: RolloutEngine,
        weights: Weights,
        prompts: Sequence[Prompts],
        *,
        limit: float,
        sampling: Sampling,
        seed: int,
    ) -> None:
        """limit: largest accepted mean difference of log-probs, nats; sampling: of the run, for its temperature and lengths."""
        self._learner, self._layout, self._engine, self._weights = learner, layout, engine, weights
        self._limit = limit
        self._proven: set[str] = set()
        self._step: int | None = None  # of the weights that the engine holds
        # At the run's temperature: an engine that reports log-probs of another distribution is found out too.
        self._sampling = Sampling(sampling.temperature, 1.0, 0, min(PROBE_TOKENS, sampling.max_tokens), sampling.eos_ids)
        # The longest prompts fill the most cache blocks.
        longest = sorted(prompts[:AMONG], key=lambda one: -len(one.views[STUDENT]))[:PROBES]
        while len(longest) < PROBES:
            longest += longest[: PROBES - len(longest)]
        self._probes = longest
        self._seed = seed
        self.metrics: dict[str, float] = {}

    def refresh(self, step: int) -> None:
        """Sends the student's weights and proves that they arrived; `CheckFailed`, on every rank, if they did not."""
        if step == self._step:
            return  # an evaluation came before the step, with the same weights
        self._engine.refresh(self._weights, step)
        if self._engine.members():
            if not set(self._engine.members()) <= self._proven:  # the first sync, or a server is new
                self._prove(step)
                self._proven |= set(self._engine.members())
            self._probe(step)
        self._step = step

    def _prove(self, step: int) -> None:
        before = self._engine.fingerprints()
        self._engine.refresh(Scrambled(self._weights), step)
        scrambled = self._engine.fingerprints()
        self._engine.refresh(self._weights, step)
        after = self._engine.fingerprints()
        # Of a server that was lost or came in between there is nothing to compare; it is new when it holds weights again.
        common = before.keys() & scrambled.keys() & after.keys()
        stale = sorted(name for name in common if scrambled[name] == before[name])
        lost = sorted(name for name in common if after[name] != before[name])
        everybody = all_gather_json([stale, lost], self._learner.grid.world)
        for fault, index in (("kept its old value", 0), ("did not come back", 1)):
            names = sorted({name for one in everybody for name in one[index]})
            if names:
                raise CheckFailed(
                    f"weight sync of step {step}: {names[0]} of the rollout engine {fault} when the student's weights were "
                    f"sent ({len(names)} of {len(before)} such); the run would sample from a stale model"
                )

    def _probe(self, step: int) -> None:
        learner = self._learner
        requests = [
            Request(one.id, one.views[STUDENT], sequence_seed(self._seed, step, -1 - i)) for i, one in enumerate(self._probes)
        ]
        gaps = [self._gaps(said) for said in self._engine.probe(requests, self._sampling)]
        plain = [[float(gap.sum()), gap.numel(), float(gap.max()) if gap.numel() else 0.0] for gap in gaps]
        by_rank = all_gather_json(plain, learner.grid.world)
        means = [sum(part[0] for part in one) / max(sum(part[1] for part in one), 1) for one in zip(*by_rank, strict=True)]
        mean = max(means, key=lambda value: math.inf if math.isnan(value) else value)  # of the worst engine
        most = max(part[2] for one in by_rank for part in one)
        self.metrics = {"rollout/sync_gap": mean, "rollout/sync_gap_max": most}
        if not mean <= self._limit:
            raise CheckFailed(
                f"weight sync of step {step}: the log-probs of rollout engine {means.index(mean)} differ from Megatron's by "
                f"{mean:.3g} nats on average, more than --max_logp_gap {self._limit:g}; its weights or caches are stale"
            )

    def _gaps(self, completions: Sequence[Completion]) -> Tensor:
        """Differences of the log-probs of the probes' tokens, `[n]`: this rank's share on the last stage, else none."""
        learner = self._learner
        samples = [Sample(one, said) for one, said in zip(self._probes, completions, strict=True)]
        multiple = self._layout.tensor_model_parallel_size if self._layout.sequence_parallel else 1
        interleaved = self._layout.virtual_pipeline_model_parallel_size is not None
        form = Form([], self._layout.packing, multiple, False, interleaved, learner.grid.device, learner.grid.context)
        count = learner.grid.pipeline.size if interleaved else 1  # the interleaved schedule takes a multiple of it
        work = lay_out([samples[i::count] for i in range(count)], form)

        def listen(i: int, rows: Tensor) -> Tensor:
            batch = work.batches[i]
            said = sampled_log_probs(
                Readout(rows, learner.student.model.head_weight()),
                token_ids=batch.token_ids,
                temperature=self._sampling.temperature,
                vocab_size=learner.arch.vocab_size,
                group=learner.grid.tensor.group,
                path=learner.objective.settings.path,
            )
            return (said - batch.engine_log_probs).abs().double()

        gaps = schedule.score(learner.student.model.chunks, [batch.view for batch in work.batches], listen, learner.grid)
        return torch.cat(gaps) if gaps else torch.zeros(0)
