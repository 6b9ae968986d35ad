"""Fetch: URLs and table cells become files in `originals/`, and rows of `sources/` that point there.

It is the only job that leaves the machine for http(s). Each is asked for once; later jobs read the copy.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import aiohttp
import pyarrow.parquet as pq

from .config import Fetch
from .ingest import links, sources
from .jobs import Outcome, RowJob, Unit, attempt, tally
from .storage import Folder, filesystem
from .tables import QUARANTINE, Table
from .tar import TarWriter

RETRIED = {408, 425, 429, 500, 502, 503, 504}
REDIRECTS = {301, 302, 303, 307, 308}


class FetchRefused(ValueError):
    """A URL that is not fetched or did not answer; `reason` is its class in the quarantine."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class FetchJob(RowJob):
    """Downloads the rows of `links/`, part by part, into one tar each."""

    workspace: Folder
    config: Fetch
    retry_errors: bool = False
    name = "fetch"

    def __post_init__(self) -> None:
        self.input, self.output = links(self.workspace), sources(self.workspace)
        self.quarantine = Table(self.workspace / "quarantine" / self.name, QUARANTINE)
        self.settings = {}          # how it is fetched does not change what is fetched

    def pending(self) -> list[Unit]:
        # A part that is there stays, whatever the settings were: nothing is downloaded twice.
        return [unit for unit in super().pending() if unit.earlier is None or (self.retry_errors and unit.failed)]

    def rows(self, unit: Unit) -> list[dict]:
        return self.input.read(unit.parts["input"]).to_pylist()

    def process(self, row: dict) -> dict:
        raise NotImplementedError("rows are fetched side by side, in run()")

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0                    # a dry run sends nothing

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        earlier = self._earlier(unit)
        refused = {} if self.retry_errors else earlier.failed
        rows = self.rows(unit)[: unit.first]
        wanted = [row for row in rows if row["ref"] not in earlier.rows and row["ref"] not in refused]
        # A name of its own: a worker that outlives its killed driver must not change the tar under our offsets.
        tar = f"{unit.key}-{uuid.uuid4().hex[:8]}.tar"
        good, bad, size = asyncio.run(self._download(wanted, tar))
        self._write(unit, [*earlier.rows.values(), *good], [*refused.values(), *bad])
        return Outcome(unit.key, len(wanted), len(bad), len(rows) - len(wanted), size, tally(bad))

    async def _download(self, rows: list[dict], tar: str) -> tuple[list[dict], list[dict], int]:
        """Everything that answers goes into one tar, in the order of the rows."""
        originals, good, bad = self.workspace / "originals", [], []
        uri = (originals / tar).uri
        with originals.staged(tar) as path, TarWriter(path) as writer:
            async for row, data, failure in self._answers(rows):
                if failure is not None:
                    bad.append(failure)
                    continue
                writer.add([(f"{row['ref']}.bin", data)])
                place = writer.members[-1]
                good.append(row | {"uri": uri, "offset": place.offset, "length": place.size})
        return good, bad, writer.size

    async def _answers(self, rows: list[dict]) -> AsyncIterator[tuple[dict, bytes, dict | None]]:
        """(row, bytes, quarantine row or None) in order; at most `concurrency` images are in memory."""
        cells = Cells()
        async with client(self.config) as session:
            for start in range(0, len(rows), self.config.concurrency):
                window = rows[start:start + self.config.concurrency]
                answers = await asyncio.gather(*(self._one(session, cells, row) for row in window),
                                               return_exceptions=True)
                for row, answer in zip(window, answers, strict=True):
                    def give(_: dict, answer: object = answer) -> dict:
                        if isinstance(answer, BaseException):
                            raise answer
                        return {"data": answer}
                    result, failure = attempt(give, row, self.name)
                    yield row, result["data"] if result else b"", failure

    async def _one(self, session: aiohttp.ClientSession, cells: Cells, row: dict) -> bytes:
        if row["cell"] is not None:
            return cells.read(row["uri"], row["cell"])
        return await fetch(session, row["uri"], self.config)


