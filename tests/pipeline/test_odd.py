"""Odd files through the real pipeline: each is a row of the scores or of the quarantine, and none stops it."""

import os
import struct
import tarfile
import zlib
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import TRANSPOSE
from tests.conftest import configure, photograph, rows_of_table, tars


def outcome(workspace):
    """{name: error class, or None if it was scored} of every source row."""
    refused = {row["ref"]: row["error"] for row in rows_of_table(workspace, "quarantine/score")}
    scored = {row["ref"] for row in rows_of_table(workspace, "scores")}
    listed = rows_of_table(workspace, "sources")
    assert {row["ref"] for row in listed} == scored | set(refused) and not scored & set(refused)
    assert len({row["ref"] for row in listed}) == len(listed)
    return {row["name"]: refused.get(row["ref"]) for row in listed}


def scored(workspace, run, text=""):
    if text:
        with open(workspace / "corpus.yaml", "a") as file:
            file.write(text)
    run(workspace, "ingest", "score", max_error_rate=1.0)
    return outcome(workspace)


# The development images -------------------------------------------------------------------------------------

def test_every_odd_file_is_scored_or_refused_with_a_reason_and_none_brings_a_worker_down(tmp_path, shared, run):
    workspace = configure(tmp_path / "w", shared / "corpus" / "odd")
    lines = run(workspace, "ingest", "score", max_error_rate=1.0)
    found = outcome(workspace)
    files = [path for path in (shared / "corpus" / "odd").rglob("*") if path.is_file()]
    assert len(found) == len(files) > 200 and "repeated after a worker died" not in "".join(lines)
    reasons = Counter(found.values())
    assert reasons[None] > 100
    assert set(reasons) <= {None, "empty", "not_an_image", "unsupported_format", "unsupported_mode", "zero_size",
                            "too_many_pixels", "animated", "truncated", "corrupt"}
    for row in rows_of_table(workspace, "quarantine/score"):
        assert row["stage"] == "score" and len(row["message"]) > 10 and "\n\n" not in row["message"]


def in_groups(workspace, *files):
    """A corpus in which each file is a group of its own."""
    for number, path in enumerate(files):
        (workspace / f"{number}").mkdir(parents=True)
        (workspace / f"{number}" / path.name).write_bytes(path.read_bytes())
    return configure(workspace, *(f"{{uri: {str(workspace / str(n))!r}, group: g{n}}}" for n in range(len(files))))


def with_selection(workspace, text, **changes):
    """Sets rules of `select` and of other sections in a corpus.yaml."""
    path = workspace / "corpus.yaml"
    path.write_text(path.read_text().replace("facts: {", text + "facts: {jpeg_quality: {}, ").replace(
        "size: 256, max_tiles: 3", changes.get("tile", "size: 256, max_tiles: 3")).replace(
        "samples: 4", changes.get("shard", "samples: 4")))
    return workspace


def pictures(workspace):
    """Per tar the pictures in it, in their order."""
    found = {}
    for name, data in tars(workspace).items():
        with tarfile.open(fileobj=BytesIO(data)) as tar:
            found[name] = [np.asarray(Image.open(tar.extractfile(m))).astype(int) for m in tar if "json" not in m.name]
    return found


def test_one_photograph_in_all_orientations_is_kept_once(tmp_path, shared, run):
    workspace = with_selection(configure(tmp_path / "w", shared / "corpus" / "odd" / "orientation"), "")
    run(workspace, "ingest", "score", "dedup", "select")
    reasons = [row["reason"] for row in rows_of_table(workspace, "selection")]
    assert sorted(reasons, key=str) == [None, *["duplicate"] * 8]


