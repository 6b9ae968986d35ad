"""The stages of this room: captions, and negatives."""

from __future__ import annotations

import os
from collections import Counter

from models.fingerprint import fingerprint
from pipeline.config import ConfigError, Corpus
from pipeline.stages import Session, Stage
from pipeline.tables import Table

from .captions import CaptionJob
from .config import captions_of, negatives_of
from .negatives import NegativesJob, PlanNegativesJob


def run_caption(session: Session) -> None:
    """Captions for all tiles, and a line on what is wrong with some."""
    config = captions_of(session.corpus)
    model = config.openai.model if config.openai else _identity(session, config.transformers.model, config.gpus)
    job = CaptionJob(session.workspace, session.corpus, model, session.retry_errors)
    if session.run(job) and not session.dry_run:
        _say_flags(session, "caption", job.output)


def run_negatives(session: Session) -> None:
    """The plan of the negatives, and then the images."""
    config = negatives_of(session.corpus)
    session.run(PlanNegativesJob(session.workspace, session.corpus))
    job = NegativesJob(session.workspace, session.corpus, _identity(session, config.model, config.gpus),
                       session.retry_errors)
    if session.run(job) and not session.dry_run:
        _say_flags(session, "negatives", job.output)


def _identity(session: Session, folder: str, gpus: float | None) -> str:
    """The fingerprint of a model's folder, taken here or, if it is not here, on a worker.

    Raises:
        ConfigError: it is on neither.
    """
    try:
        if os.path.isdir(folder) or not session.cluster.address:
            return fingerprint(folder)
        return session.cluster.call(fingerprint, folder, num_cpus=0, num_gpus=float(gpus or 0))
    except OSError as error:
        raise ConfigError(f"{folder}: no model is there ({error}). Nothing is downloaded here: on a machine with "
                          "network run `hf download MODEL --local-dir FOLDER`, and name that folder, with the same "
                          "path on every node") from None


def _say_flags(session: Session, name: str, table: Table) -> None:
    flags: Counter[str] = Counter()
    good = rows = 0
    for batch in table.dataset().to_batches(columns=["flags"]):
        for found in batch["flags"].to_pylist():
            rows, good = rows + 1, good + (not found)
            flags.update(found or ())
    if rows:
        wrong = ", ".join(f"{flag} {count}" for flag, count in flags.most_common())
        session.show.say(f"{name}: {good} of {rows} without a flag" + (f"; flagged: {wrong}" if wrong else ""))


def _wants_captions(corpus: Corpus) -> bool:
    return corpus.caption is not None


def _wants_negatives(corpus: Corpus) -> bool:
    return corpus.negatives is not None


STAGES = {stage.name: stage for stage in (
    Stage("caption", "Let a model describe every tile: one of transformers on your GPUs, or one that is served.",
          run_caption, captions_of, _wants_captions),
    Stage("negatives", "Generate images of poor quality with SDXL, which teach a restorer what to lead away from.",
          run_negatives, negatives_of, _wants_negatives),
)}
