"""What a run computes with: decided once, from what is there and what was asked for, and said aloud (docs/gpu.md).

`probe` looks at the machine, `decide` is a pure function of what it found, `choose` is both.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from unisd_megatron.config import Accelerator, Layout
from unisd_megatron.errors import ConfigError, MissingDependency
from unisd_megatron.families.covering import FLASH_ROWS
from unisd_megatron.mcore import cpu

MEGATRON_MIN, MEGATRON_MAX = (0, 16, 1), (0, 19, 2)
"""Versions of megatron-core whose interfaces have been measured; the test suite runs on the first."""

_FP8_FROM = (8, 9)
_BLOCKS_FROM_CUDA = (12, 9)
_ONE_QUEUE_TO = 9  # the last major compute capability for which Megatron asks for CUDA_DEVICE_MAX_CONNECTIONS=1
_FP8_ENGINE = {"delayed": (2, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}
"""Of each recipe: the Transformer Engine from which Megatron takes it (`fp8_utils.get_fp8_recipe`)."""


_KERNELS = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_EXPECTED = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001"}
"""Of each --attention-backend: what Megatron sets these to, if they are not set; it fails where they are set otherwise."""
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_READ = (*_KERNELS, _CONNECTIONS)


@dataclass(frozen=True)
class Probe:
    """What a machine has. Versions are of installed packages; capability: of this process's GPU, such as (9, 0)."""

    megatron: str
    capability: tuple[int, int] | None = None  # None: no CUDA
    cuda: tuple[int, int] = (0, 0)
    transformer_engine: str | None = None
    flash_attn: str | None = None
    apex_adam: bool = False
    apex_wgrad: bool = False  # fused_weight_gradient_mlp_cuda, which Apex builds on request
    environment: Mapping[str, str] = field(default_factory=dict)  # the variables of `_READ` that are set


@dataclass(frozen=True)
class Platform:
    """What this process runs on, and why.

    Attributes: reason: one line on device and layer spec; notes: the other choices, a line each; attention: what is asked for,
    which Transformer Engine is told; flash_attn: whether layers of local modules have flash-attn to choose; fp8_*: the
    student's; teacher_fp8: the recipe that the teacher reads with, None for bf16.
    """

    device: torch.device
    backend: str  # "nccl" or "gloo"
    layer_spec: str  # "transformer_engine" or "local"
    reason: str
    notes: tuple[str, ...] = ()
    attention: Literal["auto", "flash", "fused", "unfused"] = "auto"
    flash_attn: bool = False
    gradient_accumulation_fusion: bool = False
    tp_comm_overlap: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    fp8_recipe: str = "tensorwise"
    fp8_param_gather: bool = False
    teacher_fp8: str | None = None

    @property
    def lines(self) -> list[str]:
        """All of it, to be said at start."""
        return [self.reason, *self.notes]

    @property
    def row_multiple(self) -> int:
        """What the tokens of a row on each rank must be a multiple of, so that FP8 matrix products can have them."""
        if self.fp8_format is None and self.teacher_fp8 is None:
            return 1
        return 128 if self.fp8_recipe == "blockwise" else 16

    def without_fp8(self) -> Platform:
        """The same for a model whose weights and arithmetic are bf16."""
        return replace(self, fp8_format=None, fp8_param_gather=False)

    def on_meta(self) -> Platform:
        """The same for shapes and names alone: Megatron's own modules on the `meta` device."""
        return Platform(torch.device("meta"), self.backend, "local", self.reason)


def choose(asked: Accelerator | None = None, layout: Layout | None = None, world_size: int = 1) -> Platform:
    """What this process is to run on; installs the CPU adaptation where there is no CUDA.

    Sets CUDA_DEVICE_MAX_CONNECTIONS to 1 where Megatron asks for it and it is not set; to be called before CUDA starts.

    Raises `MissingDependency` for megatron-core outside the measured versions, and as `decide` does.
    """
    layout = layout or Layout()
    ours = _shares_layers(layout) and _CONNECTIONS not in os.environ
    if ours:
        os.environ[_CONNECTIONS] = "1"  # before the probe, which asks CUDA: it is read where CUDA starts
    found = probe()
    if ours and not _in_one_queue(layout, found):
        del os.environ[_CONNECTIONS]
    cpu.install()
    return decide(asked or Accelerator(), layout, found, world_size)


