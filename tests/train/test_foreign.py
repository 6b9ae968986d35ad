"""Tars that others wrote: indexed once, read as stock webdataset reads them."""

import io
import tarfile

import pytest
import webdataset as wds
from typer.testing import CliRunner

from train import Corpus, CorpusError, Reader, Reading, index_foreign
from train.foreign import index

LONG = "a/folder/with a very long name that does not fit in the hundred bytes of an old tar header/and more/of it"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """Two tars by ShardWriter, and one by tarfile with what the world has: folders, notes, long names, no image."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=4, verbose=0) as writer:
        for number in range(7):
            writer.write({"__key__": f"{number:04d}", "jpg": bytes([number]) * 300, "txt": f"text {number}",
                          "json": {"number": number}})
    with tarfile.open(folder / "face-odd.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("__notes__/ignored.jpg"))
        directory = tarfile.TarInfo("v1.0")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, data in [("v1.0/1.PNG", b"one"), ("v1.0/1.left.jpg", b"left"), ("v1.0/1.txt", "größe".encode()),
                           ("v1.0/only.json", b"{}"), (f"{LONG}/2.jpg", b"two"), ("v1.0/.hidden.webp", b"three"),
                           ("README", b"no extension"), ("日本/4.webp", b"four" * 1000)]:
            add(tar, name, data)
    return folder


def test_foreign_samples_are_those_of_webdataset(folder):
    said = index_foreign(str(folder))
    assert {name: (about["samples"], about["group"]) for name, about in said.items()} == {
        "00000": (4, "hq"), "00001": (3, "hq"), "face-odd": (3, "face")}
    reader = Reader(Corpus.open(str(folder)), Reading(weights={"hq": 7, "face": 4}))
    found = {sample.key: sample for sample in map(reader.__getitem__, range(200))}
    stock = {sample["__key__"]: sample for path in sorted(folder.glob("*.tar"))
             for sample in wds.WebDataset([str(path)], shardshuffle=False, empty_check=False)}
    pictures = {"jpg", "png", "webp"}
    assert set(found) == {key for key, sample in stock.items() if pictures & set(sample)}
    for key, sample in found.items():
        assert sample.image == stock[key][sample.extension]
        assert sample.text == (stock[key]["txt"].decode() if "txt" in stock[key] else None)
    assert found["0003"].metadata == {"number": 3} and found["v1.0/1"].text == "größe"


def test_a_tar_is_indexed_once_and_again_when_it_has_changed(folder):
    index_foreign(str(folder), group="hq")
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    with tarfile.open(folder / "00001.tar", "a") as tar:
        for number in range(20):
            add(tar, f"more{number}.jpg", b"more" * 600)
    with pytest.raises(CorpusError, match=r"changed since they were indexed: 00001.*clearshard index"):
        Corpus.open(str(folder))
    assert index_foreign(str(folder), group="hq")["00001"]["samples"] == 23
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert {name for name in written if written[name] != now[name]} == {"00001.index.parquet"}
    assert Corpus.open(str(folder)).sizes["hq"].tolist() == [4, 23, 3]


def test_indexed_tars_without_a_summary_can_be_read_and_those_without_an_index_not(folder):
    with pytest.raises(CorpusError, match=r"00000.tar has no index. `clearshard index"):
        Corpus.open(str(folder))
    index_foreign(str(folder))
    stated = Corpus.open(str(folder)).fingerprint()
    (folder / "corpus.json").unlink()
    assert Corpus.open(str(folder)).fingerprint() == stated


def cut(data: bytes) -> bytes:
    return data[:1300]


def garbled(data: bytes) -> bytes:
    return data[:3072] + b"\x7f" * 512 + data[3584:]


def doubled(data: bytes) -> bytes:
    return data[:2048] + data


@pytest.mark.parametrize("harm", [cut, garbled, doubled, lambda data: b"<html>no tar at all</html>" * 100])
def test_a_damaged_tar_is_refused_with_its_name(folder, harm):
    path = folder / "00000.tar"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(CorpusError, match=r"00000.tar is damaged \("):
        index_foreign(str(folder))
    assert not (folder / "00000.index.parquet").exists()


def test_the_command_says_what_it_found_and_leaves_a_corpus_of_ours_alone(folder, workspace, tmp_path):
    import typer
    app = typer.Typer()
    app.command()(index)
    assert "10 samples in 3 tars" in CliRunner().invoke(app, [str(folder), "--group", "face"]).output
    before = (workspace / "shards" / "corpus.json").read_bytes()
    refused = CliRunner().invoke(app, [str(workspace / "shards")])
    assert refused.exit_code == 1 and "`clearshard run` wrote" in refused.output
    assert (workspace / "shards" / "corpus.json").read_bytes() == before
    assert "holds no .tar files" in CliRunner().invoke(app, [str(tmp_path)]).output
