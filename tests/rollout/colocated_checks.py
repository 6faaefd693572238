"""What test_colocated.py runs under torchrun, once: two real vLLM engines of TP=2 in the ranks of a TP=2 x PP=2 trainer.

torchrun --nproc-per-node 4 colocated_checks.py FOLDER      # FOLDER holds the models; writes FOLDER/found.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisd_megatron.batch import STUDENT, Prompts
from unisd_megatron.config import Layout, Optimization, Vllm
from unisd_megatron.convert.source import load_stage, open_source
from unisd_megatron.errors import CheckFailed
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import LossSettings, Objective
from unisd_megatron.rollout import vllm_worker
from unisd_megatron.rollout.colocated import ColocatedEngine
from unisd_megatron.rollout.engine import Request, Sampling, sequence_seed
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.sync import Scrambled, Sync
from unisd_megatron.weights.buckets import WeightStream

LAYOUT = Layout(2, 2, sequence_parallel=True, global_batch_size=8)
SYNCS = 10
WARM = Sampling(0.7, 1.0, 0, 12, (1,))
PLAIN = Sampling(1.0, 1.0, 0, 12, (1,))
SHAPED = Sampling(0.9, 0.8, 20, 12, (1,), min_p=0.02, repetition_penalty=1.2)


def prompts() -> list[Prompts]:
    """Longer than a cache block of 32 tokens, so that a stale cache would be used."""
    generator = torch.Generator().manual_seed(5)
    lengths = [70, 40, 66, 35, 90, 50, 64, 33, 5, 9]
    return [
        Prompts(f"q{i}", {STUDENT: tuple(torch.randint(2, 250, (n,), generator=generator).tolist())})
        for i, n in enumerate(lengths)
    ]


def requests() -> list[Request]:
    return [Request(one.id, one.views[STUDENT], sequence_seed(3, 0, i)) for i, one in enumerate(prompts())]


class Bench:
    """A student, an engine, and what keeps them the same."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        source = open_source(str(folder), LAYOUT)
        platform = platforms.choose()
        model = load_stage(source, LAYOUT, platform, grid)
        student = Student(model, LAYOUT, Optimization(), 10, grid)
        objective = Objective(LossSettings(), grid.data, grid.data_context)
        self.learner = Learner(student, Teacher(model, "live", grid), objective, source.arch, grid)
        settings = Vllm(use_vllm=True, vllm_tensor_parallel_size=2, vllm_kv_cache_gib=0.03)
        self.engine = ColocatedEngine(folder, grid, torch.float32, settings, max_model_len=160)
        self.weights = WeightStream(model.named_shards, source.mappings, grid, bucket_bytes=100_000)
        self.step = 0

    def sync(self, weights: Any = None) -> Sync:
        limit = 1e-3  # the default in fp32
        return Sync(
            self.learner, LAYOUT, self.engine, weights or self.weights, prompts(), limit=limit, sampling=PLAIN, seed=3
        )  # fmt: skip

    @torch.no_grad()
    def move(self, by: float = 0.02) -> None:
        """Another student. Copies of a weight on several ranks stay copies."""
        self.step += 1
        for _, parameter in self.learner.student.model.named_shards():
            wave = torch.sin(torch.arange(parameter.numel()) * (0.7 + 0.1 * self.step))
            parameter.add_(by * wave.view_as(parameter))

    def refusal(self, act: Callable[[], None]) -> str:
        try:
            act()
        except CheckFailed as error:
            return str(error)
        return "accepted"


class Faulty(Scrambled):
    """What is sent is not what is there."""

    label = ""

    def flat(self, number: int) -> Tensor | None:
        return self._weights.flat(number)


class Corrupted(Faulty):
    """One tensor arrives with a changed row."""

    def everywhere(self) -> Iterator[list[tuple[str, Tensor]]]:
        for bucket in self._weights.everywhere():
            for name, tensor in bucket:
                if name == "model.layers.2.mlp.down_proj.weight":
                    tensor[3] += 1
            yield bucket


class Stale(Faulty):
    """What arrives is what was there when this was made."""

    def __init__(self, weights: WeightStream) -> None:
        super().__init__(weights)
        self._old = [[(name, tensor.clone()) for name, tensor in bucket] for bucket in weights.everywhere()]

    def everywhere(self) -> Iterator[list[tuple[str, Tensor]]]:
        for old, _ in zip(self._old, self._weights.everywhere(), strict=True):
            yield old


