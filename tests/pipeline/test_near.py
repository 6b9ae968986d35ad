"""Near duplicates: the same pairs as brute force, and clusters that keep their promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import copies, near
from pipeline.copies import clusters
from pipeline.near import near_pairs

DISTANCES = range(11)


def random_hashes(rng, count: int) -> np.ndarray:
    return rng.integers(0, 2**64, count, dtype=np.uint64)


def flipped(rng, hashes: np.ndarray, bits: int) -> np.ndarray:
    """Copies with up to this many flipped bits."""
    for _ in range(bits):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, hashes.size, dtype=np.uint64))
    return hashes


def planted(rng, count: int = 300, bits: int = 8) -> np.ndarray:
    parts = [random_hashes(rng, count)]
    for step in range(bits + 1):
        parts.append(flipped(rng, rng.choice(parts[0], count // 10), step))
    return rng.permutation(np.concatenate(parts))


def skewed(rng) -> np.ndarray:
    """Identical hashes, hashes that share 40 bits, a dense ball, and others."""
    shared = random_hashes(rng, 200) & np.uint64(0xFFFFFF)
    ball = flipped(rng, np.full(100, 2**63 + 12345, np.uint64), 3)
    same = np.full(60, 99, np.uint64)
    return rng.permutation(np.concatenate([same, shared, ball, random_hashes(rng, 100)]))


INPUTS = {
    "none": lambda rng: random_hashes(rng, 0),
    "one": lambda rng: random_hashes(rng, 1),
    "two": lambda rng: flipped(rng, random_hashes(rng, 1).repeat(2), 2),
    "random": lambda rng: random_hashes(rng, 500),
    "planted": planted,
    "skewed": skewed,
    "all equal": lambda rng: np.full(70, 2**64 - 1, np.uint64),
    "every value of 9 bits": lambda rng: rng.permutation(np.arange(512, dtype=np.uint64) << np.uint64(30)),
}


@pytest.fixture(params=["all against all", "tables", "tables in tables"])
def route(request, monkeypatch):
    """Small inputs would all be compared directly: make tables cheap, and then every run too long."""
    if request.param != "all against all":
        monkeypatch.setattr(near, "TABLE_COST", 2e-6)
        monkeypatch.setattr(near, "ROW_COST", 0)
    if request.param == "tables in tables":
        monkeypatch.setattr(near, "LONG_RUN", 50)
    monkeypatch.setattr(near, "CHUNK", 5000)
    monkeypatch.setattr(near, "SLICE", 100)
    return request.param


def brute_force(left: np.ndarray, right: np.ndarray, max_distance: int) -> np.ndarray:
    """Rows (i, j, distance), sorted."""
    distance = np.bitwise_count(left[:, None] ^ right)
    i, j = np.nonzero(distance <= max_distance)
    return np.stack([i, j, distance[i, j]], 1)


def expected_pairs(hashes, max_distance, queries=None) -> np.ndarray:
    if queries is None:
        rows = brute_force(hashes, hashes, max_distance)
        return rows[rows[:, 0] < rows[:, 1]]
    rows = brute_force(queries, hashes, max_distance)
    return rows[rows[:, 0] != rows[:, 1]]


def found_pairs(*args, **options) -> np.ndarray:
    chunks = [np.stack([i, j, d.astype(np.int64)], 1) for i, j, d in near_pairs(*args, **options)]
    rows = np.concatenate([np.empty((0, 3), np.int64), *chunks])
    return rows[np.lexsort(rows.T[::-1])]


def greedy(hashes, rank, max_distance, mirrored=None) -> list[int]:
    """The definition, one item at a time: the keeper of each item."""
    keeper_of = [-1] * hashes.size
    for i in sorted(range(hashes.size), key=lambda i: (-rank[i], i)):
        if keeper_of[i] >= 0:
            continue
        near_i = np.bitwise_count(hashes[i] ^ hashes) <= max_distance
        if mirrored is not None:
            near_i |= np.bitwise_count(mirrored[i] ^ hashes) <= max_distance
        for j in np.flatnonzero(near_i):
            if keeper_of[j] < 0:
                keeper_of[j] = i
    return keeper_of


def keepers_of(result) -> list[int]:
    return np.where(result.cluster < 0, np.arange(result.cluster.size), result.cluster).tolist()


@pytest.mark.parametrize("name", INPUTS)
def test_pairs_are_those_of_brute_force_each_once(name, route):
    rng = np.random.default_rng(1)
    hashes = INPUTS[name](rng)
    for distance in DISTANCES:
        np.testing.assert_array_equal(found_pairs(hashes, distance), expected_pairs(hashes, distance))


@pytest.mark.parametrize("name", INPUTS)
def test_pairs_with_mirrored_hashes_are_those_of_brute_force(name, route):
    rng = np.random.default_rng(2)
    hashes = INPUTS[name](rng)
    mirrored = flipped(rng, rng.permutation(hashes), 2)
    for distance in DISTANCES:
        found = found_pairs(hashes, distance, queries=mirrored)
        np.testing.assert_array_equal(found, expected_pairs(hashes, distance, mirrored))


@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("distance", [3, 4])
def test_long_runs_are_searched_by_tables_of_their_own(distance, with_queries, monkeypatch):
    for cost in ("TABLE_COST", "ROW_COST", "RUN_PAIR_COST"):    # the shortest keys, and so the longest runs
        monkeypatch.setattr(near, cost, 1e-12)
    monkeypatch.setattr(near, "LONG_RUN", 100)
    searches = []
    monkeypatch.setattr(near, "_sorted_tables", counted(near._sorted_tables, searches))
    rng = np.random.default_rng(11)
    crowd = random_hashes(rng, 3).repeat(300) ^ rng.integers(0, 2**12, 900, dtype=np.uint64)
    queries = rng.permutation(crowd) if with_queries else None
    found = found_pairs(crowd, distance, queries=queries)
    np.testing.assert_array_equal(found, expected_pairs(crowd, distance, queries))
    assert len(searches) > 10


def counted(function, calls: list):
    def wrapper(*args):
        calls.append(args)
        return function(*args)

    return wrapper


@pytest.mark.parametrize("distance", [11, 13, 16])
def test_large_distances_find_the_pairs_of_brute_force(distance, route):
    hashes = planted(np.random.default_rng(3), 100, 16)
    np.testing.assert_array_equal(found_pairs(hashes, distance), expected_pairs(hashes, distance))


BITS = st.lists(st.integers(0, 63), max_size=6).map(lambda bits: sum(1 << bit for bit in set(bits)))


@given(st.lists(st.tuples(st.sampled_from([0, 2**64 - 1, 0x123456789ABCDEF0]), BITS), max_size=40),
       st.integers(0, 10), st.booleans(), st.booleans())
def test_pairs_are_those_of_brute_force_for_any_hashes(parts, distance, with_queries, with_tables):
    hashes = np.array([base ^ bits for base, bits in parts], np.uint64)
    queries = hashes[::-1] ^ np.uint64(5) if with_queries else None
    with pytest.MonkeyPatch.context() as patch:
        if with_tables:
            patch.setattr(near, "TABLE_COST", 1e-8)
            patch.setattr(near, "ROW_COST", 0)
            patch.setattr(near, "LONG_RUN", 4)
        found = found_pairs(hashes, distance, queries=queries, threads=1)
    np.testing.assert_array_equal(found, expected_pairs(hashes, distance, queries))


def test_planted_copies_among_many_hashes_are_all_found():
    rng = np.random.default_rng(4)
    hashes = random_hashes(rng, 200_000)
    copies = np.arange(190_000, 200_000)
    hashes[copies] = flipped(rng, hashes[:10_000], 4)
    one, three = (found_pairs(hashes, 4, threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(one, three)
    found = set(zip(one[:, 0].tolist(), one[:, 1].tolist(), strict=True))
    assert found >= set(zip(range(10_000), copies.tolist(), strict=True))
    assert (np.bitwise_count(hashes[one[:, 0]] ^ hashes[one[:, 1]]) == one[:, 2]).all()


def test_chunks_stay_bounded_when_everything_is_a_pair():
    hashes = np.full(3000, 7, np.uint64)
    sizes = [i.size for i, _, _ in near_pairs(hashes, 0)]
    assert sum(sizes) == 3000 * 2999 // 2
    assert max(sizes) <= near.CHUNK


def test_a_search_can_be_left_early():
    hashes = random_hashes(np.random.default_rng(5), 50_000)
    hashes[25_000:] = hashes[:25_000]
    pairs = near_pairs(hashes, 4)
    i, j, distance = next(pairs)
    pairs.close()
    assert (i < j).all() and distance.max() <= 4


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("with_mirrored", [False, True])
def test_clusters_are_those_of_the_greedy_walk(name, with_mirrored, route):
    rng = np.random.default_rng(6)
    hashes = INPUTS[name](rng)
    mirrored = flipped(rng, rng.permutation(hashes), 2) if with_mirrored else None
    rank = rng.integers(0, 50, hashes.size)     # many ties
    for distance in (0, 2, 4, 7):
        result = clusters(hashes, rank, distance, mirrored=mirrored)
        assert keepers_of(result) == greedy(hashes, rank, distance, mirrored)


@pytest.mark.parametrize("name", ["planted", "skewed", "every value of 9 bits"])
@pytest.mark.parametrize("with_mirrored", [False, True])
def test_clusters_do_not_depend_on_how_many_pairs_fit_in_memory(name, with_mirrored, monkeypatch):
    rng = np.random.default_rng(7)
    hashes = INPUTS[name](rng)
    mirrored = flipped(rng, rng.permutation(hashes), 2) if with_mirrored else None
    rank = rng.permutation(hashes.size)
    monkeypatch.setattr(copies, "MAX_EDGES", 20)
    result = clusters(hashes, rank, 5, mirrored=mirrored)
    assert keepers_of(result) == greedy(hashes, rank, 5, mirrored)


def test_members_are_near_their_keeper_and_keepers_are_far_apart():
    rng = np.random.default_rng(8)
    hashes = np.concatenate([planted(rng), skewed(rng)])
    result = clusters(hashes, rng.permutation(hashes.size), 6)
    members = np.flatnonzero(~result.keeper)
    to_keeper = np.bitwise_count(hashes[members] ^ hashes[result.cluster[members]])
    np.testing.assert_array_equal(result.distance[members], to_keeper)
    assert members.size and to_keeper.max() <= 6 and result.keeper[result.cluster[members]].all()
    assert not result.distance[result.keeper].any() and not result.mirrored.any()
    assert expected_pairs(hashes[result.keeper], 6).size == 0


def test_a_chain_of_neighbours_does_not_become_one_cluster():
    chain = np.array([0b0, 0b11, 0b1111, 0b111111], np.uint64)
    result = clusters(chain, np.array([4, 3, 2, 1]), 2)
    assert result.cluster.tolist() == [0, 0, 2, 2]
    assert result.distance.tolist() == [0, 2, 0, 2]
    assert result.keeper.tolist() == [True, False, True, False]


def test_clusters_do_not_depend_on_the_order_of_items_when_ranks_are_distinct():
    rng = np.random.default_rng(9)
    hashes = np.concatenate([planted(rng), skewed(rng)])
    rank, mirrored = rng.permutation(hashes.size) / 7, flipped(rng, hashes, 20)
    first = clusters(hashes, rank, 5, mirrored=mirrored)
    order = rng.permutation(hashes.size)
    second = clusters(hashes[order], rank[order], 5, mirrored=mirrored[order])
    np.testing.assert_array_equal(np.array(keepers_of(first))[order], order[keepers_of(second)])
    for column in ("keeper", "distance", "mirrored"):
        np.testing.assert_array_equal(getattr(first, column)[order], getattr(second, column))


def test_a_mirrored_copy_belongs_to_its_original():
    rng = np.random.default_rng(10)
    hashes, mirrored = random_hashes(rng, 20), random_hashes(rng, 20)
    hashes[7] = mirrored[3] ^ np.uint64(0b101)
    rank = -np.arange(20)
    assert clusters(hashes, rank, 4).keeper.all()
    result = clusters(hashes, rank, 4, mirrored=mirrored)
    assert np.flatnonzero(~result.keeper).tolist() == [7]
    assert (result.cluster[7], result.distance[7], result.mirrored[7]) == (3, 2, True)
    assert result.cluster[3] == 3 and not result.mirrored[3]


def test_a_million_identical_hashes_are_one_cluster():
    hashes = np.full(1_000_000, 42, np.uint64)
    result = clusters(hashes, np.zeros(hashes.size), 4, mirrored=hashes)
    assert (result.cluster == 0).all() and result.keeper.sum() == 1 and not result.distance.any()


GOOD = np.arange(4, dtype=np.uint64)


@pytest.mark.parametrize(
    ("hashes", "distance", "options", "message"),
    [
        (GOOD, -1, {}, "max_distance must be an integer from 0 to 16, not -1"),
        (GOOD, 17, {}, "max_distance must be an integer from 0 to 16, not 17"),
        (GOOD, 4.0, {}, "max_distance must be an integer"),
        (GOOD.astype(np.int64), 4, {}, "hashes must be a .* uint64 array, not int64"),
        (GOOD.reshape(2, 2), 4, {}, r"not uint64 \(2, 2\)"),
        ([1, 2], 4, {}, "not list"),
        (GOOD, 4, {"threads": 0}, "threads must be an integer of at least 1, not 0"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(hashes, distance, options, message):
    with pytest.raises(ValueError, match=message):
        near_pairs(hashes, distance, **options)    # at the call, not at the first pair
    with pytest.raises(ValueError, match=message):
        clusters(hashes, np.zeros(4), distance, **options)


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"queries must be a \(4,\) uint64 array .*, not uint64 \(3,\)"):
        near_pairs(GOOD, 4, queries=GOOD[:3])
    with pytest.raises(ValueError, match="mirrored must be"):
        clusters(GOOD, np.zeros(4), 4, mirrored=GOOD.astype(np.int64))
    with pytest.raises(ValueError, match="rank must be"):
        clusters(GOOD, np.zeros(5), 4)
    with pytest.raises(ValueError, match=r"rank\[2\] is NaN"):
        clusters(GOOD, np.array([1, 2, np.nan, 0]), 4)
