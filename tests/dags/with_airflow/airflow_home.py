"""Airflow as its users have it, in a folder of its own: SQLite, the real processes, the DAGs of this repository."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.dags.head import PROGRAMS, REPOSITORY, free_ports, wait_for

AIRFLOW = str(Path(sys.executable).parent / "airflow")
SERVICES = ("api-server", "scheduler", "dag-processor", "triggerer")


def settings(home: Path) -> dict[str, str]:
    """The environment of Airflow's processes, as docs/dags.md says; small, quick, and on this machine alone."""
    port, worker_log, trigger_log = free_ports(3)
    return os.environ | {
        "AIRFLOW_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "CLEARSHARD": str(PROGRAMS / "clearshard"),
        "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1",
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "1",
        "AIRFLOW__CORE__PARALLELISM": "1",          # one worker slot
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__API__PORT": str(port), "AIRFLOW__API__HOST": "127.0.0.1", "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": "only-for-tests-" + "x" * 50,
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(worker_log),
        "AIRFLOW__TRIGGERER__TRIGGER_LOG_SERVER_PORT": str(trigger_log),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def airflow(environment: dict[str, str], *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One command of Airflow's; its output and errors together."""
    return subprocess.run([AIRFLOW, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=timeout)


class Services:
    """The processes of an Airflow deployment, and its REST API."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.address = f"http://127.0.0.1:{environment['AIRFLOW__API__PORT']}"
        self.running: dict[str, subprocess.Popen] = {}
        self.token = ""

    def start(self, name: str) -> None:
        with open(Path(self.environment["AIRFLOW_HOME"]) / f"{name}.log", "a") as log:
            self.running[name] = subprocess.Popen([AIRFLOW, name], env=self.environment, stdout=log, stderr=log,
                                                  start_new_session=True)

    def stop(self, name: str) -> None:
        """As a deployment does: SIGTERM, and what is left after a while is killed."""
        process = self.running.pop(name)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def rest(self, method: str, path: str, body: dict | None = None) -> dict:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode() if body else None, headers,
                                         method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def ready(self) -> bool:
        try:
            self.token = self.rest("GET", "/auth/token")["access_token"]
            return {"captions", "negatives"} <= {row["dag_id"] for row in self.rest("GET", "/api/v2/dags")["dags"]}
        except OSError:
            return False


@contextlib.contextmanager
def services(environment: dict[str, str]) -> Iterator[Services]:
    """A deployment that knows the DAGs."""
    here = Services(environment)
    try:
        for name in SERVICES:
            here.start(name)
        wait_for(here.ready, 90)
        yield here
    finally:
        for name in tuple(here.running):
            here.stop(name)