class Lacking(Faulty):
    """One tensor never comes."""

    def __init__(self, weights: WeightStream, name: str) -> None:
        super().__init__(weights)
        self._name = name

    def everywhere(self) -> Iterator[list[tuple[str, Tensor]]]:
        for bucket in self._weights.everywhere():
            yield [(name, tensor) for name, tensor in bucket if name != self._name]


def faults(bench: Bench, folder: Path) -> dict[str, str]:
    """What the sync says of three broken ways to sync, at the first sync and at a later one."""
    found = {}
    sync = bench.sync()
    sync.refresh(bench.step)
    bench.move()
    corrupted = bench.sync(Corrupted(bench.weights))
    corrupted._proven = sync._proven
    found["one row corrupted"] = bench.refusal(lambda: corrupted.refresh(bench.step))

    sync.refresh(bench.step)
    true_reset = bench.engine._llm.reset_prefix_cache
    bench.engine._llm.reset_prefix_cache = lambda *_: True  # type: ignore[method-assign]
    bench.engine.generate(requests(), WARM)
    bench.move()
    found["cache not reset"] = bench.refusal(lambda: sync.refresh(bench.step))
    bench.engine._llm.reset_prefix_cache = true_reset  # type: ignore[method-assign]

    sync.refresh(bench.step)
    head, vllm_worker.HEAD = vllm_worker.HEAD, "model.norm.weight.of.nothing"
    vllm_worker.EMBEDDING, embedding = "nothing", vllm_worker.EMBEDDING
    bench.move()
    found["tied head stale"] = bench.refusal(lambda: sync.refresh(bench.step))
    found["tied head stale, first sync"] = bench.refusal(lambda: bench.sync().refresh(bench.step))
    vllm_worker.HEAD, vllm_worker.EMBEDDING = head, embedding

    sync.refresh(bench.step)
    stale = bench.sync(Stale(bench.weights))
    stale._proven = sync._proven
    bench.move(1e-6)  # far less than log-probs can tell
    found["a step behind"] = bench.refusal(lambda: stale.refresh(bench.step))

    lacking = Lacking(bench.weights, "model.layers.1.self_attn.k_proj.weight")
    found["no k_proj"] = bench.refusal(lambda: bench.sync(lacking).refresh(bench.step))

    true_update = bench.engine._llm.update_weights

    def failing(*_: Any) -> None:
        raise OSError("no memory\nand more") from None

    if torch.distributed.get_rank() == 1:
        bench.engine._llm.update_weights = failing  # type: ignore[method-assign]
    found["one rank fails"] = bench.refusal(lambda: sync.refresh(bench.step))
    bench.engine._llm.update_weights = true_update  # type: ignore[method-assign]
    found["healthy again"] = bench.refusal(lambda: sync.refresh(bench.step))
    return found


def main(folder: Path) -> None:
    found: dict[str, Any] = {"gaps": {}}
    engines = []  # none ends before the last has done its work: vLLM takes the process groups of all down
    with start.world(platforms.choose(), LAYOUT, 1) as grid:
        # First: vLLM makes its group of experts only with the first engine of a process.
        experts = Bench(folder / "qwen3_moe", grid)
        engines.append(experts.engine)
        found["experts"] = experts.refusal(lambda: experts.sync().refresh(0))
        one = Lacking(experts.weights, "model.layers.2.mlp.experts.5.up_proj.weight")
        found["no up_proj of an expert"] = experts.refusal(lambda: experts.sync(one).refresh(0))
        for model in ("qwen2-tied", "qwen2-untied", "llama-untied", "llama-tied"):
            bench = Bench(folder / model, grid)
            engines.append(bench.engine)
            sync, gaps = bench.sync(), []
            for _ in range(SYNCS):
                sync.refresh(bench.step)
                gaps.append(sync.metrics["rollout/sync_gap_max"])
                bench.move()
            found["gaps"][model] = gaps
            if model == "qwen2-tied":
                found["faults"] = faults(bench, folder)
                plain = [bench.engine.generate(requests(), sampling) for sampling in (WARM, SHAPED)]
                found["completions"] = [[[one.token_ids, one.log_probs, one.finish_reason] for one in said] for said in plain]
                (alone,) = bench.engine.generate(requests()[:1], WARM)  # fewer than engines
                found["alone"] = [alone.token_ids, alone.version]
                hf = {name: tensor.clone() for bucket in bench.weights.everywhere() for name, tensor in bucket}
                if grid.world.rank == 0:
                    torch.save(hf, folder / "weights.pt")
        if grid.world.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        for engine in engines:
            engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
