"""Losses over a sharded vocabulary: pure torch and one explicit process group.

`group=None` means "not sharded". Logits are this rank's columns [..., V/t]; results are fp32 (fp64 for fp64 inputs) and the
same on every rank of `group`; gradients reach the student only.
"""

from unisd_megatron.losses.collectives import (
    concat_over,
    enter_shards,
    gather_rows,
    group_rank,
    group_size,
    max_over,
    replicated_use,
    stack_over,
    sum_over,
)
from unisd_megatron.losses.divergence import token_divergence
from unisd_megatron.losses.fused import FusedDivergence, fused_divergence, fused_log_probs
from unisd_megatron.losses.vocab import VocabShard, token_entropy, token_log_probs

__all__ = [
    "FusedDivergence",
    "VocabShard",
    "concat_over",
    "enter_shards",
    "fused_divergence",
    "fused_log_probs",
    "gather_rows",
    "group_rank",
    "group_size",
    "max_over",
    "replicated_use",
    "stack_over",
    "sum_over",
    "token_divergence",
    "token_entropy",
    "token_log_probs",
]
