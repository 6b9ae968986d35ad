"""One writer per workspace: a lock file that names its holder and outlives no dead one."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import psutil

from .storage import TEMPORARY, Folder, WorkspaceError

NAME = "lock.json"
HEARTBEAT_S = 10.0
EXPIRES_S = 60.0
SETTLE_S = 1.0


class WorkspaceBusy(RuntimeError):
    """Another run holds the workspace."""


class Lock:
    """Holds a workspace for the length of a `with` block.

    On a local disk exactly one of two runs gets it. Object stores have no operation in common that would
    ensure that: there the last writer wins, and each run looks again after a moment whether it was the
    last. The holder renews the file every ten seconds. A holder on this machine
    whose process is gone is replaced at once, one elsewhere after a minute without a sign of life.

    Raises:
        WorkspaceBusy: names the holder: user, machine, process, command and since when.
    """

    def __init__(self, workspace: Folder, command: str):
        self.folder = workspace
        process = psutil.Process()
        self.token = uuid.uuid4().hex
        self.record = {"token": self.token, "user": getpass.getuser(), "host": socket.gethostname(),
                       "pid": process.pid, "started": process.create_time(), "command": command,
                       "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._stop = threading.Event()

    def __enter__(self) -> Lock:
        with self._guarded():
            holder = self._holder()
            if holder is not None and alive(holder):
                raise WorkspaceBusy(describe(self.folder, holder))
            self._write()
        if self.folder.local is None:
            time.sleep(SETTLE_S)
            holder = self._holder()
            if holder is None or holder["token"] != self.token:
                raise WorkspaceBusy(describe(self.folder, holder or self.record))
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with self._guarded():
            if (self._holder() or {}).get("token") == self.token:
                self.folder.delete(NAME)

    def _holder(self) -> dict | None:
        try:
            return json.loads(self.folder.read(NAME))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"token": "", "host": "", "pid": 0, "beat": 0}

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """On a local disk: look and write as one step, by a file lock that lasts a moment."""
        if self.folder.local is None:
            yield
            return
        try:
            os.makedirs(self.folder.local, exist_ok=True)
            descriptor = os.open(os.path.join(self.folder.local, f"{TEMPORARY}guard"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise WorkspaceError(f"cannot lock {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self) -> None:
        self.folder.write(NAME, json.dumps(self.record | {"beat": time.time()}).encode())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(WorkspaceError, OSError):
                if (self._holder() or {}).get("token") == self.token:
                    self._write()


def alive(holder: dict) -> bool:
    """Whether the process that wrote a lock still runs."""
    if holder["host"] == socket.gethostname():
        try:
            return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1.0
        except psutil.Error:
            return False
    return time.time() - holder.get("beat", 0) < EXPIRES_S


def describe(folder: Folder, holder: dict) -> str:
    return (f"{folder} is in use by `{holder.get('command')}` of {holder.get('user')} on {holder.get('host')}"
            f" (process {holder.get('pid')}, since {holder.get('since')}). Wait for it or stop it; if that "
            f"machine is gone, this lock ends by itself within {EXPIRES_S:.0f} seconds.")
