"""The table of checks: what each shows, on which machines it runs, its programs, and how their output is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from unisd_megatron.selftest import reading
from unisd_megatron.selftest.launch import Job
from unisd_megatron.selftest.machine import DEMO, HOPPER, Machine
from unisd_megatron.selftest.reading import Reading

CPU_LAYOUTS = ("tp2", "pp2")


@dataclass(frozen=True)
class Work:
    """What a check's programs are made from: the machine, the new folder they may write in, whether to be brief."""

    machine: Machine
    folder: Path
    quick: bool


@dataclass(frozen=True)
class Check:
    """A line of the page.

    unless: why it cannot run here, or None. jobs: its programs, one after the other. read: what they found, from the folder
    and the output of each. limit_s: of each program.
    """

    name: str
    shows: str
    unless: Callable[[Machine, bool], str | None]
    jobs: Callable[[Work], list[Job]]
    read: Callable[[Path, Sequence[str]], Reading]
    limit_s: float = 600.0


def reason(check: Check, machine: Machine, quick: bool) -> str | None:
    """Why the check does not run on this machine, None if it does."""
    return check.unless(machine, quick)


def _always(machine: Machine, quick: bool) -> str | None:
    return None


def _needs(machine: Machine, quick: bool, *, packages: Sequence[str] = (), gpus: int = 0, hopper: bool = False) -> str | None:
    if hopper and machine.capability < HOPPER:
        found = ".".join(map(str, machine.capability)) if machine.gpus else "no GPU"
        return f"needs a GPU of compute capability 9.0 (Hopper) or newer, found {found}"
    if machine.gpus < gpus:
        return f"needs {gpus} GPU{'s' * (gpus > 1)}, found {machine.gpus}"
    missing = [name for name in packages if name not in machine.packages]
    return f"needs {' and '.join(missing)}, not installed" if missing else None


# Parity -------------------------------------------------------------------------------------------------------------


def _parity(name: str, ranks: int, shows: str, *flags: str) -> Check:
    def unless(machine: Machine, quick: bool) -> str | None:
        if machine.gpus:
            if ranks == 1 and machine.gpus > 1:
                return "the layouts of several GPUs contain it"
            return _needs(machine, quick, gpus=ranks)
        if name not in CPU_LAYOUTS:
            return f"needs {ranks} GPU{'s' * (ranks > 1)}; on a CPU tp2 and pp2 are enough"
        return "left out by --quick" if quick and name != "tp2" else None

    def jobs(work: Work) -> list[Job]:
        return [Job("unisd_megatron", ("parity", *flags), ranks)]

    return Check(
        f"parity.{name}", f"{shows}: loss and every gradient of every mode, against fp64", unless, jobs, reading.parity
    )


def _parity_bf16(machine: Machine, quick: bool) -> str | None:
    return _needs(machine, quick, gpus=1, packages=["transformer-engine"])


def _bf16_jobs(work: Work) -> list[Job]:
    ranks = work.machine.ranks
    flags = ("--tp", "2", "--sequence-parallel") if ranks == 2 else ()
    return [Job("unisd_megatron", ("parity", "--bf16", *flags), ranks)]


PARITY = (
    _parity("single", 1, "one GPU, fp32"),
    _parity("tp2", 2, "tensor parallel 2, fp32", "--tp", "2"),
    _parity("pp2", 2, "pipeline parallel 2, fp32", "--pp", "2"),
    _parity("dp2", 2, "data parallel 2, gradients reduced under the backward pass, fp32", "--overlap-grad-reduce"),
    _parity("tp2-pp2", 4, "TP 2 x PP 2, sequence parallel, fp32", "--tp", "2", "--pp", "2", "--sequence-parallel"),
    _parity(
        "tp2-pp2-dp2", 8, "TP 2 x PP 2 x DP 2, sequence parallel, fp32", *["--tp", "2", "--pp", "2", "--sequence-parallel"]
    ),
    _parity("tp2-pp2-cp2", 8, "TP 2 x PP 2 x CP 2, fp32", *["--tp", "2", "--pp", "2", "--cp", "2", "--micro-batch-size", "2"]),
    Check("parity.te-bf16", "Transformer Engine in bf16 against fp64, loose bounds", _parity_bf16, _bf16_jobs, reading.parity),
)


