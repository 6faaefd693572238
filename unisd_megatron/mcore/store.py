"""Distributed checkpoints of student, teacher and optimizer: written under one layout, read under any.

A thin door to `megatron.core.dist_checkpointing`; completeness of the folder around it is `train/checkpoint.py`'s.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from unisd_megatron.errors import CheckpointError
from unisd_megatron.mcore import optimizer_state, teacher_state
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.precision import is_quantized
from unisd_megatron.mcore.reading import read_metadata
from unisd_megatron.mcore.skeleton import checkpoint_metadata, parameters
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mcore.writing import Background, write

STUDENT, TEACHER, OPTIMIZER = "student", "teacher", "optimizer"


def save(
    folder: Path,
    model: Stage,
    student: Student | None = None,
    teacher: Teacher | None = None,
    background: Background | None = None,
) -> None:
    """Writes the shards of all ranks into an existing, empty folder. Collective over all ranks.

    Args: student: its optimizer state is written too; teacher: its fp32 masters (or frozen weights) too, unless live;
    background: takes the snapshot and returns; `background.finish` says when it is on disk.
    Raises `CheckFailed`, on every rank, where a rank could not write.
    """
    state = _state(model, student, teacher, is_loading=False)
    if student is not None:
        _state_exactly(state[STUDENT], student)
    if background is None:
        write(folder, state)
    else:
        background.start(folder, state)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by the name it has there. In one process with a process group."""
    return {name: value for name, value in dist_checkpointing.load_plain_tensors(str(folder)).items() if torch.is_tensor(value)}


def load(folder: Path, model: Stage, student: Student | None = None, teacher: Teacher | None = None) -> None:
    """Restores what `save` wrote, under this layout. Collective over all ranks.

    Raises `CheckpointError` where the folder holds another model or is broken.
    """
    read_metadata(folder)  # Megatron unpickles it without looking
    wanted = _state(model, student, teacher, is_loading=True)
    quiet = logging.getLogger("megatron.core.dist_checkpointing")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        loaded = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointingException, CheckpointException, OSError, KeyError, RuntimeError, ValueError) as error:
        # torch's own (a BaseException) holds what each rank met.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise CheckpointError(f"{folder}: cannot be restored ({reason[:300]})") from error
    finally:
        quiet.setLevel(level)
    model.load_state_dict(loaded[STUDENT], f"{STUDENT}.")
    if student is not None:
        optimizer_state.restore(student.optimizer, loaded[OPTIMIZER])
    if teacher is not None and teacher.kind != "live":
        teacher.restore(loaded[TEACHER])


def _state_exactly(of_model: ShardedStateDict, student: Student) -> None:
    """Weights that are kept in FP8 are written as they leave the student; the optimizer has found its parameters by then."""
    entries = parameters(student.model, of_model, f"{STUDENT}.")
    with student.in_full():
        for name, weight in student.named_shards():
            if name in entries and entries[name].data is not weight and is_quantized(entries[name].data):
                entries[name].data = weight


def _state(model: Stage, student: Student | None, teacher: Teacher | None, *, is_loading: bool) -> ShardedStateDict:
    metadata = checkpoint_metadata()
    of_model = model.sharded_state_dict(prefix=f"{STUDENT}.", metadata=metadata)
    state: dict[str, Any] = {STUDENT: of_model}
    if student is not None:
        state[OPTIMIZER] = optimizer_state.describe(student.optimizer, of_model, metadata, is_loading=is_loading)
    if teacher is not None and teacher.kind != "live":
        state[TEACHER] = teacher_state.describe(teacher, f"{TEACHER}.", metadata, is_loading=is_loading)
    return state
