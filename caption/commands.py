"""The commands of this room: `clearshard caption`, `negatives` and `plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import config as configuration
from pipeline.commands import (
    Address,
    DryRun,
    ErrorRate,
    Limit,
    Retry,
    Workers,
    Workspace,
    console,
    reported,
    run_stages,
)
from pipeline.config import Corpus
from pipeline.stages import Stage
from pipeline.storage import Folder

from . import forecast_commands
from .stages import STAGES

IfConfigured = Annotated[bool, typer.Option(
    "--if-configured", help="Do nothing where corpus.yaml has no such section.")]
Count = Annotated[int | None, typer.Option("--count", min=1, help="So many images; default: corpus.yaml's.")]


def caption(workspace: Workspace, dry_run: DryRun = False, limit: Limit = None, address: Address = None,
            workers: Workers = None, retry_errors: Retry = False, max_error_rate: ErrorRate = None,
            if_configured: IfConfigured = False) -> None:
    if not if_configured or _wanted(STAGES["caption"], workspace):
        run_stages([STAGES["caption"]], workspace, dry_run=dry_run, limit=limit, address=address, workers=workers,
                   retry=retry_errors, error_rate=max_error_rate)


def negatives(workspace: Workspace, count: Count = None, dry_run: DryRun = False, limit: Limit = None,
              address: Address = None, workers: Workers = None, retry_errors: Retry = False,
              max_error_rate: ErrorRate = None, if_configured: IfConfigured = False) -> None:
    def adjust(corpus: Corpus) -> Corpus:
        known = corpus.negatives is not None and count is not None
        return corpus.model_copy(update={"negatives": corpus.negatives | {"count": count}}) if known else corpus
    if not if_configured or _wanted(STAGES["negatives"], workspace):
        run_stages([STAGES["negatives"]], workspace, dry_run=dry_run, limit=limit, address=address, workers=workers,
                   retry=retry_errors, error_rate=max_error_rate, adjust=adjust)


def _wanted(stage: Stage, workspace: str) -> bool:
    with reported():
        wanted = stage.configured(configuration.load(Folder.at(workspace)))
    if not wanted:
        console.print(f"{stage.name}: not configured, nothing to do")
    return wanted


def register(app: typer.Typer) -> None:
    """Adds this room's commands."""
    app.command(help=STAGES["caption"].help)(caption)
    app.command(help=STAGES["negatives"].help)(negatives)
    forecast_commands.register(app)
