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
PLAIN = BASE | {"mode": "vanilla"}
REPLAY = {"mode": "vanilla", "rollout": "replay"}


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
        ({"settings": BASE | {"exit_duration_in_mins": 5}}, "a stopped one is no result"),
        ({"settings": BASE | {"tensorboard_dir": "boards"}}, "one folder for all runs"),
        ({"settings": BASE | {"use_vllm": True, "vllm_mode": "server", "vllm_server_urls": "http://a:1"}}, "would be shared"),
        ({"settings": BASE | {"use_vllm": True, "vllm_mode": "server"}}, "would be shared"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": [1, 2**63]}, f"grid.yaml: --seed is {2**63}"),
        ({"settings": {"model_name": "m"}}, "unknown dataset None"),
        ({"settings": BASE | {"dataset": ["a"]}}, "grid.yaml, entry 1: unknown dataset ['a']"),
        ({"settings": PLAIN | {"dataset": "gpqa"}}, "grid.yaml, entry 1: --dataset gpqa has no split 'train'"),
        ({"entries": [{"mode": "vanilla"}, {"mode": ["a"]}]}, "grid.yaml, entry 2: unknown --mode ['a']"),
        ({"settings": PLAIN | {"model_name": "./nope/model"}}, "entry 1: model_name: ./nope/model: no such folder"),
        ({"settings": BASE | {"model_name": 5}}, "entry 1: model_name is 5; expected str"),
        ({"settings": BASE | {"max_steps": 3, "max-steps": 4}}, "grid.yaml: settings: max_steps stands there twice"),
        ({"entries": [REPLAY | {"replay_path": "absent"}]}, "entry 1: replay_path: absent: no such folder"),
        ({"entries": [{"mode": "agreement_tok_retrieval", "num_auxiliary_contexts": 2, "retrieval_model": "./m"}]}, "./m: no"),
        ({"not_run": [{"mode": ["a"], "why": "x"}]}, "expected a list of `mode` and `why`"),
        ({"settings": BASE | {"tensor_model_parallel_size": 2}, "processes": 3}, "3 processes cannot hold"),
        (
            {"settings": PLAIN | {"data_path": "absent.jsonl"}},
            "entry 1: data_path: absent.jsonl: no such file",
        ),
        ({"settings": PLAIN | {"eval_steps": 1, "eval_data_path": "absent.jsonl"}}, "absent.jsonl: no such"),
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


@pytest.mark.parametrize(
    ("dataset", "flags", "says"),
    [
        ("addition", {"max_completion": 3}, "unknown flag 'max_completion'"),
        ("addition", {"max_completion_length": "40"}, "max_completion_length is '40'; expected int"),
        ("addition", {"max_completion_length": "abc"}, "max_completion_length is 'abc'; expected int"),
        ("addition", {"max_completion_length": [40]}, "max_completion_length is [40]; expected int"),
        ("addition", {"max_completion_length": 40.5}, "max_completion_length is 40.5; expected int"),
        ("addition", {"max_completion_length": 0}, "--max_completion_length is 0"),
        ("addition", {"temperature": "hot"}, "temperature is 'hot'; expected float"),
        ("addition", {"method": "foo"}, "method is 'foo'; use one of extraction, logprobs"),
        ("addition", {"method": "logprobs"}, "addition has none"),
        ("gsm8k", {"method": "logprobs"}, "gsm8k has none"),
        ("addition", {"engine": "foo"}, "engine is 'foo'; use one of transformers, vllm"),
        ("addition", {"semantics": "foo"}, "semantics is 'foo'; use one of corrected, released"),
        ("addition", {"split": "foo"}, "split is 'foo'; use one of test, train, all"),
        ("gpqa", {"split": "train"}, "for evaluation only"),
        ("addition", {"max_examples": -3}, "--max_examples is -3"),
        ("addition", {"max_examples": "x"}, "max_examples is 'x'; expected int"),
        ("addition", {"fit": "no"}, "fit is 'no'; expected bool"),
        ("addition", {"seed": 1.5}, "seed is 1.5; expected int"),
        ("addition", {"seed": 2**64}, "must fit in 64 bits"),
        ("addition", {"retention": True}, "--base_model_name"),
        ("addition", {"retention": True, "base_model_name": "/nope"}, "/nope: no such folder"),
        ("addition", {"retention": True, "base_model_name": "a/b", "base_answers": "nope"}, "nope: no finished evaluation"),
        ("gsm8k", {"data_path": 5}, "data_path is 5; expected str"),
        ("gsm8k", {"data_path": "absent.jsonl"}, "absent.jsonl: no such data file"),
        ("addition", {"temperature": 0.5, "split": None}, "split must not be empty"),
        ("addition", [], "expected `name: value`"),
    ],
)
def test_a_wrong_evaluation_is_refused_before_anything_is_trained(tmp_path: Path, dataset: str, flags: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, settings=PLAIN, evaluate={dataset: flags})
    assert says in str(caught.value) and str(caught.value).startswith(f"grid.yaml: evaluate: {dataset}: ")


def test_evaluations_that_are_stated_otherwise_but_alike_are_the_same(tmp_path: Path) -> None:
    sweeps = (built(tmp_path, settings=PLAIN, evaluate={"addition": {"temperature": value}}) for value in (1, 1.0))
    assert len({sweep.base[0]["evaluation"] for sweep in sweeps}) == 1


def test_a_run_is_evaluated_on_a_file_that_can_be_read(tmp_path: Path) -> None:
    """Of the default evaluation too, which no one states."""
    (tmp_path / "held_out.jsonl").write_text('{"question": "no answer"}\n')
    settings = BASE | {
        "dataset": "gsm8k",
        "mode": "vanilla",
        "eval_steps": 1,
        "eval_data_path": str(tmp_path / "held_out.jsonl"),
    }
    with pytest.raises(ConfigError, match=r"^grid.yaml, entry 1: evaluate: gsm8k: .*held_out.jsonl, line 1"):
        built(tmp_path, settings=settings)


def test_the_report_is_drawn_again_for_other_reasons_why_not(tmp_path: Path) -> None:
    def report(why: str) -> str:
        return built(tmp_path, settings=PLAIN, not_run=[{"mode": "ema", "why": why}]).nodes[-1].identity

    assert report("too slow") == report("too slow") != report("measured before")


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


def test_each_run_names_the_evaluation_of_its_own_checkpoint(tmp_path: Path) -> None:
    """As it is evaluated itself: lengths differ, and so do the places."""
    entries = [
        {"mode": "clip", "model_name": model, "max_completion_length": length}
        for model, length in (("org/small", 40), ("org/small", 60), ("org/large", 40))
    ]
    sweep = built(tmp_path, entries=entries, seeds=[0, 1])
    commands = {node.folder: node.command for node in sweep.nodes}
    assert len({row["base"]["addition"] for row in sweep.runs}) == 3 == len(sweep.base)
    for row, entry in zip(sweep.runs, [entry for entry in entries for _ in (0, 1)], strict=True):
        own, start = (commands[row[kind]["addition"]] for kind in ("evaluations", "base"))
        assert start[start.index("--model_name") + 1] == entry["model_name"]
        lengths = {command[command.index("--max_completion_length") + 1] for command in (own, start)}
        assert lengths == {str(entry["max_completion_length"])}


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
    (tmp_path / "twice.yaml").write_text("seeds: [0]\nsettings:\n  dataset: addition\n  max_steps: 3\n  max_steps: 4\n")
    wrong = {"absent": "no such file", "broken": "broken.yaml: ", "twice": "twice.yaml: line 5: 'max_steps' stands in line 4"}
    for name, says in wrong.items():
        with pytest.raises(ConfigError, match=says):
            read(str(tmp_path / f"{name}.yaml"))


def test_what_a_merge_key_brings_may_be_stated_again(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("entries:\n  - &one {mode: clip, alpha: 0.0}\n  - {<<: *one, alpha: 0.5}\n")
    assert [entry["alpha"] for entry in read(str(tmp_path / "grid.yaml")).entries] == [0.0, 0.5]