def _shares_layers(layout: Layout) -> bool:
    return layout.tensor_model_parallel_size > 1 or layout.context_parallel_size > 1


def _in_one_queue(layout: Layout, found: Probe) -> bool:
    """Whether kernels must reach the GPU as they were issued, so that communication starts before what it hides behind."""
    return _shares_layers(layout) and found.capability is not None and found.capability[0] <= _ONE_QUEUE_TO


def probe() -> Probe:
    """What is there. Raises `MissingDependency` as `check_megatron` does."""
    megatron = check_megatron()
    gpu = torch.cuda.is_available()
    return Probe(
        megatron,
        torch.cuda.get_device_capability(_local_rank()) if gpu else None,
        _numbers(torch.version.cuda or "0.0"),
        _version("transformer_engine"),
        _version("flash_attn"),
        apex_adam=_importable("apex.optimizers"),
        apex_wgrad=_importable("fused_weight_gradient_mlp_cuda"),
        environment={name: os.environ[name] for name in _READ if name in os.environ},
    )


def decide(asked: Accelerator, layout: Layout, found: Probe, world_size: int = 1) -> Platform:
    """The table of docs/gpu.md.

    Raises `MissingDependency` for what is asked for and not installed, `ConfigError` for what this GPU cannot do
    or the environment contradicts.
    """
    _require(asked, found)
    _check_environment(asked, found)
    if found.capability is None:
        reason = f"no CUDA: CPU, gloo, local layer spec, megatron-core {found.megatron}"
        chosen = Platform(torch.device("cpu"), "gloo", "local", reason)
    else:
        chosen = _on_gpu(asked, found)
    if asked.attention_backend == "flash" and chosen.layer_spec == "local" and not _one_rank_packs(layout):
        raise ConfigError(f"{FLASH_ROWS}; use auto, or Transformer Engine")
    replicas = layout.data_parallel_size(world_size) * layout.context_parallel_size
    overlapping = found.capability is not None and replicas > 1
    reduce = overlapping if asked.overlap_grad_reduce is None else asked.overlap_grad_reduce
    gather = overlapping and layout.use_distributed_optimizer and reduce
    fusion = asked.gradient_accumulation_fusion
    recipe = asked.fp8_recipe or "tensorwise"
    chosen = replace(
        chosen,
        attention=asked.attention_backend,
        flash_attn=found.capability is not None and found.flash_attn is not None,
        gradient_accumulation_fusion=(found.capability is not None and found.apex_wgrad) if fusion is None else fusion,
        tp_comm_overlap=asked.tp_comm_overlap,
        overlap_grad_reduce=reduce,
        overlap_param_gather=gather if asked.overlap_param_gather is None else asked.overlap_param_gather,
        fp8_format=asked.fp8_format,
        fp8_recipe=recipe,
        fp8_param_gather=asked.fp8_param_gather,
        teacher_fp8=recipe if asked.teacher_fp8 else None,
    )
    return replace(chosen, notes=tuple(_notes(chosen, layout, found)))


def _on_gpu(asked: Accelerator, found: Probe) -> Platform:
    device = torch.device("cuda", _local_rank())
    if asked.transformer_impl != "local" and found.transformer_engine is not None:
        engine = f"Transformer Engine {found.transformer_engine}"
        reason = f"CUDA: NCCL, {engine} (fp32: local spec), megatron-core {found.megatron}"
        return Platform(device, "nccl", "transformer_engine", reason)
    why = "without Transformer Engine" if found.transformer_engine is None else "with --transformer-impl local"
    return Platform(device, "nccl", "local", f"CUDA {why}: NCCL, local layer spec, megatron-core {found.megatron}")


