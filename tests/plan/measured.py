"""What a rank really holds: bytes of its student, teacher and EMA, and of what autograd keeps for the backward pass."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unisd_megatron.batch import STUDENT, TEACHER, Completion, Prompts, Sample
from unisd_megatron.config import Layout, Optimization
from unisd_megatron.families import Arch
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.model import build
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import LossSettings, Objective
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.step import compute_gradients, share_out


@dataclass(frozen=True)
class Found:
    """Bytes on one rank, and which rank it is."""

    place: dict[str, int]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    ema: int
    saved: int


class Saved:
    """Within it: the most that saved tensors held at once, each storage once, parameters not counted."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._not_counted = {one.untyped_storage().data_ptr() for one in parameters}
        self._users: dict[int, int] = {}
        self._now = self.most = 0
        self.seen: dict[int, tuple[int, str]] = {}
        self.at_most: list[str] = []

    def __enter__(self) -> Saved:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *of: Any) -> None:
        self._hooks.__exit__(*of)

    def _pack(self, tensor: Tensor) -> Any:
        kept = _Kept(tensor)
        storage = tensor.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if where in self._not_counted:
            return kept
        self._users[where] = self._users.get(where, 0) + 1
        if self._users[where] == 1:
            self._now += size
            self.seen[where] = size, f"{tuple(tensor.shape)} {tensor.dtype}"
        if self._now > self.most:
            self.most = self._now
            self.at_most = list(self.seen.values())
        weakref.finalize(kept, self._drop, where, size)
        return kept

    def _drop(self, where: int, size: int) -> None:
        self._users[where] -= 1
        if not self._users[where]:
            self._now -= size
            self.seen.pop(where, None)


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def samples(count: int, prompt: int, completion: int, vocabulary: int) -> list[Sample]:
    """Sequences of one length."""
    made = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (length,), generator=made).tolist())

    return [
        Sample(
            Prompts(str(i), {STUDENT: ids(prompt), TEACHER: ids(prompt)}),
            Completion(ids(completion), (0.0,) * completion, "stop"),
        )
        for i in range(count)
    ]


def measure(rank: int, group: Any, arch: Arch, layout: Layout, kind: str, memory: str, prompt: int, completion: int) -> Found:
    """One training step under a layout, and what it left. On every rank of a world."""
    platform = platforms.choose()
    with start.world(platform, layout, 1) as grid:
        model = build(arch, layout, platform, grid)
        own = kind != "live" and memory == "beside"
        other = build(arch, layout, platform, grid) if own else model
        teacher = Teacher(other, kind, grid, beta=0.9, every=1, memory=memory)  # type: ignore[arg-type]
        student = Student(model, layout, Optimization(), 10, grid)
        learner = Learner(student, teacher, Objective(LossSettings(), grid.data, grid.data_context), arch, grid)
        batch = samples(layout.global_batch_size, prompt, completion, arch.vocab_size)
        work = share_out(batch, learner, layout, mask_truncated=False)
        weights = [parameter for _, parameter in (*model.named_shards(), *other.named_shards())]
        saved = Saved(weights)
        with saved:
            compute_gradients(learner, work)
        student.gradient_norm()
        student.step(0)
        teacher.follow(model, 1)
        measure.details = saved.at_most  # type: ignore[attr-defined]
        return Found(
            place={"pipeline": grid.pipeline.rank, "data": grid.data_context.rank, "expert_data": grid.expert_data.rank},
            parameters=sum(p.numel() for _, p in model.named_shards()),
            weights=_storages([p for _, p in model.named_shards()]),
            gradients=_storages([p.main_grad for _, p in model.named_shards()]),
            optimizer=_optimizer(student),
            teacher=_teacher(teacher, other if own else None, grid),
            ema=teacher.shards.nbytes if teacher.shards is not None and kind == "ema" else 0,
            saved=saved.most,
        )


def _storages(tensors: list[Tensor]) -> int:
    """Bytes of the memory that tensors lie in, each piece once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _optimizer(student: Student) -> int:
    """Moments, and main parameters that are none of the model's own."""
    weights = {p.untyped_storage().data_ptr() for _, p in student.model.named_shards()}
    found: list[Tensor] = []
    for one in student.optimizer.chained_optimizers:
        for parameter, state in one.optimizer.state.items():
            found += [parameter, *(value for name, value in state.items() if name != "step")]
    mine = [one for one in found if one.untyped_storage().data_ptr() not in weights]
    assert all(one.untyped_storage().nbytes() == one.numel() * one.element_size() for one in mine)
    return _storages(mine)


def _teacher(teacher: Teacher, own: Any, grid: Grid) -> int:
    held = 0 if own is None else _storages([p for _, p in own.named_shards()])
    if own is None and teacher.kind != "live":
        held += teacher.shards.nbytes if teacher.kind == "frozen" and teacher.shards is not None else 0
        held += _storages([teacher.head_weight()]) if grid.is_last_stage else 0
    return held
