"""The reader: `reader[position]` is a sample of the corpus, on every rank, in every worker and after every restart.

It has no position of its own: `samples_seen`, one integer, is all that a checkpoint has to keep (`order.py`). Storage
that fails is asked again and then stops the run; a sample that is damaged is replaced, because that is a property
of its bytes and the same for everyone.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import xxhash
from pydantic import Field

from degrade.strict import Strict

from .cache import Patience, Ranges, Recent, WholeShards
from .corpus import Corpus, CorpusError, Index, Member, Shard, difference, image_of
from .order import Order, Place, rank_positions

log = logging.getLogger(__name__)
NEAR = 64 << 10         # members with less than this between them are read at once
# AWS, "Performance guidelines for Amazon S3": first byte after 100 to 200 ms, 85 to 90 MB/s per request.
LATENCY, RATE = 0.1, 90e6
ATTEMPTS = 8            # substitutes that are tried for one sample
FIRST = 1000            # samples before which the rate of damaged ones is not a rate yet


class TooManyCorrupt(CorpusError):
    """More samples are damaged than the run accepts."""


class Reading(Strict):
    """How a corpus is read. `seed`, `window` and `weights` decide the order, the rest how fast it comes."""

    seed: int = 0
    window: int = Field(16, ge=1, description="shards of a group whose samples are mixed with each other")
    weights: dict[str, float] | None = Field(
        None, description="how often each group comes, in any unit; groups without one are not read; "
                          "by default as many as there are samples (Corpus.weights for oversampling)")
    max_corrupt: float = Field(0.001, ge=0, le=1, description="share of damaged samples at which the run stops")
    cache: str | None = Field(None, description="folder on a local disk for shards from an object store; by default "
                                                "in the temporary folder; processes of one machine share it")
    cache_bytes: int = Field(200 * 10**9, gt=0, description="what the cache may hold")
    share: float = Field(1.0, gt=0, le=1, description="of the samples, those that this machine reads: 1/machines")
    patience: Patience = Patience()


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in its shard."""

    position: int
    key: str
    group: str
    epoch: int                          # of its group; with the key it names every random draw
    extension: str                      # of the image: jpg, png, …
    image: bytes
    text: str | None                    # caption
    metadata: dict = field(default_factory=dict)
    decoded: Any = None                 # what the reader's `decode` made of `image`
    replaced: str | None = None         # key of the damaged sample in whose place this one is
    reason: str | None = None           # what was wrong with that one


class Damaged(ValueError):
    """A sample whose bytes are not what was written, or cannot be used."""


