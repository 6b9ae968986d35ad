"""Order is a function: every sample once per epoch, groups by weight, the same for any split and with no history."""

import random
import sys
import time
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.order import BLOCK, GroupOrder, Mixture, Order, OrderError, Permutation, rank_positions

SIZES = {"hq": np.array([10, 3, 9, 0, 7, 11]), "face": np.array([2, 3])}
PINNED = [("face", 28, 0, 1),
          ("hq", 19, 0, 6),
          ("hq", 17, 5, 1),
          ("hq", 14, 4, 2),
          ("face", 40000000025, 1, 1)]
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers())
def test_a_permutation_takes_every_number_once_alone_and_as_a_table(size, name):
    permutation = Permutation(size, name)
    table = permutation.table()
    assert sorted(table) == list(range(size))
    assert [permutation(number) for number in range(0, size, 7)] == table[::7].tolist()


def test_all_permutations_of_four_come_about_equally_often():
    found = Counter(tuple(Permutation(4, name).table().tolist()) for name in range(6000))
    assert len(found) == 24 and max(found.values()) < 1.4 * 250 and min(found.values()) > 0.6 * 250


def test_a_permutation_leaves_no_trace_of_its_input():
    table = Permutation(20_000, "trace").table()
    steps = np.diff(table)
    assert abs(np.corrcoef(np.arange(20_000), table)[0, 1]) < 0.03
    assert abs(np.corrcoef(table[:-1], table[1:])[0, 1]) < 0.03 and len(np.unique(steps)) > 10_000
    assert (table == np.arange(20_000)).sum() < 10          # one fixed point is expected


def test_the_order_is_pinned_so_that_old_checkpoints_go_on():
    order = Order(SIZES, {"hq": 4, "face": 1}, seed=7, window=2)
    found = [(place.group, place.epoch, place.shard, place.index) for place in map(order, [0, 1, 2, 1000, 10**12])]
    assert found == PINNED


@settings(deadline=None)
@given(sizes, st.integers(1, 8), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_sample_once(sizes, window, seed, epoch):
    order = GroupOrder("hq", np.array(sizes), seed, window)
    found = [order.place(epoch * order.samples + number) for number in range(order.samples)]
    assert {place.epoch for place in found} == {epoch}
    assert sorted((place.shard, place.index) for place in found) == [
        (shard, index) for shard, size in enumerate(sizes) for index in range(size)]


@settings(deadline=None)
@given(sizes, st.integers(1, 8))
def test_a_window_is_finished_before_the_next_one_begins(sizes, window):
    order = GroupOrder("hq", np.array(sizes), 0, window)
    places = [order.place(number) for number in range(order.samples)]
    assert all(a.window <= b.window for a, b in pairwise(places))
    touched = {number: {place.shard for place in places if place.window == number} for number in range(order.windows)}
    assert max(map(len, touched.values())) <= window
    assert sum(map(len, touched.values())) == sum(size > 0 for size in sizes)


def test_a_run_of_positions_touches_the_shards_of_two_windows_at_most():
    order = Order({"hq": np.full(500, 100), "face": np.full(50, 100)}, {"hq": 9, "face": 1}, window=16)
    for start in range(0, 40_000, 1777):
        places = [order(position) for position in range(start, start + 256)]
        for group in ("hq", "face"):
            touched = {(place.epoch, place.shard) for place in places if place.group == group}
            ahead = {(place.epoch, place.window) for place in places if place.group == group}
            assert len(ahead) <= 2 and len(touched) <= 32


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 1000), min_size=1), st.integers(0, 300))
def test_groups_come_by_weight_to_within_their_number(weights, blocks):
    mixture = Mixture(weights, seed=1)
    n = min(blocks, 4) * BLOCK
    found = Counter(mixture(position)[0] for position in range(n))
    for group, weight in weights.items():
        assert abs(found[group] - n * weight / sum(weights.values())) <= len(weights)


def test_turns_of_a_group_are_all_taken_and_equal_mixtures_are_equal():
    mixture = Mixture({"hq": 20_000_000, "face": 70_000, "negative": 100_000}, seed=3)
    turns = {}
    for position in range(300 * BLOCK, 310 * BLOCK):
        group, turn = mixture(position)
        turns.setdefault(group, []).append(turn)
    assert all(sorted(each) == list(range(min(each), max(each) + 1)) for each in turns.values())
    assert Mixture({"a": 0.5, "b": 1}, 0).weights == Mixture({"a": 2, "b": 4}, 0).weights == {"a": 1, "b": 2}


def test_a_rare_group_does_not_always_fall_on_the_same_image_of_a_batch():
    mixture = Mixture({"hq": 255, "negative": 1}, seed=0)
    slots = {position % 256 for position in range(40 * BLOCK) if mixture(position)[0] == "negative"}
    assert len(slots) > 60          # 160 draws of 256 hit 119 on average; without the blocks it would be one


