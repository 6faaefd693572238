"""From a check's output to whether it held and what it found. A broken output raises, and the check has not held."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd_megatron.selftest import machine
from unisd_megatron.train.metrics import EVALUATIONS, read_metrics

ENOUGH_ACCURACY = 0.9
"""Of the whole demo, which goes from 31 % to more than 99 %."""

DRIFT = "teacher/fp8_drift"


@dataclass(frozen=True)
class Reading:
    """Whether the check held; what it found in one line; the same as numbers."""

    holds: bool
    found: str
    numbers: dict[str, Any] = field(default_factory=dict)


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object. Raises ValueError without one."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
    raise ValueError("printed no result")


def devices(folder: Path, outputs: Sequence[str]) -> Reading:
    seen = last_json(outputs[0])
    listed, usable = machine.listed_gpus(), seen["gpus"]
    hidden = "CUDA_VISIBLE_DEVICES" in machine.settings_of_environment()
    lost = not hidden and len(usable) < len(listed)
    found = f"{seen['platform']}; GPUs: {len(usable)}" + (f" of {len(listed)} that the driver lists" if lost else "")
    return Reading(not lost and not seen["platform"].startswith("NOT"), found, seen)


_CASE = re.compile(r"^(.{32}) +(\S+) +(\S+) +(\S+) +(\S+)(  FAILS)?$")


def parity(folder: Path, outputs: Sequence[str]) -> Reading:
    """Of `unisd parity`'s table."""
    rows = [match for line in outputs[0].splitlines() if (match := _CASE.match(line)) and match[1].strip() != "case"]
    columns = {"loss": 3, "gradient": 4, "norm": 5}
    worst = {name: max(float(row[column]) for row in rows) for name, column in columns.items()}
    failed = [row[1].strip() for row in rows if row[6]]
    said = re.search(r"(\d+) of (\d+) hold", outputs[0])
    holds = said is not None and said[1] == said[2] == str(len(rows)) and not failed
    errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    found = f"{len(rows) - len(failed)} of {len(rows)} cases; worst relative errors: {errors}"
    return Reading(holds, found + (f"; failed: {', '.join(failed[:3])}" if failed else ""), worst | {"cases": len(rows)})


def kernels(folder: Path, outputs: Sequence[str]) -> Reading:
    result = last_json(outputs[0])
    rows, parts = result["rows"], []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of = [row for row in rows if row["dtype"] == dtype]
        worst = (max(_or_inf(row[what]) for row in of) for what in ("value", "gradient"))
        parts.append("{}: values {:.1e}, gradients {:.1e} (at most {:g})".format(dtype, *worst, result["tolerance"][dtype]))
    held = sum(row["holds"] for row in rows)
    return Reading(held == len(rows), f"{held} of {len(rows)} cases; worst error, {'; '.join(parts)}", result)


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def floors(folder: Path, outputs: Sequence[str]) -> Reading:
    """Held if the fused loss never holds the two logit tensors beside its gradients; the rest is told."""
    one = last_json(outputs[0])
    sizes = f"T {one['tokens']:,}, V {one['vocab_size']:,}, H {one['hidden']:,}, {one['dtype']}"
    parts = []
    for way in ("materialized", "fused"):
        cost = one[way]
        parts.append(
            f"{way} {cost['seconds']:.3g} s = {cost['seconds'] / one['floor_seconds']:.1f} x its products, "
            f"{cost['bytes'] / 1e9:.3g} GB = {cost['bytes'] / one['floor_bytes']:.1f} x its gradients"
        )
    beside = one["fused"]["bytes"] - one["floor_bytes"]
    holds = beside < one["logits_bytes"]
    share = f"fused holds {max(0, beside) / one['logits_bytes']:.0%} of both models' logits beside its gradients"
    return Reading(holds, f"{sizes}: {'; '.join(parts)}; {share}", one)


