"""`clearshard train`, and the same under torchrun: `python -m train`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands import console, reported
from pipeline.lock import Lock
from pipeline.storage import Folder
from sample.run import usable

if TYPE_CHECKING:
    from .config import Training
    from .ranks import Ranks

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run; configs/ has examples.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Set a key of it, such as task.depth=paper; again "
                                                    "for more.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Check all, and say what it would take: parameters, memory, "
                                   "arithmetic, time.")]
Card = Annotated[str, typer.Option("--card", help="For --dry-run: the card to compute for.")]
Cards = Annotated[int | None, typer.Option("--cards", min=1, help="For --dry-run: how many of them.")]
Share = Annotated[float, typer.Option("--mfu", min=0.01, max=1, help="For --dry-run: share of the card's arithmetic "
                                      "that is expected.")]
Accept = Annotated[bool, typer.Option("--accept-changes", help="Go on from a checkpoint although the configuration or "
                                      "the corpus has changed.")]
StopAt = Annotated[int | None, typer.Option("--stop-at", min=1, help="Stop and save after this step, before the end.")]
ProfileSteps = Annotated[int, typer.Option("--profile", min=0, help="Record so many steps into trace.json.")]
Export = Annotated[bool, typer.Option("--export", help="Train nothing: write model/ from the last checkpoint.")]
RayWorkers = Annotated[int | None, typer.Option("--ray", min=1, help="Run by Ray Train with so many workers.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster for --ray, e.g. auto or HOST:6379. "
                                             "[RAY_ADDRESS]")]


def train(path: Config, settings: Settings = None, device: Device = "auto", dry_run: Dry = False, card: Card = "H200",
          cards: Cards = None, mfu: Share = 0.4, accept_changes: Accept = False, stop_at: StopAt = None,
          profile: ProfileSteps = 0, export: Export = False, ray_workers: RayWorkers = None,
          address: Address = None) -> None:
    """Train SUPIR, or a part of it, from the shards of a corpus.

    For example:

    \b
      clearshard train adaptor.yaml --dry-run
      clearshard train adaptor.yaml --set task.depth=paper --set batch=64
      torchrun --nproc-per-node 8 -m train adaptor.yaml

    Stop it whenever you like: the same command goes on, with any number of devices that divides the batch.
    """
    # The libraries' own progress bars would last a moment and say less than the lines here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with reported(), usable():
        from . import config as configuration
        config = configuration.load(path, settings)
        if dry_run:
            from .arithmetic import report
            config.task.check()
            from .batches import Loader
            ranks = cards or ray_workers or 1
            Loader(config.data, config.seed, batch=config.batch, micro_batch=config.micro(ranks), ranks=ranks)
            for line in report(config, card, ranks, mfu):
                console.print(line, markup=False)
        elif ray_workers:
            from .on_ray import launch
            launch(config, ray_workers, address, device, accept_changes, stop_at)
        else:
            run(config, device, accept_changes, stop_at, profile, export)


def run(config: Training, device: str = "auto", accept: bool = False, stop_at: int | None = None, profile: int = 0,
        export: bool = False) -> None:
    """One rank of a run, in this process.

    Raises:
        KeyboardInterrupt: it was asked to stop, and has saved.
    """
    from .ranks import Ranks
    ranks = Ranks.start(device)
    try:
        with held(config) if ranks.first else contextlib.nullcontext():
            go(config, ranks, say, stopped_by, accept=accept, stop_at=stop_at, profile=profile, export=export)
    finally:
        ranks.stop()


def held(config: Training) -> Lock:
    """The run's folder, held against a second run of it."""
    return Lock(Folder.at(str(config.out)), " ".join(["clearshard", *sys.argv[1:]]))


def say(text: str) -> None:
    console.print(text, markup=False)


def go(config: Training, ranks: Ranks, say: Callable[[str], None], listen: Callable[[Callable[[], None]], dict], *,
       accept: bool = False, stop_at: int | None = None, profile: int = 0, export: bool = False) -> None:
    """Trains and exports, or exports only; `listen(stop)` hears who wants it to stop.

    Raises:
        KeyboardInterrupt: as `run`.
    """
    from .loop import Trainer
    trainer = Trainer(config, ranks, say, accept=accept, stop_at=stop_at, profile=profile)
    if not export:
        previous = listen(trainer.stop)
        finished = trainer.fit()
        for number, handler in previous.items():
            signal.signal(number, handler)
        if trainer.stopping:
            raise KeyboardInterrupt
        if not finished:
            trainer.say(f"stopped at step {trainer.step:,}, as asked; the same command goes on")
            return
    trainer.export()
    trainer.say(f"done: {config.out / 'model'}")


def stopped_by(stop: Callable[[], None]) -> dict:
    """The first SIGTERM or Ctrl-C saves and ends after the step; the second ends at once."""
    previous = {}

    def asked(number: int, frame: object) -> None:
        stop()
        signal.signal(number, previous[number])
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, asked)
    return previous


def register(app: typer.Typer) -> None:
    """Adds this room's commands."""
    from .foreign import index
    app.command()(index)
    app.command()(train)
