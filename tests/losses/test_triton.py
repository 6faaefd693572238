"""The Triton kernels without a GPU: run by Triton's interpreter against the dense definition, and compiled for real GPUs.

conftest.py asks for the interpreter, before anything imports triton. It truncates where a GPU rounds to bf16, hence a tolerance
of 2^-6 there.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fused_cases as cases
import loss_oracles as oracle
from test_fused_numerics import KINDS, check, kind_of_case
from unisd_megatron.losses import enter_shards, fused_divergence, fused_log_probs
from unisd_megatron.losses.collectives import ProcessGroup
from world import World

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and Arm only")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of the -inf that the kernels mask


def interpreted(
    rank: int, group: ProcessGroup | None, case: cases.Case, width: int, setting: dict
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    setting = {"vocab_size": case["head"].shape[0], "kernels": "triton"} | setting
    return cases.sharded(rank, group, case, width, float("nan"), False, setting)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_equals_the_closed_form(world: World, alpha: float, kind: str) -> None:
    case = kind_of_case(kind, torch.float32)
    for size, temperature in ((1, 0.7), (2, 1.0)):
        setting = {"alpha": alpha, "temperature": temperature, "chunk_tokens": 7}
        found = cases.assemble(world.run(size, interpreted, case, 38 // size, setting), 37, False)
        check(found, cases.expected(case, alpha, temperature), torch.float32, kind)


def test_many_blocks_of_columns_in_bf16(world: World) -> None:
    """5,000 columns are two and a half blocks; each rank's shard ends inside one."""
    case = cases.make(4, 5000, torch.bfloat16, hidden=16, teacher=16)
    case |= {k: case[k] / 4 for k in ("hidden", "teacher_hidden")}
    for alpha in (0.0, 0.3, 1.0):
        answers = [
            cases.assemble(world.run(2, interpreted, case, 2501, {"alpha": alpha}), 5000, False),
            cases.run(world, 2, case, 2501, alpha=alpha, kernels="torch"),
        ]
        errors = oracle.compare(*answers)
        assert max(errors[k] for k in cases.VALUES) < 2e-6
        assert max(errors["d/dhidden"], errors["d/dhead"]) < 2.0**-6, errors


def log_probs(rank: int, group: ProcessGroup | None, case: cases.Case) -> tuple:
    hidden, head, _ = cases.leaves(rank, group, case, 6, 0.0, False)
    full = enter_shards(hidden, group)
    out = fused_log_probs(full, head, token_ids=case["ids"], vocab_size=11, group=group, chunk_tokens=3, kernels="triton")
    (out * case["student_log_probs"]).sum().backward()
    return {"student_log_probs": out.detach()}, hidden.grad, head.grad


def test_log_probs_alone(world: World) -> None:
    case = cases.make(8, 11, torch.float32)
    case |= {k: torch.zeros(8) for k in ("divergence", "entropy")}
    oracle.assert_equal(cases.assemble(world.run(2, log_probs, case), 11, False), cases.expected(case, 0.0), 5e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from unisd_megatron.losses import triton_passes as passes
POINTERS = {"logits", "out", "student_logits", "teacher_logits", "norms", "per_token", "column"}
for dtype in ("bf16", "fp32"):
    for kernel, kinds in ((passes._softmax, [{}]), (
        passes._sums, [{"KIND": k, "CLIP": c} for k in (1, 2, 3) for c in (True, False)]), (
        passes._to_gradient,
        [{"KIND": k, "CLIP": c and k > 0, "OF_LOG_PROBS": True, "OF_ENTROPY": True} for k in range(4) for c in (True, False)])):
        for kind in kinds:
            constants = kind | {"BLOCK": passes.BLOCK}
            signature = {}
            for name in kernel.arg_names:
                pointer = "*" + (dtype if "logits" in name else "i32" if name == "column" else "fp32")
                number = "fp32" if name in ("alpha", "temperature", "ceiling") else "i32"
                signature[name] = "constexpr" if name in constants else pointer if name in POINTERS else number
            source = ASTSource(kernel, signature, constexprs=constants)
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": passes.WARPS})
print("compiled")
"""


def test_kernels_compile_for_hopper() -> None:
    compiler = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=compiler, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


def test_without_a_gpu_they_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = cases.make(2, 5, torch.float32)
    args = [case[k] for k in ("hidden", "head", "teacher_hidden", "teacher_head")]
    with pytest.raises(ValueError, match="kernels='triton' needs triton and a GPU; found triton and cpu"):
        fused_divergence(*args, token_ids=case["ids"], alpha=0.0, kernels="triton")
    with pytest.raises(ValueError, match="kernels must be auto, torch or triton, got 'cuda'"):
        fused_divergence(*args, token_ids=case["ids"], alpha=0.0, kernels="cuda")
