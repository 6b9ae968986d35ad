"""Batches: from the shards of a corpus to micro-batches on a device, worked out ahead in processes of their own.

Which samples a global batch holds, and every pixel of them, follows from (seed, step): neither from ranks, workers and
the size of micro-batches, nor from what came before. There is no state to save.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Literal

import cv2
import torch
from pydantic import Field, model_validator

from degrade import InputRefused, Recipe, load_recipe
from degrade.strict import ConfigError, Strict
from pipeline.degraded_workers import prepared
from pipeline.storage import WorkspaceError

from .corpus import Corpus
from .crops import Batch, Crops
from .order import rank_positions
from .reader import Reading, refuse_above

log = logging.getLogger(__name__)


class WorkerDied(WorkspaceError):
    """A process that prepares data ended by itself."""


class Data(Strict):
    """What a run trains on, and how it comes to the device."""

    corpus: list[str] = Field(min_length=1, description="workspaces, or folders of indexed tars")
    repeat: dict[str, float] = Field({}, description="how many times as often a group comes as it has samples; "
                                                     "instead of reading.weights")
    crop: int = Field(512, ge=16, multiple_of=8, description="pixels of the side of a crop")
    flip: bool = Field(True, description="mirror half of the crops")
    recipe: str | None = Field("supir", description="name or file of the degradation, whose result has the size of "
                                                    "its input; null: no low-quality partner")
    reading: Reading = Field(Reading(), description="order and storage; without a seed of its own, that of the run")
    workers: int = Field(4, ge=0, description="processes that decode, per rank; 0: the training process does")
    prefetch: int = Field(2, ge=1, description="micro-batches under way, per worker")
    degrade_on: Literal["auto", "workers", "device"] = Field(
        "auto", description="where lq is made; auto: on a CUDA device, and otherwise in the workers")

    @model_validator(mode="after")
    def _one_mixture(self) -> Data:
        if self.repeat and self.reading.weights is not None:
            raise ValueError("repeat and reading.weights both say how often groups come; leave one of them out")
        return self

    def degradation(self) -> Recipe | None:
        """Raises ConfigError: no such recipe, or one whose result has another size than its input."""
        recipe = None if self.recipe is None else load_recipe(self.recipe)
        if recipe is not None and recipe.output != "hq" and recipe.scale != 1:
            raise ConfigError(f"recipe {self.recipe}: its result is {recipe.scale} times smaller than its input, and "
                              "training takes pairs of one size; take one with `output: hq`, as supir has")
        return recipe


class MicroBatches:
    """The positions of each micro-batch of a rank from a global step on, without end.

    Raises:
        ConfigError: the global batch cannot be cut evenly.
    """

    def __init__(self, batch: int, micro_batch: int, rank: int = 0, ranks: int = 1, step: int = 0) -> None:
        if min(batch, micro_batch) < 1:
            raise ConfigError(f"batch = {batch} and micro_batch = {micro_batch}: both must be 1 or more")
        whole = ranks * micro_batch
        if batch % whole:
            below, above = batch // whole * whole, -(-batch // whole) * whole
            near = " or ".join(str(size) for size in (below, above) if size > 0)
            fitting = [size for size in range(1, micro_batch) if batch % (ranks * size) == 0]
            also = f", or micro_batch = {fitting[-1]}" if fitting else ""
            raise ConfigError(f"batch = {batch} cannot be cut into micro-batches of {micro_batch} for {ranks} ranks: "
                              f"it must be a multiple of {whole}; take batch = {near}{also}")
        self.batch, self.micro_batch, self.rank, self.ranks, self.step = batch, micro_batch, rank, ranks, step

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.step):
            share = rank_positions(step, self.batch, self.rank, self.ranks)
            for start in range(0, len(share), self.micro_batch):
                yield list(share[start:start + self.micro_batch])


class Loader:
    """The micro-batches of one rank, in order.

    `waited` counts the seconds for which the consumer of `batches` has waited, `seen` the samples that came, `replaced`
    those of them that stand in for damaged ones.

    Args:
        seed: of crops, flips and degradations, and of the order unless `data.reading` has one of its own.
        batch: samples of a global batch, over all ranks and micro-batches.
        micro_batch: samples that come at once.

    Raises:
        ConfigError: a batch that cannot be cut evenly, a recipe that does not fit.
        CorpusError: as `Corpus.open` and `Reader`.
    """

    def __init__(self, data: Data, seed: int, *, batch: int, micro_batch: int, rank: int = 0, ranks: int = 1,
                 device: torch.device | str = "cpu") -> None:
        self.data, self.device, self.cut = data, torch.device(device), (batch, micro_batch, rank, ranks)
        MicroBatches(*self.cut)
        recipe, corpus = data.degradation(), Corpus.open(*data.corpus)
        where = data.degrade_on
        self.on_device = where == "device" or (where == "auto" and self.device.type == "cuda")
        # A worker sees a part of the samples only, so whether too many are damaged is judged here.
        reading = data.reading.model_copy(update={"max_corrupt": 1.0})
        if "seed" not in data.reading.model_fields_set:
            reading = reading.model_copy(update={"seed": seed})
        if data.repeat:
            reading = reading.model_copy(update={"weights": corpus.weights(data.repeat)})
        self.crops = Crops(corpus, reading, seed, crop=data.crop, flip=data.flip, recipe=recipe,
                           degrade=not self.on_device)
        self.reader = self.crops.reader
        # The server that workers are forked from loads while the run goes on to load its models.
        self.context = prepared() if data.workers else None
        self.stream = side_stream(self.device) if self.device.type == "cuda" else None
        self.waited, self.seen, self.replaced = 0.0, 0, 0
        self.damaged: list[str] = []            # keys of the first that were replaced
        self._running = None

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches from a global step on, without end; workers start at once.

        Raises:
            TooManyCorrupt: more than `data.reading.max_corrupt` of what this rank has seen was damaged.
            ReadFailed: the storage did not answer, again and again.
            WorkerDied: a worker was killed.
        """
        self.close()
        several = self.data.workers > 0
        self._running = running = iter(torch.utils.data.DataLoader(
            InWorker(self.crops) if several else Here(self.crops), batch_size=None,
            sampler=MicroBatches(*self.cut, step), num_workers=self.data.workers, collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda", generator=torch.Generator(),     # leaves the run's own alone
            multiprocessing_context=self.context, worker_init_fn=_start if several else None,
            prefetch_factor=self.data.prefetch if several else None))
        atexit.register(self.close)             # the interpreter waits for workers at its end, and they for it
        return self._timed(running)

    def at(self, positions: Sequence[int]) -> Batch:
        """The micro-batch of any positions, worked out in this process; not counted."""
        return self._ready(self._sent(self.crops(positions)))

    def close(self) -> None:
        """Ends the workers, and what `batches` has returned; without effect where there are none."""
        running, self._running = self._running, None
        atexit.unregister(self.close)
        if running is not None and self.data.workers:
            running._shutdown_workers()         # what DataLoader itself calls when its iterator is collected
            for worker in running._workers:     # one that waits for a network, say: it leaves signals to this process
                if worker.is_alive():
                    worker.kill()

    def _timed(self, running: Iterator[Batch | Exception]) -> Iterator[Batch]:
        ahead = self._ahead(running)
        try:
            while self._running is running:
                begin = time.perf_counter()
                batch = next(ahead)
                self.waited += time.perf_counter() - begin
                yield batch
        finally:
            if self._running is running:
                self.close()

    def _ahead(self, running: Iterator[Batch | Exception]) -> Iterator[Batch]:
        """On CUDA the next micro-batch is on its way while this one is worked on."""
        if self.stream is None:
            while True:
                yield self._ready(self._sent(self._checked(running)))
        following = self._sent(self._checked(running))
        while True:
            batch, following = following, self._sent(self._checked(running))
            yield self._ready(batch)

    def _checked(self, running: Iterator[Batch | Exception]) -> Batch:
        """The next micro-batch of the workers, with its damaged samples counted."""
        try:
            batch = next(running)
        except Exception as error:
            ended = [worker for worker in getattr(running, "_workers", ()) if worker.exitcode]
            if not ended:
                raise
            raise WorkerDied(
                f"process {ended[0].pid}, which prepared data, ended by itself (exit code {ended[0].exitcode}). -9: "
                f"the kernel had no memory left; lower data.workers = {self.data.workers} or data.prefetch = "
                f"{self.data.prefetch}. -7: /dev/shm is too small for the batches under way; enlarge it (in a "
                "container: --shm-size) or lower data.prefetch. Then start again from the last checkpoint") from error
        if isinstance(batch, Exception):
            raise batch
        self.seen += len(batch)
        for key, group, reason in zip(batch.replaced, batch.groups, batch.reasons, strict=True):
            if key is not None:
                self._count(key, group, reason)
        return batch

    def _count(self, key: str, group: str, reason: str) -> None:
        self.replaced += 1
        if key not in self.damaged and len(self.damaged) < 20:
            self.damaged.append(key)
        if self.data.workers:           # in this process the reader has said it
            log.warning("%s of group %s is damaged and replaced: %s", key, group, reason)
        refuse_above(self.data.reading.max_corrupt, self.replaced, self.seen, self.damaged, reason)

    def _sent(self, batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
        """On the device, where lq is made; on CUDA all of it on a stream of its own, and an event at its end."""
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            batch = batch.to(self.device)
            if self.on_device and batch.degradation is not None:
                batch.lq = self.crops.degrader.apply(batch.hq, batch.degradation)
            return batch, self.stream.record_event() if self.stream else None

    def _ready(self, sent: tuple[Batch, torch.cuda.Event | None]) -> Batch:
        """What the current stream may use: it waits for the event, and memory is not taken back before it is done."""
        batch, event = sent
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in (batch.hq, batch.lq, batch.sizes):
                if tensor is not None:
                    tensor.record_stream(current)
        return batch


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders of a process, because what the degrader keeps on the device is made on it."""
    return torch.cuda.Stream(device)


class Here(torch.utils.data.Dataset):
    """Micro-batches by their positions."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __getitem__(self, positions: list[int]) -> Batch:
        return self.crops(positions)


class InWorker(Here):
    """The same for another process: tensors in shared memory, and errors that are the user's as they are."""

    def __getitem__(self, positions: list[int]) -> Batch | Exception:
        try:
            return self.crops(positions).share_memory()
        except (WorkspaceError, ConfigError, InputRefused) as error:
            return error        # raised, DataLoader would bury its message in a traceback


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _start(worker: int) -> None:
    """A worker leaves Ctrl-C and SIGTERM to its parent, which saves first, and ends with it however it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    logging.getLogger("train.reader").setLevel(logging.ERROR)       # the parent says what was replaced

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
