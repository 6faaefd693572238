"""Random checkpoints of any size, written shard by shard, and what a conversion of one needs. Run as a program by the tests:

    python random_model.py WORK HIDDEN FFN LAYERS VOCAB DTYPE

converts a tiny model and then one of these dimensions, both ways, and prints JSON: bytes of the largest tensor and of the
model, seconds, and by how much the second raised the process's peak of resident memory above the first's.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from unisd_megatron.weights.files import write_files


def config(hidden: int, ffn: int, layers: int, vocab: int, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def tensors(hidden: int, ffn: int, layers: int, vocab: int, dtype: str) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        # One small block of numbers over and over: as random as a converter can tell, and made in no time.
        block = 0.02 * torch.randn(min(1 << 16, torch.Size(shape).numel()), generator=generator)
        count = torch.Size(shape).numel()
        return block.to(getattr(torch, dtype)).repeat(count // len(block) + 1)[:count].view(shape)

    yield "model.embed_tokens.weight", random(vocab, hidden)
    for i in range(layers):
        of = f"model.layers.{i}."
        for part, rows in (("q", hidden), ("k", 256), ("v", 256)):
            yield f"{of}self_attn.{part}_proj.weight", random(rows, hidden)
        yield f"{of}self_attn.o_proj.weight", random(hidden, hidden)
        yield f"{of}mlp.gate_proj.weight", random(ffn, hidden)
        yield f"{of}mlp.up_proj.weight", random(ffn, hidden)
        yield f"{of}mlp.down_proj.weight", random(hidden, ffn)
        yield f"{of}input_layernorm.weight", 1 + random(hidden)
        yield f"{of}post_attention_layernorm.weight", 1 + random(hidden)
    yield "model.norm.weight", 1 + random(hidden)
    yield "lm_head.weight", random(vocab, hidden)


def write(folder: Path, *dimensions: int, dtype: str, shard_bytes: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(*dimensions, dtype)))
    write_files(folder, tensors(*dimensions, dtype), None, shard_bytes)


def peak() -> int:
    """Bytes: the most that was resident so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(work: Path, dimensions: list[int], dtype: str) -> dict[str, float]:
    from unisd_megatron.cli import main

    def run(*words: str) -> float:
        begin = time.monotonic()
        assert main(list(words)) == 0, words
        return time.monotonic() - begin

    def both_ways(name: str) -> tuple[float, float]:
        folder = work / name
        into = run("convert", "import", "--model_name", f"{folder}/hf", "--output_dir", f"{folder}/megatron")
        size = ["--max_shard_size", "400MB"]
        return into, run("convert", "export", "--model_name", f"{folder}/megatron", "--output_dir", f"{folder}/back", *size)

    write(work / "tiny/hf", 256, 512, 1, 300, dtype=dtype, shard_bytes=1 << 30)
    both_ways("tiny")
    run("verify", "--model_name", f"{work}/tiny/hf", "--against", f"{work}/tiny/megatron")
    write(work / "big/hf", *dimensions, dtype=dtype, shard_bytes=400 * 10**6)
    base = peak()
    begin = time.monotonic()
    shutil.copytree(work / "big/hf", work / "big/copy")
    copy = time.monotonic() - begin
    into, out = both_ways("big")
    converted = peak()
    verify = run("verify", "--model_name", f"{work}/big/hf", "--against", f"{work}/big/megatron", "--max_prompt_length", "8")
    width = getattr(torch, dtype).itemsize
    hidden, ffn, _, vocab = dimensions
    return {
        "model": sum(path.stat().st_size for path in (work / "big/hf").glob("*.safetensors")),
        "largest": max(vocab, ffn) * hidden * width,
        "base": base,
        "conversion": converted - base,
        "verify": peak() - base,
        "copy_s": copy,
        "import_s": into,
        "export_s": out,
        "verify_s": verify,
    }


if __name__ == "__main__":
    *numbers, kind = sys.argv[2:]
    print(json.dumps(measure(Path(sys.argv[1]), [int(one) for one in numbers], kind)))
