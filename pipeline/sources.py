"""What a source entry refers to: files of a folder, members of tars, rows of tables, URLs.

Listing reads names and headers, never pixels. Each image becomes one row of `SOURCES`; rows whose bytes
must first be fetched (a URL, a cell of a table) also say how.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import groupby

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from .config import ConfigError, Source
from .storage import filesystem, local_path, local_uri, normalise
from .tables import SOURCES, digest

LINKS = SOURCES.append(pa.field("cell", pa.string()))   # "column:row group:row" of a table; null: a URL
TABLES = (".parquet", ".csv", ".jsonl", ".ndjson")
SIDECARS = (".txt", ".json", ".cls", ".xmp", ".npy", ".pyd", ".caption")    # of WebDataset samples
ROLES = {
    "bytes": ("bytes", "image_bytes", "content", "image", "jpg", "img"),
    "uri": ("uri", "url", "image_url", "path", "file", "file_name", "filename", "image_path", "filepath"),
    "text": ("text", "caption", "alt", "alt_text", "description", "prompt"),
    "licence": ("licence", "license"),
    "author": ("author", "creator", "photographer"),
    "group": ("group",),
}


Problems = Callable[[str, Exception], None]


def list_source(source: Source, problem: Problems) -> Iterator[dict]:
    """All images of one source, in a stable order, as rows of `LINKS`.

    A folder that cannot be opened, a damaged tar or table is reported to `problem` (uri, error) and does
    not stop the listing.

    Raises:
        ConfigError: the place does not exist, or a table has no fitting column.
    """
    if source.uri.startswith(("http://", "https://")) and not source.uri.lower().endswith(TABLES):
        yield _row(source, source.uri, name=source.uri)
        return
    found = False
    for uri, size, modified in _without_sidecars(_files(source, problem)):
        found = True
        kind = source.kind if source.kind != "auto" else _kind(uri)
        named = uri == normalise(source.uri) or any(c in source.uri for c in "*?[")
        if kind == "tar":
            yield from _unless_damaged(_tar(source, uri, modified), uri, problem)
        elif kind == "table" and (named or source.kind == "table"):
            yield from _unless_damaged(_table(source, uri), uri, problem)
        elif not source.extensions or uri.lower().endswith(tuple(f".{e.lower().lstrip('.')}"
                                                                 for e in source.extensions)):
            yield _row(source, uri, size=size, modified=modified, name=_base(uri))
    if not found:
        raise ConfigError(f"source {source.uri!r} holds no files. Check the path, the pattern and, for object "
                          "stores, the credentials of every node.")


def _without_sidecars(entries: Iterator[tuple]) -> Iterator[tuple]:
    """Leaves out `a.txt` and `a.json` where there is an `a.jpg`: they describe it and are no broken images."""
    for _, group in groupby(entries, key=lambda entry: os.path.splitext(entry[0])[0]):
        group = list(group)
        described = any(not entry[0].lower().endswith(SIDECARS) for entry in group)
        yield from (entry for entry in group if not (described and entry[0].lower().endswith(SIDECARS)))


def _unless_damaged(rows: Iterator[dict], uri: str, problem: Problems) -> Iterator[dict]:
    try:
        yield from rows
    except (OSError, tarfile.TarError, pa.ArrowInvalid) as error:
        problem(uri, error)


def _kind(uri: str) -> str:
    lowered = uri.lower()
    return "tar" if lowered.endswith(".tar") else "table" if lowered.endswith(TABLES) else "files"


def _base(uri: str) -> str:
    path = local_path(uri) or uri
    return os.fsencode(path.rsplit("/", 1)[-1]).decode("utf-8", "replace")


def _row(source: Source, uri: str, *, name: str, size: int | None = None, modified: float | None = None,
         offset: int | None = None, length: int | None = None, **values: object) -> dict:
    """One row; `ref` names the bytes' place and their version (size and time of change)."""
    row = {"uri": uri, "offset": offset, "length": length, "name": name, "modified": modified,
           "group": source.group, "licence": source.licence, "author": source.author} | values
    row["ref"] = digest(uri, offset, row.get("cell"), size, modified, length=24)
    return row


# Folders and globs ------------------------------------------------------------------------------------------

