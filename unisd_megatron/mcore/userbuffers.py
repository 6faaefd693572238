"""Transformer Engine's buffers for tensor-parallel communication under matrix products (`--tp-comm-overlap`).

They are made for rows of one length, and making them is slow: they grow when a longer row comes, and all rows are padded to
what they are (`train/collate.py`).
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig

GRANULARITY = 1024
"""Tokens; the buffers' length is a multiple of it, so that it changes seldom."""

_made_for: tuple[int, bool] = (0, False)


def row_length() -> int:
    """Tokens of a row, or of this rank's part of it under context parallelism, that the buffers are made for; 0: none yet."""
    return _made_for[0]


def fit(config: TransformerConfig, tokens: int) -> None:
    """Makes the buffers for rows of `tokens` tokens on a context-parallel rank. Collective over all ranks."""
    global _made_for
    from transformer_engine.pytorch.module import base

    modes = getattr(base, "UserBufferQuantizationMode", None)
    # One set of buffers for each precision where the version knows several, so that teacher and student may differ.
    wanted = tokens, modes is None and bool(config.fp8)
    if wanted == _made_for:
        return
    if _made_for[0]:
        base.destroy_ub()
    how: dict[str, Any] = {"use_fp8": wanted[1]} if modes is None else {"quantization_modes": [modes.NONE, modes.FP8]}
    base.initialize_ub(
        shape=[tokens, config.hidden_size],
        tp_size=config.tensor_model_parallel_size,
        dtype=config.params_dtype,
        bootstrap_backend=config.tp_comm_bootstrap_backend,
        **how,
    )
    _made_for = wanted
