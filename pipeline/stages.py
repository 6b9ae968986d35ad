"""The stages of a corpus in their order, and one way to run any of them."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from . import rates, scores
from .child import in_child
from .cluster import Cluster, Totals
from .config import ConfigError, Corpus
from .dedup import DedupJob
from .fetch import FetchJob
from .ingest import Ingested, ingest
from .jobs import Estimate, Job, estimate, limited
from .manifest import publish
from .metrics import missing
from .plan import PlanJob, plan
from .score import MetricJob, ScoreJob
from .selection import SelectJob, check_rules
from .shards import CORPUS, ShardJob
from .storage import Folder
from .tile import TileJob
from .verify import manifest_problems


class Show:
    """How a run shows itself; this one is silent. `pipeline.commands` has the one for terminals."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def begin(self, job: Job, rows: int) -> None:
        """A job starts."""

    def advance(self, totals: Totals) -> None:
        """A unit ended."""

    def end(self) -> None:
        """The job ended, well or not."""


@dataclass
class Session:
    """One command on one workspace."""

    workspace: Folder
    corpus: Corpus
    cluster: Cluster
    show: Show = field(default_factory=Show)
    limit: int | None = None
    dry_run: bool = False
    retry_errors: bool = False
    rewrite: tuple[str, ...] = ()
    max_error_rate: float | None = None

    def run(self, job: Job) -> Totals | Estimate:
        """Runs what is pending of a job, or says what that would take."""
        if self.dry_run:
            return self._rehearse(job)
        job.tidy()
        units = limited(job.pending(), self.limit)
        if not units:
            self.show.say(f"{job.name}: nothing to do")
            return Totals()
        self.show.begin(job, sum(unit.first or unit.rows for unit in units))
        allowed = self.corpus.max_error_rate if self.max_error_rate is None else self.max_error_rate
        try:
            totals = self.cluster.run(job, units, allowed, self.show.advance)
        finally:
            self.show.end()
        rates.note(self.workspace, job, totals)
        self.show.say(f"{job.name}: {summary(totals)}")
        return totals

    def _rehearse(self, job: Job) -> Estimate:
        units = limited(job.pending(), self.limit)
        expected = estimate(job, units)
        if not units:
            self.show.say(f"{job.name}: nothing to do")
        elif expected.seconds_per_row is None:
            self.show.say(f"{job.name}: {expected.rows} rows pending")
        else:
            total = expected.seconds_per_row * expected.rows
            self.show.say(f"{job.name}: {expected.rows} rows pending in {expected.units} units; {expected.sampled} "
                          f"took {1e3 * expected.seconds_per_row:.0f} ms each, so about {duration(total)} of one core")
        return expected


def run_ingest(session: Session) -> None:
    """New references, and the bytes of those that lie behind URLs or in tables."""
    started = time.perf_counter()
    # In a child: the listing's memory would otherwise stay with the driver for the rest of the run.
    found: Ingested = in_child(ingest, session.workspace, session.corpus, session.limit, not session.dry_run)
    problems = f", {found.problems} places could not be listed" if found.problems else ""
    session.show.say(f"ingest: {found.listed} listed, {found.new} new, {found.to_fetch} of them to fetch{problems} "
                     f"({time.perf_counter() - started:.1f} s)")
    session.run(FetchJob(session.workspace, session.corpus.fetch, session.retry_errors))


def run_score(session: Session) -> None:
    """The facts, then each configured metric.

    Raises:
        ConfigError: a metric cannot run; says which package or file it wants.
    """
    config = session.corpus.score
    for metric in config.metrics:
        if metric.name in {fact.name for fact in scores.FACTS}:
            raise ConfigError(f"score.metrics: {metric.name!r} is the name of a built-in fact; choose another")
    jobs = [MetricJob(session.workspace, config, metric, session.retry_errors) for metric in config.metrics]
    score = ScoreJob(session.workspace, config, session.retry_errors)
    for job in jobs:
        # Asked before hours of scoring; on the CPU, because this machine need not have the workers' cards.
        if (score.pending() or job.pending()) and (lacking := missing(job.metric.model_copy(update={"device": "cpu"}))):
            raise ConfigError(f"score.metrics: {job.metric.name}: {lacking}")
    for job in [score, *jobs]:
        session.run(job)


def run_dedup(session: Session) -> None:
    session.run(DedupJob(session.workspace, session.corpus.dedup))


def run_select(session: Session) -> None:
    session.run(SelectJob(session.workspace, session.corpus))


def run_tile(session: Session) -> None:
    session.run(TileJob(session.workspace, session.corpus, session.retry_errors))


def run_shard(session: Session) -> None:
    """The plan, the tars, and when all are there the manifest and `corpus.json`."""
    session.run(PlanJob(session.workspace, session.corpus))
    job = ShardJob(session.workspace, session.corpus, session.rewrite)
    folder, planned = session.workspace / "shards", plan(session.workspace).parts()
    for shard in session.rewrite:
        if shard not in planned:
            near = difflib.get_close_matches(shard, planned, n=1) or sorted(planned)[:3]
            raise ConfigError(f"--rewrite: no shard is named {shard!r}; there are: {', '.join(near) or 'none'}")
    pending = job.pending()
    if pending and not session.dry_run:
        folder.delete(CORPUS)       # it vouches for indexes that are about to change
    session.run(job)
    finished = folder.exists(CORPUS) and not any(manifest_problems(session.workspace))
    if session.dry_run or finished:
        return
    left = len(ShardJob(session.workspace, session.corpus).pending())
    if left:
        session.show.say(f"shard: {left} shards are still pending; manifest and corpus.json follow with the last")
        return
    totals = publish(session.workspace, session.corpus)
    for group, counts in sorted(totals["groups"].items()):
        session.show.say(f"corpus: {group}: {counts['samples']} samples in {counts['shards']} shards, "
                         f"{counts['bytes'] / 1e6:.1f} MB")


@dataclass(frozen=True)
class Stage:
    """One step of a corpus, and what a user types for it."""

    name: str
    help: str
    run: Callable[[Session], None]
    check: Callable[[Corpus], None] = lambda corpus: None       # refuses a mistake before anything starts
    configured: Callable[[Corpus], bool] = lambda corpus: True  # whether this corpus wants the stage


STAGES = {stage.name: stage for stage in (
    Stage("ingest", "List the sources; fetch what lies behind URLs or in table cells.", run_ingest),
    Stage("score", "Measure every image: size, sharpness, noise, compression, upscaling, hash, own metrics.",
          run_score),
    Stage("dedup", "Find exact and near duplicates.", run_dedup),
    Stage("select", "Decide what is kept, by the thresholds of corpus.yaml. Reads no image.", run_select, check_rules),
    Stage("tile", "Choose the crops of the kept images that become samples.", run_tile),
    Stage("shard", "Plan and write the WebDataset shards, their indexes and the manifest.", run_shard),
)}


def summary(totals: Totals) -> str:
    """One line: how many, how fast, what failed."""
    rate = totals.rows / totals.seconds if totals.seconds else 0.0
    text = f"{totals.rows} rows in {duration(totals.seconds)} ({rate:.1f}/s)"
    if totals.reused:
        text += f", {totals.reused} already known"
    if totals.failed:
        worst = sorted(totals.errors.items(), key=lambda item: (-item[1], item[0]))
        text += f", {totals.failed} in quarantine (" + ", ".join(f"{name} {count}" for name, count in worst[:4])
        text += ", …)" if len(worst) > 4 else ")"
    if totals.restarts:
        text += f", {totals.restarts} units repeated after a worker died"
    return text


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

