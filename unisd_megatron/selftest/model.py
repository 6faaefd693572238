"""`python -m unisd_megatron.selftest.model FOLDER`: a random model whose every size is a multiple of 128, as FP8 wants it."""

from __future__ import annotations

import sys
from pathlib import Path

from unisd_megatron.weights.tiny import write_tiny

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}

if __name__ == "__main__":
    write_tiny("qwen2", Path(sys.argv[1]), 0, SIZES)
