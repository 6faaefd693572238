"""The recipes are files that resolve, and say what the paper's command and orchestrator say (method 2.1 and 2.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unisd_megatron.config import Run
from unisd_megatron.experiments import recipes
from unisd_megatron.modes import MODES
from unisd_megatron.prepare.needs import kinds_of, task_of
from unisd_megatron.resolve import resolve
from unisd_megatron.validation import validate

FOLDER = Path(__file__).parents[2] / "examples/recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))


def run_of(path: Path) -> Run:
    run = resolve({"output_dir": "run"}, yaml.safe_load(path.read_text()), path.name)
    validate(run, 1)
    return run


def test_there_is_one_for_every_mode_launch_and_semantics() -> None:
    expected = {f"{a}/{b}/{mode}.yaml" for a in recipes.LAUNCHES for b in recipes.SEMANTICS for mode in recipes.PUBLISHED}
    assert {str(path.relative_to(FOLDER)) for path in FILES} == expected
    assert set(recipes.PUBLISHED) <= MODES.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_each_resolves_and_is_what_the_table_gives(path: Path) -> None:
    launch, semantics, mode = path.parts[-3], path.parts[-2], path.stem
    assert path.read_text() == recipes.text(mode, launch, semantics), "run examples/recipes/write.py"  # type: ignore[arg-type]
    run = run_of(path)
    assert (run.mode, run.objective.semantics) == (mode, semantics)
    common = (run.optimization.learning_rate, run.optimization.lr_scheduler_type, run.optimization.warmup_ratio)
    assert common == (2e-5, "cosine", 0.1)
    assert (run.schedule.num_train_epochs, run.schedule.max_steps, run.schedule.seed) == (1.0, None, 42)
    assert (run.rollout.temperature, run.rollout.top_p, run.optimization.weight_decay) == (0.7, 1.0, 0.0)
    lengths = (run.data.max_prompt_length, run.rollout.max_completion_length)
    assert lengths == {"direct": (1024, 2048), "orchestrator": (3072, 1024)}[launch]
    assert run.layout.packing == (semantics == "corrected")  # released: means over micro-batches of one size
    halved = (launch, semantics, mode) == ("orchestrator", "released", "unisd_star")
    assert (run.layout.micro_batch_size, run.layout.global_batch_size) == ((2, 8) if halved else (4, 16))


DIRECT: dict[str, dict[str, Any]] = {
    "agreement_seq_random": {"gamma_agreement": 1.0, "num_auxiliary_contexts": 3, "demo_k": 1, "agreement_stat": "var"},
    "agreement_tok_retrieval": {"gamma_agreement": 1.0, "retrieval_model": "sentence-transformers/all-MiniLM-L6-v2"},
    "agreement_tok_induction": {"num_demos": 5, "induction_max_length": 256, "cache_temperature": 0.7},
    "ema": {"ref_model_sync_steps": 10, "ref_model_mixup_beta": 0.9},
    "contrastive": {"contrastive_weight": 0.1, "contrastive_margin": 0.5},
    "match_joint": {"final_layer_distill_weight": 0.1},
    "clip": {"token_clip": 10.0, "alpha": 0.0},
    "unisd_star": {"gamma_agreement": 1.0, "contrastive_weight": 0.1, "contrastive_margin": 0.5}
    | {"final_layer_distill_weight": 0.1, "ref_model_sync_steps": 10, "ref_model_mixup_beta": 0.9},
}
ORCHESTRATOR: dict[str, dict[str, Any]] = {
    "agreement_seq_random": {"gamma_agreement": 0.01, "num_auxiliary_contexts": 3},
    "agreement_tok_retrieval": {"gamma_agreement": 0.01, "num_auxiliary_contexts": 3},
    "agreement_seq_induction": {"gamma_agreement": 0.01, "num_auxiliary_contexts": 3, "num_demos": 3},
    "ema": {"ref_model_sync_steps": 10, "ref_model_mixup_beta": 0.9},
    "contrastive": {"contrastive_weight": 0.1, "contrastive_margin": 0.5},
    "match_joint": {"final_layer_distill_weight": 0.1},
    "clip": {"token_clip": 10.0, "alpha": 0.0},
    "unisd_star": {"fewshot_method": "retrieval", "gamma_agreement": 0.001, "num_auxiliary_contexts": 3}
    | {"contrastive_weight": 0.01, "contrastive_margin": 0.1, "final_layer_distill_weight": 0.01}
    | {"ref_model_sync_steps": 10, "ref_model_mixup_beta": 0.98},
}


@pytest.mark.parametrize("semantics", recipes.SEMANTICS)
@pytest.mark.parametrize(("launch", "table"), [("direct", DIRECT), ("orchestrator", ORCHESTRATOR)])
def test_the_settings_of_each_mode(launch: str, table: dict[str, dict[str, Any]], semantics: str) -> None:
    for mode, expected in table.items():
        flat = run_of(FOLDER / launch / semantics / f"{mode}.yaml").flat()
        assert {name: flat[name] for name in expected} == expected, mode


def test_what_shapes_a_released_run_is_part_of_its_method() -> None:
    """A named experiment takes the method without the machine."""
    assert recipes.method("clip", "orchestrator", "released")["micro_batch_size"] == 4
    assert recipes.method("unisd_star", "orchestrator", "released")["micro_batch_size"] == 2
    assert "micro_batch_size" not in recipes.method("clip", "orchestrator", "corrected")


def test_wrong_solutions_are_written_by_a_model_whatever_the_data_set() -> None:
    for mode in ("contrastive", "unisd_star"):
        for launch in recipes.LAUNCHES:
            for dataset in ("scienceqa", "mbpp", "tooluse"):
                stated = recipes.method(mode, launch, "corrected") | {"dataset": dataset, "model_name": "someone/model"}
                run = resolve({}, stated)
                assert "negatives" in kinds_of(run, task_of(run.data, "corrected")), (mode, launch, dataset)


def test_clipping_is_part_of_unisd_star_in_the_paper_only() -> None:
    for launch in recipes.LAUNCHES:
        clips = {one: run_of(FOLDER / launch / one / "unisd_star.yaml").objective.token_clip for one in recipes.SEMANTICS}
        assert clips == {"corrected": 10.0, "released": None}
