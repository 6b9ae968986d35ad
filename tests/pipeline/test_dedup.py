"""Dedup: which images form a cluster, and how each differs from the best of them."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.config import Dedup
from pipeline.dedup import DedupJob, duplicates
from pipeline.score import scores_table
from pipeline.scores import score
from pipeline.storage import Folder
from tests.conftest import photograph


def jpeg(image, quality=92):
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def scored(**images):
    """Rows of the scores table; refs are the names."""
    return [{"ref": name} | score(data) for name, data in images.items()]


def deduplicated(folder, rows, parts=1, **options):
    """Clusters as {ref: (cluster, rank, kind, distance)}, from scores that lie in so many parts."""
    workspace = Folder.at(str(folder))
    for number in range(parts):
        share = rows[number::parts]
        scores_table(workspace).write(f"{number:06d}-{len(share)}-part", "i", share)
    job = DedupJob(workspace, Dedup(**options))
    for unit in job.pending():
        job.run(unit)
    assert job.pending() == []
    return {row["ref"]: (row["cluster"], row["rank"], row["kind"], row["distance"])
            for row in duplicates(workspace).dataset().to_table().to_pylist()}


def clusters(found):
    grouped = {}
    for ref, (cluster, *_) in found.items():
        grouped.setdefault(cluster, set()).add(ref)
    return sorted(map(sorted, grouped.values()))


@pytest.fixture(scope="module")
def family():
    """One photograph in many copies, another one twice, and a third alone."""
    first, second = photograph(1, 640, 480), photograph(2, 640, 480)
    return scored(original=jpeg(first), copy=jpeg(first), low=jpeg(first, 60), half=jpeg(first.resize((320, 240))),
                  mirror=jpeg(ImageOps.mirror(first), 80), other=jpeg(second), again=jpeg(second),
                  alone=jpeg(photograph(3)))


def test_copies_and_saved_again_ones_are_clusters_and_strangers_are_none(tmp_path, family):
    found = deduplicated(tmp_path, family)
    assert clusters(found) == [["again", "other"], ["copy", "half", "low", "original"]]


def test_each_member_says_what_it_is_and_how_far_from_the_best(tmp_path, family):
    found = deduplicated(tmp_path, family)
    assert {ref: found[ref][2] for ref in ("low", "half")} == {"low": "near", "half": "near"}
    assert {found["original"][1:], found["copy"][1:]} == {(0, "keeper", 0), (1, "exact", 0)}
    assert {found["other"][2], found["again"][2]} == {"keeper", "exact"}
    assert found["half"][1] == 3        # the fewest pixels come last


def test_mirrored_copies_are_found_only_when_asked_for(tmp_path, family):
    assert "mirror" not in deduplicated(tmp_path / "plain", family)
    found = deduplicated(tmp_path / "mirrored", family, mirrored=True)
    assert found["mirror"][0] == found["original"][0] and found["mirror"][2] == "mirrored"
    assert found["low"][2] == "near"


def test_a_mirrored_best_image_is_found_by_its_copies_too(tmp_path):
    first = photograph(1, 640, 480)
    rows = scored(large=jpeg(ImageOps.mirror(first.resize((1280, 960)))), small=jpeg(first))
    found = deduplicated(tmp_path, rows, mirrored=True)
    assert found["large"][2] == "keeper" and found["small"][2] == "mirrored"


def test_distance_nought_finds_only_equal_hashes(tmp_path):
    rows = [{"ref": f"{i}", "uid": f"{i}", "width": 10 - i, "height": 1, "bytes": 1, "phash": value, "phash_mirror": 7}
            for i, value in enumerate([0, 0, 1, 3])]
    assert clusters(deduplicated(tmp_path / "a", rows, max_distance=0)) == [["0", "1"]]
    assert clusters(deduplicated(tmp_path / "b", rows, max_distance=1)) == [["0", "1", "2"]]    # 3 is two bits away


def test_pictures_of_one_colour_are_copies_only_by_their_bytes(tmp_path):
    blank = [jpeg(Image.new("RGB", (300, 300), colour)) for colour in ("red", "blue")]
    found = deduplicated(tmp_path, scored(red=blank[0], again=blank[0], blue=blank[1]))
    assert clusters(found) == [["again", "red"]]


def test_the_best_image_has_most_pixels_then_most_bytes(tmp_path):
    first = photograph(4, 640, 480)
    rows = scored(large=jpeg(first, 50), small=jpeg(first.resize((480, 360)), 95), same_size=jpeg(first, 95))
    found = deduplicated(tmp_path, rows)
    assert [ref for ref, _ in sorted(found.items(), key=lambda item: item[1][1])] == ["same_size", "large", "small"]


def test_a_corpus_without_copies_has_no_cluster(tmp_path):
    assert deduplicated(tmp_path / "some", scored(a=jpeg(photograph(1)), b=jpeg(photograph(2)))) == {}
    assert deduplicated(tmp_path / "none", []) == {}


HASHES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 63), st.integers(0, 63), st.integers(0, 4)),
                  min_size=1, max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(HASHES, st.integers(0, 6), st.booleans(), st.integers(2, 5))
def test_every_member_is_near_its_keeper_however_the_corpus_is_cut(tmp_path_factory, made, most, mirrored, parts):
    rng = np.random.default_rng(0)
    families = [int(value) for value in rng.integers(0, 2**63, 8)]
    mirrors = [int(value) for value in rng.integers(0, 2**63, 8)]
    rows = [{"ref": f"r{i}", "uid": f"u{i // 2 if same == 0 else 100 + i}", "width": 100 + same, "height": 100,
             "bytes": 1000 + i // 2, "phash": families[family] ^ (1 << a) ^ (1 << b),
             "phash_mirror": mirrors[family] ^ (1 << a) ^ (1 << b)} for i, (family, a, b, same) in enumerate(made)]
    for row in rows:        # equal bytes have equal hashes and sizes
        twin = next(other for other in rows if other["uid"] == row["uid"])
        row |= {k: twin[k] for k in ("width", "bytes", "phash", "phash_mirror")}
    folder = tmp_path_factory.mktemp("dedup")
    found = deduplicated(folder / "one", rows, max_distance=most, mirrored=mirrored)
    assert found == deduplicated(folder / "many", rows, parts, max_distance=most, mirrored=mirrored)
    by_ref, keepers = {row["ref"]: row for row in rows}, {c: ref for ref, (c, rank, *_) in found.items() if rank == 0}
    for ref, (cluster, rank, kind, distance) in found.items():
        keeper, row = by_ref[keepers[cluster]], by_ref[ref]
        value = keeper["phash_mirror"] if kind == "mirrored" else keeper["phash"]
        if kind == "exact" and mirrored:
            assert distance <= most
        else:
            assert distance == (row["phash"] ^ value).bit_count() <= most
        assert (kind == "keeper") == (rank == 0)
        assert (row["width"], row["bytes"]) <= (keeper["width"], keeper["bytes"])
    uids = [row["uid"] for row in rows]
    assert {row["ref"] for row in rows if uids.count(row["uid"]) > 1} <= set(found)     # exact copies always


def test_one_photograph_in_all_orientations_is_one_cluster(tmp_path, shared):
    files = sorted((shared / "corpus" / "odd" / "orientation").iterdir())
    found = deduplicated(tmp_path, scored(**{path.stem: path.read_bytes() for path in files}))
    assert len(found) == len(files) == 9 and len(clusters(found)) == 1