def test_one_group_alone_is_read_epoch_by_epoch():
    order = Order(SIZES, {"hq": 0.3}, window=2)
    for epoch in range(3):
        places = [order(position) for position in range(40 * epoch, 40 * epoch + 40)]
        assert {place.epoch for place in places} == {epoch} and len(set(places)) == 40


def test_after_as_many_positions_as_samples_every_sample_has_come_once():
    sizes = {"hq": np.full(20, 100), "face": np.array([30, 18])}      # 2048 samples: two blocks
    order = Order(sizes, {"hq": 2000, "face": 48}, window=3)
    places = [order(position) for position in range(2048)]
    assert len({(place.group, place.shard, place.index) for place in places}) == 2048
    assert {place.epoch for place in places} == {0}


@settings(deadline=None)
@given(st.integers(0, 50), st.sampled_from([(1, 1), (2, 3), (4, 1), (6, 2), (12, 4)]))
def test_a_global_batch_is_the_same_for_any_ranks_and_workers(step, split):
    ranks, workers = split
    order = Order(SIZES, {"hq": 4, "face": 1}, seed=7, window=2)
    whole = [order(position) for position in rank_positions(step, 24, 0, 1)]
    parts = {}
    for rank in range(ranks):
        mine = rank_positions(step, 24, rank, ranks)
        for worker in range(workers):
            fresh = Order(SIZES, {"hq": 4, "face": 1}, seed=7, window=2)
            parts |= {position: fresh(position) for position in mine[worker::workers]}
    assert [parts[position] for position in sorted(parts)] == whole


def test_a_place_does_not_depend_on_what_was_asked_before():
    positions = list(range(0, 5000, 3))
    forth = Order(SIZES, {"hq": 4, "face": 1}, window=2)
    expected = {position: forth(position) for position in positions}
    random.Random(0).shuffle(positions)
    shuffled = Order(SIZES, {"hq": 4, "face": 1}, window=2)
    assert all(shuffled(position) == expected[position] for position in positions)


def test_seeds_and_epochs_give_other_orders():
    def epoch(seed, number):
        order = GroupOrder("hq", SIZES["hq"], seed, 2)
        return [(place.shard, place.index) for place in map(order.place, range(40 * number, 40 * number + 40))]
    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    assert len({tuple(order) for order in orders}) == 9 and len({frozenset(order) for order in orders}) == 1


def test_a_substitute_is_another_sample_of_the_same_group_and_epoch():
    order = Order(SIZES, {"hq": 4, "face": 1}, window=2)
    for position in range(300):
        place, others = order(position), [order.substitute(position, attempt) for attempt in range(4)]
        assert all((o.group, o.epoch) == (place.group, place.epoch) for o in others)
        assert all((o.shard, o.index) != (place.shard, place.index) for o in others)
    assert order.substitute(299, 0) == Order(SIZES, {"hq": 4, "face": 1}, window=2).substitute(299, 0)


@pytest.mark.parametrize(("sizes", "weights", "window", "said"), [
    ({"hq": np.array([0, 0])}, {"hq": 1}, 2, "'hq' has no samples"),
    (SIZES, {"hq": 0}, 2, "above 0"),
    (SIZES, {"hq": float("nan")}, 2, "above 0"),
    (SIZES, {}, 2, "at least one weight"),
    (SIZES, {"hq": 1}, 0, "at least 1"),
])
def test_orders_that_cannot_be_are_refused(sizes, weights, window, said):
    with pytest.raises(OrderError, match=said):
        Order(sizes, weights, window=window)


def test_a_batch_that_cannot_be_split_evenly_is_refused():
    with pytest.raises(ValueError, match="a global batch of 10 for rank 0 of 4"):
        rank_positions(0, 10, 0, 4)


@pytest.mark.slow
def test_memory_stays_flat_over_an_epoch_of_twenty_million_samples(capsys):
    rng = np.random.default_rng(0)
    sizes = {"hq": rng.integers(500, 1500, 20_000), "face": np.full(70, 1000), "negative": np.full(100, 1000)}
    order = Order(sizes, {group: int(each.sum()) for group, each in sizes.items()})
    tracemalloc.start()
    for position in range(0, 20_000_000, 4000):
        order(position)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks, started = sys.getallocatedblocks(), time.perf_counter()
    for position in range(5_000_000, 6_000_000):
        order(position)
    seconds, grown = time.perf_counter() - started, sys.getallocatedblocks() - blocks
    with capsys.disabled():
        print(f"\n1,000,000 positions: {seconds:.1f} µs each; peak {peak / 1e6:.2f} MB; {grown} blocks more")
    assert peak < 4e6 and grown < 2000
    assert seconds < 100        # microseconds each; about 7 on one core of 2020
