"""What a training run reads: the shards of finished workspaces and of indexed folders of tars, by group.

Nothing but `corpus.json` and a listing of the folder is read to open a corpus; an index is read when the first
sample of its shard is. What does not fit together is refused before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pipeline.shards import CORPUS, read_index
from pipeline.storage import Folder, WorkspaceError, filesystem

log = logging.getLogger(__name__)
IMAGES = {"jpg", "jpeg", "png", "webp", "avif", "tif", "tiff", "bmp", "gif", "jp2", "ppm"}
SUFFIX = ".index.parquet"


class CorpusError(WorkspaceError):
    """A corpus that cannot be read as it is; the message names the place and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One tar, as `corpus.json` describes it."""

    folder: Folder
    name: str               # without `.tar`
    group: str
    samples: int
    bytes: int              # of the whole tar
    xxh3: str               # of the whole tar

    @property
    def uri(self) -> str:
        return (self.folder / f"{self.name}.tar").uri

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}.tar"


@dataclass(frozen=True)
class Corpus:
    """The shards of each group, in the order of their names."""

    groups: dict[str, tuple[Shard, ...]]

    @classmethod
    def open(cls, *places: str) -> Corpus:
        """Finished workspaces and folders of indexed tars, local or on an object store; equal groups are joined.

        Raises:
            CorpusError: no corpus, a missing tar or index, a tar whose size is not the one that was indexed.
        """
        groups: dict[str, list[Shard]] = {}
        for place in places:
            for shard in _shards(Folder.at(place)):
                groups.setdefault(shard.group, []).append(shard)
        return cls({group: tuple(groups[group]) for group in sorted(groups)})

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        """Samples of each shard, by group."""
        return {group: np.array([shard.samples for shard in shards], np.int64)
                for group, shards in self.groups.items()}

    def weights(self, repeat: Mapping[str, float] | None = None) -> dict[str, float]:
        """Weights by which all groups finish an epoch together; `repeat={"face": 10}`: the faces come ten times.

        Raises:
            CorpusError: a group that is not in the corpus.
        """
        repeat = self.known(repeat or {})
        return {group: sum(shard.samples for shard in shards) * repeat.get(group, 1)
                for group, shards in self.groups.items() if any(shard.samples for shard in shards)}

    def known(self, weights: Mapping[str, float]) -> Mapping[str, float]:
        """The weights, if the corpus has samples of each group that they name.

        Raises:
            CorpusError: an unknown group, with the nearest name; a group without samples.
        """
        for group in weights:
            if group not in self.groups:
                near = difflib.get_close_matches(group, self.groups, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(self.groups) or 'none'}"
                raise CorpusError(f"the corpus has no group {group!r}; {hint}")
            if not any(shard.samples for shard in self.groups[group]):
                raise CorpusError(f"group {group!r} has no samples in its {len(self.groups[group])} shards: leave it "
                                  "out of the weights, or add images to it")
        return weights

    def fingerprint(self) -> dict[str, dict]:
        """What a checkpoint keeps to know the corpus again: per group its shards, samples and a digest of both."""
        return {group: {"shards": len(shards), "samples": sum(shard.samples for shard in shards),
                        "digest": _digest(f"{shard.name}\0{shard.samples}\0{shard.xxh3}" for shard in shards)}
                for group, shards in self.groups.items()}


def difference(before: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> list[str]:
    """In words, how one fingerprint differs from another; [] if they are equal."""
    lines = [f"group {group!r} is gone" for group in before if group not in now]
    for group, has in now.items():
        had = before.get(group)
        if had is None:
            lines.append(f"group {group!r} is new, with {has['samples']:,} samples in {has['shards']:,} shards")
        elif (had["samples"], had["shards"]) != (has["samples"], has["shards"]):
            lines.append(f"group {group!r} had {had['samples']:,} samples in {had['shards']:,} shards "
                         f"and has {has['samples']:,} in {has['shards']:,}")
        elif had["digest"] != has["digest"]:
            lines.append(f"group {group!r} has as many samples as before, but some of its shards are others")
    return lines


def _digest(lines: Iterable[str]) -> str:
    digest = blake2b(digest_size=8)
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _shards(place: Folder) -> list[Shard]:
    """The shards of a workspace (its folder `shards/`) or of a folder of tars, checked against what is there."""
    inner = place / "shards"
    folder, listed = (inner, found) if (found := listing(inner)) else (place, listing(place))
    if CORPUS in listed:
        said = _stated(folder)
    elif folder is inner:
        raise CorpusError(f"{place} is not finished: {inner} has no {CORPUS}. `clearshard run {place}` finishes it")
    else:
        said = gathered(folder, [name.removesuffix(".tar") for name in sorted(listed) if name.endswith(".tar")])
    if not said:
        raise CorpusError(f"{place} holds no shards: neither shards/{CORPUS} nor tars. Check the path and, for object "
                          "stores, the credentials")
    shards = [Shard(folder, name, about.get("group") or group_of(name), about["samples"], about["bytes"],
                    about["xxh3"]) for name, about in sorted(said.items())]
    _check(folder, shards, listed)
    return shards


def group_of(name: str) -> str:
    """`hq` of `hq-000012`; a name without a group is one of `hq`, as sources are."""
    return name.rpartition("-")[0] or "hq"


def listing(folder: Folder) -> dict[str, int]:
    """Name -> bytes of the files of a folder, by one listing; {} if it does not exist."""
    fs, path = filesystem(folder.uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}


def _stated(folder: Folder) -> dict[str, dict]:
    try:
        said = json.loads(folder.read(CORPUS))["shards"]
        for name, about in said.items():
            if not {"samples", "bytes", "xxh3"} <= set(about):
                raise ValueError(f"shard {name} lacks samples, bytes or xxh3")
        return said
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{folder}/{CORPUS} is damaged ({error}); what wrote it (`clearshard run` or "
                          "`clearshard index`) writes it again") from error


def gathered(folder: Folder, names: Iterable[str]) -> dict[str, dict]:
    """What `corpus.json` would say of tars that have an index; those without are refused.

    Raises:
        CorpusError: a tar without an index.
    """
    said = {}
    for name in names:
        try:
            index = Index.read(folder, name)
        except FileNotFoundError:
            raise CorpusError(f"{folder}/{name}.tar has no index. `clearshard index {folder}` reads every tar once "
                              "and writes one") from None
        said[name] = {"samples": index.samples, "bytes": index.bytes, "xxh3": index.xxh3}
    return said


def _check(folder: Folder, shards: list[Shard], listed: dict[str, int]) -> None:
    for ending, what in ((".tar", "tars"), (SUFFIX, "indexes")):
        missing = [f"{shard.name}{ending}" for shard in shards if f"{shard.name}{ending}" not in listed]
        if missing:
            raise CorpusError(f"{len(missing)} of {len(shards)} {what} are not in {folder}: {_some(missing)}. "
                              f"Put them back, or run what wrote them again; it makes only what is missing")
    changed = [shard for shard in shards if listed[f"{shard.name}.tar"] != shard.bytes]
    if changed:
        one = changed[0]
        raise CorpusError(f"{len(changed)} tars in {folder} have changed since they were indexed: "
                          f"{_some(shard.name for shard in changed)} ({one.name} had {one.bytes:,} bytes and has "
                          f"{listed[f'{one.name}.tar']:,}). `clearshard verify` mends a workspace, `clearshard index` "
                          "indexes foreign tars again")
    more = len([name for name in listed if name.endswith(".tar")]) - len(shards)
    if more:
        log.warning("%s: %d tars are not in %s and are not read", folder, more, CORPUS)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


@dataclass(frozen=True)
class Member:
    """A file in a tar, as its index says."""

    extension: str
    offset: int
    size: int
    xxh3: str


class Index:
    """The members of a shard's samples; about 130 bytes per member in memory."""

    def __init__(self, table: pa.Table, about: Mapping[str, str]) -> None:
        table = table.combine_chunks()
        self.bytes, self.xxh3 = int(about["bytes"]), about["xxh3"]
        keys = table["key"]
        others = pc.not_equal(keys[1:], keys[:-1]).to_numpy() if len(keys) else np.zeros(0, bool)
        starts = np.flatnonzero(others) + 1
        self.rows = np.concatenate([[0] if len(keys) else [], starts, [len(keys)]]).astype(np.int64)
        self._columns = [table[name].chunk(0) if len(keys) else [] for name in ("key", "extension", "xxh3")]
        self._places = np.stack([table["offset"].to_numpy(), table["size"].to_numpy()], axis=1)

    @classmethod
    def read(cls, folder: Folder, shard: str) -> Index:
        """Raises as `pipeline.shards.read_index`."""
        return cls(*read_index(folder, shard))

    @classmethod
    def of(cls, shard: Shard) -> Index:
        """The index of a shard of an open corpus.

        Raises:
            CorpusError: it belongs to another tar than the one that `corpus.json` describes.
        """
        index = cls.read(shard.folder, shard.name)
        if (index.samples, index.bytes, index.xxh3) != (shard.samples, shard.bytes, shard.xxh3):
            raise CorpusError(f"{shard.folder}/{shard.name}{SUFFIX} does not belong to the tar that {CORPUS} describes:"
                              f" {index.samples} samples and {index.bytes:,} bytes, not {shard.samples} and "
                              f"{shard.bytes:,}. The shard was written again; finish that run, then start anew")
        return index

    @property
    def samples(self) -> int:
        return len(self.rows) - 1

    def sample(self, number: int) -> tuple[str, list[Member]]:
        """(key, members) of a sample."""
        start, end = int(self.rows[number]), int(self.rows[number + 1])
        keys, extensions, hashes = self._columns
        places = self._places[start:end].tolist()
        return keys[start].as_py(), [Member(extensions[row].as_py(), *place, hashes[row].as_py())
                                     for row, place in zip(range(start, end), places, strict=True)]


def image_of(members: list[Member]) -> Member | None:
    """The first member that is a picture (`.jpg`, `.left.png`), or None."""
    return next((member for member in members if member.extension.rpartition(".")[2] in IMAGES), None)
