"""The views of a question: who sees the gold answer, whose solutions are shown, and that chance depends on nothing else."""

import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from unisd_megatron.data.contexts import build_examples
from unisd_megatron.data.example import Example
from unisd_megatron.data.task import Record
from unisd_megatron.data.tasks.addition import Addition
from unisd_megatron.data.tasks.cos_e import CosE
from unisd_megatron.data.tasks.gsm8k import Gsm8k
from unisd_megatron.data.tasks.mbpp import Mbpp
from unisd_megatron.errors import ConfigError, DataError

DATA = Path(os.environ.get("UNISD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
TASK = Gsm8k()


def records_of(count: int) -> list[Record]:
    """Questions that name their number and whose answers are all different."""
    rows = [
        {"question": f"Person {n} has {n}?", "answer": f"{n}+5010=<<{n}+5010={n + 5010}>>{n + 5010}\n#### {n + 5010}"}
        for n in range(1, count + 1)
    ]
    return [TASK.parse(row, number) for number, row in enumerate(rows, start=1)]


def build(
    records: list[Record], auxiliary: int = 3, donors_per_context: int = 2, negatives: bool = True, seed: int = 0
) -> list[Example]:
    examples, _ = build_examples(
        TASK, records, auxiliary=auxiliary, donors_per_context=donors_per_context, negatives=negatives, seed=seed
    )
    return examples


def donors_of(example: Example) -> list[list[int]]:
    """The numbers of the records that each auxiliary context shows, found by their questions."""
    asked = TASK.question(records_of(1)[0]).replace("Person 1 has 1?", "")
    contexts = [context.removesuffix(example.prompt) for context in example.auxiliary]
    assert all(asked in context for context in contexts)
    return [[int(number) for number in re.findall(r"Person (\d+) has", context)] for context in contexts]


def test_every_context_shows_as_many_other_records_as_asked() -> None:
    records = records_of(30)
    for example, record in zip(build(records), records, strict=True):
        contexts = donors_of(example)
        shown = [number for context in contexts for number in context]
        assert [len(context) for context in contexts] == [2, 2, 2]
        assert len(set(shown)) == 6  # no donor twice, over all contexts
        assert record.id not in {f"gsm8k_{number}" for number in shown}
        for context in example.auxiliary:
            assert context.endswith(example.prompt)


def test_the_gold_answer_is_in_the_teacher_view_only() -> None:
    for number, example in enumerate(build(records_of(30)), start=1):
        gold = str(number + 5010)
        assert example.teacher.count(gold) == 2  # where it is worked out, and after the mark
        assert example.negative is not None
        for text in (example.prompt, example.negative, *example.auxiliary):
            assert gold not in text


def test_a_record_with_the_same_question_is_never_a_donor() -> None:
    """A twin under another id would show this record's own solution in a view that must not have it."""
    records = records_of(8)
    twin = Record("twin", {**records[3].fields, "question": records[3].fields["question"] + " "})
    for seed in range(20):
        for example in build([*records, twin], seed=seed):
            if example.id in ("twin", records[3].id):
                assert all(4 not in context for context in donors_of(example))


@pytest.mark.parametrize("similar", [False, True])
def test_a_question_with_another_distractor_is_never_a_donor(similar: bool) -> None:
    """It has the same right answer, which the solution shown would give away."""
    shops = [["shop", "house", "sea"], ["sea", "house", "wood"], ["shop", "sea", "wood"], ["tree", "sea", "wood"]]
    stems = ["Where is a lantern?", "Where is a  lantern?", "Where is a boat?", "Where is a bird?"]
    rows = [{"id": n, "question": q, "choices": c, "answer": c[1]} for n, (q, c) in enumerate(zip(stems, shops, strict=True))]
    records = [CosE().parse(row, 0) for row in rows]

    def nearest(count: int) -> list[list[int]]:
        return [sorted(range(4), key=lambda j: (abs(i - j), j))[:count] for i in range(4)]

    found, _ = build_examples(
        CosE(), records, auxiliary=1, donors_per_context=2, negatives=False, seed=0, nearest=nearest if similar else None
    )
    for example in found[:2]:
        assert all(one in example.auxiliary[0] for one in stems[2:]) and example.auxiliary[0].count("lantern?") == 1


def test_teacher_and_negative_have_one_form() -> None:
    """The contrast is to measure the solution and not its wrapping (the released code wraps the two differently)."""
    for record, example in zip(records_of(10), build(records_of(10)), strict=True):
        wrong = TASK.corrupt(record, random.Random(f"0:{record.id}:negative"))
        assert example.negative is not None and wrong != TASK.reference(record)
        assert example.teacher.replace(TASK.reference(record), "SOLUTION") == example.negative.replace(wrong, "SOLUTION")
        assert example.prompt in example.teacher


def test_the_choice_for_a_record_does_not_depend_on_the_order_or_on_negatives() -> None:
    records = records_of(40)
    shuffled = random.Random(1).sample(records, len(records))
    assert {example.id: example for example in build(records)} == {example.id: example for example in build(shuffled)}
    assert [example.id for example in build(shuffled)] == [record.id for record in shuffled]
    assert [example.auxiliary for example in build(records, negatives=False)] == [each.auxiliary for each in build(records)]
    assert all(example.negative is None for example in build(records, negatives=False))


def test_another_seed_chooses_otherwise() -> None:
    first, second = build(records_of(40), seed=0), build(records_of(40), seed=1)
    assert first == build(records_of(40), seed=0)
    assert sum(a.auxiliary != b.auxiliary for a, b in zip(first, second, strict=True)) > 30
    assert any(a.negative != b.negative for a, b in zip(first, second, strict=True))


def test_all_records_are_donors_about_equally_often() -> None:
    examples = build(records_of(200), auxiliary=5, donors_per_context=2, negatives=False)
    shown = Counter(number for example in examples for context in donors_of(example) for number in context)
    assert len(shown) == 200 and max(shown.values()) < 25  # 10 expected, standard deviation about 3


def test_a_small_pool_repeats_donors_in_other_contexts_but_never_in_one() -> None:
    for example in build(records_of(4), auxiliary=3, donors_per_context=2):
        contexts = donors_of(example)
        assert all(len(set(context)) == 2 for context in contexts)
        assert len({number for context in contexts for number in context}) == 3  # all there are


def test_a_pool_that_cannot_fill_one_context_is_refused() -> None:
    with pytest.raises(DataError, match="shows 3 solved other questions, but of the 3 gsm8k records only 2 ask something else"):
        build(records_of(3), donors_per_context=3)
    assert len(build(records_of(1), auxiliary=0)) == 1  # nothing is needed where nothing is shown


@pytest.mark.parametrize(("auxiliary", "donors_per_context"), [(-1, 1), (1, 0)])
def test_impossible_numbers_are_refused(auxiliary: int, donors_per_context: int) -> None:
    with pytest.raises(ConfigError, match="cannot be built"):
        build(records_of(5), auxiliary, donors_per_context)


class Flawless(Addition):
    """Addition whose sums without a carry have no wrong solution."""

    def corrupt(self, record: Record, rng: random.Random) -> str | None:  # type: ignore[override]
        a, b = record.fields["a"], record.fields["b"]
        return super().corrupt(record, rng) if a % 10 + b % 10 > 9 else None


def test_records_without_a_wrong_solution_are_dropped_and_counted() -> None:
    task = Flawless()
    carried, plain = task.parse({"a": 7, "b": 5}, 0), task.parse({"a": 1, "b": 2}, 1)
    examples, dropped = build_examples(task, [carried, plain], auxiliary=1, donors_per_context=1, negatives=True, seed=0)
    assert [example.id for example in examples] == [carried.id] and dropped == 1
    assert task.question(plain) in examples[0].auxiliary[0]  # though dropped, it still is a donor
    examples, dropped = build_examples(task, [carried, plain], auxiliary=0, donors_per_context=1, negatives=False, seed=0)
    assert len(examples) == 2 and dropped == 0
    with pytest.raises(DataError, match="none of the 1 addition records offers a wrong solution"):
        build_examples(task, [plain], auxiliary=0, donors_per_context=1, negatives=True, seed=0)


@pytest.mark.parametrize(("task", "file"), [(Gsm8k(), "gsm8k_train.jsonl"), (Mbpp(), "mbpp.jsonl")])
def test_real_records_become_examples(task: Gsm8k | Mbpp, file: str) -> None:
    if not (DATA / file).is_file():
        pytest.skip(f"{DATA / file} is absent; set UNISD_DATA to the folder of the real benchmark files")
    records = task.load("train", str(DATA / file))
    examples, dropped = build_examples(task, records, auxiliary=3, donors_per_context=1, negatives=False, seed=0)
    assert dropped == 0
    for record, example in zip(records, examples, strict=True):
        reference = task.reference(record)
        assert reference in example.teacher and reference not in example.prompt
        assert all(reference not in context and context.count(example.prompt) == 1 for context in example.auxiliary), example.id
