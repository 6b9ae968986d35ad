"""Bytes of shards: opened files, patience with a network, and a bounded cache of whole shards on a local disk.

Nothing here knows what a sample is.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Protocol, TypeVar

from pydantic import Field

from degrade.strict import Strict
from pipeline.storage import TEMPORARY, WorkspaceError, filesystem, local_path
from pipeline.tables import digest

from .corpus import Shard

log = logging.getLogger(__name__)
Value = TypeVar("Value")
CHUNK = 16 << 20        # bytes per request of a whole shard, so that a time-out costs little
LONGEST_WAIT = 30.0     # seconds between two tries
ABANDONED = 3600        # seconds since the last byte of a half-fetched shard


class ReadFailed(WorkspaceError):
    """The storage did not give what it holds; nothing is known to be wrong with the data."""


class Patience(Strict):
    """How long a read may take and how often it is tried again."""

    timeout: float = Field(60, gt=0)        # seconds for one request
    retries: int = Field(5, ge=0)
    wait: float = Field(0.5, ge=0)          # seconds before the first retry; doubled for each further one

    def __call__(self, what: str, action: Callable[[], Value], limited: bool = True) -> Value:
        """The action's result; `what` names it in errors. With `limited`, a try that hangs is left behind.

        Raises:
            ReadFailed: it is not there, is not allowed, or failed every time.
        """
        for attempt in range(self.retries + 1):
            try:
                return _within(self.timeout, action) if limited else action()
            except EOFError:
                raise
            except (FileNotFoundError, PermissionError) as error:
                raise ReadFailed(f"cannot read {what}: {error}. It was there when the run began; put it back or give "
                                 "the permission back, and start again from the last checkpoint") from error
            except OSError as error:
                failure = error
                if attempt < self.retries:
                    log.warning("%s: %s; trying again (%d of %d)", what, error, attempt + 1, self.retries)
                    time.sleep(min(LONGEST_WAIT, self.wait * 2**attempt) * random.uniform(0.5, 1))
        raise ReadFailed(f"cannot read {what}: {failure} ({self.retries + 1} tries of up to {self.timeout:g} s). Check "
                         "the network and the storage, then start again from the last checkpoint") from failure


def _within(seconds: float, action: Callable[[], Value]) -> Value:
    """The action's result; TimeoutError after so many seconds. A thread that hangs in a system call is abandoned."""
    answer: list = []

    def run() -> None:
        try:
            answer.append((action(), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = answer[0]
    if error is not None:
        raise error
    return value


class Recent:
    """The values that were asked for last, at most `size` of them. Threads may share it."""

    def __init__(self, size: int) -> None:
        self.size, self._held, self._lock = size, OrderedDict(), threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        value = make()          # outside the lock: two threads may both make it, and one is dropped
        with self._lock:
            self._held[key] = value
            while len(self._held) > self.size:
                self._held.popitem(last=False)
        return value

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._held.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held


class LocalFile:
    """A file on this machine; closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.path, self.descriptor = path, -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """Raises EOFError where the file ends early."""
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
            data += more
        return _whole(data, size, self.path)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class RemoteFile:
    """A file on an object store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        fs, path = filesystem(uri)
        self.file = fs.open_input_file(path)

    def read(self, offset: int, size: int) -> bytes:
        """Raises EOFError where the file ends early."""
        return _whole(self.file.read_at(size, offset), size, self.uri)


def _whole(data: bytes, size: int, name: str) -> bytes:
    if len(data) != size:
        raise EOFError(f"{name} ends {size - len(data)} bytes early")
    return data


class Source(Protocol):
    """Where the bytes of shards come from."""

    def read(self, shard: Shard, offset: int, size: int, again: bool = False) -> bytes:
        """Bytes of a shard; `again`: not from a copy, since what came looked damaged.

        Raises:
            EOFError: the file is too short.
            ReadFailed: as `Patience`.
        """

    def announce(self, group: str, shards: Iterable[Shard]) -> None:
        """These are the shards of a group that are read next."""


class Ranges:
    """Reads only what is asked for, from files that stay open for a while."""

    def __init__(self, patience: Patience, files: int = 256) -> None:
        self.patience, self.files = patience, Recent(files)

    def read(self, shard: Shard, offset: int, size: int, again: bool = False) -> bytes:
        path = local_path(shard.uri)
        if again:
            self.files.drop(shard.uri)

        def once() -> bytes:
            try:
                file = self.files.get(shard.uri, lambda: LocalFile(path) if path else RemoteFile(shard.uri))
                return file.read(offset, size)
            except OSError:
                self.files.drop(shard.uri)      # a broken connection is not used again
                raise

        return self.patience(str(shard), once, limited=path is None)

    def announce(self, group: str, shards: Iterable[Shard]) -> None:
        pass


class WholeShards:
    """Copies of shards in a local folder, at most `limit` bytes of them; the longest unused goes first.

    Processes of one machine may share the folder: each shard is fetched by one of them. Only what was announced last
    for a group is copied; from other shards only what is asked for is read. `files`: copies that stay open.
    """

    def __init__(self, folder: str, limit: int, files: int, patience: Patience, fetchers: int = 4) -> None:
        self.folder, self.limit = folder, limit
        os.makedirs(folder, exist_ok=True)
        self.remote, self.files, self.fetchers = Ranges(patience), Recent(files), fetchers
        self.wanted: dict[str, set[Shard]] = {}     # by group

    def read(self, shard: Shard, offset: int, size: int, again: bool = False) -> bytes:
        path = self._path(shard)
        if again or (shard not in self.wanted.get(shard.group, ()) and path not in self.files):
            return self.remote.read(shard, offset, size, again)
        return self.files.get(path, lambda: self.opened(shard)).read(offset, size)

    def announce(self, group: str, shards: Iterable[Shard]) -> None:
        shards, before = list(shards), self.wanted.get(group, set())
        self.wanted[group] = set(shards)
        new = [shard for shard in shards if shard not in before]
        for number in range(min(self.fetchers, len(new))):      # daemons: the end of the program does not wait for them
            threading.Thread(target=self._fetch_ahead, args=(new[number::self.fetchers],), daemon=True).start()

    def _fetch_ahead(self, shards: list[Shard]) -> None:
        for shard in shards:
            with contextlib.suppress(ReadFailed, EOFError):     # who needs it meets the same error, and raises it
                if shard in self.wanted[shard.group]:       # not if the run has moved on in the meantime
                    self.opened(shard)

    def _path(self, shard: Shard) -> str:
        return os.path.join(self.folder, f"{digest(shard.uri, shard.bytes, shard.xxh3, length=24)}.tar")

    def _delete(self, path: str) -> None:
        self.files.drop(path)       # an open file would keep its space
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def opened(self, shard: Shard) -> LocalFile:
        """The local copy of a shard, fetched if there is none.

        Raises:
            ReadFailed: the storage does not give it, or the cache's disk does not take it.
        """
        path = self._path(shard)
        stripe = os.path.join(self.folder, f"{os.path.basename(path)[:2]}.lock")
        try:
            with _locked(stripe):
                try:
                    file = LocalFile(path)
                except FileNotFoundError:
                    file = self._fetch(shard, path)
                with contextlib.suppress(FileNotFoundError):    # another process made room; the file stays readable
                    os.utime(path)                              # the time of last use
                return file
        except OSError as error:
            raise ReadFailed(f"cannot keep {shard} in the cache {self.folder}: {error}. Make room there, or give the "
                             "reader another `cache` folder or fewer `cache_bytes`") from error

    def _fetch(self, shard: Shard, path: str) -> LocalFile:
        scratch = f"{path}{TEMPORARY}{uuid.uuid4().hex[:8]}"
        try:
            self._reserve(scratch, shard.bytes)
            with open(scratch, "r+b") as target:
                for offset in range(0, shard.bytes, CHUNK):
                    target.write(self.remote.read(shard, offset, min(CHUNK, shard.bytes - offset)))
            file = LocalFile(scratch)       # opened first: once it has its name, another process may delete it
            os.replace(scratch, path)
            return file
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)

    def _reserve(self, scratch: str, size: int) -> None:
        """Makes a file of its final size, which others count; deletes the copies that were not used for longest."""
        with _locked(os.path.join(self.folder, "room.lock")):
            held, over = [], size - self.limit
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):    # renamed or deleted by another process
                    about = entry.stat()
                    if TEMPORARY in entry.name and time.time() - about.st_mtime > ABANDONED:
                        os.unlink(entry.path)
                    else:
                        over += about.st_size
                        if entry.name.endswith(".tar"):
                            held.append((about.st_mtime, about.st_size, entry.path))
            for _, freed, path in sorted(held):
                if over <= 0:
                    break
                self._delete(path)
                over -= freed
            with open(scratch, "wb") as file:
                file.truncate(size)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """One thread of one process at a time; the lock of a killed process is free."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
