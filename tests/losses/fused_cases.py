"""Inputs for the fused loss, its run on the shards of one rank, and the answers of all ranks put together."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import loss_oracles as oracle
from loss_oracles import Answer
from unisd_megatron.losses import enter_shards, fused_divergence, gather_rows, group_size
from world import World

Case = dict[str, Tensor]
VALUES = ("divergence", "student_log_probs", "teacher_log_probs", "entropy")


def make(tokens: int, vocab_size: int, dtype: torch.dtype, *, hidden: int = 6, teacher: int = 5, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "hidden": normal(tokens, hidden).to(dtype),
        "head": normal(vocab_size, hidden).to(dtype),
        "teacher_hidden": normal(tokens, teacher).to(dtype),
        "teacher_head": normal(vocab_size, teacher).to(dtype),
        "ids": torch.randint(vocab_size, (tokens,), generator=g),
        **{k: normal(tokens) for k in oracle.UPSTREAM},
    }


def leaves(rank: int, group: dist.ProcessGroup | None, case: Case, width: int, padding: float, sharded_rows: bool) -> tuple:
    """(this rank's hidden states, its head, the teacher's head): what the parameters and the model would hold here."""
    size = group_size(group)
    hidden = (case["hidden"].chunk(size)[rank] if sharded_rows else case["hidden"]).clone().requires_grad_()
    head, teacher_head = (oracle.cut(case[k], rank, size, width, padding, dim=0) for k in ("head", "teacher_head"))
    return hidden, head.requires_grad_(), teacher_head.requires_grad_()


def weighted(values: dict[str, Tensor], case: Case) -> Tensor:
    return sum((values[k] * case[k].to(values[k].dtype)).sum() for k in oracle.UPSTREAM)


def sharded(
    rank: int, group: dist.ProcessGroup | None, case: Case, width: int, padding: float, rows: bool, setting: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Values, hidden gradient (of this rank's rows under sequence parallelism), head gradient."""
    hidden, head, teacher_head = leaves(rank, group, case, width, padding, rows)
    full = gather_rows(hidden, group) if rows else enter_shards(hidden, group)
    teacher_hidden = case["teacher_hidden"].clone().requires_grad_()
    out = fused_divergence(full, head, teacher_hidden, teacher_head, token_ids=case["ids"], group=group, **setting)
    values = {k: getattr(out, k) for k in VALUES}
    assert not out.teacher_log_probs.requires_grad
    weighted(values, case).backward()
    assert teacher_hidden.grad is None and teacher_head.grad is None
    return {k: v.detach() for k, v in values.items()}, hidden.grad, head.grad


def run(world: World, size: int, case: Case, width: int, *, rows: bool = False, padding: float = math.nan, **setting) -> Answer:
    """The answer of `size` ranks put together; they must agree bit for bit on values, and on hidden gradients if replicated."""
    real = case["head"].shape[0]
    results = world.run(size, sharded, case, width, padding, rows, {"vocab_size": real} | setting)
    return assemble(results, real, rows)


def assemble(results: list[tuple[dict[str, Tensor], Tensor, Tensor]], real: int, rows: bool) -> Answer:
    for values, hidden, _ in results[1:]:
        assert all(torch.equal(values[k], results[0][0][k]) for k in values)
        assert rows or torch.equal(hidden, results[0][1])
    head = torch.cat([r[2] for r in results])
    assert (head[real:] == 0).all(), "padding rows of the head must have exactly zero gradient"
    hidden = torch.cat([r[1] for r in results]) if rows else results[0][1]
    return Answer(results[0][0], {"hidden": hidden, "head": head[:real]})


def expected(case: Case, alpha: float, temperature: float = 1.0, entry_clip: float | None = None) -> Answer:
    inputs = (case[k] for k in ("hidden", "head", "teacher_hidden", "teacher_head", "ids"))
    upstream = {k: case[k] for k in oracle.UPSTREAM}
    setting = {"alpha": alpha, "temperature": temperature, "entry_clip": entry_clip}
    return oracle.from_hidden(*inputs, upstream, vocab_size=None, **setting)