def test_each_orientation_of_one_photograph_gives_the_same_sample(tmp_path, shared, run):
    files = sorted((shared / "corpus" / "odd" / "orientation").iterdir())
    workspace = with_selection(in_groups(tmp_path / "w", *files), "keep_near_duplicates: true, ",
                               tile="mode: whole, size: 600")
    run(workspace)
    first, *others = [sample for sample, in pictures(workspace).values()]
    assert len(others) == 8 and first.shape == (600, 900, 3)
    for other in others:        # each file was compressed in its own position
        assert np.abs(other - first).mean() < 4 < np.abs(other[::-1] - first).mean() / 5


def test_a_photograph_stored_in_any_position_gives_the_same_tiles_to_the_last_bit(tmp_path, run):
    upright, files = np.asarray(photograph(1, 640, 520)), []
    for orientation in range(1, 9):
        stored = TRANSPOSE.get({6: 8, 8: 6}.get(orientation, orientation), lambda a: a)(upright)
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(tmp_path / f"{orientation}.png")
        Image.fromarray(np.ascontiguousarray(stored)).save(files[-1], exif=exif)
    workspace = with_selection(in_groups(tmp_path / "w", *files), "keep_near_duplicates: true, ",
                               shard="samples: 4, encoding: png")
    run(workspace)
    first, *others = pictures(workspace).values()
    assert len(first) == 3 and len(others) == 7
    # Within a shard the order is that of the tiles, which are the same ones.
    assert all(np.array_equal(np.array(first), np.array(other)) for other in others)


# Made-up ones -----------------------------------------------------------------------------------------------

