"""The restart proof: a run that is killed at random points and resumed each time, against the same run unbroken.

Both are `unisd train` under torchrun, on a tiny model, in the mode that carries most from step to step: EMA teacher,
clipping at the previous step's quantile, agreement, contrast, Adam. They must agree bit for bit in metrics, rollouts,
exported weights and every tensor of the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.families import FAMILIES
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start, store
from unisd_megatron.processes import kill
from unisd_megatron.resolve import resolve
from unisd_megatron.train import checkpoint
from unisd_megatron.train.metrics import METRICS_FILE, read_metrics
from unisd_megatron.validation import validate
from unisd_megatron.weights.hf import HfFolder
from unisd_megatron.weights.tiny import VOCAB_SIZE, write_tiny

FAMILY = "qwen2"
SETTINGS: dict[str, Any] = {
    "mode": "unisd_star",
    "dataset": "addition",
    "num_train_examples": 64,
    "num_auxiliary_contexts": 2,
    "fewshot_method": "random",
    "global_batch_size": 8,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "token_clip_quantile": 0.9,
    "ref_model_sync_steps": 1,
    "use_distributed_optimizer": True,
    "save_steps": 2,
}
TIMES = ("seconds/", "tokens_per_second", "memory/")
"""Metrics that differ from run to run."""

LEG_TIMEOUT_S = 900.0
WRITING_S = 0.1  # a kill that is to hit a checkpoint comes at most so long after it was begun


@dataclass(frozen=True)
class Plan:
    """The run in question and how often it is killed."""

    folder: Path
    kills: int
    steps: int
    processes: int
    layout: Layout
    seed: int

    def settings(self, output: Path) -> dict[str, Any]:
        return SETTINGS | {
            "model_name": str(self.folder / "model"),
            "output_dir": str(output),
            "max_steps": self.steps,
            "seed": self.seed,
            "tensor_model_parallel_size": self.layout.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.layout.pipeline_model_parallel_size,
        }

    def check(self) -> None:
        """Raises `ConfigError` for what cannot be carried out."""
        if self.kills < 1 or self.steps < 2 or self.processes < 1:
            raise ConfigError(
                f"--kills {self.kills} --steps {self.steps} --nproc {self.processes}: at least 1 kill, 2 steps, 1 process"
            )
        if start.world_size_from_environment() > 1:
            raise ConfigError("parity restart starts its processes itself; call it without torchrun, with --nproc N")
        validate(resolve(self.settings(self.folder), {}), self.processes)
        arch = FAMILIES[FAMILY].arch({**FAMILIES[FAMILY].tiny_config(), "vocab_size": VOCAB_SIZE})
        sizes = self.layout.tensor_model_parallel_size, self.layout.pipeline_model_parallel_size
        arch.check_layout(*sizes, f"the tiny {FAMILY}")


@dataclass(frozen=True)
class Strike:
    """A kill: `share` of a step's time after `after` steps were recorded, or soon after a later checkpoint was begun."""

    after: int
    share: float
    at_checkpoint: bool


def strikes(plan: Plan) -> list[Strike]:
    """One random point in each of `kills` equal parts of the run, the last step left out; every third at a checkpoint."""
    rng = random.Random(f"restart {plan.seed}")
    points = [(i + rng.random()) / plan.kills * (plan.steps - 1) for i in range(plan.kills)]
    return [Strike(int(point), point % 1, at_checkpoint=i % 3 == 1) for i, point in enumerate(points)]


@dataclass
class Leg:
    """One start of the run, from a checkpoint or from nothing."""

    process: subprocess.Popen[bytes]
    log: Path
    output: Path
    abandoned: frozenset[Path]  # half-written checkpoints of earlier legs
    journal_before: int | None  # inode; a resumed run rewrites the file before its first step
    arrivals: list[float] = field(default_factory=list)

    def recorded(self) -> int:
        """Steps on record; -1 until this leg has reached its first step."""
        return len(read_metrics(self.output)) if _inode(self.output) not in (None, self.journal_before) else -1

    def is_saving(self) -> bool:
        return not self.abandoned.issuperset(_half_written(self.output))

    def watch(self, ready: Callable[[], bool]) -> bool:
        """Waits for `ready`; false if the leg ended before. Raises `CheckFailed` if neither happens."""
        began = time.monotonic()
        while self.process.poll() is None:
            if ready():
                return True
            self.arrivals += [time.monotonic()] * (self.recorded() - len(self.arrivals))
            if time.monotonic() - began > LEG_TIMEOUT_S:
                raise CheckFailed(f"a start of the run did not end in {LEG_TIMEOUT_S:g} s; {self._last_words()}")
            time.sleep(0.01)
        return False

    def finish(self) -> None:
        """Waits for the end; `CheckFailed` unless it is a good one."""
        self.watch(lambda: False)
        if self.process.returncode:
            raise CheckFailed(f"a start of the run failed with status {self.process.returncode}; {self._last_words()}")

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return next((line for line in lines if line.startswith("unisd")), lines[-1] if lines else "no output")


