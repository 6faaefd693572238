"""`unisd bench rollout` measures what it says it does."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from unisd_megatron.bench import rollout
from unisd_megatron.bench.rollout import Case, Sizes
from unisd_megatron.cli import main

SMALL = Sizes(hidden=128, layers=2, vocab_size=400, sequences=3, new_tokens=2)
# Embedding (tied) and final norm; per layer q, o, k, v with biases of q, k, v, three matrices, two norms.
PARAMETERS = 400 * 128 + 128 + 2 * (4 * 128 * 128 + 3 * 128 + 3 * 128 * 384 + 2 * 128)


@pytest.mark.timeout(300)
def test_the_report_says_what_a_sync_from_two_ranks_and_a_batch_cost(tmp_path: Path) -> None:
    said: list[str] = []
    results = rollout.measure_all(SMALL, ["transformers"], [2], said.append)
    table = rollout.write(SMALL, results, tmp_path)
    found = results[Case("transformers", 2)]
    assert found.bytes == 4 * PARAMETERS
    assert all(len(times) == rollout.REPEATS and min(times) > 0 for times in (found.sync, found.copy, found.generate))
    row = table.splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["transformers", "TP 2"] and len(said) == 1
    under = dict(zip(rollout.HEAD, row[2:], strict=True))
    ratios = [float(one) for one in under["sync / copy"].split(", ")]
    expected = [min(found.sync) / min(found.copy), statistics.median(found.sync) / statistics.median(found.copy)]
    assert ratios == pytest.approx(expected, rel=0.01)
    assert float(under["tokens/s"].split(", ")[0]) == pytest.approx(6 / min(found.generate), rel=0.01)
    assert json.loads((tmp_path / "rollout.json").read_text())["rows"][0]["sync"] == found.sync
    assert (tmp_path / "rollout.md").read_text() == table


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--width", "192"], "--width is 192; it must be a multiple of 128"),
        (["--new_tokens", "0"], "--new_tokens is 0; it must be at least 1"),
        (["--vocabulary", "100"], "--vocabulary is 100; it must be at least"),
        (["--tensor_sizes", "3"], "tensor-parallel 3 does not divide"),
    ],
)
def test_sizes_that_no_model_has_are_refused(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "rollout", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
