"""The order by windows of shards: a permutation whatever the shards are, and only a window of them at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae.configs import UserError
from personmae.data.image_index import build_index
from personmae.data.order import WindowOrder, choose_order
from personmae.data.plan import Plan
from personmae.data.region_draws import RegionConfig
from personmae_kernels.sample_random import permutation
from tests.bad_images import write_people
from tests.packing import ignore, pack


def order_of(num_shards, num_samples, window, seed, numbers_seed=0):
    numbers = np.random.default_rng(numbers_seed).integers(0, num_shards, num_samples).astype(np.int32)
    return numbers, WindowOrder(numbers, num_shards, window, seed)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 80), st.integers(1, 14), st.integers(0, 2**40), st.integers(0, 3))
def test_each_epoch_shows_every_sample_once_and_few_shards_at_a_time(num_shards, num_samples, window, seed, epoch):
    numbers, order = order_of(num_shards, num_samples, window, seed, numbers_seed=num_samples)
    samples = order(epoch)
    assert samples.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(num_samples))
    # From the first use of a shard to its last one, no more shards are met than a window has.
    met = numbers[samples]
    for shard in set(met.tolist()):
        places = np.flatnonzero(met == shard)
        assert len(set(met[places[0] : places[-1] + 1].tolist())) <= window


def test_it_follows_from_seed_and_epoch():
    numbers, order = order_of(7, 500, 2, seed=3)
    again = WindowOrder(numbers, 7, 2, 3)
    # Whatever was asked for in between.
    epochs = {epoch: order(epoch).copy() for epoch in (0, 5, 1, 0, 2)}
    assert all(np.array_equal(again(epoch), samples) for epoch, samples in epochs.items())
    assert len({samples.tobytes() for samples in epochs.values()}) == 4
    assert not np.array_equal(WindowOrder(numbers, 7, 2, 4)(0), order(0))
    # Shards do not come in their own order, nor samples within a window.
    assert list(dict.fromkeys(numbers[order(0)].tolist())) != sorted(set(numbers.tolist()))


def test_a_window_of_all_shards_is_the_order_over_the_whole_set():
    _, order = order_of(5, 333, 9, seed=11)
    for epoch in range(3):
        assert np.array_equal(order(epoch), permutation(11, epoch, 333))


def test_neighbours_are_of_the_window_and_of_other_shards():
    numbers, order = order_of(9, 400, 3, seed=1)
    for epoch in range(2):
        samples = order(epoch)
        for sample in (0, 57, 399):
            near = order.neighbours(epoch, sample)
            assert len(near)
            assert not np.isin(numbers[near], numbers[sample]).any()
            together = np.union1d(near, np.flatnonzero(numbers == numbers[sample]))
            places = np.flatnonzero(np.isin(samples, together))
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert len(np.unique(numbers[together])) == 3


def test_a_plan_takes_replacements_from_the_window():
    _, order = order_of(6, 120, 2, seed=0)
    plan = Plan(np.full(120, 80), np.full(120, 40), 10, 0, RegionConfig(), order=order, neighbours=order.neighbours)
    assert np.array_equal(plan.step_samples(13), order(1)[10:20])
    drawn = {plan.replacement(1, 7, attempt) for attempt in range(1, 40)}
    assert drawn <= set(order.neighbours(1, 7).tolist())
    assert len(drawn) > 5
    # A sample of a window that has no other shard takes any other.
    _, lonely = order_of(6, 120, 1, seed=0)
    plan = Plan(np.full(120, 80), np.full(120, 40), 10, 0, RegionConfig(), order=lonely, neighbours=lonely.neighbours)
    assert len({plan.replacement(0, 7, attempt) for attempt in range(1, 40)} - {7}) > 5


def test_identity_changes_with_what_the_order_depends_on():
    numbers, order = order_of(6, 120, 2, seed=0)
    assert WindowOrder(numbers, 6, 2, 99).identity == order.identity
    assert WindowOrder(numbers, 6, 3, 0).identity != order.identity
    assert WindowOrder(numbers[::-1], 6, 2, 0).identity != order.identity
    with pytest.raises(UserError, match="order_window is 0"):
        WindowOrder(numbers, 6, 0, 0)


def test_windows_need_shards(tmp_path):
    people = write_people(tmp_path / "people", 20)
    files = build_index(people, tmp_path / "files", progress=False, announce=ignore)
    pack(people, tmp_path / "pack")
    packed = build_index(tmp_path / "pack", tmp_path / "index", progress=False, announce=ignore)
    assert choose_order("auto", 2, files.storage, 0) is None
    assert choose_order("auto", 2, packed.storage, 0) is None
    assert choose_order("global", 2, packed.storage, 0) is None
    chosen = choose_order("windows", 2, packed.storage, 0)
    assert chosen is not None
    assert chosen.identity.startswith("windows of 2 shards")
    with pytest.raises(UserError, match="the source is none: choose the order"):
        choose_order("windows", 2, files.storage, 0)
