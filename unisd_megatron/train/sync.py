"""Weights to the rollout engine, and the proof that they arrived.

After every sync some live weights of the engine, of one layer after the other, must be the student's to the bit: a step changes
weights by less than bf16 log-probs can tell. The engine then samples a few fixed prompts and Megatron reads them: the log-probs
of the sampled tokens must agree, and nothing of the prompts, which stay the same through a run, may have been in its cache.
At the first sync every tensor is proven as well: after a sync the engine's live weights are fingerprinted, after a sync of
scrambled weights every fingerprint must differ, after another sync of the true ones each must be back.
"""

from __future__ import annotations

import math
import re
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
from unisd_megatron.rollout.link import part_sums
from unisd_megatron.train.collate import form_of, lay_out
from unisd_megatron.train.learner import Learner
from unisd_megatron.weights.buckets import unpack

PROBES, PROBE_TOKENS, AMONG = 8, 16, 256
ONE_PROBE = 2.0  # times the limit, for the mean of a single probe: it has few tokens, and rounding does not average out
PROOFS = 3  # at most, while servers come and go
COLUMNS = 16  # of each matrix that is compared to the bit
# What engines keep as a module of its own; whole, and by columns.
NORMS, MATRICES = ("norm.weight",), ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.gate.weight")


class Scrambled:
    """The same stream with every number x sent as 1 - x: nothing that it reaches stays what it was."""

    label = "-scrambled"

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
        self._layer = 0  # whose weights are compared at the next sync
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
        with self._learner.student.in_full():
            self._refresh(step)
        self._step = step

    def _refresh(self, step: int) -> None:
        self._engine.refresh(self._weights, step)
        if self._engine.members():
            for _ in range(PROOFS):
                if not self._strangers():
                    break
                self._proven |= self._prove(step)  # the first sync, or a server is new
            if strangers := self._strangers():
                raise CheckFailed(
                    f"weight sync of step {step}: {strangers[0]} came or went during each of {PROOFS} proofs that it takes "
                    "weights; leave it out, or start it anew and resume"
                )
            self._compare(step)
            self._probe(step)

    def _strangers(self) -> list[str]:
        return sorted(set(self._engine.members()) - self._proven)

    def _prove(self, step: int) -> set[str]:
        """The members of which every tensor was seen to change and to come back."""
        seen = [self._engine.fingerprints()]
        there = set(self._engine.members())
        for weights in (Scrambled(self._weights), self._weights):
            self._engine.refresh(weights, step)
            there &= set(self._engine.members())  # one that was away in between has another name
            seen.append(self._engine.fingerprints())
        before, scrambled, after = seen
        # Of a server that was lost or came in between there is nothing to compare; it is proven the next time.
        proven = there & before.keys() & scrambled.keys() & after.keys()
        stale, lost, empty, count = [], [], [], 0
        for member in sorted(proven):
            common = before[member].keys() & scrambled[member].keys() & after[member].keys()
            count += len(common)
            stale += [f"{name} of {member}" for name in common if scrambled[member][name] == before[member][name]]
            lost += [f"{name} of {member}" for name in common if after[member][name] != before[member][name]]
            empty += [f"every tensor of {member}"] * (not common)
        everybody = all_gather_json([stale, lost, empty, sorted(proven)], self._learner.grid.world)
        for index, fault in enumerate(("kept its old value", "did not come back", "stayed unseen")):
            names = sorted({name for one in everybody for name in one[index]})
            if names:
                raise CheckFailed(
                    f"weight sync of step {step}: {names[0]} (rollout engine) {fault} when the student's weights were "
                    f"sent ({len(names)} of {count} such); the run would sample from a stale model"
                )
        return set.intersection(*(set(one[3]) for one in everybody))

    @torch.no_grad()
    def _compare(self, step: int) -> None:
        """Some weights of one layer, the next one at each sync, are to the bit what was sent."""
        shapes = {
            name: shape for i in range(len(self._weights)) for name, shape in zip(*self._weights.contents(i)[:2], strict=True)
        }
        layers: dict[int, dict[str, list[int]]] = {}
        for name, shape in shapes.items():
            found = re.search(r"\.layers\.(\d+)\.", name)
            if found and (name.endswith(NORMS) or name.endswith(MATRICES)):
                columns = _spread(shape[1], self._layer) if name.endswith(MATRICES) else []
                layers.setdefault(int(found[1]), {})[name] = columns
        wanted = layers[sorted(layers)[self._layer % len(layers)]]
        self._layer += 1
        mine: dict[str, int] = {}
        for number in range(len(self._weights)):
            names, sizes, _ = self._weights.contents(number)
            if wanted.keys() & set(names) and (flat := self._weights.flat(number)) is not None:
                for name, tensor in unpack(flat, list(zip(names, sizes, strict=True))):
                    if name in wanted:
                        mine |= part_sums(name, tensor, wanted[name])
        expected = {part: total for one in all_gather_json(mine, self._learner.grid.world) for part, total in one.items()}
        for engine, said in self._engine.parts(wanted).items():
            other = sorted({part for part, total in said if expected[part] != total})
            if other or not said:
                what = (
                    f"{other[0]} and {len(other) - 1} more parts differ from"
                    if other
                    else "no weight of it could be compared with"
                )
                raise CheckFailed(
                    f"weight sync of step {step}: {engine} computes with other weights than the student's ({what} what was "
                    "sent); they are stale, or of another --dtype"
                )

    def _probe(self, step: int) -> None:
        learner = self._learner
        requests = [
            Request(one.id, one.views[STUDENT], sequence_seed(self._seed, step, -1 - i)) for i, one in enumerate(self._probes)
        ]
        said = [self._gaps(said).tolist() for said in self._engine.probe(requests, self._sampling)]
        # [engines, probes, 3]: over the ranks, sums and numbers of tokens, and the largest gap.
        whole = torch.tensor(all_gather_json(said, learner.grid.world), dtype=torch.float64)
        sums, counts, most = whole[..., 0].sum(0), whole[..., 1].sum(0), float(whole[..., 2].amax())
        means, single = sums.sum(1) / counts.sum(1).clamp(min=1), sums / counts.clamp(min=1)
        engine = _worst(means)
        mean = float(means[engine])
        place = divmod(_worst(single.flatten()), single.shape[1])
        self.metrics = {"rollout/sync_gap": mean, "rollout/sync_gap_max": most}
        if not mean <= self._limit:
            raise CheckFailed(
                f"weight sync of step {step}: the log-probs of rollout engine {engine} differ from Megatron's by "
                f"{mean:.3g} nats on average, more than --max_logp_gap {self._limit:g}; its weights or caches are stale"
            )
        if not float(single[place]) <= ONE_PROBE * self._limit:
            raise CheckFailed(
                f"weight sync of step {step}: the log-probs of rollout engine {place[0]} after prompt "
                f"{self._probes[place[1]].id} differ from Megatron's by {float(single[place]):.3g} nats on average, more than "
                f"{ONE_PROBE:g} times --max_logp_gap {self._limit:g}; its weights or caches are stale"
            )

    def _gaps(self, completions: Sequence[Completion]) -> Tensor:
        """Of the log-probs of each probe's tokens, `[probes, 3]`: the sum of the differences, how many there are, the largest.
        This rank's share on the last stage, else zeros.
        """
        learner = self._learner
        samples = [Sample(one, said) for one, said in zip(self._probes, completions, strict=True)]
        form = form_of(learner, self._layout, [], mask_truncated=False)
        count = learner.grid.pipeline.size if form.equal_lengths else 1  # the interleaved schedule takes a multiple of it
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
            gaps = (said - batch.engine_log_probs).abs().double().cpu()
            found = torch.zeros(len(samples), 3, dtype=torch.float64)
            rows_of = i + count * batch.mine.nonzero()[:, 0].cpu()
            found[:, 0].index_add_(0, rows_of, gaps)
            found[:, 1].index_add_(0, rows_of, torch.ones_like(gaps))
            found[:, 2].scatter_reduce_(0, rows_of, gaps, "amax")
            return found

        found = schedule.score(learner.student.model.chunks, [batch.view for batch in work.batches], listen, learner.grid)
        return sum(found, torch.zeros(len(samples), 3, dtype=torch.float64))  # of different probes


def _spread(width: int, shift: int) -> list[int]:
    """Some columns of each tensor-parallel shard, others at each sync."""
    return sorted({(i * width // COLUMNS + shift) % width for i in range(COLUMNS)})


def _worst(values: Tensor) -> int:
    return int(values.nan_to_num(nan=math.inf).argmax())
