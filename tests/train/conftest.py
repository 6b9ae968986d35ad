"""Small corpora, written by the pipeline's own writer."""

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.shards import index_bytes
from pipeline.tar import TarWriter


def image(key: str) -> bytes:
    """Some bytes that stand for the image of a key, a few hundred of them."""
    return hashlib.shake_128(key.encode()).digest(200 + len(key) * 7)


def write_corpus(folder: Path, groups: dict[str, list[int]]) -> Path:
    """A folder as `clearshard run` leaves it: groups with so many samples in each of their shards."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    said = {}
    for group, sizes in groups.items():
        for number, samples in enumerate(sizes):
            name = f"{group}-{number:06d}"
            with TarWriter(str(shards / f"{name}.tar")) as writer:
                for sample in range(samples):
                    key = f"{name}-{sample}"
                    writer.add([(f"{key}.jpg", image(key)), (f"{key}.txt", f"caption of {key}".encode()),
                                (f"{key}.json", json.dumps({"key": key}).encode())])
            (shards / f"{name}.index.parquet").write_bytes(index_bytes(writer, "0" * 12))
            said[name] = {"samples": samples, "bytes": writer.size, "xxh3": writer.xxh3, "plan": "0" * 12}
    (shards / "corpus.json").write_text(json.dumps({"format": 1, "shards": said}))
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """40 samples of hq in 6 uneven shards, 5 faces in 2."""
    return write_corpus(tmp_path / "w", {"hq": [10, 3, 9, 0, 7, 11], "face": [2, 3]})


def damage(workspace: Path, key: str) -> None:
    """Changes one byte of a sample's image."""
    tar = workspace / "shards" / f"{key.rpartition('-')[0]}.tar"
    data = bytearray(tar.read_bytes())
    data[data.find(image(key)) + 5] ^= 1
    tar.write_bytes(data)
