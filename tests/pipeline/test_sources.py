"""Sources: every way in which images lie around."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError, Source
from pipeline.sources import list_source
from pipeline.storage import local_path, read_bytes


def listed(uri, **options):
    problems = []
    rows = list(list_source(Source(uri=str(uri), **options), lambda place, error: problems.append((place, error))))
    return rows, problems


def names(rows):
    return [row["name"] for row in rows]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "b/c.PNG", "b/deep/d.txt", ".hidden.jpg", "with space.jpg", "line\nbreak.jpg", "日本.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    with open(os.fsencode(tmp_path) + b"/no-utf8-\xff.jpg", "wb") as file:
        file.write(b"x")
    return tmp_path


def test_every_file_of_a_folder_is_listed_in_a_stable_order_whatever_its_name(folder):
    rows, problems = listed(folder)
    assert names(rows) == ["a.jpg", "line\nbreak.jpg", "no-utf8-\ufffd.jpg", "with space.jpg", "日本.jpg", "c.PNG",
                           "d.txt"]
    assert not problems and len({row["ref"] for row in rows}) == 7
    assert all(len(read_bytes(row["uri"])) > 0 for row in rows)


def test_extensions_narrow_a_folder_without_regard_to_case(folder):
    assert names(listed(folder, extensions=["png", ".txt"])[0]) == ["c.PNG", "d.txt"]


@pytest.mark.parametrize(("pattern", "expected"), [
    ("*.jpg", 5), ("**/*.jpg", 5), ("b/*", 1), ("b/**", 2), ("**/[cd].*", 2), ("?.jpg", 1)])
def test_globs(folder, pattern, expected):
    assert len(listed(folder / pattern)[0]) == expected


def test_a_name_with_glob_characters_is_itself_first(tmp_path):
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "a.jpg").write_bytes(b"x")
    assert names(listed(tmp_path / "set[1]")[0]) == ["a.jpg"]


def test_links_are_followed_once_and_a_loop_ends(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    rows, _ = listed(tmp_path)
    assert sorted(names(rows)) == ["a.jpg", "nowhere.jpg"]
    assert names(listed(tmp_path, follow_links=False)[0]) == ["a.jpg"]


def test_files_that_describe_an_image_beside_them_are_no_images(tmp_path):
    for name in ("a.jpg", "a.txt", "a.json", "b.txt", "c-1.jpg", "c.JPG", "c.xmp"):
        (tmp_path / name).write_bytes(b"x")
    assert names(listed(tmp_path)[0]) == ["a.jpg", "b.txt", "c-1.jpg", "c.JPG"]


def test_a_changed_file_gets_a_new_ref_and_an_unchanged_one_keeps_it(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"one")
    first = listed(tmp_path)[0][0]["ref"]
    assert listed(tmp_path)[0][0]["ref"] == first
    (tmp_path / "a.jpg").write_bytes(b"three")
    assert listed(tmp_path)[0][0]["ref"] != first


def test_an_absent_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing-here.*holds no files"):
        listed(tmp_path / "nothing-here")


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tar_members_are_read_in_place_and_their_text_travels_along(tmp_path):
    make_tar(tmp_path / "s.tar", [
        ("x/001.jpg", b"first"), ("x/001.txt", b"a cat \n"), ("x/001.json", b'{"license": "CC0", "score": 3}'),
        ("x/002.png", b"second"), ("x/002.json", b"not json")])
    rows, _ = listed(tmp_path)
    assert names(rows) == ["x/001.jpg", "x/002.png"]
    assert read_bytes(rows[1]["uri"], rows[1]["offset"], rows[1]["length"]) == b"second"
    assert (rows[0]["text"], rows[0]["licence"], json.loads(rows[0]["extra"])["score"]) == ("a cat", "CC0", 3)
    assert rows[1].get("text") is None


def test_a_damaged_tar_gives_what_it_holds_and_is_reported(tmp_path):
    make_tar(tmp_path / "whole.tar", [("1.jpg", b"x" * 2000), ("2.jpg", b"y" * 2000), ("3.jpg", b"z" * 2000)])
    data = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "whole.tar").write_bytes(data[:3000] + b"\xff" * 3000)
    (tmp_path / "zz.jpg").write_bytes(b"x")
    rows, problems = listed(tmp_path)
    assert names(rows)[-1] == "zz.jpg" and "1.jpg" in names(rows)
    assert [os.path.basename(local_path(place)) for place, _ in problems] == ["whole.tar"]


def test_tables_of_paths_and_urls_keep_their_further_columns(tmp_path):
    rows = [{"url": "https://example.com/a.jpg", "caption": "a dog", "license": "CC-BY", "photo_id": 7},
            {"url": "inner/b.jpg", "caption": "", "license": None, "photo_id": 8}]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "t.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("t.parquet", "t.csv", "t.jsonl"):
        found, _ = listed(tmp_path / name, licence="unknown")
        assert [row["uri"] for row in found] == ["https://example.com/a.jpg", f"file://{tmp_path}/inner/b.jpg"]
        assert [(row.get("text"), row["licence"]) for row in found] == [("a dog", "CC-BY"), (None, "unknown")]
        assert json.loads(found[0]["extra"]) == {"photo_id": 7}


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    pq.write_table(pa.table({"picture": ["a.jpg"]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"no column that looks like.*picture"):
        listed(tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="no column 'pic'"):
        listed(tmp_path / "t.parquet", columns={"uri": "pic"})
    assert names(listed(tmp_path / "t.parquet", columns={"uri": "picture"})[0]) == ["a.jpg"]


@pytest.mark.parametrize("as_struct", [False, True])
def test_images_in_a_column_are_noted_cell_by_cell(tmp_path, as_struct):
    cells = [b"one", b"two", b"three"]
    values = [{"bytes": c, "path": None} for c in cells] if as_struct else cells
    pq.write_table(pa.table({"image": values, "text": ["x", "y", "z"]}), tmp_path / "t.parquet", row_group_size=2)
    rows, _ = listed(tmp_path / "t.parquet")
    assert [row["cell"] for row in rows] == ["image:0:0", "image:0:1", "image:1:0"]
    assert [row["text"] for row in rows] == ["x", "y", "z"]
