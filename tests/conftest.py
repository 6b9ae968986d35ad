"""What many tests share: made photographs, the development images if they are there, one Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


def photograph(seed: int, width: int = 320, height: int = 288) -> Image.Image:
    """A picture with the spectrum of a photograph: noise whose amplitude falls with frequency, in colour."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    shaped = np.fft.fft2(generator.standard_normal((3, height, width))) / (frequency + 0.01) ** 1.2
    plane = np.fft.ifft2(shaped).real
    plane = (plane - plane.mean()) / plane.std() * 50 + 120
    return Image.fromarray(plane.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development images; tests that need them are skipped without."""
    if not SHARED.is_dir():
        pytest.skip("needs the development images in ../shared/data")
    return SHARED


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """A small messy source: six photographs (one large), a copy, a small one, and files that are no pictures."""
    folder = tmp_path / "pile"
    (folder / "inner").mkdir(parents=True)
    for seed in range(5):
        photograph(seed).save(folder / f"{seed}.jpg", quality=92)
    photograph(5, 700, 640).save(folder / "inner" / "large.png")
    (folder / "inner" / "copy.jpg").write_bytes((folder / "0.jpg").read_bytes())
    photograph(6, 64, 64).save(folder / "small.jpg")
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.jpg").write_bytes((folder / "1.jpg").read_bytes()[:9000])
    return folder


SMALL = """
select: {{min_side: 256, facts: {loose}}}
tile: {{size: 256, max_tiles: 3, min_texture: 0.05}}
shard: {{samples: 4}}
max_error_rate: 0.9
"""
# The made photographs are no photographs: the thresholds for real ones are opened.
LOOSE = ("{sharpness: {min: 0}, flat_share: {max: 1}, noise: {max: 1000}, blockiness: {max: 1000}, "
         "upscale: {max: 100}, border: {max: 1}, entropy: {min: 0}}")


def configure(workspace: Path, *sources: object, extra: str = "") -> Path:
    """Writes a corpus.yaml for small pictures."""
    workspace.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"  - {{uri: {str(source)!r}}}\n" if not isinstance(source, str) or not source.startswith("{")
                     else f"  - {source}\n" for source in sources)
    (workspace / "corpus.yaml").write_text("sources:\n" + listed + SMALL.format(loose=LOOSE) + extra)
    return workspace


def clearshard(*arguments: object, check: bool = True, env: dict | None = None, **options: object):
    """Runs the command line in a process of its own."""
    result = subprocess.run([sys.executable, str(REPOSITORY / "clearshard.py"), *map(str, arguments)],
                            capture_output=True, text=True, env=os.environ | (env or {}), **options)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def ray_here():
    """Ray on this machine for all tests of a process."""
    import ray
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def on_cluster(ray_here) -> dict:
    """Environment in which commands join the tests' Ray, instead of starting one of their own each."""
    return {"RAY_ADDRESS": ray_here.get_runtime_context().gcs_address}


@pytest.fixture
def run(ray_here):
    """run(workspace, *stages, **options): stages in this process, by default all configured; returns what was said."""
    from clearshard import ORDER
    from pipeline import config
    from pipeline.cluster import Cluster
    from pipeline.stages import Session, Show
    from pipeline.storage import Folder

    class Lines(Show):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    def stages(workspace: Path, *names: str, **options: object) -> list[str]:
        folder, show = Folder.at(str(workspace)), Lines()
        session = Session(folder, config.load(folder), Cluster(), show, **options)
        for stage in ORDER:
            if stage.name in names or (not names and stage.configured(session.corpus)):
                stage.run(session)
        return show.lines

    return stages


def rows_of_table(workspace: Path | str, name: str) -> list[dict]:
    """All rows of one of a workspace's tables, sorted by ref."""
    from pipeline.ingest import sources
    from pipeline.score import scores_table
    from pipeline.selection import selection
    from pipeline.storage import Folder
    from pipeline.tables import QUARANTINE, Table
    from pipeline.tile import tiles
    folder = Folder.at(str(workspace))
    known = {"sources": sources, "scores": scores_table, "selection": selection, "tiles": tiles}
    table = known[name](folder) if name in known else Table(folder / "quarantine" / name.split("/")[1], QUARANTINE)
    return sorted(table.dataset().to_table().to_pylist(), key=lambda row: row["ref"])


def tars(workspace: Path) -> dict[str, bytes]:
    """Every tar of a workspace."""
    return {path.name: path.read_bytes() for path in sorted((workspace / "shards").glob("*.tar"))}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """Folder with llava/, sdxl/ and supir/, written by `clearshard models tiny` once for all test processes."""
    pytest.importorskip("skimage", reason="needs scikit-image's photographs")
    import fcntl
    import hashlib

    import torch
    from typer.testing import CliRunner

    from clearshard import app
    torch.set_num_threads(1)            # threads of so small models wait for each other more than they work
    sources = sorted((Path(__file__).parent.parent / "models").glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = tmp_path_factory.getbasetemp().parent / f"tiny-models-{digest}"
    folder.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = CliRunner().invoke(app, ["models", "tiny", str(folder)])
        assert result.exit_code == 0, result.output
        said = folder / "said.txt"      # by the process that made them
        said.write_text(said.read_text() if said.exists() else result.output)
    return folder
