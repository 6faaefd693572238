"""The optimizer's part of a distributed checkpoint, the same whether or not experts are dealt out over ranks.

With expert parallelism Megatron keeps two optimizers, of experts and of everything else, and without it one. The state of each
parameter has its place in a checkpoint by name; what is left (step, learning rate, weight decay) Megatron writes by optimizer,
and reads back only into as many.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer

_PARTS = ("parameters", "experts")
_IDENTITY = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""What tells parameter groups apart, for Megatron together with `is_expert_parallel`."""


def describe(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, metadata: dict[str, Any], *, is_loading: bool
) -> ShardedStateDict:
    """The entries to write, or to read. Collective over all ranks.

    Args: model_state: `sharded_state_dict` of the model whose parameters these are.
    """
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    count = len(optimizer.chained_optimizers)
    return {part: state[number] if count > 1 else state for number, part in enumerate(_PARTS[:count])}


def restore(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Takes what was read for `describe(..., is_loading=True)`, from a checkpoint with any expert parallelism."""
    _, *experts = optimizer.chained_optimizers
    parts = [loaded[_PARTS[0]]]
    for one in experts:
        mine = loaded[_PARTS[1]]
        written = any("lr" in group for group in _inner(mine).get("param_groups", []))
        parts.append(mine if written else _completed(mine, loaded[_PARTS[0]], one.param_groups))
    optimizer.load_state_dict(dict(enumerate(parts)) if experts else parts[0])


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """The state of torch's optimizer; Megatron's of mixed precision and of sharded state have it one level down."""
    return state.get("optimizer", state)  # type: ignore[no-any-return]


def _completed(mine: Any, other: dict[str, Any], groups: list[dict[str, Any]]) -> Any:
    """The experts' own tensors, with what the other optimizer's state says of all parameters together."""
    out = dict(mine)
    for key, value in other.items():
        if key == "param_groups":
            own = mine.get(key) or [{}] * len(groups)
            out[key] = [_like(group, value) | kept for group, kept in zip(groups, own, strict=True)]
        elif key in ("optimizer", "state"):
            out[key] = _completed(mine.get(key, {}), value, groups)
        elif key not in mine and not isinstance(key, int):  # a number stands for a parameter of the other's
            out[key] = copy.deepcopy(value)
    return out


def _like(group: dict[str, Any], written: list[dict[str, Any]]) -> dict[str, Any]:
    """What was written of the parameter group that is as this one, but for its experts."""
    found = next(one for one in written if all(one[key] == group[key] for key in _IDENTITY))
    others = {key: value for key, value in found.items() if key != "params"}
    return others | {"is_expert_parallel": group["is_expert_parallel"]}
