"""A cache is complete or it is resumed: wherever it was cut, it ends as the one that nobody disturbed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unisd_megatron.convert import fingerprint
from unisd_megatron.data import Record
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.prepare.cache import Appending, cache_file, partial_of, read_rows
from unisd_megatron.weights.tiny import write_tiny

HEADER = {"task": "t", "rows": 5, "seed": 1}
ROWS = [{"id": n, "text": f"half a pair \ud83d, a line\nbreak, ü {n}"} for n in range(5)]


def complete(path: Path, align: int = 2, stop_after: int | None = None) -> int:
    """Writes what is left in groups of `align`, or only so many groups; says how many rows were there."""
    with Appending(path, HEADER, align) as cache:
        found, groups = cache.done, 0
        while cache.done < len(ROWS) and groups != stop_after:
            cache.append(ROWS[cache.done : cache.done + align])
            groups += 1
    return found


def test_cut_at_any_byte_it_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    assert complete(whole) == 0
    content, found = whole.read_bytes(), []
    for size in range(len(content)):
        path = tmp_path / "cut.jsonl"
        partial_of(path).write_bytes(content[:size])
        assert read_rows(path, HEADER) is None
        found.append(complete(path))
        assert path.read_bytes() == content and not partial_of(path).exists()
        path.unlink()
    assert set(found) == {0, 2, 4} and found == sorted(found)  # whole groups are kept, and never a part of one
    assert read_rows(whole, HEADER) == ROWS


def test_it_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    complete(path, stop_after=1)
    assert not path.exists() and read_rows(path, HEADER) is None
    with pytest.raises(KeyboardInterrupt), Appending(path, HEADER, 2) as cache:
        cache.append(ROWS[2:])
        raise KeyboardInterrupt
    assert not path.exists() and complete(path) == 5 and read_rows(path, HEADER) == ROWS


def test_what_another_request_began_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    with Appending(path, HEADER | {"seed": 2}, 1) as cache:
        cache.append(ROWS[:3])
    assert complete(path) == 0 and read_rows(path, HEADER) == ROWS


def test_two_processes_do_not_write_one_cache(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    with Appending(path, HEADER, 1), pytest.raises(ConfigError, match=r"some\.jsonl\.partial: another process"):
        Appending(path, HEADER, 1)


def test_a_damaged_cache_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    complete(path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole.replace(b'"seed": 1', b'"seed": 3'), b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckFailed, match=r"some\.jsonl: damaged"):
            read_rows(path, HEADER)


def test_the_name_follows_from_all_that_shaped_it() -> None:
    names = {cache_file("c", "negatives", HEADER | change) for change in ({}, {"seed": 2}, {"rows": 6}, {"more": 0})}
    assert len(names) == 4
    assert cache_file("c", "negatives", HEADER) == cache_file("c", "negatives", dict(reversed(HEADER.items())))


def test_the_name_of_the_model_is_told_and_shapes_nothing(tmp_path: Path) -> None:
    """A copy under another name has the same weights, and they are in the header too."""
    named, other = HEADER | {"model": "here", "weights": "1"}, HEADER | {"model": "a copy", "weights": "1"}
    path = cache_file(str(tmp_path), "negatives", named)
    assert cache_file(str(tmp_path), "negatives", other) == path
    assert cache_file(str(tmp_path), "negatives", other | {"weights": "2"}) != path
    with Appending(path, named, 1) as cache:
        cache.append(ROWS[:3])
    with Appending(path, other, 1) as cache:
        assert cache.done == 3
        cache.append(ROWS[3:])
    assert read_rows(path, other) == ROWS and json.loads(path.read_text().splitlines()[0])["model"] == "here"


def test_a_fingerprint_is_of_every_byte_of_the_checkpoint_and_of_nothing_else(tmp_path: Path) -> None:
    weights = b"1" * 9_000_000
    for name, content in (("a", weights), ("same", weights), ("b", weights[:4_000_000] + b"2" + weights[4_000_001:])):
        (tmp_path / name / "1_Dense").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(content)
        (tmp_path / name / "1_Dense" / "model.safetensors").write_bytes(b"3")
        (tmp_path / name / "modules.json").write_text('[{"path": ""}, {"path": "1_Dense"}]')
    same = tmp_path / "same"
    first = fingerprint.of_checkpoint(tmp_path / "a")
    assert fingerprint.of_checkpoint(same) == first != fingerprint.of_checkpoint(tmp_path / "b")
    for name in ("output/result.json", "cache/embeddings/x.safetensors", "pytorch_model.bin"):
        (same / name).parent.mkdir(parents=True, exist_ok=True)
        (same / name).write_text("{}")
        assert fingerprint.of_checkpoint(same) == first
    (same / "1_Dense" / "model.safetensors").write_bytes(b"4")
    assert fingerprint.of_checkpoint(same) != first
    (same / "shards").mkdir()
    (same / "shards" / "__0_0.distcp").write_bytes(b"5")
    assert fingerprint.of_checkpoint(same, same / "shards") != fingerprint.of_checkpoint(same)


def test_samples_tell_other_weights_by_a_fraction_of_their_bytes(tmp_path: Path) -> None:
    """A 405B is read in seconds: what training moved is seen anywhere, and a copy is the same."""
    weights = bytes(range(250)) * 40_000
    trained = bytes((one + 1) % 256 for one in weights)
    for name, content in {"a": weights, "copy": weights, "trained": trained, "longer": weights + b"1"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        (tmp_path / name / "config.json").write_text("{}")
    a, copy, trained_, longer = (fingerprint.of_samples(tmp_path / name) for name in ("a", "copy", "trained", "longer"))
    assert a == copy and len({a, trained_, longer}) == 3
    (tmp_path / "copy" / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint.of_samples(tmp_path / "copy") != a


def test_weights_are_read_once_until_they_change(tmp_path: Path) -> None:
    model, caches = tmp_path / "model", tmp_path / "caches"
    write_tiny("qwen2", model, seed=0)
    true = fingerprint.of_checkpoint(model)
    assert fingerprint.of_checkpoint(model, cache_dir=caches) == true and not caches.exists()  # whoever reads makes no folder
    caches.mkdir()
    assert fingerprint.of_checkpoint(model, cache_dir=caches) == true
    memory, weights = caches / fingerprint.MEMORY, model / "model.safetensors"
    known = json.loads(memory.read_text())
    assert known.keys() == {str(weights.resolve())}
    memory.write_text(json.dumps({name: [*seen[:-1], "another"] for name, seen in known.items()}))
    assert fingerprint.of_checkpoint(model, cache_dir=caches) != true  # so it is not read again
    os.utime(weights, ns=(0, 0))
    assert fingerprint.of_checkpoint(model, cache_dir=caches) == true
    memory.write_text(memory.read_text()[:-20])
    assert fingerprint.of_checkpoint(model, cache_dir=caches) == true


def test_a_fingerprint_sees_weights_tokenizer_and_configuration_wherever_they_lie(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("same", 0), ("b", 1)):
        write_tiny("qwen2", tmp_path / name, seed)
    first = fingerprint.of_checkpoint(tmp_path / "a")
    assert fingerprint.of_checkpoint(tmp_path / "same") == first != fingerprint.of_checkpoint(tmp_path / "b")
    (tmp_path / "same" / "README.md").write_text("notes")
    assert fingerprint.of_checkpoint(tmp_path / "same") == first
    for name, change in (("config.json", " "), ("chat_template.jinja", "{{ messages }}")):
        path = tmp_path / "same" / name
        path.write_text((path.read_text() if path.is_file() else "") + change)
        changed = fingerprint.of_checkpoint(tmp_path / "same")
        assert changed != first
        first = changed


def test_a_fingerprint_of_records_sees_each_field_and_the_order() -> None:
    records = [Record(str(n), {"question": f"Q{n}", "n": n}) for n in range(3)]
    others = [records[::-1], records[:2], [*records[:2], Record("2", {"question": "Q2", "n": 3})]]
    digests = {fingerprint.of_records(one) for one in [records, *others]}
    assert len(digests) == 4 and fingerprint.of_records(list(records)) in digests