# The loss -----------------------------------------------------------------------------------------------------------


def _kernels(paths: Sequence[str], work: Work) -> list[Job]:
    shapes, dtypes = [[37, 5003, 48]], ["float32", "bfloat16"]
    environment = {}
    if work.machine.gpus:
        shapes = [[37, 5003, 64], [512, 32000, 896]] + [[256, 151936, 896]] * (not work.quick)
    elif "triton" in paths:
        shapes, dtypes, environment = [[7, 2503, 16]], ["float32"], {"TRITON_INTERPRET": "1"}
    request = json.dumps({"paths": list(paths), "dtypes": dtypes, "shapes": shapes})
    return [Job("unisd_megatron.selftest.kernels", (request,), environment=environment)]


def _floor_jobs(work: Work) -> list[Job]:
    sizes = {"tokens": 2048, "vocab_size": 32000, "hidden": 128 if work.quick else 896}
    if work.machine.gpus:
        sizes = {"tokens": 4096 if work.quick else 16384, "vocab_size": 151936, "hidden": 4096}
    return [Job("unisd_megatron.selftest.floors", (json.dumps(sizes),))]


LOSS = (
    Check("loss.torch", "the loss in plain torch against its fp64 definition", _always,
          partial(_kernels, ("materialized", "fused_torch")), reading.kernels),
    Check("loss.triton", "the Triton kernels (on a CPU in Triton's interpreter) against the definition",
          partial(_needs, packages=["triton"]), partial(_kernels, ("triton",)), reading.kernels),
    Check("loss.floors", "memory and time of the loss beside what it cannot go below", _always, _floor_jobs, reading.floors,
          limit_s=1200.0),
)  # fmt: skip


# Weight sync --------------------------------------------------------------------------------------------------------


def _sync_jobs(engine: str, work: Work) -> list[Job]:
    sizes = [
        "--width",
        "128",
        "--layers",
        "2",
        "--vocabulary",
        "400",
        "--sequences",
        "4",
        "--new_tokens",
        "4",
        "--tensor_sizes",
        "1",
    ]
    if not work.quick:
        sizes = ["--sequences", "16", "--new_tokens", "16"]
    if work.machine.gpus and not work.quick:
        sizes = ["--width", "2048", "--layers", "16", "--vocabulary", "32000", "--sequences", "64", "--new_tokens", "64"]
    return [
        Job("unisd_megatron", ("bench", "rollout", "--engines", engine, "--output_dir", str(work.folder / "bench"), *sizes))
    ]


def _vllm_jobs(work: Work) -> list[Job]:
    """The benchmark, then two steps of training: its first sync is proven tensor by tensor, or it stops."""
    proof = _training(work, "proof", steps=2, more=("--use_vllm", "--vllm_kv_cache_gib", "0.25"))
    return [*_sync_jobs("vllm", work), _tiny(work), proof]


def _vllm_unless(machine: Machine, quick: bool) -> str | None:
    return "left out by --quick" if quick else _needs(machine, quick, packages=["vllm"])


SYNC = (
    Check("sync.transformers", "a weight sync into the embedded engine, beside a plain copy", _always,
          partial(_sync_jobs, "transformers"), reading.sync),
    Check("sync.vllm", "a weight sync into vLLM, and the proof that every tensor arrived", _vllm_unless, _vllm_jobs,
          reading.sync_with_proof, limit_s=900.0),
)  # fmt: skip


# Training -----------------------------------------------------------------------------------------------------------


def _tiny(work: Work) -> Job:
    return Job("unisd_megatron", ("tiny", "--family", "qwen2", "--output_dir", str(work.folder / "model")))


