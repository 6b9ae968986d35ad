"""Where answers come from: a model of one's own, or one that is served. Either keeps its model busy while rows wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from pipeline.ahead import Batch, ahead
from pipeline.config import Score
from pipeline.jobs import failure
from pipeline.tables import digest

from .config import Captions, LocalModel, Sampling, Server
from .generated import Generated
from .shown import Encoded, Shown, Tensors

STAGE = "caption"
Answers = Iterator[tuple[dict, Generated | dict]]       # a row, and what was answered or its quarantine row


class Backend(Protocol):
    """Answers the questions of rows; safe to use from several threads at once."""

    def answers(self, rows: list[dict], sampling: Sampling, one_by_one: bool) -> Answers:
        """Each row with what was answered, or with its quarantine row; in any order."""


class Local:
    """A model of transformers in this process."""

    def __init__(self, model: LocalModel, shown: Shown, max_new_tokens: int) -> None:
        from .local import Captioner
        self.captioner, self.max_new_tokens = Captioner(model), max_new_tokens
        self.prepare, self.batch_size = Tensors(shown, model.model), model.batch_size
        self.lock = threading.Lock()

    def answers(self, rows: list[dict], sampling: Sampling, one_by_one: bool) -> Answers:
        batches = cut(sorted(rows, key=expected_length), 1 if one_by_one else self.batch_size)
        for batch in ahead(self.prepare, batches):
            yield from batch.failures(STAGE)
            if batch.rows:
                yield from zip(batch.rows, self._generated(batch, sampling), strict=True)

    def _generated(self, batch: Batch, sampling: Sampling) -> list[Generated | dict]:
        import torch
        inputs = {name: torch.tensor(array) for name, array in batch.inputs.items()}
        seeded = sampling.model_copy(update={"seed": seed_of(sampling, batch.rows[0])})
        try:
            with self.lock:
                return self.captioner(inputs, self.max_new_tokens, seeded)
        except MemoryError as error:
            if len(batch.rows) == 1:
                return [failure(batch.rows[0], STAGE, error)]
        except RuntimeError as error:
            if "CUDA error" in str(error) or "device-side assert" in str(error):
                os._exit(70)        # this process cannot use its GPU again; the pool starts another
            raise
        return [self._generated(self.prepare([row]), sampling)[0] for row in batch.rows]


class Served:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, server: Server, shown: Shown, max_new_tokens: int) -> None:
        from .served import Client
        self.client, self.prepare, self.max_new_tokens = Client(server), Encoded(shown), max_new_tokens

    def answers(self, rows: list[dict], sampling: Sampling, one_by_one: bool) -> Answers:
        from .served import Question
        by_key, failed = {row["ref"]: row for row in rows}, []

        def questions() -> Iterator[Question]:
            for batch in ahead(self.prepare, cut(rows, 1 if one_by_one else 8), depth=2):
                failed.extend(batch.failures(STAGE))
                for row, file in zip(batch.rows, batch.inputs or (), strict=True):
                    yield Question(row["ref"], file, row["question"], system=row["system"],
                                   max_tokens=self.max_new_tokens, temperature=sampling.temperature,
                                   seed=seed_of(sampling, row) if sampling.temperature else None)

        for answer in self.client.stream(questions()):
            row = by_key[answer.key]
            yield row, Generated(answer.text, answer.tokens, "length" if answer.finish_reason == "length" else "stop") \
                if answer.error is None else {"ref": row["ref"], "name": row["name"], "stage": STAGE,
                                              "error": answer.error, "message": answer.message[:500]}
        yield from failed


def expected_length(row: dict) -> tuple[int, int, int]:
    """What decides how long a sequence gets: the size that is shown, then the question. Equal ones keep their order."""
    return row["tile"]["out_height"], row["tile"]["out_width"], len(row["question"])


def seed_of(sampling: Sampling, row: dict) -> int:
    """A seed of a row's own."""
    return int(digest(sampling.seed, row["ref"], length=7), 16)


def cut(rows: list[dict], size: int) -> Iterator[list[dict]]:
    source = iter(rows)
    while batch := list(islice(source, size)):
        yield batch


def make(config: Captions, score: Score) -> Backend:
    shown = Shown(score.limits, config.max_side, score.row_timeout_s)
    if config.openai is not None:
        return Served(config.openai, shown, config.prompt.max_new_tokens)
    model = config.transformers
    if (config.gpus or 0) > 1 and model.device == "auto":
        model = model.model_copy(update={"device": "balanced"})
    return Local(model, shown, config.prompt.max_new_tokens)


_made: dict[str, Backend] = {}
_making = threading.Lock()


def backend(config: Captions, score: Score) -> Backend:
    """The backend of a configuration, kept for the life of the process: a worker loads its model once."""
    name = digest(config.model_dump(mode="json"), score.model_dump(mode="json"))
    with _making:
        if name not in _made:
            _made[name] = make(config, score)
        return _made[name]