def _check_environment(asked: Accelerator, found: Probe) -> None:
    backend = "auto" if found.capability is None else asked.attention_backend
    for name, expected in zip(_KERNELS, _EXPECTED[backend], strict=True):
        if (value := found.environment.get(name, expected)) != expected:
            raise ConfigError(
                f"the environment has {name}={value}, and Megatron wants {expected} with --attention-backend {backend}; unset "
                f"{', '.join(_KERNELS)}, and choose by the flag"
            )


def _require(asked: Accelerator, found: Probe) -> None:
    """Raises for what was asked for and cannot be had."""
    of_engine = {
        "--transformer-impl transformer_engine": asked.transformer_impl == "transformer_engine",
        "--fp8-format": asked.fp8_format is not None,
        "--teacher-fp8": asked.teacher_fp8,
        "--tp-comm-overlap": asked.tp_comm_overlap,
        "--attention-backend fused": asked.attention_backend == "fused",
    }
    needed = {
        **of_engine,
        "--attention-backend flash": asked.attention_backend == "flash",
        "--gradient-accumulation-fusion": bool(asked.gradient_accumulation_fusion),
    }
    for flag, wanted in needed.items():
        if wanted and found.capability is None:
            raise ConfigError(f"{flag} needs a GPU, and CUDA is not available here; drop it")
    for flag, wanted in of_engine.items():
        if wanted and found.transformer_engine is None:
            raise MissingDependency(
                f"{flag} needs Transformer Engine, which is not installed; pip install 'transformer-engine[pytorch]>=2.3'"
            )
    if asked.attention_backend == "flash" and found.flash_attn is None:
        raise MissingDependency("--attention-backend flash needs flash-attn, which is not installed; pip install flash-attn")
    if asked.gradient_accumulation_fusion and not found.apex_wgrad:
        raise MissingDependency(
            "--gradient-accumulation-fusion needs Apex's fused_weight_gradient_mlp_cuda, which is not installed (Megatron's "
            "output layer asks for it, whatever the layers are made of); build Apex with its CUDA extensions"
        )
    if asked.fp8:
        _require_fp8(asked, found)


def _require_fp8(asked: Accelerator, found: Probe) -> None:
    assert found.capability is not None and found.transformer_engine is not None
    if found.capability < _FP8_FROM:
        major, minor = found.capability
        raise ConfigError(
            f"{asked.fp8_flag}: this GPU (compute capability {major}.{minor}) has no FP8; it needs 8.9 or more, such as "
            "Hopper's 9.0"
        )
    recipe = asked.fp8_recipe or "tensorwise"
    asked.check_recipe(found.capability)
    if recipe == "blockwise" and found.cuda < _BLOCKS_FROM_CUDA:
        raise ConfigError(
            f"--fp8-recipe blockwise needs CUDA 12.9, and torch is built for {found.cuda[0]}.{found.cuda[1]}; use tensorwise"
        )
    least = _FP8_ENGINE[recipe]
    if _numbers(found.transformer_engine) < least:
        raise MissingDependency(
            f"--fp8-recipe {recipe} needs Transformer Engine {least[0]}.{least[1]}, not {found.transformer_engine}; "
            f"pip install 'transformer-engine[pytorch]>={least[0]}.{least[1]}'"
        )


def _one_rank_packs(layout: Layout) -> bool:
    return layout.packing and layout.context_parallel_size == 1


def _attention_note(chosen: Platform, layout: Layout, found: Probe) -> str:
    """The model is not known yet: layers may be local ones though Transformer Engine is there (`engine_covers`)."""
    flash = chosen.flash_attn and chosen.attention in ("auto", "flash") and layout.bf16 and _one_rank_packs(layout)
    local = f"flash-attn {found.flash_attn}" if flash else "matrix products, segment by segment"
    if chosen.layer_spec == "local" or not layout.bf16:
        return f"attention: {local}"
    engine = {
        "auto": "chosen by Transformer Engine for each shape (NVTE_DEBUG=1 tells)",
        "flash": "flash-attn, through Transformer Engine",
        "fused": "cuDNN's, through Transformer Engine",
        "unfused": "matrix products, by Transformer Engine",
    }[chosen.attention]
    return f"attention: {engine}; in families of local modules {local}"


