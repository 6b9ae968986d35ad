"""Tars: what other programs see in the ones that are written by hand."""

import io
import os
import shutil
import subprocess
import tarfile

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tar import BLOCK, LARGEST, TarWriter, header

NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0/"), min_size=1, max_size=100).filter(
    lambda name: len(name.encode()) <= 100)
SAMPLES = [[("a.jpg", b"x" * 1000), ("a.txt", b""), ("a.json", b"{}")], [("b.jpg", bytes(range(256)) * 4)],
           [("日本.png", b"y" * BLOCK)]]


def write(path, samples=SAMPLES):
    with TarWriter(str(path)) as writer:
        for members in samples:
            writer.add(members)
    return writer


def test_tarfile_sees_the_members_with_fixed_times_owners_and_modes(tmp_path):
    write(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        found = [(m.name, tar.extractfile(m).read()) for m in tar]
        about = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar}
    assert found == [member for sample in SAMPLES for member in sample]
    assert about == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
def test_the_program_tar_reads_it_without_a_word(tmp_path):
    write(tmp_path / "a.tar")
    listed = subprocess.run(["tar", "-tf", tmp_path / "a.tar", "--quoting-style=literal"], capture_output=True)
    assert listed.stdout.decode().splitlines() == [name for sample in SAMPLES for name, _ in sample]
    assert (listed.returncode, listed.stderr) == (0, b"")


def test_the_writer_knows_where_each_members_data_lies(tmp_path):
    writer, data = write(tmp_path / "a.tar"), (tmp_path / "a.tar").read_bytes()
    members = [member for sample in SAMPLES for member in sample]
    for place, (name, content) in zip(writer.members, members, strict=True):
        assert place.name == name and data[place.offset:place.offset + place.size] == content
        assert place.xxh3 == xxhash.xxh3_128_hexdigest(content)


def test_the_hash_and_size_are_those_of_the_whole_file(tmp_path):
    writer, data = write(tmp_path / "a.tar"), (tmp_path / "a.tar").read_bytes()
    assert (writer.size, writer.xxh3) == (len(data), xxhash.xxh3_128_hexdigest(data))


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6))
def test_any_names_and_contents_come_back_and_equal_ones_give_equal_bytes(tmp_path_factory, members):
    folder = tmp_path_factory.mktemp("tar")
    write(folder / "a.tar", [members])
    write(folder / "b.tar", [[member] for member in members])       # a sample's members in one call or in many
    data = (folder / "a.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == members
    assert data == (folder / "b.tar").read_bytes() and len(data) % BLOCK == 0


@given(NAMES, st.integers(0, LARGEST))
def test_every_header_is_the_one_that_tarfile_reads(name, size):
    info = tarfile.TarInfo.frombuf(header(name, size), "utf-8", "strict")      # checks the sum
    assert (info.name, info.size) == (name, size)


@pytest.mark.parametrize(("name", "size"), [("n" * 101, 0), ("é" * 51, 0), ("a.jpg", LARGEST + 1)])
def test_what_a_plain_header_cannot_hold_is_refused(name, size):
    with pytest.raises(ValueError, match="at most 100 bytes of name and 8 GiB"):
        header(name, size)


def test_a_refused_member_leaves_the_tar_as_it_was(tmp_path):
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.add(SAMPLES[0])
        with pytest.raises(ValueError):
            writer.add([("ok.jpg", b"1"), ("n" * 101, b"2")])
        writer.add(SAMPLES[1])
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == [name for sample in SAMPLES[:2] for name, _ in sample]
    data = (tmp_path / "a.tar").read_bytes()
    assert (writer.size, writer.xxh3) == (len(data), xxhash.xxh3_128_hexdigest(data))
    assert [member.name for member in writer.members] == [name for sample in SAMPLES[:2] for name, _ in sample]


@pytest.mark.parametrize("taken", [1, BLOCK, BLOCK + 7])
def test_a_write_that_the_system_cuts_short_is_completed(tmp_path, monkeypatch, taken):
    monkeypatch.setattr(os, "writev", lambda descriptor, pieces: os.write(descriptor, b"".join(pieces)[:taken]))
    write(tmp_path / "short.tar")
    monkeypatch.undo()
    write(tmp_path / "whole.tar")
    assert (tmp_path / "short.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()


def test_more_members_than_one_system_call_takes_are_written(tmp_path):
    many = [(f"{i}.txt", b"%d" % i) for i in range(os.sysconf("SC_IOV_MAX"))]
    write(tmp_path / "many.tar", [many])
    with tarfile.open(tmp_path / "many.tar") as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == many


def test_a_tar_is_never_written_over(tmp_path):
    write(tmp_path / "a.tar")
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.tar")


def test_an_error_in_the_middle_leaves_no_end_mark(tmp_path):
    with pytest.raises(KeyError), TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.add(SAMPLES[1])
        raise KeyError
    assert (tmp_path / "a.tar").stat().st_size == writer.size == 2 * BLOCK + BLOCK
