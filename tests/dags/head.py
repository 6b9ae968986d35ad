"""A real Ray head with dashboard and token for the tests of both environments. Standard library and dags only."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from dags.ray_jobs import RayJobs, RayJobsError

REPOSITORY = Path(__file__).parent.parent.parent
# Where ray and clearshard are installed; Airflow's environment has neither.
PROGRAMS = Path(os.environ.get("CLEARSHARD_VENV") or Path(sys.executable).parent.parent) / "bin"


def wait_for(condition: Callable[[], object], seconds: float, every: float = 0.3) -> object:
    """The first truth that the condition answers."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for nothing"
        time.sleep(every)
    return answer


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(number)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


@contextlib.contextmanager
def ray_head() -> Iterator[dict[str, str]]:
    """Starts it; yields the variables that lead to it: RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE, RAY_AUTH_TOKEN."""
    gcs, dashboard, agent, client = free_ports(4)
    there = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_AUTH_MODE": "token",
             "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tempfile.mkdtemp(prefix="rd", dir="/tmp")      # sockets lie in it, and their names have to be short
    process = subprocess.Popen(
        [PROGRAMS / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--port={gcs}",
         f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
         f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1"],
        env=os.environ | there, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        with mock.patch.dict(os.environ, there):
            wait_for(lambda: process.poll() is not None or answers(there["RAY_API_SERVER_ADDRESS"]), 60)
            assert process.poll() is None, "ray start ended; try it by hand"
        yield there
    finally:
        process.terminate()         # ends the processes that it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    try:
        RayJobs(address).jobs("")
        return True
    except RayJobsError:
        return False
