"""Where rows come from: parquet and the hub's library, read for real; what cannot be read is one line that says so."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unisd_megatron.data.sources import read_rows
from unisd_megatron.data.tasks.medmcqa import MedMcqa
from unisd_megatron.errors import DataError

ROWS = [
    {
        "id": str(number),
        "question": f"Q{number}?",
        "opa": "a",
        "opb": "b",
        "opc": "c",
        "opd": "d",
        "cop": number % 3,
        "exp": None,
    }
    for number in range(5)
]


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow, which is an extra")
    parquet_files = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow, which is an extra")
    parquet_files.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_parquet_gives_the_rows_of_all_row_groups_with_their_place(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", ROWS)
    assert [row for _, _, row in read_rows(path)] == ROWS
    assert [(where, index) for where, index, _ in read_rows(path)] == [(f"{path}, row {n}", n) for n in range(5)]
    assert [record.id for record in MedMcqa().load("train", str(path))] == [f"medmcqa_{n}" for n in range(5)]


def test_nested_columns_and_nulls_come_as_lists_and_none(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"choices": ["x", "y"], "image": None}, {"choices": [], "image": {"path": "a.png"}}]
    assert [row for _, _, row in read_rows(parquet(tmp_path / "rows.parquet", rows))] == rows


def test_a_broken_row_of_parquet_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", [*ROWS, ROWS[0] | {"cop": 4}])
    with pytest.raises(DataError, match=r"rows\.parquet, row 5: not a record of medmcqa: cop is 4"):
        MedMcqa().load("train", str(path))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_broken_parquet_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = parquet(tmp_path / "rows.parquet", ROWS)
    path.write_bytes({"cut": path.read_bytes()[:-9], "text": b"question,answer\n", "empty": b""}[damage])
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as parquet: ") as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)


def test_an_object_of_records_gives_each_with_its_key_as_id(tmp_path: Path) -> None:
    path = tmp_path / "problems.json"
    path.write_text(json.dumps({"7": {"question": "a"}, "9": {"question": "b", "id": "own"}}))
    assert [(where.removeprefix(f"{path}, "), row) for where, _, row in read_rows(path)] == [
        ("record '7'", {"id": "7", "question": "a"}),
        ("record '9'", {"id": "own", "question": "b"}),
    ]


@pytest.mark.parametrize("text", ["{}", '{"a": {}, "b": 1}', '"text"', "[" * 100_000])
def test_json_that_holds_no_records_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json: (expected a list of records|nested too deeply)"):
        list(read_rows(path))


HUB = """
import sys
import datasets
from unisd_megatron.data.sources import hub_rows
from unisd_megatron.errors import DataError
features = datasets.Features({"question": datasets.Value("string"), "image": datasets.Image()})
columns = {"question": ["a", "b"], "image": [None, {"bytes": b"no image", "path": "b.png"}]}
datasets.Dataset.from_dict(columns, features=features).to_parquet(sys.argv[1] + "/train.parquet")
for hub_id, config, split in [(sys.argv[1], None, "train"), (sys.argv[1], None, "test"), ("openai/gsm8k", "main", "test")]:
    try:
        print("rows", list(hub_rows(hub_id, config, split)))
    except DataError as error:
        print("refused", error)
"""


def test_the_hubs_library_reads_a_folder_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    """In a process of its own, since the library reads its offline switch when it is imported.

    An image column stays as it is stored: no image library is asked for.
    """
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("loading from the hub needs the datasets library, which is an extra")
    folder = tmp_path / "data"
    folder.mkdir()
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", HUB, str(folder)], env=offline, capture_output=True, text=True, check=True)
    read, no_split, unreachable = done.stdout.splitlines()
    assert read.startswith("rows [(") and "'question': 'a', 'image': None" in read and "b'no image'" in read
    assert no_split.startswith(f"refused {folder} cannot be loaded from the hub (") and "test" in no_split
    assert unreachable.startswith("refused openai/gsm8k cannot be loaded from the hub (")
    assert unreachable.endswith("); pass --data_path FILE")
