"""vLLM in the training processes: engines of `tensor_parallel_size` ranks each, fed by reference.

Every rank is a worker of one engine (`external_launcher`); engines answer their share of the prompts and exchange token ids.
Requests carry seeds of their own, so what is sampled does not depend on the number of engines.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unisd_megatron.batch import Completion
from unisd_megatron.config import Vllm
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Grid
from unisd_megatron.rollout.engine import Request, Sampling, Weights, common_prefixes
from unisd_megatron.weights import internlm3

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

EXTENSION = "unisd_megatron.rollout.vllm_worker.WorkerExtension"

# Read by vLLM when it is imported. The first makes this process the worker, so that tensors pass by reference. Below errors,
# vLLM warns at every sync of modules that have no weights to load.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
_CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_CPU_BLOCK = 32  # tokens of a cache block


class ColocatedEngine:
    """Args: folder: Hugging Face checkpoint, for shapes (weights come with the first refresh); dtype: of the engine's weights;
    max_model_len: prompt and completion together, tokens; structured: completions may have to follow a JSON schema, for which
    vLLM reads the folder's tokenizer. Collective over the world.

    Raises `ConfigError` without vLLM.
    """

    def __init__(
        self,
        folder: Path,
        grid: Grid,
        dtype: torch.dtype,
        settings: Vllm,
        *,
        max_model_len: int,
        structured: bool = False,
    ) -> None:
        self._grid, self._size, self._version = grid, settings.vllm_tensor_parallel_size, 0
        self._rests = settings.vllm_enable_sleep_mode
        self._cached: dict[int, int] = {}  # tokens of each prompt of the last call that were in the cache before
        on_cpu = grid.device.type == "cpu"
        if self._rests and on_cpu:
            raise ConfigError("--vllm_enable_sleep_mode frees GPU memory and there is no GPU; drop it")
        for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if on_cpu else {})).items():
            os.environ.setdefault(name, value)
        state = torch.get_rng_state()
        self._llm = _start(folder, grid, dtype, settings, max_model_len, structured)
        torch.set_rng_state(state)  # vLLM seeds the whole process
        self._llm.init_weight_transfer_engine({"init_info": {}})

    def refresh(self, weights: Weights, step: int) -> None:
        """See `RolloutEngine.refresh`. Buckets reach this rank's worker by reference, never copied in between."""
        fault = _fault_of(self._begin)
        for number, bucket in enumerate(weights.everywhere(), start=1):
            if fault is None:  # else only the stream is read on: other ranks take part in it
                update = {"update_info": _update(bucket, last=number == len(weights))}
                fault = _fault_of(lambda: self._llm.update_weights(update))  # noqa: B023
        if fault is None:
            fault = _fault_of(lambda: self._finish(f"{step}{weights.label}"))
        self._agree(f"weight sync of step {step}", fault)
        self._version = step

    def _begin(self) -> None:
        if self._rests:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("unisd_abandon")
        self._llm.start_weight_update()

    def _finish(self, version: str) -> None:
        self._llm.finish_weight_update(version)
        if self._rests:
            self._llm.wake_up(tags=["kv_cache"])
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its cache of the old weights")

    def _agree(self, during: str, fault: str | None) -> None:
        """`CheckFailed` on every rank if any has a fault."""
        faults = [one for one in all_gather_json(fault, self._grid.world) if one is not None]
        if faults:
            raise CheckFailed(f"{during}: {faults[0]}")

    def members(self) -> list[str]:
        """See `RolloutEngine.members`."""
        return ["colocated"]

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """See `RolloutEngine.fingerprints`; those of this rank's shards."""
        (mine,) = self._llm.collective_rpc("unisd_fingerprints")
        return {"colocated": mine}

    def parts(self, wanted: dict[str, list[int]]) -> dict[str, list[tuple[str, int]]]:
        """See `RolloutEngine.parts`."""
        (mine,) = self._llm.collective_rpc("unisd_parts", args=(wanted,))
        found: dict[str, list[tuple[str, int]]] = {}
        for rank, said in enumerate(all_gather_json(mine, self._grid.world)):
            found.setdefault(f"rollout engine {rank // self._size}", []).extend(said.items())
        return found

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine.generate`."""
        world = self._grid.world
        engine, engines = world.rank // self._size, world.size // self._size
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        by_engine = self._said(requests, order[engine::engines], sampling)
        merged = {i: completion for one in by_engine for i, completion in one.items()}
        return [merged[i] for i in range(len(requests))]

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `RolloutEngine.probe`."""
        everything = range(len(requests))
        said = self._said(requests, everything, sampling)
        possible = common_prefixes(requests)
        stale = next((i for i in everything if self._cached[i] > possible[i]), None)
        fault = None if stale is None else (
            f"rollout engine {self._grid.world.rank // self._size} had {self._cached[stale]} tokens of a prompt in its cache "
            "right after it was told to drop it; its caches are stale"
        )  # fmt: skip
        self._agree("prefix cache", fault)
        return [[one[i] for i in everything] for one in said]

    def _said(self, requests: Sequence[Request], mine: Sequence[int], sampling: Sampling) -> list[dict[int, Completion]]:
        """What each engine says to the requests that are its own, by number. Collective over the world."""
        from vllm import TokensPrompt

        said = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(requests[i].prompt)) for i in mine],
            [_parameters(requests[i], sampling) for i in mine],
            use_tqdm=False,
        )
        self._cached = {i: int(one.num_cached_tokens) for i, one in zip(mine, said, strict=True)}
        plain = [[i, *_plain(one.outputs[0])] for i, one in zip(mine, said, strict=True)]
        # All ranks of an engine say the same; the first of each speaks.
        every = all_gather_json(plain, self._grid.world)[:: self._size]
        return [
            {i: Completion(tuple(ids), tuple(log_probs), reason, self._version) for i, ids, log_probs, reason in one}
            for one in every
        ]

    def rest(self) -> None:
        """See `RolloutEngine.rest`: weights and cache leave the GPU; the next refresh brings both back."""
        if self._rests:
            self._llm.sleep(level=2)

    def close(self) -> None:
        """Ends the engine. To be called last of all: vLLM's shutdown takes the default process group down, Megatron's."""
        del self._llm
        gc.collect()


def _start(folder: Path, grid: Grid, dtype: torch.dtype, settings: Vllm, max_model_len: int, structured: bool) -> LLM:
    try:
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from unisd_megatron.rollout.vllm_worker import BACKEND
    except ImportError as error:
        raise ConfigError(f"--use_vllm: vLLM cannot be imported ({error}); install it, or leave --use_vllm out") from error
    internlm3.register()
    where: dict[str, Any]
    if grid.device.type == "cpu":
        where = {
            "kv_cache_memory_bytes": int(settings.vllm_kv_cache_gib * 2**30),
            "block_size": _CPU_BLOCK,
            "enforce_eager": True,
            # Else a prompt that is cut in two ends the engine: vLLM winds its seeded generator back, which a CPU's cannot.
            "enable_chunked_prefill": False,
        }
    else:
        where = {
            "gpu_memory_utilization": settings.vllm_gpu_memory_utilization,
            "enable_sleep_mode": settings.vllm_enable_sleep_mode,
        }
    if structured:
        where["structured_outputs_config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
    if grid.world.size > 1:
        where["distributed_executor_backend"] = "external_launcher"
    return LLM(
        model=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        tensor_parallel_size=settings.vllm_tensor_parallel_size,
        max_model_len=max_model_len,
        skip_tokenizer_init=not structured,
        generation_config="vllm",  # no defaults of the checkpoint's
        logprobs_mode="processed_logprobs",  # of the sampling distribution
        load_format="dummy",
        seed=0,
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls=EXTENSION,
        **where,
    )


def _fault_of(act: Callable[[], object]) -> str | None:
    """What goes wrong, in one line. Of whatever kind: a rank that left alone would leave the others waiting for it."""
    try:
        act()
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _update(bucket: Sequence[tuple[str, torch.Tensor]], *, last: bool) -> dict[str, Any]:
    return {
        "names": [name for name, _ in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "dtype": str(bucket[0][1].dtype).removeprefix("torch."),
        "last": last,
        "tensors": [tensor for _, tensor in bucket],
    }


def _parameters(request: Request, sampling: Sampling) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = sampling.json_schema
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=request.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.eos_ids),
        ignore_eos=True,  # of the model's own; ours are the stop tokens
        logprobs=0,
        detokenize=False,
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
    )


def _plain(output: Any) -> list[Any]:
    ids = list(output.token_ids)
    return [ids, [output.logprobs[i][token].logprob for i, token in enumerate(ids)], output.finish_reason]
