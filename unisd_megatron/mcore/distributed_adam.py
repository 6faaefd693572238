"""A repair of megatron-core 0.16.1: the distributed optimizer with `torch.optim.Adam` cannot load a reshardable checkpoint.

Without Apex or Transformer Engine, torch's Adam keeps a `step` tensor per parameter, which the loading code does not
expect: a fresh optimizer has no state to describe itself with (distrib_optimizer.py:642), `step` has no counterpart
among the loaded tensors (:940), and after loading all parameters share one `step` tensor (:819), so that Adam's bias
correction is silently wrong. Not specific to CPU. Remove when upstream clones the step and skips it on load.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

_MARK = "_unisd_reshardable"


def make_torch_adam_reshardable() -> None:
    """Installs the repair once; does nothing where a fused Adam is in use."""
    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(cls, _MARK):
        return
    describe, copy_in, load = cls.sharded_state_dict, cls._set_main_param_and_optimizer_states, cls.load_state_dict

    @functools.wraps(describe)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return describe(self, *args, **kwargs)

    @functools.wraps(copy_in)
    def set_states(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        copy_in(self, model_param, {"step": state["step"], **tensors} if "step" in state else tensors)

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    cls.sharded_state_dict = sharded_state_dict
    cls._set_main_param_and_optimizer_states = set_states
    cls.load_state_dict = load_state_dict
    setattr(cls, _MARK, True)