def _inode(output: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return (output / METRICS_FILE).stat().st_ino
    return None


def _half_written(output: Path) -> frozenset[Path]:
    return frozenset((output / "checkpoints").glob("*.partial"))


@contextlib.contextmanager
def start_leg(plan: Plan, name: str, output: Path, **more: Any) -> Iterator[Leg]:
    """`unisd train` under torchrun, output in NAME.log; whatever happens, nothing of it is left running."""
    request, log = plan.folder / f"{name}.json", plan.folder / f"{name}.log"
    request.write_text(json.dumps(plan.settings(output) | more, indent=2) + "\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={plan.processes}"]
    abandoned, journal = _half_written(output), _inode(output)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*torchrun, "-m", "unisd_megatron", "train", "--config", str(request)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,
        )
    try:
        yield Leg(process, log, output, abandoned, journal)
    finally:
        kill(process)


def prove(plan: Plan, say: Callable[[str], None]) -> list[str]:
    """Carries out both runs; what differs, one line each. `CheckFailed` if a start fails or a kill finds nothing running."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_tiny(FAMILY, plan.folder / "model", seed=1)
    whole, broken = plan.folder / "unbroken", plan.folder / "broken"
    with start_leg(plan, "unbroken", whole) as leg:
        leg.finish()
    pace = statistics.median(later - earlier for earlier, later in zip(leg.arrivals, leg.arrivals[1:], strict=False))
    say(f"unbroken: {plan.steps} steps, {pace:.2f} s apart")
    for number, strike in enumerate(strikes(plan), start=1):
        origin, how = _continue(broken, number)
        with start_leg(plan, f"leg{number}", broken, **how) as leg:
            struck = _strike(leg, strike, pace)
        left = [path.name for path in sorted((broken / "checkpoints").glob("*"))]
        say(f"kill {number}: {origin}; {struck}; left: {', '.join(left) or 'no checkpoint'}")
    origin, how = _continue(broken, plan.kills + 1)
    with start_leg(plan, f"leg{plan.kills + 1}", broken, **how) as leg:
        leg.finish()
    say(f"not killed: {origin}; to the end")
    return differences(whole, broken, say)


def _continue(output: Path, number: int) -> tuple[str, dict[str, Any]]:
    """What a user does after a kill, in words and as settings; every other leg saves in the background."""
    in_background = number % 2 == 1
    how: dict[str, Any] = {"async_save": in_background}
    complete = checkpoint.complete(output)
    if complete:
        how["resume_from_checkpoint"] = "latest"
    else:
        shutil.rmtree(output, ignore_errors=True)
    origin = f"resumed from {complete[-1].name}" if complete else "from the start"
    return origin + (", saving in the background" if in_background else ""), how


def _strike(leg: Leg, strike: Strike, pace: float) -> str:
    found = leg.watch(lambda: leg.recorded() >= strike.after and (not strike.at_checkpoint or leg.is_saving()))
    delay = strike.share * (WRITING_S if strike.at_checkpoint else pace)
    time.sleep(delay if found else 0)
    if leg.process.poll() is not None:
        leg.finish()
        raise CheckFailed("a kill came after the end of the run; give more --steps or fewer --kills")
    kill(leg.process)
    since = "a checkpoint was begun" if strike.at_checkpoint else f"{strike.after} or more steps were on record"
    return f"SIGKILL {delay:.2f} s after {since}, {leg.recorded()} then"


def differences(whole: Path, broken: Path, say: Callable[[str], None]) -> list[str]:
    """What differs between two finished runs, one line each: metrics, rollouts, exported weights, last checkpoint."""
    metrics = _of_values("", _metrics(whole), _metrics(broken))
    rollouts = _of_values("", _rollouts(whole), _rollouts(broken))
    exported = _of_tensors("exported ", _exported(whole), _exported(broken))
    last = [checkpoint.complete(run)[-1] for run in (whole, broken)]
    states = [{name: checkpoint.read_state(path)[name] for name in ("steps_done", "clip_ceiling", "identity")} for path in last]
    with start.world(platforms.choose(), Layout(), seed=1):
        tensors = [store.tensors(path / "shards") for path in last]
    saved = _of_tensors("checkpoint: ", *tensors) + _of_values("checkpoint: ", *states)
    say(
        f"compared: {len(_metrics(whole))} numbers of the loss curve, {len(_rollouts(whole))} steps' rollouts, "
        f"{len(_exported(whole))} exported tensors, {len(tensors[0])} tensors of {last[0].name}"
    )
    return metrics + rollouts + exported + saved


def _metrics(run: Path) -> dict[str, Any]:
    return {
        f"step {row['step']} {name}": value
        for row in read_metrics(run)
        for name, value in row.items()
        if not name.startswith(TIMES)
    }


def _rollouts(run: Path) -> dict[str, Any]:
    return {f"rollouts of {path.stem}": path.read_text() for path in (run / "rollouts").iterdir()}


def _exported(run: Path) -> dict[str, Tensor]:
    folder = HfFolder(run / "hf")
    return {name: folder.tensor(name) for name in folder.names()}


def _of_values(what: str, whole: dict[str, Any], broken: dict[str, Any]) -> list[str]:
    names = sorted(whole.keys() | broken.keys())
    unequal = [name for name in names if whole.get(name) != broken.get(name)]
    return [f"{what}{name}: {str(whole.get(name))[:60]} unbroken, {str(broken.get(name))[:60]} broken" for name in unequal]


def _of_tensors(what: str, whole: dict[str, Tensor], broken: dict[str, Tensor]) -> list[str]:
    def is_equal(name: str) -> bool:
        if name not in whole or name not in broken:
            return False
        one, other = whole[name].contiguous(), broken[name].contiguous()
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))

    return [f"{what}{name}: not the same bits" for name in sorted(whole.keys() | broken.keys()) if not is_equal(name)]