def _notes(chosen: Platform, layout: Layout, found: Probe) -> list[str]:
    gpu = found.capability is not None
    adam = (
        f"Transformer Engine's FusedAdam {found.transformer_engine}"
        if found.transformer_engine is not None
        else "Apex's FusedAdam"
        if found.apex_adam
        else "torch's Adam"
    )
    lines = [_attention_note(chosen, layout, found), f"optimizer: {adam}"]
    if gpu:
        kernel = "" if found.apex_wgrad else " (fused_weight_gradient_mlp_cuda is not installed)"
        off = {
            "gradient accumulation fusion": (chosen.gradient_accumulation_fusion, kernel),
            "overlapped gradient reduction": (chosen.overlap_grad_reduce, ""),
            "overlapped parameter gathering": (chosen.overlap_param_gather, ""),
            "overlapped TP communication": (chosen.tp_comm_overlap, " (would pad rows to one length)"),
        }
        lines.append(", ".join(f"{name} {'on' if on else 'off' + why}" for name, (on, why) in off.items()))
    if _in_one_queue(layout, found):
        value = found.environment.get(_CONNECTIONS, "not set")
        advice = "" if value == "1" else "; with 1, communication would start before what it hides behind"
        lines.append(f"{_CONNECTIONS}: {value}{advice}")
    if chosen.fp8_format is not None:
        kept = "FP8, fp32 in the optimizer" if chosen.fp8_param_gather else "bf16"
        lines.append(
            f"FP8: the student's layers in {chosen.fp8_format}, {chosen.fp8_recipe} scaling, weights kept in {kept}; "
            "embedding, norms, attention scores, head and losses are not in FP8"
        )
    if chosen.teacher_fp8 is not None:
        lines.append(f"FP8: the teacher's layers in e4m3, {chosen.teacher_fp8} scaling, its head and weights in bf16")
    if chosen.row_multiple > 1:
        lines.append(f"FP8: rows are padded to multiples of {chosen.row_multiple} tokens on each rank")
    return lines


def check_megatron() -> str:
    """The installed megatron-core version; `MissingDependency` outside the measured range or without its hidden needs.

    To be called before anything imports Megatron.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependency("megatron-core is not installed; pip install 'megatron-core==0.16.1'") from error
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not MEGATRON_MIN <= numbers <= MEGATRON_MAX:
        age = "old" if numbers < MEGATRON_MIN else "new"
        raise MissingDependency(
            f"megatron-core {version} is too {age}; 0.16.1 to 0.19.2 are supported: pip install 'megatron-core==0.16.1'"
        )
    if numbers >= (0, 17) and importlib.util.find_spec("triton") is None:
        raise MissingDependency(f"megatron-core {version} needs triton even without a GPU; pip install triton")
    if importlib.util.find_spec("psutil") is None:
        raise MissingDependency(
            "psutil is missing (Megatron's checkpoint writer hangs for ever without it); pip install psutil"
        )
    _check_engine()
    return version


def _check_engine() -> None:
    """Transformer Engine without its torch part fails while Megatron imports it, and not as Megatron expects."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return
    package = Path(spec.origin).parent
    # Where Transformer Engine itself looks: beside it (in place), in it (built), in its wheels' folder.
    places = (package.parent, package, package / "wheel_lib", Path(sysconfig.get_path("purelib")))
    if not any(any(place.glob("transformer_engine_torch*.so")) for place in places):
        raise MissingDependency(
            "transformer-engine is installed without its torch part; pip install --no-build-isolation "
            "'transformer-engine[pytorch]', or pip uninstall transformer-engine"
        )


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _version(package: str) -> str | None:
    if not _importable(package):
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # built in place
        return str(getattr(importlib.import_module(package), "__version__", "0"))


def _numbers(version: str) -> tuple[int, int]:
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