def sync(folder: Path, outputs: Sequence[str]) -> Reading:
    rows = json.loads((folder / "bench/rollout.json").read_text())["rows"]
    parts = []
    for row in rows:
        seconds, copy = statistics.median(row["sync"]), statistics.median(row["copy"])
        rate = row["bytes"] / 1e9 / seconds
        parts.append(
            f"TP {row['tensor']}: {row['bytes'] / 1e6:.0f} MB in {seconds:.3g} s, {rate:.2g} GB/s, {seconds / copy:.0f} copies"
        )
    return Reading(bool(rows), "; ".join(parts) or "not measured", {"rows": rows})


def sync_with_proof(folder: Path, outputs: Sequence[str]) -> Reading:
    """The training run stops where its first sync is not proven; its probes are told."""
    measured, rows = sync(folder, outputs), read_metrics(folder / "proof")
    gap = max(row["rollout/sync_gap"] for row in rows)
    found = f"{measured.found}; every tensor proven at the first sync, log-probs after it within {gap:.1e} nats"
    return Reading(measured.holds, found, measured.numbers | {"sync_gap": gap})


def demo(folder: Path, outputs: Sequence[str]) -> Reading:
    """Accuracy where the demo ran: to `ENOUGH_ACCURACY` in all its steps, upward in fewer. Else the loss, which must fall."""
    rows = read_metrics(folder / "run")
    losses = [row["loss"] for row in rows]
    gap = max(row["rollout/logp_gap"] for row in rows)
    first, last = (statistics.fmean(part) for part in (losses[: len(losses) // 4], losses[-(len(losses) // 4) :]))
    numbers: dict[str, Any] = {"steps": len(rows), "logp_gap": gap, "loss": [first, last]}
    after = f"; engine and Megatron within {gap:.1e} nats on sampled tokens"
    journal = folder / "run" / EVALUATIONS
    if not journal.is_file():
        return Reading(last < first, f"{len(rows)} steps, loss {first:.4f} to {last:.4f}{after}", numbers)
    curve = [json.loads(line)["accuracy"] for line in journal.read_text().splitlines()]
    holds = curve[-1] >= ENOUGH_ACCURACY if len(rows) >= 100 else curve[-1] > curve[0]
    found = f"{len(rows)} steps, held-out accuracy {curve[0]:.1%} to {curve[-1]:.1%}{after}"
    return Reading(holds, found, numbers | {"accuracy": curve})


def restart(folder: Path, outputs: Sequence[str]) -> Reading:
    lines = outputs[0].splitlines()
    compared = next(line for line in lines if line.startswith("compared:"))
    verdict = next(line for line in lines if re.match(r"\d+ kills?, \d+ difference", line))
    return Reading(verdict.endswith(" 0 differences"), f"{verdict}; {compared}")


def fp8_teacher(folder: Path, outputs: Sequence[str]) -> Reading:
    """Zero would be a teacher that is not in FP8."""
    drifts = [row[DRIFT] for row in read_metrics(folder / "run") if DRIFT in row]
    drift = drifts[0]
    return Reading(0 < drift < math.inf, f"drift {drift:.3e} nats per token", {DRIFT: drift})


def fp8_student(folder: Path, outputs: Sequence[str]) -> Reading:
    """Held if both losses are finite and fall; how far apart the curves are is told, and must not be nothing."""
    curves = {name: [row["loss"] for row in read_metrics(folder / name)] for name in ("bf16", "fp8")}
    pairs = list(zip(curves["bf16"], curves["fp8"], strict=True))
    apart = statistics.fmean(abs(one - other) for one, other in pairs) / statistics.fmean(curves["bf16"])
    quarter = max(1, len(pairs) // 4)
    ends = {name: (statistics.fmean(c[:quarter]), statistics.fmean(c[-quarter:])) for name, c in curves.items()}
    holds = all(math.isfinite(last) and last < first for first, last in ends.values()) and apart > 0
    told = ", ".join(f"{name} {first:.4f} to {last:.4f}" for name, (first, last) in ends.items())
    return Reading(holds, f"{len(pairs)} steps: loss {told}; {apart:.2%} apart on average", {"apart": apart, "curves": curves})
