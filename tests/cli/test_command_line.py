"""The command line: spellings of flags, help without torch, where a value comes from, and a run.json that repeats its run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unisd_megatron.cli import main
from unisd_megatron.cli.parser import given_settings, parse
from unisd_megatron.config import GROUPS, all_settings, setting_type
from unisd_megatron.modes import MODES
from unisd_megatron.resolve import resolve
from unisd_megatron.train.folder import write_run_file
from unisd_megatron.train.metrics import read_metrics
from unisd_megatron.validation import validate_objective
from unisd_megatron.weights.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("no_queue_for_later_workers")


def test_every_flag_has_every_spelling() -> None:
    for group, item in all_settings():
        kind, choices, _ = setting_type(GROUPS[group], item.name)
        value = [] if kind is bool else [choices[0] if choices else {int: "3", float: "0.5", str: "x"}[kind]]
        first, *rest = item.name.split("_")
        spellings = {item.name, item.name.replace("_", "-"), "-".join([first, "_".join(rest)] if rest else [first])}
        parsed = [given_settings(parse(["train", f"--{name}", *value]))[0] for name in spellings]
        parsed += [given_settings(parse(["train", f"--{name}={value[0]}"]))[0] for name in spellings if value]
        assert all(list(flags) == [item.name] and flags == parsed[0] for flags in parsed), item.name


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, asked for by a file and by flags that contradict it."""
    folder = tmp_path_factory.mktemp("earlier")
    settings = "learning-rate: 1e-3\nmax_steps: 7\nmode: unisd_star\nnum_auxiliary_contexts: 2\nfewshot_method: random\n"
    (folder / "settings.yaml").write_text(settings)
    write_tiny("qwen2", folder / "model", seed=0)
    where = ["--model_name", str(folder / "model"), "--output_dir", str(folder / "run")]
    size = ["--num_train_examples", "16", "--max_completion_length", "4", "--max_steps", "1"]
    assert main(["train", "--dataset", "addition", *where, *size, "--config", str(folder / "settings.yaml")]) == 0
    return folder / "run"


def test_the_command_line_wins_and_origins_are_recorded(earlier: Path) -> None:
    record = json.loads((earlier / "run.json").read_text())
    assert record["settings"]["max_steps"] == len(read_metrics(earlier)) == 1
    assert record["settings"]["learning_rate"] == 1e-3
    expected = {"max_steps": "flag", "learning_rate": "file", "mode": "file", "teacher": "mode", "alpha": "default"}
    assert {name: record["origins"][name] for name in expected} == expected
    assert record["origins"].keys() == record["settings"].keys()


def test_a_length_on_the_command_line_takes_the_place_of_the_one_in_the_file() -> None:
    for file, flags in (({"num_train_epochs": 2}, {"max_steps": 3}), ({"max_steps": 3}, {"num_train_epochs": 2.0})):
        schedule = resolve({"model_name": "m", "mode": "vanilla", **flags}, file).schedule
        expected = {"max_steps": None, "num_train_epochs": 1.0} | flags
        assert (schedule.max_steps, schedule.num_train_epochs) == (expected["max_steps"], expected["num_train_epochs"])


def test_released_semantics_run_without_packing() -> None:
    run = resolve({"model_name": "m", "mode": "vanilla", "semantics": "released"}, {})
    assert not run.layout.packing and run.origins["packing"] == "mode"
    validate_objective(run)


def test_run_json_repeats_the_run(earlier: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(earlier / "run.json"), "--output_dir", str(tmp_path / "again")]) == 0
    first, again = (json.loads((folder / "run.json").read_text())["settings"] for folder in (earlier, tmp_path / "again"))
    assert again == first | {"output_dir": str(tmp_path / "again")}
    assert [row["loss"] for row in read_metrics(tmp_path / "again")] == [row["loss"] for row in read_metrics(earlier)]


@pytest.mark.parametrize("mode", MODES)
def test_run_json_of_every_mode_is_accepted_again(tmp_path: Path, mode: str) -> None:
    contexts = {"num_auxiliary_contexts": 2} if MODES[mode].agreement else {}
    run = resolve({"mode": mode, "model_name": "m", "output_dir": "o", "learning_rate": 1e-3, **contexts}, {})
    write_run_file(run, {}, tmp_path, {})
    again = resolve(*given_settings(parse(["train", "--config", str(tmp_path / "run.json"), "--output-dir", "o"])))
    assert again == run


HELP = """import sys, unisd_megatron.cli as c
try: c.main(sys.argv[1:])
except SystemExit as end: sys.exit(end.code or 10 * ('torch' in sys.modules))"""
COMMANDS = [
    "",
    "train",
    "tiny",
    "convert",
    "convert import",
    "convert export",
    "verify",
    "parity",
    "parity golden",
    "evaluate",
    "prepare negatives",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_help_of_every_subcommand_loads_no_torch(words: str) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *words.split(), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: unisd {words}".strip() in done.stdout