def _files(source: Source, problem: Problems) -> Iterator[tuple[str, int, float]]:
    """(uri, bytes, time of change) of every file of a folder, glob or single file; hidden ones left out."""
    uri = normalise(source.uri)
    if _exists_exactly(uri) or not any(c in source.uri for c in "*?["):
        root, pattern = uri, None
    else:
        root = normalise(re.split(r"[*?\[]", normalise_glob(source.uri), maxsplit=1)[0].rsplit("/", 1)[0] or "/")
        pattern = re.compile(glob_expression(normalise_glob(source.uri)))
    path = local_path(root)
    walk = _walk_local(path, source.follow_links, problem) if path is not None else _walk_remote(root)
    for entry in walk:
        name = local_path(entry[0]) or entry[0]
        if pattern is None or pattern.fullmatch(name):
            yield entry


def normalise_glob(uri: str) -> str:
    """A glob with its folder made absolute: a plain path for local ones."""
    return uri if "://" in uri and not uri.startswith("file://") else os.path.abspath(
        os.path.expanduser(uri.removeprefix("file://")))


def glob_expression(pattern: str) -> str:
    """A regular expression for a glob in which `**` crosses folders and `*` does not."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "(?s:" + "".join(known.get(p) or (fnmatch.translate(p)[4:-3] if p.startswith("[") else re.escape(p))
                            for p in pieces) + ")"


def _exists_exactly(uri: str) -> bool:
    path = local_path(uri)
    return path is not None and os.path.exists(path)


def _walk_local(top: str, follow_links: bool, problem: Problems) -> Iterator[tuple[str, int, float]]:
    """Depth first in the order of names; a folder that links lead back to is visited once."""
    if os.path.isfile(top):
        status = os.stat(top)
        yield local_uri(top), status.st_size, status.st_mtime
        return
    if not os.path.isdir(top):
        return
    seen, stack = set(), [top]
    while stack:
        folder = stack.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda e: os.fsencode(e.name))
        except OSError as error:
            problem(local_uri(folder), error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for entry in entries:
            if entry.name.startswith(".") or (entry.is_symlink() and not follow_links):
                continue
            try:
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                status = entry.stat()
            except OSError:     # a link to nowhere or in a loop: listed, so that reading it says what is wrong
                status = entry.stat(follow_symlinks=False)
            yield local_uri(entry.path), status.st_size, status.st_mtime
        stack.extend(reversed(folders))


def _walk_remote(root: str) -> Iterator[tuple[str, int, float]]:
    fs, path = filesystem(root)
    scheme = root.split("://", 1)[0]
    info = fs.get_file_info(path)
    infos = [info] if info.type == pafs.FileType.File else sorted(
        fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)), key=lambda i: i.path)
    for info in infos:
        if info.type == pafs.FileType.File and not info.base_name.startswith("."):
            yield f"{scheme}://{info.path}", info.size, info.mtime.timestamp() if info.mtime else None


# Tars -------------------------------------------------------------------------------------------------------

def _tar(source: Source, uri: str, modified: float | None) -> Iterator[dict]:
    """One row per image member, with its place in the tar; text and JSON of the same sample travel along."""
    fs, path = filesystem(uri)
    with fs.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        sample: list[dict] = []
        fields: dict[str, object] = {}
        last = None
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (folder, stem) != last:
                yield from _finished(sample, fields)
                sample, fields, last = [], {}, (folder, stem)
            if f".{extension.lower()}".endswith(SIDECARS):
                fields |= _sidecar(tar, member, extension.lower())
                continue
            sample.append(_row(source, uri, name=member.name, offset=member.offset_data, length=member.size,
                               modified=modified))
        yield from _finished(sample, fields)
        file.seek(tar.offset)       # tarfile takes a garbled header for the end
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no member header at byte {tar.offset}; what follows is not read")


def _sidecar(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> dict[str, object]:
    if member.size > 1 << 20 or extension not in ("txt", "caption", "json"):
        return {}
    text = tar.extractfile(member).read().decode("utf-8", "replace")
    if extension != "json":
        return {"text": text.strip()}
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return _roles(values) if isinstance(values, dict) else {}


def _roles(values: dict) -> dict[str, object]:
    """Licence, author and text among the keys of a sample's JSON; everything else as `extra`."""
    known = {role: values[name] for role in ("text", "licence", "author") for name in ROLES[role]
             if isinstance(values.get(name), str)}
    return known | {"extra": json.dumps(values, sort_keys=True, default=str)}


