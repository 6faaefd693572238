"""The page of a run says what its files say, whatever the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import made
from unisd_megatron.errors import ConfigError
from unisd_megatron.evaluate.statistics import mcnemar, wilson
from unisd_megatron.report.drawing import picture
from unisd_megatron.report.run import PAGES_A_WORKER, report

BEFORE = [made.answer(f"q{i}", i < 3) for i in range(10)]
AFTER = [made.answer(f"q{i}", 1 <= i < 9) for i in range(10)]


def test_numbers_come_from_the_files(tmp_path: Path) -> None:
    made.run(tmp_path / "run", made.metrics(10), {0: BEFORE, 10: AFTER})
    report([tmp_path / "run"], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    numbers = {row[0]: row[1:] for row in page.tables["metrics"]}
    assert numbers["loss"] == ["1", "0.1", "0.1", "0.1", "1"]
    low, high = wilson(8, 10)
    assert page.tables["evaluations"][1:] == [
        ["0", "10", "30.0", "{:.1f} to {:.1f}".format(*(100 * bound for bound in wilson(3, 10)))],
        ["10", "10", "80.0", f"{100 * low:.1f} to {100 * high:.1f}"],
    ]
    assert page.marked["data-tile", "tokens per second"] == "50"
    assert page.marked["data-tile", "peak memory, GiB"] == "1.50"
    found = {name: page.marked["data-flips", name] for name in ("to_right", "to_wrong", "both_right", "both_wrong")}
    assert found == {"to_right": "6", "to_wrong": "1", "both_right": "2", "both_wrong": "1"}
    assert f"{mcnemar(6, 1):.2g}" in page.text
    assert dict(row[:2] for row in page.tables["settings"]) == {
        "mode": "vanilla",
        "dataset": "addition",
        "model_name": "base",
        "max_steps": "10",
    }


def test_what_a_run_has_not_recorded_has_no_empty_plot(tmp_path: Path) -> None:
    made.run(tmp_path / "plain", made.metrics(3))
    made.run(tmp_path / "agreeing", made.metrics(3, **made.AGREEMENT))
    report([tmp_path / "plain"], tmp_path / "one")
    report([tmp_path / "agreeing"], tmp_path / "two")
    without, with_ = (made.read(tmp_path / name / "index.html") for name in ("one", "two"))
    shown = {"agreement", "weights"}
    assert not without.ids & (shown | {"accuracy", "entropy", "teacher", "flips"}) and "loss" in without.ids
    assert shown <= with_.ids
    pngs = {path.stem for path in (tmp_path / "one").glob("*.png")}
    assert pngs == without.ids & pngs and "weights" not in pngs
    assert all((tmp_path / "one" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pngs)


def test_text_of_models_is_text(tmp_path: Path) -> None:
    before = [made.answer(f"q{i}{made.HOSTILE}", False, made.HOSTILE) for i in range(2)]
    after = [made.answer(f"q{i}{made.HOSTILE}", True, made.HOSTILE) for i in range(2)]
    made.run(tmp_path / f"run {made.HOSTILE}".replace("/", "|"), made.metrics(3), {0: before, 3: after})
    about = json.loads((folder := next(tmp_path.iterdir())).joinpath("run.json").read_text())
    about["settings"]["dataset"] = made.HOSTILE
    (folder / "run.json").write_text(json.dumps(about))
    report([folder], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    assert not {"script", "img", "iframe", "object", "link:stylesheet"} & set(page.tags)
    assert page.text.count(made.HOSTILE) >= 8  # shown, word for word


def test_a_page_names_nothing_outside_itself(tmp_path: Path) -> None:
    made.run(tmp_path / "run", made.metrics(3, **made.AGREEMENT), {0: BEFORE, 3: AFTER})
    report([tmp_path / "run"], tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    page = made.Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"url\((?!#)|@import|<script|<link rel=\"stylesheet", text)
    for link in page.links:
        assert link.startswith("#") or (tmp_path / "out" / link).is_file()


def test_a_line_cut_short_is_left_out_and_said(tmp_path: Path) -> None:
    folder = made.run(tmp_path / "run", made.metrics(5))
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    said = report([folder], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    assert page.marked["data-tile", "steps"] == "4"
    assert any("line 5 is cut short" in line for line in said) and "line 5 is cut short" in page.text


def test_a_run_that_recorded_nothing_and_numbers_that_are_none(tmp_path: Path) -> None:
    made.run(tmp_path / "empty", [])
    made.run(tmp_path / "nan", made.metrics(3, entropy=float("nan")))
    said = report([tmp_path / "empty", tmp_path / "nan"], tmp_path / "out")
    assert "no step was recorded" in made.read(tmp_path / "out" / "run-empty.html").text
    page = made.read(tmp_path / "out" / "run-nan.html")
    assert "entropy" not in page.ids and "loss" in page.ids
    assert "nan: entropy: 3 steps not finite" in said and "entropy: 3 steps not finite" in page.text


def test_two_evaluations_stand_in_for_the_runs_own(tmp_path: Path) -> None:
    made.run(tmp_path / "run", made.metrics(3), {0: BEFORE, 3: AFTER})
    made.evaluation(tmp_path / "before", [False] * 4)
    made.evaluation(tmp_path / "after", [True, True, True, False])
    report([tmp_path / "run"], tmp_path / "out", (tmp_path / "before", tmp_path / "after"))
    assert made.read(tmp_path / "out" / "index.html").marked["data-flips", "to_right"] == "3"
    made.evaluation(tmp_path / "shorter", [True] * 3)
    with pytest.raises(ConfigError, match="has 4 questions and --after .* has 3, 3 in common"):
        report([tmp_path / "run"], tmp_path / "out", (tmp_path / "before", tmp_path / "shorter"))


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    made.run(tmp_path / "run", made.metrics(3))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "index.html").write_text("mine")
    with pytest.raises(ConfigError, match="is no report"):
        report([tmp_path / "run"], tmp_path / "precious")
    assert (tmp_path / "precious" / "index.html").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"no run \(run.json is missing\)"):
        report([tmp_path / "precious"], tmp_path / "out")
    with pytest.raises(ConfigError, match="no run"):
        report([tmp_path / "precious"], tmp_path / "pages" / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "pages").exists()
    report([tmp_path / "run"], tmp_path / "out")
    (tmp_path / "out" / "stale.png").write_text("of an earlier one")
    report([tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out" / "stale.png").exists() and not list(tmp_path.glob("*.partial"))


def test_this_folder_may_be_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.run(tmp_path / "run", made.metrics(3))
    monkeypatch.chdir(run)
    with pytest.raises(ConfigError, match="is no report"):
        report([run], Path("."))
    assert (run / "metrics.jsonl").is_file()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    report([run], Path("."))
    assert (tmp_path / "empty" / "index.html").is_file()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"settings": null}', '{"settings": {"mode": "clip"'])
def test_what_is_no_runs_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    run = made.run(tmp_path / "run", made.metrics(3))
    (run / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run/run\.json: [^\n]*$"):
        report([run], tmp_path / "out")


def test_a_run_that_was_cut_says_so(tmp_path: Path) -> None:
    """One that was asked for by epochs: its settings state no number of steps."""
    for name, wanted in (("cut", 9), ("whole", None)):
        folder = made.run(tmp_path / name, made.metrics(4), wanted=wanted)
        about = json.loads((folder / "run.json").read_text())
        about["settings"] |= {"max_steps": None, "num_train_epochs": 1}
        (folder / "run.json").write_text(json.dumps(about))
    said = report([tmp_path / "cut"], tmp_path / "one")
    assert "cut: not finished: 4 of 9 steps are recorded, finished.json is missing" in said
    assert "of 9, not finished" in made.read(tmp_path / "one" / "index.html").text
    assert report([tmp_path / "whole"], tmp_path / "two") == [str(tmp_path / "two" / "index.html")]
    whole = made.read(tmp_path / "two" / "index.html").text
    assert "of 4" in whole and "not finished" not in whole


def test_distances_of_the_contrast_are_drawn(tmp_path: Path) -> None:
    more = {"contrastive/margin_violations": 0.9, "contrastive/positive_distance": 2.0, "contrastive/negative_distance": 17.0}
    report([made.run(tmp_path / "run", made.metrics(3, **more))], tmp_path / "out")
    assert {"contrast", "distances"} <= made.read(tmp_path / "out" / "index.html").ids


def test_a_title_ends_no_attribute() -> None:
    page = made.Page(picture("one", made.HOSTILE, "", lambda axes: axes.plot([1, 2])).svg)
    assert not {"script", "img"} & set(page.tags) and page.tags[0] == "svg"


def test_several_processes_draw_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [made.run(tmp_path / f"run{i}", made.metrics(2 + i)) for i in range(2 * PAGES_A_WORKER)]
    report(runs, tmp_path / "by-several")
    monkeypatch.setattr("unisd_megatron.report.run.PAGES_A_WORKER", len(runs) + 1)
    report(runs, tmp_path / "by-one")
    several, one = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "by-several", tmp_path / "by-one")
    )
    assert several == one and len(list((tmp_path / "by-one").glob("run-*.html"))) == len(runs)
