"""What a rollout engine costs: a weight sync against a plain copy of the same bytes, and tokens per second.

The model is random and Qwen2-shaped. A sync is a whole `engine.refresh`: the weights leave the trainer's shards and the engine
computes with them. Every process has one thread.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unisd_megatron.bench import serving
from unisd_megatron.bench.loss import sizes_for_this_machine
from unisd_megatron.bench.processes import measure_in_fresh_processes
from unisd_megatron.config import Layout, Vllm
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import FAMILIES
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.model import build
from unisd_megatron.rollout.engine import Request, RolloutEngine, Sampling, sequence_seed
from unisd_megatron.rollout.servers import ServerEngine
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.buckets import WeightStream
from unisd_megatron.weights.tiny import byte_tokenizer

ENGINES = ("transformers", "vllm", "vllm-server")
HEAD_DIM = 64
PROMPT_TOKENS = (90, 110)  # at least, at most
REPEATS = 3
CACHE_BYTES = 512 << 20  # of a vLLM engine on a CPU


@dataclass(frozen=True)
class Sizes:
    """The model, and the batch that is generated."""

    hidden: int = 512
    layers: int = 8
    vocab_size: int = 16000
    sequences: int = 64
    new_tokens: int = 64

    def config(self) -> dict[str, Any]:
        """The model's config.json. A quarter of the heads, at least two, are of keys and values."""
        heads = self.hidden // HEAD_DIM
        return FAMILIES["qwen2"].tiny_config() | {
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(2, heads // 4),
            "vocab_size": self.vocab_size,
            "dtype": _dtype(),
        }

    def check(self, tensor: Sequence[int]) -> None:
        """`ConfigError` for sizes that no model or batch has, or that trainers of `tensor` ranks cannot share."""
        if self.hidden < 2 * HEAD_DIM or self.hidden % (2 * HEAD_DIM):
            raise ConfigError(f"--width is {self.hidden}; it must be a multiple of {2 * HEAD_DIM}, an even number of heads")
        for name in ("layers", "sequences", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.vocab_size < (least := len(byte_tokenizer())):
            raise ConfigError(f"--vocabulary is {self.vocab_size}; it must be at least {least}, the tokenizer's")
        for size in tensor:
            FAMILIES["qwen2"].arch(self.config()).check_layout(size, 1, "the benchmark's model")

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return PROMPT_TOKENS[1] + self.new_tokens


@dataclass(frozen=True)
class Case:
    """One engine, fed by a trainer of so many tensor-parallel ranks."""

    engine: str
    tensor: int


@dataclass(frozen=True)
class Found:
    """bytes: of all weights, once. Seconds of every repetition: syncs, plain copies of these bytes, batches generated."""

    bytes: int
    sync: list[float]
    copy: list[float]
    generate: list[float]


def measure_all(
    sizes: Sizes, engines: Sequence[str], tensor: Sequence[int], tell: Callable[[str], None]
) -> dict[Case, Found]:  # fmt: skip
    """Every engine that is installed under every trainer; those that are not are told of."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="unisd-bench-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(sizes.config()))
        byte_tokenizer().save_pretrained(folder)  # a server wants one; requests are token ids
        for engine in engines:
            if engine != "transformers" and importlib.util.find_spec("vllm") is None:
                tell(f"{engine:14} skipped: vLLM is not installed")
                continue
            with _server(folder, sizes) if engine == "vllm-server" else contextlib.nullcontext() as url:
                for size in tensor:
                    case = Case(engine, size)
                    results[case] = _measure(case, sizes, folder, url)
                    tell(f"{case.engine:14} TP {case.tensor}  {'  '.join(cells(sizes, results[case]))}")
    return results


def trainers() -> tuple[int, ...]:
    """Tensor-parallel sizes that this machine has the devices for."""
    return (1, 2) if torch.cuda.device_count() != 1 else (1,)


def _server(folder: Path, sizes: Sizes) -> contextlib.AbstractContextManager[str]:
    return serving.running(folder, _dtype(), sizes.longest, CACHE_BYTES)


def _measure(case: Case, sizes: Sizes, folder: Path, url: str | None) -> Found:
    request = {"case": asdict(case), "sizes": asdict(sizes), "folder": str(folder), "url": url}
    ranks = measure_in_fresh_processes("unisd_megatron.bench.rollout", request, case.tensor, threads=1)

    def slowest(what: str) -> list[float]:
        return [max(times) for times in zip(*(one[what] for one in ranks), strict=True)]

    return Found(ranks[0]["bytes"], slowest("sync"), slowest("copy"), slowest("generate"))


def write(sizes: Sizes, results: dict[Case, Found], folder: Path) -> str:
    """Writes rollout.json and rollout.md into `folder`; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    machine = f"{sizes_for_this_machine().machine}, load {load} (1, 5, 15 minutes)"
    what = f"{sizes.sequences} sequences of {sizes.new_tokens} new tokens; best and median of {REPEATS}"
    table = f"{machine}\n{what}\n\n{markdown(sizes, results)}\n"
    rows = [asdict(case) | asdict(found) for case, found in results.items()]
    content = {"machine": machine, "sizes": asdict(sizes), "rows": rows}
    (folder / "rollout.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "rollout.md").write_text(table)
    return table


HEAD = ("MB", "sync s", "GB/s", "plain copy s", "sync / copy", "generation s", "tokens/s")


def markdown(sizes: Sizes, results: dict[Case, Found]) -> str:
    """A row per case. Seconds: the best and the median of three; rates and the ratio: of the best, and of the medians."""
    lines = [f"| engine | trainer | {' | '.join(HEAD)} |", "|" + " --- |" * (2 + len(HEAD))]
    lines += [f"| {case.engine} | TP {case.tensor} | {' | '.join(cells(sizes, found))} |" for case, found in results.items()]
    return "\n".join(lines)


def cells(sizes: Sizes, found: Found) -> list[str]:
    """What stands under `HEAD`."""
    tokens = sizes.sequences * sizes.new_tokens

    def both(value: Callable[[Callable[[list[float]], float]], float]) -> str:
        return f"{value(min):.3g}, {value(statistics.median):.3g}"

    return [
        f"{found.bytes / 1e6:.1f}",
        both(lambda of: of(found.sync)),
        both(lambda of: found.bytes / 1e9 / of(found.sync)),
        both(lambda of: of(found.copy)),
        both(lambda of: of(found.sync) / of(found.copy)),
        both(lambda of: of(found.generate)),
        both(lambda of: tokens / of(found.generate)),
    ]


def run(case: Case, sizes: Sizes, folder: Path, url: str | None) -> Found:
    """On every rank of the trainer."""
    platform, layout = platforms.choose(), Layout(case.tensor, bf16=_dtype() == "bfloat16")
    family = FAMILIES["qwen2"]
    arch = family.arch(sizes.config())
    with start.world(platform, layout, 1) as grid:
        model = build(arch, layout, platform, grid)
        weights = WeightStream(model.named_shards, family.mappings(arch), grid)
        with _engine(case, sizes, folder, url, grid) as engine:
            count, dtype = _elements(weights)
            sync = _repeated(lambda i: engine.refresh(weights, i), grid)
            copy = _copies(count, dtype, grid)
            generate = _repeated(lambda i: _generate(engine, sizes, i), grid)
    return Found(count * dtype.itemsize, sync, copy, generate)


@contextlib.contextmanager
def _engine(case: Case, sizes: Sizes, folder: Path, url: str | None, grid: Grid) -> Iterator[RolloutEngine]:
    dtype = getattr(torch, _dtype())
    engine: RolloutEngine
    if case.engine == "transformers":
        engine = TransformersEngine(folder, grid, dtype)
    elif case.engine == "vllm-server":
        assert url is not None
        engine = ServerEngine([url], grid, timeout_s=300, max_model_len=sizes.longest)
    else:
        from unisd_megatron.rollout.colocated import ColocatedEngine  # imports vLLM, which changes its process

        settings = Vllm(use_vllm=True, vllm_kv_cache_gib=CACHE_BYTES / 2**30)
        engine = ColocatedEngine(folder, grid, dtype, settings, max_model_len=sizes.longest)
    try:
        yield engine
    finally:
        engine.close()


def _elements(weights: WeightStream) -> tuple[int, torch.dtype]:
    """How many, and of what dtype; a model of this benchmark has one."""
    contents = [weights.contents(number) for number in range(len(weights))]
    (dtype,) = {name for _, _, name in contents}
    return sum(torch.Size(shape).numel() for _, shapes, _ in contents for shape in shapes), getattr(torch, dtype)


def _copies(count: int, dtype: torch.dtype, grid: Grid) -> list[float]:
    """Seconds of copying as many bytes within this process's memory, which all ranks do at once."""
    source = torch.ones(count, dtype=dtype, device=grid.device)
    target = torch.zeros_like(source)
    return _repeated(lambda _: target.copy_(source), grid)


def _generate(engine: RolloutEngine, sizes: Sizes, repetition: int) -> None:
    """One batch without end-of-sequence ids. Prompts of its own, since engines keep what they computed for a prompt."""
    generator = torch.Generator().manual_seed(repetition)
    least, most = PROMPT_TOKENS
    requests = []
    for i in range(sizes.sequences):
        length = int(torch.randint(least, most + 1, (), generator=generator))
        prompt = torch.randint(sizes.vocab_size, (length,), generator=generator).tolist()
        requests.append(Request(f"q{i}", tuple(prompt), sequence_seed(0, repetition, i)))
    said = engine.generate(requests, Sampling(1.0, 1.0, 0, sizes.new_tokens, ()))
    assert all(len(one.token_ids) == sizes.new_tokens for one in said)


def _repeated(work: Callable[[int], object], grid: Grid) -> list[float]:
    """Seconds on this rank of each repetition, all ranks beginning together; a first one warms up and is not counted."""
    seconds = []
    for number in range(1 + REPEATS):
        _wait(grid)
        begin = time.perf_counter()
        work(number)
        if grid.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def _wait(grid: Grid) -> None:
    if grid.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _dtype() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = run(Case(**asked["case"]), Sizes(**asked["sizes"]), Path(asked["folder"]), asked["url"])
    print(json.dumps(asdict(found)))