class Cells:
    """Images in a column of a Parquet table; holds one row group's column at a time."""

    def __init__(self) -> None:
        self.held: tuple | None = None
        self.values: list = []

    def read(self, uri: str, cell: str) -> bytes:
        column, group, row = cell.rsplit(":", 2)
        if self.held != (uri, column, group):
            fs, path = filesystem(uri)
            with fs.open_input_file(path) as file:
                self.values = pq.ParquetFile(file).read_row_group(int(group), columns=[column])[column]
            self.held = (uri, column, group)
        value = self.values[int(row)].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not value:
            raise FetchRefused("empty", f"{uri}: the cell in column {column}, row group {group}, row {row} "
                                        "is empty")
        return value


def client(config: Fetch) -> aiohttp.ClientSession:
    resolver = aiohttp.ThreadedResolver()
    connector = aiohttp.TCPConnector(limit=config.concurrency, limit_per_host=8,
                                     resolver=resolver if config.allow_private else PublicOnly(resolver))
    return aiohttp.ClientSession(connector=connector, headers={"User-Agent": config.user_agent},
                                 timeout=aiohttp.ClientTimeout(total=config.timeout_s))


class PublicOnly(aiohttp.abc.AbstractResolver):
    """Answers only with public addresses: checked where the connection is made, so that a name cannot
    resolve to one address for the check and to another for the request."""

    def __init__(self, inner: aiohttp.abc.AbstractResolver):
        self.inner = inner

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list:
        found = await self.inner.resolve(host, port, family)
        for answer in found:
            refuse_private(host, answer["host"])
        return found

    async def close(self) -> None:
        await self.inner.close()


def refuse_private(host: str, address: str) -> None:
    if not ipaddress.ip_address(address.split("%")[0]).is_global:
        raise FetchRefused("private_address", f"{host} is at {address}, which is not a public address; "
                                              "set fetch.allow_private: true if that is meant")


async def fetch(session: aiohttp.ClientSession, url: str, config: Fetch) -> bytes:
    """The body behind a URL, after retries.

    Raises:
        FetchRefused: with the class and the cause.
    """
    pause = config.backoff_s
    for left in range(config.retries, -1, -1):
        try:
            return await _follow(session, url, config)
        except FetchRefused as error:
            if not left or error.reason not in {f"http_{status}" for status in RETRIED}:
                raise
        except TimeoutError:
            if not left:
                raise FetchRefused("timeout", f"{url}: no answer in {config.timeout_s:g} seconds") from None
        except aiohttp.ClientError as error:
            if not left or isinstance(error, aiohttp.InvalidURL):
                raise FetchRefused("connection", f"{url}: {error}") from None
        await asyncio.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


async def _follow(session: aiohttp.ClientSession, url: str, config: Fetch) -> bytes:
    """One try, redirects followed by hand so that each target is checked."""
    for _ in range(config.max_redirects + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FetchRefused("bad_url", f"{url} is not an http(s) address")
        if not config.allow_private and _is_address(parts.hostname):
            refuse_private(parts.hostname, parts.hostname)      # aiohttp resolves names, not addresses
        async with session.get(url, allow_redirects=False) as response:
            if response.status not in REDIRECTS:
                return await _body(response, url, config)
            url = urljoin(url, response.headers.get("Location", ""))
    raise FetchRefused("redirects", f"{url}: more than {config.max_redirects} redirects")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _body(response: aiohttp.ClientResponse, url: str, config: Fetch) -> bytes:
    if response.status != 200:
        raise FetchRefused(f"http_{response.status}", f"{url}: {response.status} {response.reason}")
    tags = robots_tags(response.headers.getall("X-Robots-Tag", []))
    if refused := tags & set(config.robots_tags):
        raise FetchRefused("robots", f"{url}: its owner refuses this use (X-Robots-Tag: {sorted(refused)[0]})")
    too_large = FetchRefused("too_many_bytes", f"{url}: more than fetch.max_bytes = {config.max_bytes}")
    if (response.content_length or 0) > config.max_bytes:
        raise too_large
    data = bytearray()
    async for block in response.content.iter_chunked(1 << 16):
        data += block
        if len(data) > config.max_bytes:
            raise too_large
    return bytes(data)


def robots_tags(headers: list[str]) -> set[str]:
    """The directives of X-Robots-Tag headers, for whichever agent they are meant (`bot: noai, noindex`)."""
    return {tag.rsplit(":", 1)[-1].strip().lower() for header in headers for tag in header.split(",")}
