"""Caption: what a model says about every tile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil

import pyarrow.compute as pc

from pipeline.config import Corpus
from pipeline.ingest import sources
from pipeline.jobs import Attempt, Replicas, RowJob, Unit
from pipeline.plan import captions
from pipeline.storage import Folder
from pipeline.tables import QUARANTINE, Part, Table, digest, rows_of
from pipeline.tile import sample_key, tiles

from .backends import STAGE, Backend, backend
from .config import Captions, captions_of
from .generated import Generated
from .text import Caption, Tokens, describe

IMAGES = 128        # of one unit: half a minute of a GPU, which is what a kill can cost


@dataclass
class CaptionJob(RowJob):
    """A caption for every tile. `model` is the model's fingerprint, or the name under which it is served."""

    workspace: Folder
    corpus: Corpus
    model: str
    retry_errors: bool = False
    name = STAGE
    identity = "key"

    def __post_init__(self) -> None:
        self.config: Captions = captions_of(self.corpus)
        self.input, self.output = tiles(self.workspace), captions(self.workspace, self.corpus)
        self.quarantine = Table(self.workspace / "quarantine" / self.name, QUARANTINE)
        config = self.config
        self.asking = {"model": self.model, "prompt": config.prompt.model_dump(), "max_side": config.max_side,
                       "sampling": config.sampling.model_dump(), "retry": config.retry and config.retry.model_dump(),
                       "precision": config.transformers and config.transformers.model_dump(
                           include={"dtype", "quantisation"})}
        self.wording = {"version": 1, "commentary": config.commentary, "limit": config.limit,
                        "tokenizer": config.tokenizer}
        self.settings = {"asking": self.asking, "wording": self.wording}
        self.pool = Replicas(config.replicas, 0.0 if config.openai else config.gpus)

    def inputs(self) -> Iterator[tuple[str, dict[str, Part]]]:
        """Parts of the tiles, cut into slices by the references of their images."""
        places = sources(self.workspace).parts()
        for key, part in sorted(self.input.parts().items()):
            for number in range(slices(key)):
                yield f"{key}.{number}", {"input": part, "places": places[key]}

    def pending(self) -> list[Unit]:
        """With the number of tiles of each unit, for which the tiles of those that are pending are opened."""
        units = super().pending()
        with ThreadPoolExecutor(16) as threads:
            counts = dict(threads.map(self._counted, {unit.parts["input"].key: unit for unit in units}.values()))
        units = [replace(unit, rows=counts[unit.parts["input"].key][slice_of(unit)]) for unit in units]
        if self.config.openai and units:
            # As many units side by side as fill the bound of requests twice.
            usual = max(1.0, sum(unit.rows for unit in units) / len(units))
            self.pool = replace(self.pool, depth=max(2, min(64, ceil(2 * self.config.openai.concurrency / usual))))
        return units

    def _counted(self, unit: Unit) -> tuple[str, Counter]:
        part, counts = unit.parts["input"], Counter()
        table = self.input.read(part, ["ref", "tiles"])
        for ref, count in zip(table["ref"].to_pylist(), pc.list_value_length(table["tiles"]).to_pylist(), strict=True):
            counts[place(ref, part.key)] += count
        return part.key, counts

    def rows(self, unit: Unit) -> Iterator[dict]:
        """One row per tile, with the question about it."""
        part, number = unit.parts["input"], slice_of(unit)
        places = {row["ref"]: row for row in sources(self.workspace).read(unit.parts["places"]).to_pylist()}
        for image in self.input.read(part).to_pylist():
            if place(image["ref"], part.key) == number:
                for tile in image["tiles"]:
                    yield self._row(image, places[image["ref"]], tile)

    def _row(self, image: dict, source: dict, tile: dict) -> dict:
        key = sample_key(image["uid"], tile)
        facts = {"alt_text": source["text"], "author": source["author"], "group": image["group"], "key": key,
                 "licence": source["licence"], "name": source["name"], "width": tile["out_width"],
                 "height": tile["out_height"]}
        prompt = self.config.prompt
        return {"ref": key, "name": source["name"], "uid": image["uid"], "uri": source["uri"], "tile": tile,
                "offset": source["offset"], "length": source["length"], "question": prompt.ask(facts),
                "system": prompt.system_for(facts)}

    def _backend(self) -> Backend:
        return backend(self.config, self.corpus.score)

    def _tokens(self) -> Tokens:
        return tokens(self.config.tokenizer)

    def process(self, row: dict) -> dict:
        raise NotImplementedError("rows are asked in batches, in attempts()")

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0                    # a dry run loads no model; `clearshard plan` says how long it would take

    def attempts(self, rows: list[dict], isolate: bool) -> Iterator[tuple[str, Attempt]]:
        """Every row asked once, and those with flagged answers a second time, with sampling."""
        config, again = self.config, []
        for row, answer in self._backend().answers(rows, config.sampling, isolate):
            if isinstance(answer, dict):
                yield row["ref"], (None, answer)
                continue
            caption = self._described(row, answer.text, answer.finish_reason)
            if caption.good or config.retry is None:
                yield row["ref"], (self._result(row, caption, answer, 1), None)
            else:
                again.append((row, caption, answer))
        first = {row["ref"]: (caption, answer) for row, caption, answer in again}
        for row, answer in self._backend().answers([row for row, *_ in again], config.retry, isolate) if again else ():
            caption, kept = first[row["ref"]]
            if isinstance(answer, Generated):
                better = self._described(row, answer.text, answer.finish_reason)
                if len(better.flags) < len(caption.flags) or better.good:
                    caption, kept = better, answer
            yield row["ref"], (self._result(row, caption, kept, 2), None)

    def _described(self, row: dict, raw: str, finish_reason: str) -> Caption:
        return describe(raw, prompt=self.config.prompt, question=row["question"], finish_reason=finish_reason,
                        tokens=self._tokens(), limit=self.config.limit, commentary=self.config.commentary)

    def _result(self, row: dict, caption: Caption, answer: Generated, attempts: int) -> dict:
        return {"key": row["ref"], "caption": caption.text or None, "model": self._model(), "short": caption.short,
                "tokens": caption.tokens, "flags": list(caption.flags), "prompt": self.config.prompt.name,
                "question": row["question"], "raw": caption.raw, "finish_reason": answer.finish_reason,
                "generated": answer.tokens, "attempts": attempts, "made": "-".join(self._made(row))}

    def _model(self) -> str:
        """The model's name for people, and its fingerprint."""
        if self.config.openai is not None:
            return self.model
        return f"{self.config.transformers.model.rstrip('/').rpartition('/')[2]}@{self.model}"

    def _made(self, row: dict) -> tuple[str, str]:
        """Digests of what decides the answer, and of what decides the text that is made of it."""
        return digest(self.asking, row["question"], row["system"]), digest(self.wording)

    def _earlier_rows(self, part: Part | None) -> list[dict]:
        return self._read(self.output, part)        # each row says by itself how it was made

    def renewed(self, row: dict, earlier: dict | None) -> dict | None:
        """A row that was asked the same stays; if only the wording of captions changed, its answer is worded anew."""
        asked, worded = self._made(row)
        if earlier is None or not (earlier["made"] or "").startswith(asked):
            return None
        if earlier["made"] == f"{asked}-{worded}":
            return earlier
        caption = self._described(row, earlier["raw"], earlier["finish_reason"])
        answer = Generated(earlier["raw"], earlier["generated"], earlier["finish_reason"])
        return self._result(row, caption, answer, earlier["attempts"])


def slices(key: str) -> int:
    """Into how many units a part of the tiles is cut."""
    return max(1, ceil(rows_of(key) / IMAGES))


def place(ref: str, key: str) -> int:
    """The slice of an image: by its reference, so that it stays where it is when others come and go."""
    return int(ref[:8], 16) % slices(key)


def slice_of(unit: Unit) -> int:
    return int(unit.key.rpartition(".")[2])


_loaded: dict[str | None, Tokens] = {None: Tokens()}


def tokens(folder: str | None) -> Tokens:
    """CLIP's tokenizer, kept for the life of the process."""
    if folder not in _loaded:
        _loaded[folder] = Tokens.load(folder)
    return _loaded[folder]