def _training(work: Work, name: str, steps: int, more: Sequence[str] = (), ranks: int | None = None) -> Job:
    """A short run on `work.folder / "model"`; its metrics are in `work.folder / name`."""
    ranks = ranks or work.machine.ranks
    words = f"--mode vanilla --dataset addition --max_steps {steps} --global_batch_size 8 --max_completion_length 16"
    layout = ("--tensor_model_parallel_size", str(ranks), "--learning_rate", "2e-5")
    folders = ("--model_name", str(work.folder / "model"), "--output_dir", str(work.folder / name))
    return Job("unisd_megatron", ("train", *words.split(), *layout, *folders, *more), ranks)


def _demo_jobs(work: Work) -> list[Job]:
    if not work.machine.examples:
        return [_tiny(work), _training(work, "run", 10 if work.quick else 40)]
    steps, ranks = 20 if work.quick else 100, work.machine.ranks
    words = ("train", "--config", str(DEMO / "demo.yaml"), "--model_name", str(DEMO / "model"), "--max_steps", str(steps))
    more = ("--eval_steps", str(steps), "--save_steps", str(steps), "--tensor_model_parallel_size", str(ranks))
    return [Job("unisd_megatron", (*words, *more, "--output_dir", str(work.folder / "run")), ranks)]


def _restart_jobs(work: Work) -> list[Job]:
    ranks = str(work.machine.ranks)
    return [Job("unisd_megatron", ("parity", "restart", "--kills", "1", "--steps", "4", "--nproc", ranks, "--tp", ranks))]


def _not_quick(machine: Machine, quick: bool) -> str | None:
    return "left out by --quick" if quick else None


TRAINING = (
    Check("demo", "training from checkpoint to checkpoint: held-out accuracy, or without the examples the loss", _always,
          _demo_jobs, reading.demo, limit_s=1200.0),
    Check("restart", "a run killed and resumed against the same run unbroken, to the bit", _not_quick, _restart_jobs,
          reading.restart, limit_s=900.0),
)  # fmt: skip


# FP8 ----------------------------------------------------------------------------------------------------------------

FP8 = ("--fp8_recipe", "tensorwise")


def _wide(work: Work) -> Job:
    """A model whose sizes are multiples of 128, which every FP8 recipe takes."""
    return Job("unisd_megatron.selftest.model", (str(work.folder / "model"),))


def _fp8_teacher_jobs(work: Work) -> list[Job]:
    return [_wide(work), _training(work, "run", 3, ("--bf16", "--teacher_fp8", *FP8), ranks=1)]


def _fp8_student_jobs(work: Work) -> list[Job]:
    """Both runs learn from the completions of the first, so that only the arithmetic differs."""
    steps = 10 if work.quick else 50
    replay = ("--rollout", "replay", "--replay_path", str(work.folder / "bf16/rollouts"))
    fp8 = _training(work, "fp8", steps, ("--bf16", "--fp8_format", "hybrid", *FP8, *replay), ranks=1)
    return [_wide(work), _training(work, "bf16", steps, ("--bf16",), ranks=1), fp8]


_fp8 = partial(_needs, gpus=1, hopper=True, packages=["transformer-engine"])
FP8_CHECKS = (
    Check("fp8.teacher", "a teacher in FP8: drift KL(bf16 || FP8) on the first batch", _fp8, _fp8_teacher_jobs,
          reading.fp8_teacher),
    Check("fp8.student", "a student in FP8 beside one in bf16, the same completions", _fp8, _fp8_student_jobs,
          reading.fp8_student, limit_s=900.0),
)  # fmt: skip


def _device_jobs(work: Work) -> list[Job]:
    return [Job("unisd_megatron.selftest.devices", ())]


DEVICES = Check("devices", "torch can use every GPU that the driver lists; megatron-core is a measured version", _always,
                _device_jobs, reading.devices)  # fmt: skip
CHECKS = (DEVICES, *LOSS, *PARITY, *SYNC, *TRAINING, *FP8_CHECKS)
"""In the order in which they run; the first finds out what the machine is."""
