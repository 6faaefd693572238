"""Reading data files: what is read is everything, and what is broken is named."""

import gzip
import json
from pathlib import Path

import pytest

from unisd_megatron.data import TASKS
from unisd_megatron.data.tasks.gsm8k import Gsm8k
from unisd_megatron.errors import DataError, RequestError

ROWS = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(3, 8)]


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(path: Path, text: str) -> str:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    text = lines(ROWS) if "jsonl" in name else json.dumps(ROWS)
    records = Gsm8k().load("train", written(tmp_path / name, text))
    assert [record.id for record in records] == [f"gsm8k_{index}" for index in range(len(ROWS))]
    assert [dict(record.fields) for record in records] == ROWS


def test_a_blank_line_is_no_record_but_counts_as_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", lines(ROWS[:1]) + "\n" + lines(ROWS[1:2]) + '{"question": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: not JSON"):
        Gsm8k().load("train", path)
    path = written(tmp_path / "rows.jsonl", lines(ROWS[:1]) + "\n" + lines(ROWS[1:2]))
    assert len(Gsm8k().load("train", path)) == 2


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"question": "Q"}', "field 'answer' is missing"),
        ('{"question": "", "answer": "#### 1"}', "question is ''"),
        ('{"question": 3, "answer": "#### 1"}', "question is 3"),
        ('{"question": "Q", "answer": null}', "answer is None"),
        ('{"question": "Q", "answer": "just words"}', "#### <number>"),
        ('{"question": "Q", "answer": "#### many"}', "#### <number>"),
        ('["Q", "#### 1"]', "expected an object, got list"),
        ('{"question": "Q", ', "not JSON"),
    ],
)
def test_a_broken_line_is_named_with_its_number_and_reason(tmp_path: Path, broken: str, reason: str) -> None:
    path = written(tmp_path / "rows.jsonl", lines(ROWS) + broken + "\n" + lines(ROWS))
    with pytest.raises(DataError, match="line 6") as caught:
        Gsm8k().load("train", path)
    assert reason in str(caught.value) and "rows.jsonl" in str(caught.value)


def test_a_broken_entry_of_a_json_list_is_named_with_its_number(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", json.dumps([*ROWS, {"question": "Q"}]))
    with pytest.raises(DataError, match="record 6: not a record of gsm8k: field 'answer' is missing"):
        Gsm8k().load("train", path)


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", ""), ("rows.jsonl", "\n\n"), ("rows.json", "[]")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        Gsm8k().load("train", written(tmp_path / name, text))


@pytest.mark.parametrize(("name", "text"), [("rows.json", '{"a": 1}'), ("rows.csv", "a,b"), ("rows", "a,b")])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match=r"expected a list|unknown kind"):
        Gsm8k().load("train", written(tmp_path / name, text))


def test_a_file_that_cannot_be_read_is_an_error_of_the_request(tmp_path: Path) -> None:
    """Not a traceback: the shell's exit status for a wrong request depends on the class."""
    latin, cut, plain = tmp_path / "latin.jsonl", tmp_path / "cut.jsonl.gz", tmp_path / "plain.jsonl.gz"
    latin.write_bytes(lines(ROWS).encode() + '{"question": "né"}'.encode("latin-1"))
    cut.write_bytes(gzip.compress(lines(ROWS).encode())[:-20])
    plain.write_bytes(lines(ROWS).encode())
    for path in (latin, cut, plain, tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(RequestError, match=path.name):
            Gsm8k().load("train", str(path))


def test_an_id_that_two_records_share_is_named_with_both_places(tmp_path: Path) -> None:
    """Merged silently, one of the two would be trained on or scored as the other."""
    rows = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}]
    path = written(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: the id 1\+2 is that of .*rows\.jsonl, line 1 too; "):
        TASKS["addition"]().load("all", path)


@pytest.mark.parametrize("name", TASKS)
def test_the_table_of_tasks_knows_every_task_by_its_own_name(name: str) -> None:
    assert TASKS[name].name == name
