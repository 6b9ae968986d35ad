"""The commands of the corpus: `clearshard init`, `ingest`, `score`, …, `run`, `verify`, `report`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import config as configuration
from .cluster import Cluster, JobStopped, Totals
from .config import ConfigError, Corpus
from .jobs import Job
from .lock import Lock, WorkspaceBusy
from .report import write_report
from .selection import check_rules
from .stages import STAGES, Session, Show, Stage, duration
from .storage import Folder, WorkspaceError
from .verify import VerifyJob, rewrite, table_problems

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
LOG_EVERY_S = 10.0

Workspace = Annotated[str, typer.Argument(help="Folder of the corpus: a local one, s3://… or gs://…")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what is pending and how long it would take.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only so many rows.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster, e.g. auto or HOST:6379. [RAY_ADDRESS]")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="CPUs to use on this machine; default: all.")]
Retry = Annotated[bool, typer.Option("--retry-errors", help="Try quarantined rows again.")]
ErrorRate = Annotated[float | None, typer.Option(
    "--max-error-rate", min=0, max=1, help="Stop when more of the rows fail; default: corpus.yaml's.")]
Rewrite = Annotated[list[str] | None, typer.Option("--rewrite", help="Write this shard again, e.g. hq-000003.")]

class Terminal(Show):
    """Progress bars on a terminal; elsewhere a line every ten seconds."""

    waiting = "starting Ray and its workers"

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.job, self.rows, self.logged = "", 0, 0.0

    def say(self, text: str) -> None:
        console.print(text, markup=False)

    def begin(self, job: Job, rows: int) -> None:
        self.job, self.rows, self.logged = job.name, rows, 0.0
        if console.is_terminal:
            self.progress = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn(
                "{task.completed}/{task.total}"), TextColumn("{task.fields[note]}"), TimeRemainingColumn(),
                console=console, transient=True)
            self.task = self.progress.add_task(job.name, total=rows, note=self.waiting)
            self.progress.start()

    def advance(self, totals: Totals) -> None:
        done, rate = totals.rows + totals.reused, totals.rows / max(totals.seconds, 1e-9)
        note = f"{rate:.1f}/s" + (f", {totals.failed} errors" if totals.failed else "")
        if self.progress is not None:
            self.progress.update(self.task, completed=done, note=note)
        elif totals.seconds - self.logged > LOG_EVERY_S:
            self.logged = totals.seconds
            left = (self.rows - done) / max(done / max(totals.seconds, 1e-9), 1e-9)
            self.say(f"{self.job}: {done} of {self.rows}, {note}, about {duration(max(left, 0))} left")

    def end(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Errors that a user can mend: one message and an exit status, no traceback."""
    try:
        yield
    except (ConfigError, WorkspaceBusy, JobStopped, WorkspaceError) as error:
        errors.print(f"error: {error}", style="red", markup=False)
        statuses = {ConfigError: 2, WorkspaceBusy: 3}
        raise typer.Exit(next((code for kind, code in statuses.items() if isinstance(error, kind)), 1)) from None
    except KeyboardInterrupt:
        errors.print("stopped; what was finished is kept, and the same command goes on from there")
        raise typer.Exit(130) from None


def interruptible() -> None:
    """SIGTERM ends a run like Ctrl-C: tasks cancelled, lock released."""
    def stop(*_: object) -> None:
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)


def run_stages(stages: Iterable[Stage], workspace: str, *, dry_run: bool, limit: int | None, address: str | None,
               workers: int | None, retry: bool, error_rate: float | None, rewrite: list[str] | None = None,
               adjust: Callable[[Corpus], Corpus] = lambda corpus: corpus,
               then: Callable[[Session], None] = lambda session: None) -> None:
    """Runs stages one after the other, holding the workspace."""
    interruptible()
    with reported():
        folder = Folder.at(workspace)
        corpus = adjust(configuration.load(folder))
        for check in dict.fromkeys([check_rules, *(stage.check for stage in stages)]):
            check(corpus)       # a mistake is told now, and not after hours of scoring
        cluster = Cluster(address, workers)
        session = Session(folder, corpus, cluster, Terminal(), limit, dry_run, retry, tuple(rewrite or ()), error_rate)
        held = contextlib.nullcontext() if dry_run else Lock(folder, " ".join(["clearshard", *sys.argv[1:]]))
        with held:
            try:
                for stage in stages:
                    stage.run(session)
                then(session)
            finally:
                cluster.stop()