def _finished(sample: list[dict], fields: dict[str, object]) -> Iterator[dict]:
    for row in sample:
        yield row | {k: v for k, v in fields.items() if v is not None}


# Tables -----------------------------------------------------------------------------------------------------

def _table(source: Source, uri: str) -> Iterator[dict]:
    """One row per row of a Parquet, CSV or JSONL table, read in batches."""
    fs, path = filesystem(uri)
    kind = {"parquet": "parquet", "csv": "csv"}.get(uri.lower().rsplit(".", 1)[-1], "json")
    dataset = pads.dataset(path, filesystem=fs, format=kind)
    columns = _columns(source, dataset.schema, uri)
    if "bytes" in columns:
        yield from _cells(source, uri, columns)
        return
    for batch in dataset.to_batches(batch_size=4096, use_threads=False):
        for values in batch.to_pylist():
            yield _from_values(source, uri, values, columns)


def _columns(source: Source, schema: pa.Schema, uri: str) -> dict[str, str]:
    """Which column plays which role: as configured, or by its usual name and a fitting type."""
    stated = {role: name for role, name in source.columns.model_dump().items() if name}
    for role, name in stated.items():
        if name not in schema.names:
            raise ConfigError(f"{uri} has no column {name!r} (columns.{role}); it has {schema.names}")
    found = dict(stated)
    for role, names in ROLES.items():
        for name in names:
            if role not in found and name in schema.names and _fits(schema.field(name).type, role):
                found[role] = name
    if "bytes" in found and "uri" in stated and "bytes" not in stated:
        del found["bytes"]
    if "bytes" not in found and "uri" not in found:
        raise ConfigError(f"{uri} has no column that looks like a path, a URL or bytes; it has {schema.names}. "
                          "Name it in the source: columns: {uri: NAME}")
    return found


def _fits(kind: pa.DataType, role: str) -> bool:
    if role != "bytes":
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if pa.types.is_struct(kind):    # how Hugging Face datasets store images
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _from_values(source: Source, table: str, values: dict, columns: dict[str, str]) -> dict:
    place = str(values[columns["uri"]] or "")
    if "://" not in place:
        place = local_uri(os.path.join(os.path.dirname(local_path(table) or "/"), place)) \
            if local_path(table) is not None and place else f"{table.rsplit('/', 1)[0]}/{place}"
    return _row(source, place, name=place if place.startswith("http") else _base(place),
                **_travelling(values, columns))


def _travelling(values: dict, columns: dict[str, str]) -> dict[str, object]:
    roles = {role: values[name] for role, name in columns.items()
             if role in ("licence", "author", "group", "text") and values.get(name)}
    if "group" in roles:
        # It becomes the name of files, so a table from anywhere may not choose it freely.
        group = re.sub(r"[^a-z0-9_]+", "_", str(roles.pop("group")).lower()).strip("_")
        roles |= {"group": group} if group else {}
    rest = {k: v for k, v in values.items() if k not in columns.values() and _plain(v)}
    return roles | {"extra": json.dumps(rest, sort_keys=True, default=str) if rest else None}


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool | datetime) and len(str(value)) < 4096


def _cells(source: Source, uri: str, columns: dict[str, str]) -> Iterator[dict]:
    """Rows whose images lie in the table itself: their cells are noted, their bytes not read."""
    if not uri.lower().endswith(".parquet"):
        raise ConfigError(f"{uri}: images in a column are read from Parquet; CSV and JSONL hold paths or URLs")
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    modified = info.mtime.astimezone(UTC).timestamp() if info.mtime else None
    with fs.open_input_file(path) as file:
        table = pq.ParquetFile(file)
        others = [n for n in table.schema_arrow.names if n != columns["bytes"]]
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=others).to_pylist() if others else \
                [{}] * table.metadata.row_group(group).num_rows
            for index, values in enumerate(rows):
                name = str(values.get(columns.get("uri", ""), "") or f"{_base(uri)}#{group}.{index}")
                yield _row(source, uri, name=name, size=info.size, modified=modified,
                           cell=f"{columns['bytes']}:{group}:{index}", **_travelling(values, columns))
