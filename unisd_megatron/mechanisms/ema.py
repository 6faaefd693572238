"""The exponential moving average that makes a teacher out of past students. Source: unisd.md 1.8, A1-A4 (paper Eq. 3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mix_(masters: Iterable[Tensor], students: Iterable[Tensor], beta: float) -> None:
    """master <- beta master + (1 - beta) student for each pair, in place; beta is the weight of the *old* teacher.

    Masters are fp32 (or fp64) and stay so: a bf16 average absorbs a quarter to 85 % of what it should have moved, since steps
    below half a unit in the last place vanish. Students may have any floating dtype and device. Every rank mixes the shards it
    holds, without communication. Equal tensors stay bit-equal.

    Nothing is changed unless everything fits. Raises ValueError without any tensor (an average over nothing is how the released
    code's teacher stood still), for unequal counts or shapes, a master below fp32, or beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta, the weight of the old teacher, lies in [0, 1], got {beta}")
    masters, students = list(masters), list(students)
    if not masters or len(masters) != len(students):
        counts = f"{len(masters)} masters and {len(students)} students"
        raise ValueError(f"the average needs one student tensor per master tensor, got {counts}")
    for i, (master, student) in enumerate(zip(masters, students, strict=True)):
        if master.shape != student.shape:
            raise ValueError(f"tensor {i}: master {tuple(master.shape)} and student {tuple(student.shape)} differ in shape")
        if master.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"tensor {i}: a moving average must be kept in float32, got a {master.dtype} master")
    with torch.no_grad():
        for master, student in zip(masters, students, strict=True):
            master.lerp_(student.to(device=master.device, dtype=master.dtype), 1 - beta)
