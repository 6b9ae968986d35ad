"""For `make test-dags`: this folder runs where Airflow is and Clearshard is not."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-")        # before anything imports airflow

from dags.ray_jobs import RayJobs
from tests.dags.head import PROGRAMS, REPOSITORY, ray_head
from tests.dags.with_airflow.airflow_home import airflow, settings


@pytest.fixture(scope="session")
def jobs() -> Iterator[RayJobs]:
    """The Jobs API of a Ray head; its address and token are in the environment of this process."""
    with ray_head() as there, mock.patch.dict(os.environ, there):
        yield RayJobs(there["RAY_API_SERVER_ADDRESS"])


@pytest.fixture(scope="session")
def airflow_environment(jobs: RayJobs) -> Iterator[dict[str, str]]:
    """The variables of an Airflow with an empty data base."""
    home = Path(os.environ["AIRFLOW_HOME"])
    environment = settings(home)
    migrated = airflow(environment, "db", "migrate")
    assert migrated.returncode == 0, migrated.stdout
    yield environment
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace whose source has three made photographs; made where numpy and Pillow are."""
    program = ("import sys; from pathlib import Path; from tests.conftest import configure, photograph\n"
               "folder = Path(sys.argv[1]); (folder / 'pile').mkdir()\n"
               "for seed in range(3): photograph(seed).save(folder / 'pile' / f'{seed}.jpg', quality=92)\n"
               "configure(folder / 'corpus', folder / 'pile')")
    subprocess.run([PROGRAMS / "python", "-c", program, tmp_path], cwd=REPOSITORY, check=True)
    return tmp_path / "corpus"


@pytest.fixture
def script(tmp_path: Path):
    """script(text): the path of a shell script, to stand where the clearshard program is expected."""
    def write(text: str) -> Path:
        path = tmp_path / "clearshard"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path
    return write