def stage_command(stage: Stage) -> Callable[..., None]:
    """The command of one stage."""
    def command(workspace: Workspace, dry_run: DryRun = False, limit: Limit = None, address: Address = None,
                workers: Workers = None, retry_errors: Retry = False, max_error_rate: ErrorRate = None) -> None:
        run_stages([stage], workspace, dry_run=dry_run, limit=limit, address=address, workers=workers,
                   retry=retry_errors, error_rate=max_error_rate)
    return command


def shard(workspace: Workspace, rewrite: Rewrite = None, dry_run: DryRun = False, limit: Limit = None,
          address: Address = None, workers: Workers = None, max_error_rate: ErrorRate = None) -> None:
    run_stages([STAGES["shard"]], workspace, dry_run=dry_run, limit=limit, address=address, workers=workers,
               retry=False, error_rate=max_error_rate, rewrite=rewrite)


def run_command(stages: list[Stage]) -> Callable[..., None]:
    """`clearshard run`: those of the stages that the corpus wants, and the report."""
    def run(workspace: Workspace, dry_run: DryRun = False, limit: Limit = None, address: Address = None,
            workers: Workers = None, retry_errors: Retry = False, max_error_rate: ErrorRate = None) -> None:
        """Everything that is configured and not done yet, from ingest to shards and the report."""
        def finish(session: Session) -> None:
            if not dry_run:
                console.print(f"report: {write_report(session.workspace, session.corpus)}", markup=False)
        with reported():
            corpus = configuration.load(Folder.at(workspace))
        run_stages([stage for stage in stages if stage.configured(corpus)], workspace, dry_run=dry_run, limit=limit,
                   address=address, workers=workers, retry=retry_errors, error_rate=max_error_rate, then=finish)
    return run


Sources = Annotated[list[str], typer.Option("--source", help="Where images come from: URI or GROUP=URI.")]


def init(workspace: Workspace, source: Sources) -> None:
    """Make a workspace: write a commented corpus.yaml."""
    with reported():
        folder = Folder.at(workspace)
        if folder.exists(configuration.NAME):
            raise ConfigError(f"{folder} has a {configuration.NAME} already; edit it, or choose another folder")
        entries = []
        for entry in source:
            group, separator, uri = entry.partition("=")
            named = separator and group.isidentifier()
            uri = uri if named else entry
            entries.append((uri if "://" in uri or set(uri) & set("*?[") else str(Folder.at(uri)),
                            group if named else "hq"))
        text = configuration.template(entries)
        configuration.parse(text, str(folder / configuration.NAME))
        folder.write(configuration.NAME, text.encode())
        console.print(f"wrote {folder / configuration.NAME}\nnext: clearshard run {folder}", markup=False)


def verify(workspace: Workspace, quick: Annotated[bool, typer.Option("--quick", help="Do not decode images.")] = False,
           address: Address = None, workers: Workers = None) -> None:
    """Check every shard against its index, plan and manifest, and the tables; exit status 1 if anything is wrong."""
    with reported():
        folder = Folder.at(workspace)
        corpus, cluster, show = configuration.load(folder), Cluster(address, workers), Terminal()
        job = VerifyJob(folder, corpus, quick)
        units = job.pending()
        try:
            show.begin(job, sum(unit.rows for unit in units))
            totals = cluster.run(job, units, watch=show.advance)
        finally:
            show.end()
            cluster.stop()
        problems = [(text, rewrite(folder, text.split(":")[0])) for text in totals.errors]
        problems += table_problems(folder, corpus)
        for text, mend in problems:
            errors.print(f"{text}\n  mend: {mend}", style="red", markup=False)
        console.print(f"verify: {totals.units} shards, {totals.rows} samples, {totals.bytes / 1e6:.1f} MB read in "
                      f"{duration(totals.seconds)}: {f'{len(problems)} problems' if problems else 'all well'}")
        raise typer.Exit(1 if problems else 0)


def report(workspace: Workspace) -> None:
    """Write reports/corpus.html: funnel, scores, contact sheets, duplicates, errors, shards."""
    with reported():
        folder = Folder.at(workspace)
        console.print(f"report: {write_report(folder, configuration.load(folder))}", markup=False)


def register(app: typer.Typer) -> None:
    """Adds this room's commands."""
    app.command()(init)
    for name, stage in STAGES.items():
        app.command(name, help=stage.help)(shard if name == "shard" else stage_command(stage))
    for function in (verify, report):
        app.command()(function)
