"""Small corpora, written by the pipeline's own writer."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.shards import index_bytes
from pipeline.tar import TarWriter
from tests.conftest import photograph


def image(key: str) -> bytes:
    """Some bytes that stand for the image of a key, a few hundred of them."""
    return hashlib.shake_128(key.encode()).digest(200 + len(key) * 7)


def write_corpus(folder: Path, groups: dict[str, list[int]], image: Callable[[str], bytes] = image) -> Path:
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


def picture(key: str) -> bytes:
    """A JPEG of 96 x 80 pixels that looks a little like a photograph, another one for each key."""
    data = io.BytesIO()
    photograph(int(hashlib.md5(key.encode()).hexdigest()[:6], 16), 96, 80).save(data, "jpeg", quality=95)
    return data.getvalue()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A corpus of real pictures: 18 of hq in 3 shards, 4 negatives."""
    return write_corpus(tmp_path_factory.mktemp("pictures"), {"hq": [6, 7, 5], "negative": [4]}, picture)


@pytest.fixture(scope="session")
def prior(tmp_path_factory) -> Path:
    """The tiny SDXL."""
    import torch

    from models import tiny_sdxl
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("prior") / "sdxl"
    tiny_sdxl.build(folder)
    return folder


@pytest.fixture
def configured(tmp_path, pictures, prior) -> Callable[..., dict]:
    """configured(task, **changes): a run of the tiny networks, as YAML would give it; `data=…` and `task=…` are added
    to what is there."""
    def make(task: str = "supir.encoder", /, **changes: Any) -> dict:
        values = {
            "task": {"name": task, "prior": str(prior), **changes.pop("task", {})},
            "data": {"corpus": [str(pictures)], "crop": 64, "workers": 0,
                     "recipe": "supir" if task in ("supir.encoder", "supir.adaptor") else None,
                     "reading": {"weights": {"hq": 3, "negative": 1}}, **changes.pop("data", {})},
            "out": str(tmp_path / "run"), "images": 32, "batch": 4, "log_every": 1,
            "optimizer": {"rate": 1e-3}, "ema": {"half_life": 16},
            "validation": {"every": 1000, "images": 2, "previews": 1}, "checkpoints": {"every": 8}}
        return values | changes
    return make
