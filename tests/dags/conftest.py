"""The folder with_airflow is for an environment of its own: `make test-dags`."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest

from tests.dags.head import ray_head

collect_ignore = ["with_airflow"]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of a Ray head whose token this process has."""
    with ray_head() as there, mock.patch.dict(os.environ, there):
        yield there["RAY_API_SERVER_ADDRESS"]
