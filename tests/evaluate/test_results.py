"""Rows that survive a kill, belong to one set of settings, and never end up in somebody else's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unisd_megatron.errors import CheckFailed, CheckpointError, ConfigError
from unisd_megatron.evaluate.results import ANSWERS, Ledger, locked, read_finished

KEY = {"dataset": "gsm8k", "temperature": 0.0, "samples": (1, 2)}
ROWS = [{"id": f"q{i}", "text": "a\nb\u2028c\ud800"} for i in range(5)]


def filled(folder: Path) -> Ledger:
    ledger = Ledger(folder, ANSWERS, KEY)
    ledger.append(ROWS[:2])
    ledger.append(ROWS[2:4])
    return ledger


def test_rows_come_back(tmp_path: Path) -> None:
    filled(tmp_path / "new")
    assert Ledger(tmp_path / "new", ANSWERS, KEY).rows == ROWS[:4]


@pytest.mark.parametrize("torn", ['{"id": "q4", "te', '{"id": "q4"}', "\x00\x00"])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path, torn: str) -> None:
    filled(tmp_path)
    complete = (tmp_path / "answers.jsonl").read_bytes()
    with (tmp_path / "answers.jsonl").open("a") as stream:
        stream.write(torn)
    ledger = Ledger(tmp_path, ANSWERS, KEY)
    assert ledger.rows == ROWS[:4]
    ledger.append(ROWS[4:])
    assert (tmp_path / "answers.jsonl").read_bytes() == complete + (json.dumps(ROWS[4]) + "\n").encode()


def test_rows_that_are_forgotten_are_written_over(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    expected = (tmp_path / "answers.jsonl").read_bytes()
    ledger.keep(3)
    ledger.append(ROWS[3:4])
    assert (tmp_path / "answers.jsonl").read_bytes() == expected


def test_a_broken_line_among_others_is_named(tmp_path: Path) -> None:
    filled(tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join([lines[0], "{oops\n", *lines[2:]]))
    with pytest.raises(CheckpointError, match=r"answers\.jsonl, line 2: not JSON"):
        Ledger(tmp_path, ANSWERS, KEY)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"temperature": 0.7}, "temperature 0.0 there, 0.7 here"), ({"seed": 1}, "seed null there, 1 here")],
)
def test_rows_of_other_settings_are_refused(tmp_path: Path, change: dict[str, float], words: str) -> None:
    filled(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        Ledger(tmp_path, ANSWERS, KEY | change)


def test_a_folder_of_something_else_is_refused_and_a_new_one_not_made(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already and holds no answers"):
        Ledger(tmp_path, ANSWERS, KEY)
    Ledger(tmp_path / "new", ANSWERS, KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unfinished_evaluations_are_not_compared_with(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(CheckpointError, match="no finished evaluation"):
        read_finished(tmp_path)
    (tmp_path / "result.json").write_text('{"answers": 4}')
    assert read_finished(tmp_path).rows == ROWS[:4]


@pytest.mark.parametrize("kept", [None, 0, 3])
def test_a_finished_evaluation_without_all_its_answers_says_so(tmp_path: Path, kept: int | None) -> None:
    filled(tmp_path)
    (tmp_path / "result.json").write_text('{"answers": 4}')
    answers = tmp_path / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    if kept is None:
        answers.unlink()
    else:
        answers.write_text("".join(lines[:kept]))
    with pytest.raises(CheckpointError, match=rf"answers\.jsonl holds {kept or 0} answers and result\.json speaks of 4"):
        read_finished(tmp_path)


def test_what_is_extended_is_not_called_complete(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    (tmp_path / "result.json").write_text('{"answers": 4}')
    ledger.append(ROWS[4:])
    assert not (tmp_path / "result.json").exists()


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with locked(folder):
        with pytest.raises(ConfigError, match="new: another process is writing it"), locked(folder):
            pass
        filled(folder)
    with locked(folder):
        assert len(Ledger(folder, ANSWERS, KEY).rows) == 4
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"), locked(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"new", "notes.txt"}


def test_rows_that_cannot_be_written_end_the_work_with_the_reason(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new", ANSWERS, KEY)
    (tmp_path / "new" / "answers.jsonl").mkdir(parents=True)
    with pytest.raises(CheckFailed, match=r"new: could not be written \(Is a directory\)"):
        ledger.append(ROWS)
