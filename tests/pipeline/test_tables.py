"""Tables: parts named after what they were made from."""

import pyarrow as pa

from pipeline.storage import Folder
from pipeline.tables import Part, Table, digest, digest_table, rows_of

SCHEMA = pa.schema([("ref", pa.string()), ("value", pa.int64())])


def table(tmp_path):
    return Table(Folder.at(str(tmp_path / "t")), SCHEMA)


def test_a_digest_is_the_same_everywhere():
    assert digest("a", 1, {"b": [None, 2.5]}) == "1382bddd503e"


def test_a_part_name_tells_key_inputs_and_content():
    part = Part.parse("000012-64-9f3a1b2c~aa~bb.parquet")
    assert (part.key, part.inputs, part.content, rows_of(part.key)) == ("000012-64-9f3a1b2c", "aa", "bb", 64)
    assert Part.parse("manifest.parquet") is None


def test_equal_rows_make_equal_files_however_they_are_chunked(tmp_path):
    rows = [{"ref": str(i), "value": i} for i in range(10)]
    whole = pa.Table.from_pylist(rows, schema=SCHEMA)
    chunked = pa.concat_tables([whole.slice(0, 3), whole.slice(3)])
    assert digest_table(whole) == digest_table(chunked)
    first, second = (table(tmp_path / n).write("000000-10-k", "i", t) for n, t in (("a", whole), ("b", chunked)))
    assert first == second


def test_a_new_part_replaces_the_old_one(tmp_path):
    target = table(tmp_path)
    old = target.write("000000-1-k", "one", [{"ref": "a", "value": 1}])
    new = target.write("000000-1-k", "two", [{"ref": "a", "value": 2}], replaces=old)
    assert target.folder.names() == [new.file]


def test_of_two_parts_of_one_key_the_newest_counts_and_tidy_removes_the_other(tmp_path):
    target = table(tmp_path)
    old = target.write("000000-1-k", "one", [{"ref": "a", "value": 1}])
    new = target.write("000000-1-k", "two", [{"ref": "a", "value": 2}])     # killed before it deleted the old
    assert target.parts()["000000-1-k"] == new
    assert target.dataset().to_table()["value"].to_pylist() == [2]
    target.tidy()
    assert target.folder.names() == [new.file] and old.file != new.file


def test_an_absent_table_is_an_empty_one(tmp_path):
    assert table(tmp_path).parts() == {} and table(tmp_path).dataset().to_table().num_rows == 0
