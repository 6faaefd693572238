"""Grids: what is stated, what it becomes, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unisd_megatron.errors import ConfigError
from unisd_megatron.experiments import graph, named, recipes
from unisd_megatron.experiments.graph import Sweep
from unisd_megatron.experiments.grid import from_content, read
from unisd_megatron.experiments.identity import Contents
from unisd_megatron.modes import MODES

BASE = {"dataset": "addition", "model_name": "someone/model"}


def built(folder: Path, **content: Any) -> Sweep:
    return graph.build(from_content({"settings": BASE} | content, "grid.yaml"), folder, Contents())


def test_entries_times_crossed_values_times_seeds(tmp_path: Path) -> None:
    sweep = built(tmp_path, entries=[{"mode": "vanilla"}, {"mode": "ema"}], cross={"alpha": [0.0, 0.5]}, seeds=[0, 1, 2])
    assert len(sweep.runs) == 12
    assert {row["name"] for row in sweep.runs} == {f"{mode} alpha={a}" for mode in ("vanilla", "ema") for a in (0.0, 0.5)}
    assert (
        len({row["train"] for row in sweep.runs}) == len({e for row in sweep.runs for e in row["evaluations"].values()}) == 12
    )


def test_runs_that_differ_in_alpha_alone_do_not_collide(tmp_path: Path) -> None:
    sweep = built(tmp_path, entries=[{"mode": "clip"}], cross={"alpha": [0.0, 0.5]})
    assert len({row["train"] for row in sweep.runs}) == 2
    assert [row["settings"] for row in sweep.runs] == [{"alpha": 0.0}, {"alpha": 0.5}]


def test_the_output_folder_does_not_make_another_run(tmp_path: Path) -> None:
    one, other = (built(tmp_path / name, entries=[{"mode": "clip"}]) for name in "ab")
    assert [row["train"] for row in one.runs] == [row["train"] for row in other.runs]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"entires": []}, "unknown key 'entires'"),
        ({"entries": [{"mode": "clip"}, {"mode": "clip"}]}, "stands there twice"),
        ({"entries": [{"mode": "clip"}, {"mode": "clip", "micro_batch_size": 4}]}, "stands there twice"),
        ({"entries": [{"mode": "vanilla", "token_margin": 1}]}, "unknown setting 'token_margin'"),
        ({"entries": [{"mode": "vanilla", "gamma_agreement": 0.1}]}, "does nothing in --mode vanilla"),
        ({"entries": [{"mode": "nothing"}]}, "unknown --mode 'nothing'"),
        ({"entries": [{"mode": "clip", "alpha": 1.0}], "cross": {"alpha": [0.0]}}, "which `cross` varies"),
        ({"settings": BASE | {"seed": 3}}, "give `seeds`"),
        ({"settings": BASE | {"output_dir": "x"}}, "decided by the sweep"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"settings": {"model_name": "m"}}, "unknown dataset None"),
        ({"evaluate": {"addition": {"retention": True}}}, "--base_model_name"),
        ({"evaluate": {"addition": {"max_completion": 3}}}, "unknown flag 'max_completion'"),
        ({"settings": BASE | {"tensor_model_parallel_size": 2}, "processes": 3}, "3 processes cannot hold"),
        ({"settings": BASE | {"mode": "vanilla", "data_path": "absent.jsonl"}}, "absent.jsonl: no such file"),
        ({"entries": [{"mode": "vanilla", "max_steps": 5, "num_train_epochs": 2.0}]}, "--num_train_epochs does nothing"),
        ({"entries": [{"mode": "contrastive", "negatives": "generated"}]}, "addition has no kinds of wrong solutions"),
        ({"entries": [{"mode": "vanilla", "semantics": "released", "packing": True}]}, "which --packing gives up"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, **content)
    assert says in str(caught.value)


def test_runs_on_several_data_sets_are_told_apart(tmp_path: Path) -> None:
    entries, base = [{"mode": "vanilla"}, {"mode": "clip"}], {"model_name": "someone/model"}
    sweep = built(tmp_path, entries=entries, settings=base, cross={"dataset": ["addition", "gsm8k"]})
    expected = [f"{mode} dataset={dataset}" for mode in ("vanilla", "clip") for dataset in ("addition", "gsm8k")]
    assert [row["name"] for row in sweep.runs] == expected
    assert [row["name"] for row in built(tmp_path, entries=entries).runs] == ["vanilla", "clip"]


def test_a_released_experiment_has_the_micro_batches_of_the_recipe_unless_others_are_stated() -> None:
    stated = BASE | {"semantics": "released"}
    layouts = [cell.run.layout for cell in named.grid("clip", stated, "orchestrator", [1], None).cells()]
    assert {(one.micro_batch_size, one.packing) for one in layouts} == {(4, False)}
    cells = named.grid("clip", stated | {"micro_batch_size": 2}, "orchestrator", [1], None).cells()
    assert {cell.run.layout.micro_batch_size for cell in cells} == {2}


def test_what_runs_need_is_prepared_once_for_all_seeds(tmp_path: Path) -> None:
    entries = [
        {"mode": "agreement_tok_retrieval", "num_auxiliary_contexts": 2},
        {"mode": "agreement_seq_retrieval", "num_auxiliary_contexts": 3},
        {"mode": "agreement_seq_induction", "num_auxiliary_contexts": 3},
        {"mode": "contrastive", "negatives": "generated"},
        {"mode": "vanilla"},
    ]
    sweep = built(tmp_path, entries=entries, settings=BASE | {"dataset": "gsm8k"}, seeds=[0, 1])
    kinds = [node.command[node.command.index("prepare") + 1] for node in sweep.nodes if node.kind == "prepare"]
    assert sorted(kinds) == ["embeddings", "induction", "negatives"]
    needs = {node.name.split("-")[1]: node.needs for node in sweep.nodes if node.kind == "train"}
    assert needs["vanilla"] == () and len(needs["contrastive"]) == 1
    assert needs["agreement_tok_retrieval"] == needs["agreement_seq_retrieval"]


def test_evaluations_follow_their_training_and_the_base_follows_nothing(tmp_path: Path) -> None:
    sweep = built(tmp_path, entries=[{"mode": "clip"}], evaluate={"addition": {}, "gsm8k": {"max_completion_length": 9}})
    evaluations = [node for node in sweep.nodes if node.kind == "evaluate"]
    assert [len(node.needs) for node in evaluations] == [1, 1, 0, 0]
    assert [row["dataset"] for row in sweep.base] == ["addition", "gsm8k"]
    assert "9" in evaluations[1].command and str(tmp_path) in " ".join(evaluations[1].command)


def test_the_study_has_every_mode_or_says_why_not() -> None:
    study = named.study()
    told = {row["mode"]: row["why"] for row in study.not_run}
    assert {entry["mode"] for entry in study.entries} | told.keys() >= MODES.keys() | set(named.BASELINES)
    assert all(told.values()) and not {entry["mode"] for entry in study.entries} & told.keys()
    assert list(study.seeds) == [0, 1, 2]
    assert len(study.cells()) == len(study.entries)


def test_named_experiments_stand_beside_their_control() -> None:
    for name, modes in named.NAMED.items():
        if set(modes) <= MODES.keys():
            cells = named.grid(name, BASE, "orchestrator", [1], None).cells()
            assert [cell.run.mode for cell in cells] == list(dict.fromkeys(("vanilla", *modes)))


def test_a_baseline_keeps_the_sampling_of_its_own_paper() -> None:
    assert "temperature" not in recipes.method(named.BASELINES[0], "direct", "corrected")
    assert "temperature" not in named.study().settings


def test_a_file_that_is_no_grid_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    for path, says in ((tmp_path / "absent.yaml", "no such file"), (tmp_path / "broken.yaml", "broken.yaml")):
        with pytest.raises(ConfigError, match=says):
            read(str(path))
