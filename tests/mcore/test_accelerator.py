"""What a machine has decides what is chosen; every flag of layout and accelerator arrives in Megatron's configuration.

No GPU here: machines are described by what a probe of them would find.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core import fp8_utils
from megatron.core.transformer.enums import AttnBackend

from unisd_megatron.config import Accelerator, Layout
from unisd_megatron.errors import ConfigError, MissingDependency
from unisd_megatron.families import Arch
from unisd_megatron.families.covering import check_covered, engine_covers
from unisd_megatron.mcore import start
from unisd_megatron.mcore.attention import FlashSegmentAttention, SegmentAttention
from unisd_megatron.mcore.layers import layer_spec
from unisd_megatron.mcore.model import transformer_config
from unisd_megatron.mcore.platform import Platform, Probe, choose, decide
from unisd_megatron.mcore.student import distributed_config, optimizer_config
from unisd_megatron.plan import GPUS, Cluster, find_arch
from unisd_megatron.plan.kernels import kernels
from unisd_megatron.resolve import resolve
from unisd_megatron.validation import validate

CPU = Probe("0.16.1")
BARE = Probe("0.16.1", (9, 0), (12, 9))
FLASH = dataclasses.replace(BARE, flash_attn="2.8.3")
ENGINE = dataclasses.replace(BARE, transformer_engine="2.8.0")
FULL = dataclasses.replace(ENGINE, apex_adam=True, apex_wgrad=True, flash_attn="2.8.3")
AMPERE = dataclasses.replace(FULL, capability=(8, 0))
BLACKWELL = dataclasses.replace(FULL, capability=(10, 0))
BY_ENGINE = "attention: chosen by Transformer Engine for each shape (NVTE_DEBUG=1 tells); in families of local modules"
PRODUCTS = "matrix products, segment by segment"
MACHINES = {
    # layer spec, attention, gradient accumulation fusion, optimizer
    "nothing": (CPU, "local", f"attention: {PRODUCTS}", False, "torch's Adam"),
    "CUDA alone": (BARE, "local", f"attention: {PRODUCTS}", False, "torch's Adam"),
    "flash-attn": (FLASH, "local", "attention: flash-attn 2.8.3", False, "torch's Adam"),
    "Apex alone": (
        dataclasses.replace(BARE, apex_adam=True, apex_wgrad=True),
        "local",
        f"attention: {PRODUCTS}",
        True,
        "Apex's FusedAdam",
    ),
    "Transformer Engine": (
        ENGINE,
        "transformer_engine",
        f"{BY_ENGINE} {PRODUCTS}",
        False,
        "Transformer Engine's FusedAdam",
    ),
    "all": (FULL, "transformer_engine", f"{BY_ENGINE} flash-attn 2.8.3", True, "Transformer Engine's FusedAdam"),
    "Ampere": (AMPERE, "transformer_engine", f"{BY_ENGINE} flash-attn 2.8.3", True, "Transformer Engine's FusedAdam"),
    "Blackwell": (BLACKWELL, "transformer_engine", f"{BY_ENGINE} flash-attn 2.8.3", True, "Transformer Engine's FusedAdam"),
}
BF16 = Layout(bf16=True, use_distributed_optimizer=True)


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_there_is_chosen_and_said(name: str) -> None:
    found, spec, attention, fusion, adam = MACHINES[name]
    for world_size in (1, 2):
        platform = decide(Accelerator(), BF16, found, world_size)
        assert (platform.layer_spec, platform.notes[0], platform.gradient_accumulation_fusion) == (spec, attention, fusion)
        assert platform.overlap_grad_reduce is platform.overlap_param_gather is (name != "nothing" and world_size == 2)
        assert not platform.tp_comm_overlap and platform.row_multiple == 1 and "FP8" not in " ".join(platform.lines)
        assert adam in " ".join(platform.lines)
        assert all("\n" not in line and len(line) < 260 for line in platform.lines)
    refused = decide(
        Accelerator(
            transformer_impl="local",
            attention_backend="unfused",
            gradient_accumulation_fusion=False,
            overlap_grad_reduce=False,
        ),
        BF16,
        found,
        2,
    )
    assert (refused.layer_spec, refused.attention, refused.notes[0]) == ("local", "unfused", f"attention: {PRODUCTS}")
    assert not (refused.gradient_accumulation_fusion or refused.overlap_grad_reduce or refused.overlap_param_gather)


# Of a family, a machine and a layout: what layers of local modules attend with.
ATTENDING: list[tuple[str, Probe, Accelerator, Layout, type]] = [
    ("gemma-3-1b-it", FULL, Accelerator(), BF16, FlashSegmentAttention),
    ("gemma-3-1b-it", FULL, Accelerator(attention_backend="flash"), BF16, FlashSegmentAttention),
    ("gemma-3-1b-it", FULL, Accelerator(attention_backend="unfused"), BF16, SegmentAttention),
    ("gemma-3-1b-it", ENGINE, Accelerator(), BF16, SegmentAttention),
    ("Qwen3-30B-A3B", FULL, Accelerator(), BF16, FlashSegmentAttention),
    ("Qwen3-30B-A3B", FULL, Accelerator(), Layout(bf16=True, context_parallel_size=2), SegmentAttention),
    ("Qwen2.5-7B-Instruct", FULL, Accelerator(), Layout(), SegmentAttention),
    ("Qwen2.5-7B-Instruct", FLASH, Accelerator(), BF16, FlashSegmentAttention),
    ("Qwen2.5-7B-Instruct", FULL, Accelerator(transformer_impl="local"), BF16, FlashSegmentAttention),
]


@pytest.mark.parametrize(("name", "found", "asked", "layout", "core"), ATTENDING)
def test_layers_of_local_modules_attend_with_what_is_there(
    name: str, found: Probe, asked: Accelerator, layout: Layout, core: type
) -> None:
    platform = decide(asked, layout, found, 2)
    arch = arch_of(name)
    with start.world(choose(), Layout(), 1):
        spec = layer_spec(arch, transformer_config(arch, layout, platform), platform, None)
    assert spec.layer_specs[0].submodules.self_attention.submodules.core_attention is core
    # What is planned for is the same; a plan takes both libraries to be installed.
    if found is FULL:
        run = resolve({**ASKED, "bf16": layout.bf16}, {})
        run = dataclasses.replace(run, layout=layout, accelerator=asked)
        assert kernels(run, arch, Cluster(8, 8, GPUS["h100"])).flash is (core is FlashSegmentAttention)


def test_flash_that_would_be_ignored_is_refused() -> None:
    asked, shared = Accelerator(attention_backend="flash"), dataclasses.replace(BF16, context_parallel_size=2)
    for layout in (shared, dataclasses.replace(BF16, packing=False)):
        with pytest.raises(ConfigError, match="for packed rows on one context-parallel rank; use auto, or Transformer Engine"):
            decide(asked, layout, FLASH, 2)
        decide(asked, layout, FULL, 2)
        run = dataclasses.replace(resolve(ASKED, {}), layout=layout, accelerator=asked)
        with pytest.raises(ConfigError, match="for packed rows on one context-parallel rank and for heads of at most 256"):
            check_covered(run, arch_of("gemma-3-1b-it"))
        check_covered(run, arch_of("Qwen2.5-7B-Instruct"))


FP8 = Accelerator(fp8_format="hybrid")
TEACHER = Accelerator(teacher_fp8=True)
BLOCKS = Accelerator(fp8_format="e4m3", fp8_recipe="blockwise")
LACKING: list[tuple[Accelerator, Probe, type[Exception], str]] = [
    (FP8, CPU, ConfigError, "--fp8-format needs a GPU"),
    (TEACHER, CPU, ConfigError, "--teacher-fp8 needs a GPU"),
    (FP8, FLASH, MissingDependency, "--fp8-format needs Transformer Engine"),
    (TEACHER, FLASH, MissingDependency, "--teacher-fp8 needs Transformer Engine"),
    (FP8, AMPERE, ConfigError, r"\(compute capability 8.0\) has no FP8"),
    (TEACHER, AMPERE, ConfigError, "--teacher-fp8: this GPU"),
    (BLOCKS, BLACKWELL, ConfigError, "blockwise is made for Hopper"),
    (BLOCKS, dataclasses.replace(FULL, cuda=(12, 8)), ConfigError, "needs CUDA 12.9, and torch is built for 12.8"),
    (
        BLOCKS,
        dataclasses.replace(FULL, transformer_engine="2.2.0"),
        MissingDependency,
        "needs Transformer Engine 2.3, not 2.2.0",
    ),
    (FP8, dataclasses.replace(FULL, transformer_engine="2.1"), MissingDependency, "needs Transformer Engine 2.2, not 2.1"),
    (Accelerator(transformer_impl="transformer_engine"), CPU, ConfigError, "needs a GPU"),
    (Accelerator(transformer_impl="transformer_engine"), BARE, MissingDependency, "needs Transformer Engine"),
    (Accelerator(tp_comm_overlap=True), CPU, ConfigError, "--tp-comm-overlap needs a GPU"),
    (Accelerator(tp_comm_overlap=True), BARE, MissingDependency, "--tp-comm-overlap needs Transformer Engine"),
    (Accelerator(attention_backend="fused"), FLASH, MissingDependency, "--attention-backend fused needs Transformer Engine"),
    (Accelerator(attention_backend="flash"), CPU, ConfigError, "--attention-backend flash needs a GPU"),
    (Accelerator(attention_backend="flash"), ENGINE, MissingDependency, "needs flash-attn"),
    (Accelerator(gradient_accumulation_fusion=True), CPU, ConfigError, "--gradient-accumulation-fusion needs a GPU"),
    (Accelerator(gradient_accumulation_fusion=True), ENGINE, MissingDependency, "fused_weight_gradient_mlp_cuda"),
]


@pytest.mark.parametrize(("asked", "found", "error", "words"), LACKING)
def test_what_is_asked_for_and_absent_is_refused(asked: Accelerator, found: Probe, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        decide(asked, BF16, found)
    assert "\n" not in str(caught.value)
    decide(asked, BF16, FULL)  # and taken where it is there


def test_fp8_says_what_it_is_and_pads_rows() -> None:
    both = decide(dataclasses.replace(FP8, teacher_fp8=True), BF16, FULL)
    said = " ".join(both.lines)
    assert "hybrid, tensorwise scaling" in said and "the teacher's layers in e4m3" in said and "head and losses are not" in said
    assert (both.row_multiple, decide(BLOCKS, BF16, FULL).row_multiple, decide(TEACHER, BF16, BLACKWELL).row_multiple) == (
        16,
        128,
        16,
    )


ASKED: dict[str, Any] = {
    "mode": "ema",
    "model_name": "model",
    "dataset": "addition",
    "output_dir": "run",
    "bf16": True,
    "global_batch_size": 64,
}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True}
ENDS = {f"account_for_{end}_in_pipeline_split": True for end in ("embedding", "loss")}
# Of each flag: what is asked for, and the fields of Megatron's configurations that must then be so. None: a flag of this
# program's own, which Megatron is told through the shape of the batches it is given.
ARRIVES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "tensor_model_parallel_size": (
        {"tensor_model_parallel_size": 2},
        {"model.tensor_model_parallel_size": 2, "model.expert_tensor_parallel_size": 2},
    ),
    "pipeline_model_parallel_size": ({"pipeline_model_parallel_size": 2}, {"model.pipeline_model_parallel_size": 2}),
    "virtual_pipeline_model_parallel_size": (
        {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"model.virtual_pipeline_model_parallel_size": 2},
    ),
    **{name: ({**ENDS, "pipeline_model_parallel_size": 2}, {f"model.{name}": True}) for name in ENDS},
    "context_parallel_size": ({"context_parallel_size": 2}, {"model.context_parallel_size": 2}),
    "expert_model_parallel_size": ({"expert_model_parallel_size": 2}, {"model.expert_model_parallel_size": 2}),
    "sequence_parallel": (TP, {"model.sequence_parallel": True}),
    "micro_batch_size": ({"micro_batch_size": 2}, None),
    "packing": ({"packing": False}, None),
    "global_batch_size": ({"global_batch_size": 32}, None),
    "use_distributed_optimizer": (
        SHARDED,
        {"ddp.use_distributed_optimizer": True, "optimizer.use_distributed_optimizer": True},
    ),
    "recompute_granularity": (
        {"recompute_granularity": "full"},
        {"model.recompute_granularity": "full", "model.recompute_method": "uniform", "model.recompute_num_layers": 1},
    ),
    "bf16": ({"bf16": True}, {"model.bf16": True, "optimizer.bf16": True}),
    "transformer_impl": ({"transformer_impl": "local"}, {"platform.layer_spec": "local"}),
    "attention_backend": ({"attention_backend": "fused"}, {"model.attention_backend": AttnBackend.fused}),
    "gradient_accumulation_fusion": ({"gradient_accumulation_fusion": False}, {"model.gradient_accumulation_fusion": False}),
    "tp_comm_overlap": ({"tp_comm_overlap": True, **TP}, {"model.tp_comm_overlap": True}),
    "overlap_grad_reduce": ({"overlap_grad_reduce": False}, {"ddp.overlap_grad_reduce": False}),
    "overlap_param_gather": (
        {"overlap_param_gather": True, **SHARDED},
        {"ddp.overlap_param_gather": True, "optimizer.overlap_param_gather": True},
    ),
    "fp8_format": ({"fp8_format": "e4m3"}, {"model.fp8": "e4m3", "model.fp8_recipe": "tensorwise", "model.fp8_wgrad": True}),
    "fp8_recipe": (
        {"fp8_format": "hybrid", "fp8_recipe": "blockwise"},
        {"model.fp8": "hybrid", "model.fp8_recipe": "blockwise", "optimizer.fp8_recipe": "blockwise"},
    ),
    "fp8_param_gather": (
        {"fp8_format": "hybrid", "fp8_param_gather": True, **SHARDED},
        {"model.fp8_param": True, "ddp.fp8_param_gather": True},
    ),
    "teacher_fp8": ({"teacher_fp8": True}, {"platform.teacher_fp8": "tensorwise", "model.fp8": None}),
}


def arch_of(name: str) -> Arch:
    return find_arch(name)[1]


def configured(flags: dict[str, Any]) -> dict[str, Any]:
    """Every field of Megatron's configurations for a run on eight of the best GPUs."""
    run = resolve({**ASKED, **flags}, {})
    validate(run, 8)
    platform = decide(run.accelerator, run.layout, FULL, 8)
    name = "Qwen3-30B-A3B" if "expert_model_parallel_size" in flags else "Qwen2.5-7B-Instruct"
    model = transformer_config(arch_of(name), run.layout, platform)
    parts = {
        "model": vars(model),
        "ddp": vars(distributed_config(run.layout, platform)),
        "optimizer": vars(optimizer_config(run.layout, run.optimization, platform)),
        "platform": vars(platform),
    }
    return {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}


