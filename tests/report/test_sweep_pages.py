"""The page of a sweep: every run counted or named, differences with their chances."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

import made
from unisd_megatron.report.comparison import lines
from unisd_megatron.report.reading import read_sweep
from unisd_megatron.report.run import report
from unisd_megatron.report.statistics import mean_interval, sign_flip

QUESTIONS = 40


def some(share: float, seed: int) -> list[bool]:
    draw = random.Random(seed)
    return [draw.random() < share for _ in range(QUESTIONS)]


VANILLA = {seed: some(0.5, seed) for seed in range(3)}
CLIP = {seed: some(0.8, 10 + seed) for seed in range(2)}  # the third seed fails
CELLS = [
    *(("vanilla", seed, right) for seed, right in VANILLA.items()),
    *(("clip", seed, right) for seed, right in CLIP.items()),
    ("clip", 2, None),
]


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    return made.sweep(tmp_path / "sweep", CELLS, base=some(0.3, 99))


def shares(found: dict[int, list[bool]]) -> list[float]:
    return [sum(right) / QUESTIONS for right in found.values()]


def test_the_table_against_numbers_by_hand(swept: Path, tmp_path: Path) -> None:
    vanilla, clip = lines(read_sweep(swept), "addition")
    assert list(vanilla.accuracies.values()) == pytest.approx(shares(VANILLA)) and vanilla.against is None
    assert (clip.mean, clip.interval) == mean_interval(shares(CLIP))
    against = clip.against
    assert against is not None and list(against.seeds) == [0, 1]  # vanilla's third seed has no partner
    differences = [a - b for a, b in zip(shares(CLIP), shares(VANILLA)[:2], strict=True)]
    assert against.mean == pytest.approx(sum(differences) / 2)
    assert against.interval == pytest.approx(mean_interval(differences)[1])
    totals = [sum(CLIP[s][q] - VANILLA[s][q] for s in (0, 1)) for q in range(QUESTIONS)]
    assert against.p == pytest.approx(sign_flip(totals)) == against.p_holm
    report([swept], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    row = next(row for row in page.tables["addition"] if row[0] == "clip")
    assert row[:3] == ["clip", "2", f"{100 * clip.mean:.1f}"]  # type: ignore[operator]
    assert row[4:7] == [*(f"{100 * share:.1f}" for share in shares(CLIP)), "missing"]
    assert row[7:9] == ["2", f"{100 * against.mean:+.1f}"] and row[10] == (
        f"{against.p:.2g}" if against.p >= 1e-4 else "< 0.0001"
    )
    assert row[-3:] == ["8", "50", "1.50"]  # 4 steps of 2 s, 100 tokens each
    assert page.marked["data-base", "addition"] == f"{100 * sum(some(0.3, 99)) / QUESTIONS:.1f} %"


def test_what_failed_is_named_with_its_last_words(swept: Path, tmp_path: Path) -> None:
    said = report([swept], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    why = "training failed, exit status 1: unisd: step 4: not finite: <b>loss</b>"
    assert page.tables["missing"][1:] == [["clip, seed 2", "addition", why]]
    assert any(line.startswith("clip, seed 2: no result on addition") for line in said)
    assert page.tables["not-run"] == [["ssd", "no samples"]]
    assert len(page.tables["runs"]) == 1 + len(CELLS)


def test_a_mode_whose_runs_all_failed_has_its_row(tmp_path: Path) -> None:
    none = made.sweep(tmp_path / "sweep", [*CELLS, ("opsd", 0, None), ("opsd", 1, None)])
    report([none], tmp_path / "out")
    row = next(row for row in made.read(tmp_path / "out" / "index.html").tables["addition"] if row[0] == "opsd")
    assert row[4:6] == ["missing", "missing"] and row[-3:] == ["–", "–", "–"]


def test_every_run_has_its_page(swept: Path, tmp_path: Path) -> None:
    report([swept], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    targets = {link for link in page.links if link.startswith("run-")}
    assert len(targets) == 5
    for link in page.links:
        assert link.removeprefix("#") in page.ids if link.startswith("#") else (tmp_path / "out" / link).is_file()
    one = made.read(tmp_path / "out" / "run-clip-seed-0.html")
    gained = sum(a and not b for a, b in zip(CLIP[0], some(0.3, 99), strict=True))
    assert one.marked["data-flips", "to_right"] == str(gained)  # from before training to after it
    assert "index.html" in one.links and (tmp_path / "out" / "run-clip-seed-0" / "loss.png").is_file()


def test_a_control_is_found_among_crossed_settings_or_none_is(swept: Path) -> None:
    content = json.loads((swept / "sweep.json").read_text())
    for row in content["runs"]:  # another value of alpha for each seed: every run is a setting of its own
        alpha = {0: 0.0, 1: 0.5, 2: 1.0}[row["seed"]]
        row |= {"settings": {"alpha": alpha}, "name": f"{row['mode']} alpha={alpha}"}
    (swept / "sweep.json").write_text(json.dumps(content))
    found = {line.name: line for line in lines(read_sweep(swept), "addition")}
    half = found["clip alpha=0.5"].against
    assert half is not None and half.mean == pytest.approx(shares(CLIP)[1] - shares(VANILLA)[1])
    assert half.interval is None  # one seed
    for row in content["runs"]:
        row["settings"] = {"gamma": row["seed"]} if row["mode"] == "clip" else row["settings"]
    (swept / "sweep.json").write_text(json.dumps(content))
    assert all(line.against is None for line in lines(read_sweep(swept), "addition"))


def test_runs_trained_on_several_data_sets_have_their_own_rows_pages_and_control(tmp_path: Path) -> None:
    names = [f"{mode} dataset={dataset}" for dataset in ("addition", "gsm8k") for mode in ("vanilla", "clip")]
    answers = {name: some(0.2 * (i + 1), i) for i, name in enumerate(names)}
    sweep = made.sweep(tmp_path / "sweep", [(name, 0, right) for name, right in answers.items()])
    content = json.loads((sweep / "sweep.json").read_text())
    for row in content["runs"]:
        row["mode"], row["dataset"] = row["name"].split(" dataset=")
        row["settings"] = {"dataset": row["dataset"]}
    (sweep / "sweep.json").write_text(json.dumps(content))
    found = {line.name: line for line in lines(read_sweep(sweep), "addition")}
    assert list(found) == names
    for vanilla, clip in (names[:2], names[2:]):
        against = found[clip].against
        assert against is not None and found[vanilla].against is None
        assert against.mean == pytest.approx((sum(answers[clip]) - sum(answers[vanilla])) / QUESTIONS)
    report([sweep], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    assert len({link for link in page.links if link.startswith("run-")}) == len(names)


def test_other_questions_are_not_compared(swept: Path) -> None:
    path = next(swept.glob("runs/clip-*/seed0/evaluate-*/answers.jsonl"))
    path.write_text(path.read_text().replace('"id": "q0"', '"id": "another"'))
    clip = lines(read_sweep(swept), "addition")[1]
    assert clip.against is not None and list(clip.against.seeds) == [1]


def test_vanilla_from_another_checkpoint_is_no_control(tmp_path: Path) -> None:
    folder = made.sweep(tmp_path / "sweep", [(mode, 0, [True, False]) for mode in ("vanilla", "clip", "ema")])
    content = json.loads((folder / "sweep.json").read_text())
    for row in content["runs"]:
        row["base"] = {"addition": f"base/{'large' if row['mode'] == 'ema' else 'small'}/evaluate-addition-45"}
    (folder / "sweep.json").write_text(json.dumps(content))
    _, clip, ema = lines(read_sweep(folder), "addition")
    assert clip.against is not None and ema.against is None


def test_each_run_is_compared_with_the_checkpoint_it_started_from(tmp_path: Path) -> None:
    bases, after = {"small": [False] * 4, "large": [True] * 4}, [True, True, False, False]
    folder = made.sweep(tmp_path / "sweep", [(name, 0, after) for name in bases])
    content = json.loads((folder / "sweep.json").read_text())
    for row, (name, right) in zip(content["runs"], bases.items(), strict=True):
        made.evaluation(folder / "base" / name, right)
        row["base"] = {"addition": f"base/{name}"}
        content["base"].append({"model_name": f"models/{name}", "dataset": "addition", "evaluation": f"base/{name}"})
    (folder / "sweep.json").write_text(json.dumps(content))
    report([folder], tmp_path / "out")
    pages = {name: made.read(tmp_path / "out" / f"run-{name}-seed-0.html") for name in bases}
    flips = {name: [page.marked["data-flips", kind] for kind in ("to_right", "to_wrong")] for name, page in pages.items()}
    assert flips == {"small": ["2", "0"], "large": ["0", "2"]}
    index = made.read(tmp_path / "out" / "index.html")
    told = {key: said for (kind, key), said in index.marked.items() if kind == "data-base"}
    assert told == {"models/small: small": "0.0 %", "models/large: large": "100.0 %"}


def test_runs_of_the_same_title_have_pages_of_their_own(tmp_path: Path) -> None:
    folder = made.sweep(tmp_path / "sweep", [("vanilla", 0, [True, False]), ("clip", 0, [True, True])])
    content = json.loads((folder / "sweep.json").read_text())
    content["runs"][1] |= {"name": "vanilla", "identity": "4567"}
    (folder / "sweep.json").write_text(json.dumps(content))
    made.write_rows(folder / "runs/clip-addition-0123/seed0/train/metrics.jsonl", made.metrics(3))
    report([folder], tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    pages = [re.search(rf'<a href="(run-[^"]*)">{accuracy}</a>', text) for accuracy in ("50.0", "100.0")]
    steps = [made.read(tmp_path / "out" / page[1]).marked["data-tile", "steps"] for page in pages if page is not None]
    assert steps == ["4", "3"]


def test_equal_seeds_have_no_interval(tmp_path: Path) -> None:
    right = {"vanilla": [True, False, False, False], "clip": [True, True, True, False]}
    folder = made.sweep(tmp_path / "sweep", [(mode, seed, answers) for mode, answers in right.items() for seed in (0, 1)])
    report([folder], tmp_path / "out")
    page = made.read(tmp_path / "out" / "index.html")
    row = next(row for row in page.tables["addition"] if row[0] == "clip")
    assert row[2:4] == ["75.0", "– all seeds equal"] and row[6:9] == ["2", "+50.0", "– all seeds equal"]
