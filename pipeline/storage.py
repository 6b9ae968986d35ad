"""Folders on a local disk or an object store, with the few operations that jobs need.

Every write is atomic: a reader sees the old file, the new one or none, never half of one. On a local
disk that is a temporary name, fsync and rename; on an object store a finished upload is atomic already.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import pyarrow as pa
import pyarrow.fs as pafs

TEMPORARY = ".tmp-"


class WorkspaceError(RuntimeError):
    """The workspace cannot be written or read; nothing is wrong with the images."""


def local_uri(path: str | bytes | Path) -> str:
    """A local path as `file://` with percent-encoding, so that any name at all is plain ASCII text."""
    return "file://" + quote(os.path.abspath(os.fsencode(path)))


def normalise(uri: str) -> str:
    """`file://…` for local paths (`~` and relative ones resolved), other URIs without a trailing slash."""
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")
    return local_uri(Path(uri).expanduser()) if "://" not in uri else "file://" + uri[7:].rstrip("/")


def local_path(uri: str) -> str | None:
    """The path of a `file://` URI (surrogates for bytes that are no UTF-8), or None for a remote one."""
    return os.fsdecode(unquote_to_bytes(uri[7:])) if uri.startswith("file://") else None


@lru_cache(maxsize=16)
def _s3(endpoint: str | None, region: str | None) -> pafs.FileSystem:
    scheme, _, host = (endpoint or "").rpartition("://")
    extra = {"endpoint_override": host, "scheme": scheme or "https"} if endpoint else {}
    return pafs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **extra)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem and the path in it. Other schemes than pyarrow's go through fsspec.

    `AWS_ENDPOINT_URL` and `AWS_REGION` name an S3-compatible server.
    """
    path = local_path(uri)
    if path is not None:
        return pafs.LocalFileSystem(), path
    if uri.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _s3(endpoint, os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")), uri[5:]
    try:
        return pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid:
        import fsspec
        fs, path = fsspec.core.url_to_fs(uri)
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def read_bytes(uri: str, offset: int | None = None, length: int | None = None) -> bytes:
    """A whole file, or `length` bytes of it from `offset`.

    Raises:
        FileNotFoundError, PermissionError, OSError: as the storage answers.
        EOFError: the file ends before `offset + length`.
    """
    path = local_path(uri)
    if path is not None:
        # Non-blocking, so that a FIFO among the images cannot hang a worker.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if offset:
                file.seek(offset)
            data = file.read(-1 if length is None else length)
    else:
        fs, remote = filesystem(uri)
        with fs.open_input_file(remote) as file:
            data = file.read() if offset is None else file.read_at(length, offset)
    if length is not None and len(data) != length:
        raise EOFError(f"{uri} ends at byte {(offset or 0) + len(data)}, {length - len(data)} bytes early")
    return data


def size_of(uri: str) -> int:
    """Bytes of a file, without reading it."""
    path = local_path(uri)
    if path is not None:
        return os.stat(path).st_size
    fs, remote = filesystem(uri)
    info = fs.get_file_info(remote)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return info.size


@dataclass(frozen=True)
class Folder:
    """A folder by URI. Cheap to make and to send to a worker; nothing is opened until it is used."""

    uri: str

    @classmethod
    def at(cls, uri: str) -> Folder:
        return cls(normalise(uri))

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{quote(name) if self.local else name}")

    @property
    def local(self) -> str | None:
        """The path on this machine, or None."""
        return local_path(self.uri)

    def __str__(self) -> str:
        return self.local or self.uri

    def names(self) -> list[str]:
        """The names in this folder, sorted; [] if it does not exist. Temporary files are left out."""
        if self.local is not None:
            try:
                found = os.listdir(self.local)
            except FileNotFoundError:
                return []
            except OSError as error:
                raise WorkspaceError(f"cannot list {self}: {error.strerror}") from error
        else:
            fs, path = filesystem(self.uri)
            infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
            found = [info.base_name for info in infos if info.base_name]
        return sorted(name for name in found if TEMPORARY not in name)

    def modified(self, name: str) -> float:
        """When a file was written, seconds since 1970."""
        fs, path = filesystem((self / name).uri)
        info = fs.get_file_info(path)
        return info.mtime.timestamp() if info.mtime else 0.0

    def exists(self, name: str) -> bool:
        fs, path = filesystem((self / name).uri)
        return fs.get_file_info(path).type != pafs.FileType.NotFound

    def size(self, name: str) -> int:
        return size_of((self / name).uri)

    def read(self, name: str) -> bytes:
        return read_bytes((self / name).uri)

    def write(self, name: str, data: bytes | memoryview | pa.Buffer) -> None:
        """Writes a whole file atomically.

        Raises:
            WorkspaceError: the storage refused it (full, read-only, gone); names the file and the cause.
        """
        if self.local is not None:
            with self.staged(name) as path, open(path, "wb") as file:
                file.write(data)
            return
        try:
            fs, path = filesystem((self / name).uri)
            with fs.open_output_stream(path) as stream:
                stream.write(data)
        except OSError as error:
            raise _refused(self, name, error) from error

    @contextlib.contextmanager
    def staged(self, name: str):
        """A local path to write a large file to; renamed (or uploaded) to `name` when the block ends well."""
        folder = self.local
        try:
            if folder is not None:
                os.makedirs(folder, exist_ok=True)
                path = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{name}")
            else:
                path = os.path.join(tempfile.gettempdir(), f"clearshard{TEMPORARY}{uuid.uuid4().hex}")
            try:
                yield path
                if folder is not None:
                    commit(path, os.path.join(folder, name))
                else:
                    self._upload(path, name)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        except OSError as error:
            raise _refused(self, name, error) from error

    def _upload(self, path: str, name: str) -> None:
        fs, target = filesystem((self / name).uri)
        with open(path, "rb") as source, fs.open_output_stream(target) as stream:
            while block := source.read(8 << 20):
                stream.write(block)

    def delete(self, *names: str) -> None:
        """Deletes files; those already gone are no error."""
        for name in names:
            fs, path = filesystem((self / name).uri)
            with contextlib.suppress(FileNotFoundError):
                fs.delete_file(path)

    def sweep(self) -> None:
        """Deletes temporary files that a killed run left. Only the holder of the workspace may call it."""
        if self.local is not None and os.path.isdir(self.local):
            for name in os.listdir(self.local):
                if name.startswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(self.local, name))


def commit(path: str, target: str) -> None:
    """Makes a finished file visible under its name and durable: fsync, rename, fsync of the folder."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(path, target)
    folder = os.open(os.path.dirname(target), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refused(folder: Folder, name: str, error: OSError) -> WorkspaceError:
    cause = os.strerror(error.errno) if error.errno else str(error)
    return WorkspaceError(
        f"cannot write {name} in {folder}: {cause}. What was finished is kept: make room or mend the "
        "permission, then run the same command again."
    )