def png(width, height, rows=b""):
    """A PNG of one bit per pixel whose header promises so many of them."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def test_what_is_no_picture_is_refused_and_what_is_one_is_not(tmp_path, run):
    pile = tmp_path / "pile"
    pile.mkdir()
    made = {
        "bomb.png": (png(20_000, 20_000), "too_many_pixels"),
        "real bomb.png": (png(20_000, 20_000, bytes(2501 * 20_000)), "too_many_pixels"),
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"\n<!DOCTYPE html><html>Not found</html>", "not_an_image"),
        "zeros.jpg": (bytes(5000), "not_an_image"),
        "text.png": (b"to do: photographs", "not_an_image"),
        "no pixels.png": (png(64, 64), "truncated"),
        "notes": (b"%PDF-1.4", "not_an_image"),
    }
    for name, (data, _) in made.items():
        (pile / name).write_bytes(data)
    photograph(1).save(pile / "a photograph named.txt", "JPEG", quality=92)
    found = scored(configure(tmp_path / "w", pile), run)
    assert found.pop("a photograph named.txt") is None
    assert found.pop("no pixels.png") in ("truncated", "corrupt")
    assert found == {name: error for name, (_, error) in made.items() if name != "no pixels.png"}


def test_any_name_at_all_is_scored_and_found_again(tmp_path, run):
    pile = tmp_path / "pile"
    pile.mkdir()
    names = [b"with space.jpg", b"new\nline.jpg", "日本語 ü ß.jpg".encode(), b"\xff\xfe\x80.jpg", b"100%25?#&.jpg",
             b"'\"`$(x).jpg", b"-rf.jpg", b"*[a-z]?.jpg", b"n" * 250 + b".jpg", "\u202egpj.jpg".encode(), b"~.jpg"]
    for seed, name in enumerate(names):
        with open(os.fsencode(pile) + b"/" + name, "wb") as file:
            photograph(seed).save(file, "JPEG", quality=92)
    workspace = configure(tmp_path / "w", pile)
    lines = run(workspace)
    found = outcome(workspace)
    assert set(found.values()) == {None} and len(found) == len(names)
    assert any(f"corpus: hq: {len(names)} samples" in line for line in lines)


def test_links_pipes_and_folders_that_are_named_like_pictures(tmp_path, run):
    pile = tmp_path / "pile"
    (pile / "inner.jpg").mkdir(parents=True)
    photograph(1).save(pile / "inner.jpg" / "a.jpg", quality=92)
    photograph(2).save(tmp_path / "outside.jpg", quality=92)
    os.symlink(tmp_path / "outside.jpg", pile / "link.jpg")
    os.symlink(pile, pile / "inner.jpg" / "up")                 # a loop of folders
    os.symlink(pile / "self.jpg", pile / "self.jpg")            # a loop of one
    os.symlink(pile / "nowhere.jpg", pile / "broken.jpg")
    os.mkfifo(pile / "pipe.jpg")
    found = scored(configure(tmp_path / "w", pile), run)
    assert {name for name, error in found.items() if error is None} == {"a.jpg", "link.jpg"}
    assert found["broken.jpg"] == "not_found" and found["pipe.jpg"] == "empty" and found["self.jpg"]
    assert not {"crashed", "timeout"} & set(found.values()) and len(found) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path, run):
    pile = tmp_path / "pile"
    pile.mkdir()
    photograph(1).save(pile / "secret.jpg", quality=92)
    os.chmod(pile / "secret.jpg", 0)
    assert scored(configure(tmp_path / "w", pile), run) == {"secret.jpg": "permission"}


def test_a_file_of_the_largest_size_passes_and_one_byte_more_does_not(tmp_path, run, monkeypatch):
    pile = tmp_path / "pile"
    pile.mkdir()
    photograph(1).save(pile / "fits.jpg", quality=92)
    limit = (pile / "fits.jpg").stat().st_size
    photograph(2).save(pile / "more.jpg", quality=92)
    data = (pile / "fits.jpg").read_bytes()
    (pile / "more.jpg").write_bytes(data[:-2] + b"\0" + data[-2:])
    photograph(3, 400, 251).save(pile / "pixels.png")
    photograph(3, 64, 64).save(pile / "fewer.png")
    text = f"score: {{limits: {{max_bytes: {limit}, max_pixels: {320 * 288}}}}}\n"
    found = scored(configure(tmp_path / "w", pile), run, text)
    assert found == {"fits.jpg": None, "more.jpg": "too_many_bytes", "fewer.png": None,
                     "pixels.png": "too_many_bytes" if (pile / "pixels.png").stat().st_size > limit
                     else "too_many_pixels"}


def test_a_limit_that_was_raised_is_applied_to_what_was_refused(tmp_path, run):
    pile = tmp_path / "pile"
    pile.mkdir()
    photograph(1).save(pile / "a.jpg", quality=92)
    workspace = configure(tmp_path / "w", pile)
    assert scored(workspace, run, "score: {limits: {max_pixels: 1000}}\n") == {"a.jpg": "too_many_pixels"}
    path = workspace / "corpus.yaml"
    path.write_text(path.read_text().replace("max_pixels: 1000", "max_pixels: 100000"))
    assert scored(workspace, run) == {"a.jpg": None}


def test_an_animation_counts_as_its_first_picture_or_is_refused_as_configured(tmp_path, run):
    pile = tmp_path / "pile"
    pile.mkdir()
    frames = [photograph(seed).convert("P") for seed in range(3)]
    frames[0].save(pile / "a.gif", save_all=True, append_images=frames[1:])
    workspace = configure(tmp_path / "w", pile)
    assert scored(workspace, run) == {"a.gif": None}
    assert rows_of_table(workspace, "scores")[0]["frames"] == 3
    assert scored(workspace, run, "score: {limits: {animated: refuse}}\n") == {"a.gif": "animated"}


def test_a_group_that_a_table_names_cannot_leave_the_workspace(tmp_path, pile, run):
    (pile / "table.csv").write_text("path,group\n0.jpg,../../evil\n1.jpg,A Nice Group!\n2.jpg,\n3.jpg,it's\n"
                                    "4.jpg,---\n")
    workspace = configure(tmp_path / "inner" / "w", pile / "table.csv")
    run(workspace)
    assert sorted(tars(workspace)) == ["a_nice_group-000000.tar", "evil-000000.tar", "hq-000000.tar",
                                       "it_s-000000.tar"]
    assert not [path for path in tmp_path.rglob("*.tar") if path.parent != workspace / "shards"]
