"""Storage: atomic writes, and URIs for any name at all."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import Folder, WorkspaceError, local_path, local_uri, read_bytes


@given(st.binary(min_size=1, max_size=40).filter(lambda b: b"\0" not in b and b"/" not in b))
def test_any_name_survives_the_way_to_a_uri_and_back(name):
    path = b"/images/" + name
    uri = local_uri(path)
    assert uri.isascii() and os.fsencode(local_path(uri)) == os.path.abspath(path)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    folder = Folder.at(str(tmp_path))
    folder.write("a", b"old")
    with pytest.raises(KeyboardInterrupt), folder.staged("a") as path:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt
    assert folder.read("a") == b"old" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_not_listed_and_swept(tmp_path):
    (tmp_path / ".tmp-123-a").write_bytes(b"half")
    folder = Folder.at(str(tmp_path))
    assert folder.names() == []
    folder.sweep()
    assert os.listdir(tmp_path) == []


def test_a_refused_write_names_file_cause_and_remedy(tmp_path):
    (tmp_path / "scores").write_bytes(b"a file where a folder should be")
    with pytest.raises(WorkspaceError, match=r"cannot write x\.parquet in .*scores: (File exists|Not a dir).*same"):
        (Folder.at(str(tmp_path)) / "scores").write("x.parquet", b"")


def test_a_range_that_ends_early_is_an_error_and_not_short_data(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    uri = local_uri(tmp_path / "a")
    assert read_bytes(uri, 3, 4) == b"3456"
    with pytest.raises(EOFError, match="2 bytes early"):
        read_bytes(uri, 8, 4)


def test_a_pipe_among_the_images_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert read_bytes(local_uri(tmp_path / "pipe.jpg")) == b""