class Reader:
    """Samples of a corpus by position. Threads may share one; processes get one of their own by pickling it.

    `decode(image bytes)` may make something of each image; a ValueError from it (as `pipeline.decode` raises) means
    that the sample is damaged.

    Raises:
        CorpusError: an unknown or empty group, a cache too small for the windows.
    """

    def __init__(self, corpus: Corpus, reading: Reading | None = None,
                 decode: Callable[[bytes], Any] | None = None) -> None:
        self.corpus, self.reading, self.decode = corpus, reading or Reading(), decode
        weights = corpus.weights() if self.reading.weights is None else corpus.known(self.reading.weights)
        self.order = Order(corpus.sizes, weights, self.reading.seed, self.reading.window)
        self.read, self.corrupt = 0, 0
        self.corrupt_keys: list[str] = []       # the first of them
        self._start()

    def _start(self) -> None:
        """What belongs to one process: open files, locks, the cache."""
        shards = [shard for group in self.order.groups for shard in self.corpus.groups[group]]
        self.in_use = 2 * self.reading.window * len(self.order.groups)      # shards of the windows at a border
        self.indexes = Recent(2 * self.in_use)
        self.source = self._cache(shards) if whole_is_cheaper(shards, self.reading.share) else \
            Ranges(self.reading.patience)
        self._announce = lru_cache(4 * len(self.order.groups))(self._announce_once)
        self._counting, self._process = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple:
        return Reader, (self.corpus, self.reading, self.decode)

    def fingerprint(self) -> dict:
        """What a checkpoint keeps: with another one, positions mean other samples."""
        return {"corpus": self.corpus.fingerprint(), "seed": self.reading.seed, "window": self.reading.window,
                "weights": {group: str(weight) for group, weight in self.order.mixture.weights.items()}}

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """In words, what has changed since the fingerprint of a checkpoint; [] if positions mean the same samples."""
        now = self.fingerprint()
        return difference(before["corpus"], now["corpus"]) + [
            f"{name} was {before[name]} and is {now[name]}" for name in ("seed", "window", "weights")
            if before[name] != now[name]]

    def batch(self, step: int, global_batch: int, rank: int = 0, ranks: int = 1) -> list[Sample]:
        """The samples that one rank takes of the global batch of a step."""
        return [self[position] for position in rank_positions(step, global_batch, rank, ranks)]

    def stream(self, position: int = 0) -> Iterator[Sample]:
        """Samples from a position on, without end."""
        while True:
            yield self[position]
            position += 1

    def __getitem__(self, position: int) -> Sample:
        """The sample of a position, or its substitute.

        Raises:
            TooManyCorrupt: more than `max_corrupt` of what was read is damaged.
            ReadFailed: the storage did not answer, again and again.
        """
        if self._process != os.getpid():        # forked: another thread may have held a lock
            self._start()
        place, first = self.order(position), None
        with self._counting:
            self.read += 1
        for attempt in range(ATTEMPTS):
            try:
                sample = self._sample(position, place, announce=first is None)
                return replace(sample, replaced=first[0], reason=first[1]) if first else sample
            except Damaged as error:
                key = self._key(place)
                first = first or (key, str(error))
                self._count(key, place, error)
                place = self.order.substitute(position, attempt)
        raise TooManyCorrupt(f"position {position}: {first[0]} and {ATTEMPTS - 1} samples in its place are damaged: "
                             f"{', '.join(self.corrupt_keys)} (the first: {first[1]}). `clearshard verify` says what "
                             "mends them")

    def _sample(self, position: int, place: Place, announce: bool) -> Sample:
        shard = self.corpus.groups[place.group][place.shard]
        if announce:
            self._announce(place.group, place.epoch, place.window)
        key, members = self._index(shard).sample(place.index)
        image, roles = image_of(members), {member.extension: member for member in members}
        chosen = [member for member in (image, roles.get("txt"), roles.get("json")) if member is not None]
        if image is None:
            raise Damaged("it has no image")
        found = self._members(shard, chosen)
        try:
            metadata = json.loads(found.get("json", b"{}"))
            if not isinstance(metadata, dict):
                raise ValueError(f"its JSON is a {type(metadata).__name__}, not a mapping")
            decoded = self.decode(found[image.extension]) if self.decode else None
        except ValueError as error:
            raise Damaged(str(error)) from error
        text = found["txt"].decode("utf-8", "replace") if "txt" in found else None
        return Sample(position, key, place.group, place.epoch, image.extension.rpartition(".")[2],
                      found[image.extension], text, metadata, decoded)

    def _members(self, shard: Shard, members: list[Member]) -> dict[str, bytes]:
        """The data of each member, checked; read twice where it looks damaged, since the way may be at fault."""
        try:
            return self._checked(shard, members)
        except Damaged:
            return self._checked(shard, members, again=True)

    def _checked(self, shard: Shard, members: list[Member], again: bool = False) -> dict[str, bytes]:
        found = {}
        for run in runs(members):
            start = run[0].offset
            try:
                data = memoryview(self.source.read(shard, start, run[-1].offset + run[-1].size - start, again))
            except EOFError as error:
                raise Damaged(str(error)) from error
            for member in run:
                piece = data[member.offset - start:member.offset - start + member.size]
                if xxhash.xxh3_128_hexdigest(piece) != member.xxh3:
                    raise Damaged(f"its .{member.extension} in {shard} is not what was written there")
                found[member.extension] = bytes(piece)
        return found

    def _index(self, shard: Shard) -> Index:
        def read() -> Index:
            return self.reading.patience(f"the index of {shard}", lambda: Index.of(shard),
                                         limited=shard.folder.local is None)
        return self.indexes.get(shard, read)

    def _key(self, place: Place) -> str:
        return self._index(self.corpus.groups[place.group][place.shard]).sample(place.index)[0]

    def _announce_once(self, group: str, epoch: int, window: int) -> None:
        shards = [self.corpus.groups[group][number] for number in self.order.shards_ahead(group, epoch, window)]
        self.source.announce(group, [shard for shard in shards if shard.samples])

    def _count(self, key: str, place: Place, error: Damaged) -> None:
        with self._counting:
            self.corrupt += 1
            if key not in self.corrupt_keys and len(self.corrupt_keys) < 20:
                self.corrupt_keys.append(key)
            corrupt, read = self.corrupt, self.read
        log.warning("%s of group %s is damaged and replaced: %s", key, place.group, error)
        refuse_above(self.reading.max_corrupt, corrupt, read, self.corrupt_keys, str(error))

    def _cache(self, shards: list[Shard]) -> WholeShards:
        largest = {group: sorted((shard.bytes for shard in self.corpus.groups[group]), reverse=True)
                   for group in self.order.groups}
        needed = sum(sum(sizes[:2 * self.reading.window]) for sizes in largest.values())
        if needed > self.reading.cache_bytes:
            raise CorpusError(f"two windows of {self.reading.window} shards of each group can take {needed:,} bytes: "
                              f"cache_bytes = {self.reading.cache_bytes:,} is too little; raise it or lower the window")
        folder = self.reading.cache or os.path.join(tempfile.gettempdir(), "clearshard-shards")
        return WholeShards(folder, self.reading.cache_bytes, self.in_use, self.reading.patience)


def refuse_above(accepted: float, corrupt: int, read: int, keys: list[str], last: str) -> None:
    """Raises TooManyCorrupt where more than the accepted share is damaged; `last`: what was wrong with the last one."""
    if corrupt > accepted * max(read, FIRST):
        raise TooManyCorrupt(
            f"{corrupt} of {read} samples are damaged, more than max_corrupt = {accepted}: {', '.join(keys)} (the "
            f"last: {last}). `clearshard verify` names the shards and what mends them; if tars from elsewhere were "
            "replaced, delete their indexes and run `clearshard index`")


def runs(members: list[Member]) -> list[list[Member]]:
    """Members that lie near each other, to be read at once."""
    found: list[list[Member]] = []
    for member in sorted(members, key=lambda member: member.offset):
        last = found[-1][-1] if found else None
        if last is not None and member.offset - (last.offset + last.size) < NEAR:
            found[-1].append(member)
        else:
            found.append([member])
    return found


def whole_is_cheaper(shards: list[Shard], share: float) -> bool:
    """Whether to fetch whole shards rather than the `share` of their samples that is used: never on a local disk."""
    samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
    if all(shard.folder.local is not None for shard in shards):
        return False
    transfer = size / samples / RATE
    return transfer < share * (LATENCY + transfer)
