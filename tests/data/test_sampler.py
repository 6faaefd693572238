"""The order of examples: complete, reproducible from the step alone, and sparing of padding."""

import random
import statistics

import pytest

from unisd_megatron.data.sampler import Sampler
from unisd_megatron.errors import ConfigError, DataError

SIZES = [(10, 4), (12, 4), (1, 1), (1, 3), (5, 7), (7, 7), (3, 10), (100, 1), (1000, 32)]


def random_lengths(count: int) -> list[int]:
    rng = random.Random(5)
    return [int(rng.lognormvariate(5, 0.6)) for _ in range(count)]


def mean_spread(batches: list[list[int]], lengths: list[int]) -> float:
    return statistics.mean(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches)


@pytest.mark.parametrize(("count", "batch_size"), SIZES)
def test_every_epoch_shows_every_example_once(count: int, batch_size: int) -> None:
    """Nothing is dropped at the end of an epoch: the batch there is filled from the next one."""
    sampler = Sampler(random_lengths(count), batch_size, seed=0, window=3)
    batches = [sampler.batch(step) for step in range(-(-4 * count // batch_size))]
    assert {len(batch) for batch in batches} == {batch_size}
    order = [index for batch in batches for index in batch]
    for epoch in range(4):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize(("count", "batch_size"), SIZES)
def test_a_batch_depends_on_its_step_only(count: int, batch_size: int) -> None:
    """So a resumed run, which asks for step 500 first, continues exactly where the first one stopped."""
    lengths = random_lengths(count)
    sampler = Sampler(lengths, batch_size, seed=3)
    forward = [sampler.batch(step) for step in range(60)]
    steps = random.Random(0).sample(range(60), 60)
    other = Sampler(lengths, batch_size, seed=3)
    assert {step: other.batch(step) for step in steps} == dict(enumerate(forward))
    assert Sampler(lengths, batch_size, seed=3).batch(59) == forward[59]


def test_a_caller_that_changes_its_batch_does_not_change_the_order() -> None:
    sampler = Sampler(random_lengths(20), 4, seed=0)
    first = sampler.batch(0)
    first.reverse()
    assert sampler.batch(0) == first[::-1]


def test_the_order_stays_what_it_was() -> None:
    """Frozen: another order would silently break every run that is resumed with a newer version of this program."""
    sampler = Sampler([5, 3, 9, 1, 7, 7, 2, 8], batch_size=3, seed=0, window=2)
    frozen = [[5, 4, 7], [3, 6, 0], [2, 1, 2], [4, 5, 7], [6, 1, 0], [3, 6, 4]]
    assert [sampler.batch(step) for step in range(6)] == frozen


def test_epochs_and_seeds_differ() -> None:
    lengths = random_lengths(64)
    epochs = [tuple(Sampler(lengths, 64, seed=0).batch(epoch)) for epoch in range(3)]
    equal = [tuple(Sampler([1] * 64, 8, seed).batch(0)) for seed in range(3)]
    batches = [frozenset(Sampler(lengths, 8, seed).batch(0)) for seed in range(3)]
    assert len(set(equal)) == len(set(batches)) == 3
    assert len({frozenset(epoch) for epoch in epochs}) == 1  # one batch is the whole epoch: the same examples
    halves = [frozenset(Sampler(lengths, 32, seed=0, window=1).batch(step)) for step in (0, 2, 4)]
    assert len(set(halves)) == 3


def test_prompts_of_one_batch_have_similar_lengths() -> None:
    lengths = random_lengths(2048)
    shuffled = random.Random(0).sample(range(2048), 2048)
    unsorted = mean_spread([shuffled[first : first + 32] for first in range(0, 2048, 32)], lengths)
    spread = {
        window: mean_spread([Sampler(lengths, 32, 0, window).batch(step) for step in range(64)], lengths) for window in (1, 16)
    }
    assert spread[16] < unsorted / 4
    assert spread[1] > unsorted / 2  # a window of one batch sorts nothing between batches


def test_short_prompts_do_not_come_first() -> None:
    """Sorting must not turn into a curriculum: the batches of an epoch follow each other in random order of length."""
    lengths = random_lengths(2048)
    sampler = Sampler(lengths, 32, seed=0, window=64)  # one window: the whole epoch is sorted
    means = [statistics.mean(lengths[index] for index in sampler.batch(step)) for step in range(64)]
    assert abs(statistics.correlation(range(64), means)) < 0.3


def test_examples_of_equal_length_meet_by_chance() -> None:
    batch = Sampler([7] * 100, 10, seed=0).batch(0)
    assert batch != sorted(batch) and max(batch) - min(batch) > 20


def test_the_batch_between_two_epochs_holds_the_rest_of_one_and_the_start_of_the_next() -> None:
    sampler = Sampler(random_lengths(10), 4, seed=0)
    first = {index for step in range(2) for index in sampler.batch(step)}
    between = sampler.batch(2)
    assert first.isdisjoint(between[:2]) and len(first | set(between[:2])) == 10


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        Sampler([], 4, seed=0)
    for batch_size, window in ((0, 16), (4, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            Sampler([1, 2], batch_size, seed=0, window=window)
    with pytest.raises(ValueError, match="negative"):
        Sampler([1, 2], 1, seed=0).batch(-1)
