"""What a gradient needs on this rank."""

from __future__ import annotations

from dataclasses import dataclass

from unisd_megatron.families import Arch
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import Objective


@dataclass
class Learner:
    """Student, teacher and loss on this rank's part of the layout: everything a gradient needs."""

    student: Student
    teacher: Teacher | None  # None: the loss has none
    objective: Objective
    arch: Arch
    grid: Grid