@pytest.mark.parametrize("flag", ARRIVES)
def test_each_flag_arrives_in_megatrons_configuration(flag: str) -> None:
    asked, fields = ARRIVES[flag]
    assert flag in asked
    before, after = configured({"bf16": False} if flag == "bf16" else {}), configured(asked)
    if fields is None:
        changed = {name for name in after if after[name] != before[name] and not name.startswith("model.init")}
        assert not {name for name in changed - {"platform.notes"} if "method" not in name}, changed
        return
    assert {name: after[name] for name in fields} == fields
    assert any(before[name] != after[name] for name in fields), f"--{flag} changes none of its fields"


def test_no_flag_is_without_its_row() -> None:
    flags = {item.name for group in (Layout, Accelerator) for item in dataclasses.fields(group)}
    assert flags == ARRIVES.keys()


def test_delayed_scaling_looks_as_far_back_as_transformer_engine_does() -> None:
    fields = configured({"fp8_format": "hybrid", "fp8_recipe": "delayed"})
    assert (fields["model.fp8_amax_history_len"], fields["model.fp8_amax_compute_algo"]) == (1024, "max")


# Fields of the recipes of Transformer Engine 2.20.2 that a caller may set.
SHARED = {"fp8_format", "fp8_dpa", "fp8_mha", "backward_override"}
RECIPES = {
    "delayed": SHARED | {"margin", "amax_history_len", "amax_compute_algo", "scaling_factor_compute_algo", "reduce_amax"},
    "tensorwise": SHARED | {"use_power_2_scales"},
    "blockwise": SHARED | {"use_f32_scales", "x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_hands_transformer_engine_what_its_recipes_take(recipe: str) -> None:
    """Megatron's own function, which it defines only beside Transformer Engine, with recipes that note what they are given."""
    made: list[tuple[str, dict[str, Any]]] = []
    source = ast.parse(inspect.getsource(fp8_utils))
    function = next(one for one in ast.walk(source) if isinstance(one, ast.FunctionDef) and one.name == "get_fp8_recipe")

    def taking(name: str) -> Any:
        return lambda **given: made.append((name, given))

    recipes = SimpleNamespace(
        Format=SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID"),
        Float8CurrentScaling=taking("tensorwise"),
        Float8BlockScaling=taking("blockwise"),
    )
    scope = {
        **vars(fp8_utils),
        "transformer_engine": SimpleNamespace(common=SimpleNamespace(recipe=recipes)),
        "is_te_min_version": lambda version: True,
        "TEDelayedScaling": taking("delayed"),
    }
    exec(compile(ast.Module([function], []), "get_fp8_recipe", "exec"), scope)
    run = resolve({**ASKED, "fp8_format": "e4m3", "fp8_recipe": recipe}, {})
    scope["get_fp8_recipe"](
        transformer_config(arch_of("Qwen2.5-7B-Instruct"), run.layout, decide(run.accelerator, run.layout, FULL, 8))
    )
    ((name, given),) = made
    assert name == recipe and given["fp8_format"] == "E4M3"
    # Megatron's wrapper of delayed scaling reads the rest from the configuration itself.
    assert given.keys() - {"config", "override_linear_precision"} <= RECIPES[recipe]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed")
@pytest.mark.parametrize(
    ("recipe", "name"),
    [("delayed", "TEDelayedScaling"), ("tensorwise", "Float8CurrentScaling"), ("blockwise", "Float8BlockScaling")],
)
def test_megatron_makes_transformer_engines_recipe_of_it(recipe: str, name: str) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    run = resolve({**ASKED, "fp8_format": "e4m3", "fp8_recipe": recipe}, {})
    platform = decide(run.accelerator, run.layout, FULL, 8)
    made = get_fp8_recipe(transformer_config(arch_of("Qwen2.5-7B-Instruct"), run.layout, platform))
    assert type(made).__name__ == name and made.fp8_format.name == "E4M3"


def test_what_transformer_engine_does_not_cover_is_known() -> None:
    names = ["Qwen2.5-7B-Instruct", "Qwen3-8B", "Llama-3.1-8B-Instruct", "Qwen3-30B-A3B", "gemma-3-1b-it"]
    assert [name for name in names if not engine_covers(arch_of(name))] == ["Qwen3-30B-A3B", "gemma-3-1b-it"]


def test_the_teachers_own_module_is_never_built_in_fp8() -> None:
    platform = decide(Accelerator(fp8_format="hybrid", fp8_param_gather=True, teacher_fp8=True), BF16, FULL)
    bare: Platform = platform.without_fp8()
    assert (bare.fp8_format, bare.fp8_param_gather, bare.teacher_fp8) == (None, False, "tensorwise")
