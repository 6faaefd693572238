"""The pages in a real browser without a network: no request but for the page itself, no complaint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import made
from browser import Browser, find
from test_sweep_pages import CELLS, some
from unisd_megatron.report.run import report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with Browser(program, tmp_path_factory.mktemp("profile")) as one:
        yield one


def test_it_sees_what_it_is_to_see(browser: Browser, tmp_path: Path) -> None:
    """Without this the next tests would pass on a browser that sees nothing."""
    page = tmp_path / "bad.html"
    page.write_text('<title>bad</title><img src="http://198.51.100.7/x.png"><script>document.title="run"; nothing()</script>')
    requests, complaints, title = browser.open(page)
    assert "http://198.51.100.7/x.png" in requests and title == "run"
    assert any("nothing is not defined" in one for one in complaints)


def test_a_run_with_hostile_answers(browser: Browser, tmp_path: Path) -> None:
    answers = {step: [made.answer("q0", bool(step), made.HOSTILE)] for step in (0, 4)}
    folder = made.run(tmp_path / "run", made.metrics(4, **made.AGREEMENT), answers)
    report([folder], tmp_path / "out")
    index = tmp_path / "out" / "index.html"
    requests, complaints, title = browser.open(index)
    assert [one for one in requests if not one.startswith("data:")] == [index.as_uri()] and complaints == [] and title == "run"


def test_a_sweep_with_a_failed_run(browser: Browser, tmp_path: Path) -> None:
    folder = made.sweep(tmp_path / "sweep", CELLS, base=some(0.3, 99))
    report([folder], tmp_path / "out")
    for name in ("index.html", "run-clip-seed-0.html"):
        page = tmp_path / "out" / name
        requests, complaints, _ = browser.open(page)
        assert [one for one in requests if not one.startswith("data:")] == [page.as_uri()] and complaints == []
