"""A step's two passes against their arithmetic: what packing, the merged schedule and the layout cost or save.

The batch is real text of a task (reference solutions as completions) in bytes, the model random. Arithmetic is the matrix
products that the result needs, nothing recomputed, at the rate of one large product measured in the same process.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.batch import STUDENT, TEACHER, Completion, Sample
from unisd_megatron.bench.processes import measure_in_fresh_processes
from unisd_megatron.config import Layout, Optimization
from unisd_megatron.data import TASKS, build_examples
from unisd_megatron.data.tokens import encode_examples
from unisd_megatron.families import FAMILIES, Arch
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.model import build
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import LossSettings, Objective
from unisd_megatron.train.collate import Work
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.step import compute_gradients, listen_to_teacher, share_out
from unisd_megatron.weights.tiny import byte_tokenizer

VIEWS = 2
SEQUENCES = 8


@dataclass(frozen=True)
class Case:
    """One measurement. merged: the teacher reads all views in one schedule, else each view in one of its own."""

    name: str
    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    packing: bool = True
    merged: bool = True


CASES = (
    Case("1 process, packed"),
    Case("1 process, padded", packing=False),
    Case("TP 2", 2, tensor=2),
    Case("PP 2", 2, pipeline=2),
    Case("PP 2, a schedule per view", 2, pipeline=2, merged=False),
    Case("PP 2, padded", 2, pipeline=2, packing=False),
    Case("PP 2, VPP 2", 2, pipeline=2, virtual=2),
    Case("DP 2", 2),
)


@dataclass(frozen=True)
class Found:
    """Seconds of the teacher's pass and of the whole step without rollout, the arithmetic's share of each, padding."""

    teacher: float
    step: float
    teacher_arithmetic: float
    step_arithmetic: float
    padding: float


def measure_all(dataset: str, data_path: str | None, tell: Callable[[str], None]) -> dict[Case, Found]:
    """Every case on a batch of `dataset`, from a file or the hub."""
    results = {}
    for case in CASES:
        request = {"case": asdict(case), "dataset": dataset, "data_path": data_path}
        ranks = [Found(**one) for one in measure_in_fresh_processes("unisd_megatron.bench.step", request, case.ranks)]
        # The slowest rank's time; what it had to compute, from all of them.
        worst = max(ranks, key=lambda one: one.step)
        results[case] = replace(worst, teacher=max(one.teacher for one in ranks), padding=max(one.padding for one in ranks))
        tell(f"{case.name:28} {_cells(results[case], '  ')}")
    return results


def markdown(results: dict[Case, Found]) -> str:
    head = "| layout | teacher s | arithmetic | step s | arithmetic | padding |"
    return "\n".join(
        [head, "|" + " --- |" * 6, *(f"| {case.name} | {_cells(found, ' | ')} |" for case, found in results.items())]
    )


def _cells(found: Found, between: str) -> str:
    cells = (
        f"{found.teacher:.2f}",
        f"{found.teacher_arithmetic:.0%}",
        f"{found.step:.2f}",
        f"{found.step_arithmetic:.0%}",
        f"{found.padding:.1%}",
    )
    return between.join(cells)


def run(case: Case, dataset: str, data_path: str | None) -> Found:
    """On every rank of the case."""
    layout = Layout(
        case.tensor,
        case.pipeline,
        case.virtual,
        sequence_parallel=case.tensor > 1,
        packing=case.packing,
        micro_batch_size=2,
        global_batch_size=SEQUENCES,
    )
    platform = platforms.choose()
    with start.world(platform, layout, 1) as grid:
        arch = _arch()
        settings = LossSettings(agreement="token", gamma=1.0, views=VIEWS, alpha=0.5)
        student = Student(build(arch, layout, platform, grid), layout, Optimization(), 10, grid)
        teacher = Teacher(build(arch, layout, platform, grid), "frozen", grid)
        learner = Learner(student, teacher, Objective(settings, grid.data, grid.data_context), arch, grid)
        work = share_out(_samples(dataset, data_path), learner, layout, mask_truncated=False)
        listen = listen_to_teacher if case.merged else _view_by_view
        listen(learner, work)  # a first pass warms up threads and connections
        heard = _seconds(lambda: listen(learner, work), grid)
        learned = _seconds(lambda: compute_gradients(learner, work), grid)
        # compute_gradients hears the teacher in the merged schedule; the difference is what another way adds.
        step = learned + (heard - _seconds(lambda: listen_to_teacher(learner, work), grid) if not case.merged else 0.0)
        rate = _product_rate()
        of_teacher, of_student = _arithmetic(arch, work.samples, learner)
        parts = case.tensor * case.pipeline
        return Found(
            heard,
            step,
            of_teacher / parts / rate / heard,
            (of_teacher + of_student) / parts / rate / step,
            work.padding_fraction([STUDENT, *settings.teacher_views]),
        )


def _view_by_view(learner: Learner, work: Work) -> None:
    each = len(work.batches)
    for begin in range(0, len(work.readings), each):
        assert learner.teacher is not None
        learner.teacher.score([reading.view for reading in work.readings[begin : begin + each]], lambda _, rows: rows)
        dist.barrier()  # what a view says is wanted before the next begins


def _arch() -> Arch:
    """Four layers of width 256 and a vocabulary of 8,000: five million parameters."""
    config = FAMILIES["qwen2"].tiny_config() | {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 8000}
    return FAMILIES["qwen2"].arch(config)


def _samples(dataset: str, data_path: str | None) -> list[Sample]:
    task = TASKS[dataset]()
    records = task.load("train", data_path)[:SEQUENCES]
    examples, _ = build_examples(task, records, auxiliary=VIEWS, donors_per_context=1, negatives=False, seed=0)
    tokenizer = byte_tokenizer()
    prompts, _ = encode_examples(tokenizer, examples, 4096)
    samples = []
    for one, record in zip(prompts, records, strict=True):
        ids = tuple(tokenizer.encode(task.reference(record)))
        samples.append(Sample(one, Completion(ids, (0.0,) * len(ids), "stop")))
    return list(itertools.islice(itertools.cycle(samples), SEQUENCES))


def _arithmetic(arch: Arch, samples: Sequence[Sample], learner: Learner) -> tuple[float, float]:
    """Operations that the teacher's and the student's results need, two per multiply-add, over all ranks of a replica."""
    heads = arch.num_attention_heads + 2 * arch.num_query_groups
    weights = arch.hidden_size * arch.head_dim * (heads + arch.num_attention_heads)
    weights += 3 * arch.hidden_size * arch.ffn_hidden_size

    def reading(name: str) -> float:
        lengths = [len(sample.prompts.views[name]) + len(sample.completion.token_ids) for sample in samples]
        pairs = sum(length * length / 2 for length in lengths)  # causal
        attention = 4 * arch.num_attention_heads * arch.head_dim * pairs
        return arch.num_layers * (2 * weights * sum(lengths) + attention)

    head = 2 * arch.vocab_size * arch.hidden_size * sum(len(sample.completion.token_ids) for sample in samples)
    views = learner.objective.settings.teacher_views
    of_teacher = sum(reading(name) + (0 if name == TEACHER else head) for name in views)
    # Forward and twice that backward; the loss multiplies by both heads and back into hidden states and head.
    return of_teacher, 3 * reading(STUDENT) + 4 * head


def _seconds(work: Callable[[], object], grid: Grid) -> float:
    _wait(grid)
    begin = time.perf_counter()
    work()
    _wait(grid)
    return time.perf_counter() - begin


def _wait(grid: Grid) -> None:
    if grid.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _product_rate() -> float:
    """Operations per second of a large product in the model's dtype, best of five, with the threads this process has."""
    left, right = torch.randn(1024, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        product: Tensor = left @ right
        best = min(best, time.perf_counter() - begin)
    return 2.0 * left.shape[0] * left.shape[1] * product.shape[1] / best


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(asdict(run(Case(**request["case"]), request["dataset"], request["data_path"]))))
