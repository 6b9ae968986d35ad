"""The command `clearshard plan`: what a corpus will take, before it is paid for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from degrade.strict import ConfigError
from pipeline import config as configuration
from pipeline.commands import Workspace, errors, reported
from pipeline.config import Corpus
from pipeline.degraded_commands import cores
from pipeline.storage import Folder

from .arithmetic import CAPTIONERS, Captioner, find_captioner
from .assumptions import ASSUMED, GIVEN, MEASURED, Assumption
from .cards import CARDS, Card, find_card
from .config import Captions, Negatives, captions_of, negatives_of
from .forecast import Forecast, JobPlan, Observation, Setting, forecast
from .observed import observe
from .speeds import Captioning, Machine

CARD, CAPTIONER = "H200", "llava-1.5-13b"       # where nobody says otherwise
LONG = 200                                      # tokens of a detailed caption, unless the prompt allows fewer

Images = Annotated[int | None, typer.Option("--images", min=1, help="So many; default: what the workspace lists.")]
Gpus = Annotated[int | None, typer.Option("--gpus", min=0, help="Cards; default: 1 if a configured job needs one.")]
CardName = Annotated[str | None, typer.Option("--card", help=f"One of {', '.join(CARDS)}.")]
Cpus = Annotated[int | None, typer.Option("--cpus", min=1, help="Cores; default: those of the measurement.")]
Model = Annotated[str | None, typer.Option("--caption-model", help=f"One of {', '.join(CAPTIONERS)}.")]
Tokens = Annotated[int | None, typer.Option("--caption-tokens", min=1, help="Of a caption; default: as measured.")]
Json = Annotated[bool, typer.Option("--json", help="The same as data.")]


def plan(workspace: Workspace, images: Images = None, gpus: Gpus = None, card: CardName = None, cpus: Cpus = None,
         caption_model: Model = None, caption_tokens: Tokens = None, as_json: Json = False) -> None:
    """Forecast the hours, GPU-hours, storage and shards of every job, from a sample and arithmetic."""
    with reported():
        wanted = find_card(card) if card else None
        model = find_captioner(caption_model) if caption_model else None
        folder = Folder.at(workspace)
        corpus = configuration.load(folder)
        setting = decided(corpus, observe(folder, corpus), gpus, cpus, wanted, model,
                          {"images": images, "caption tokens": caption_tokens})
        result = forecast(setting)
        if as_json:
            typer.echo(json.dumps(as_data(result, setting), indent=1))
        else:
            show(result, setting)
        for text in result.warnings:
            errors.print(f"warning: {text}", style="yellow", markup=False)


def decided(corpus: Corpus, seen: Observation, gpus: int | None, cpus: int | None, card: Card | None,
            model: Captioner | None, numbers: dict[str, int | None]) -> Setting:
    """What to forecast: options, where they are silent the workspace, and then defaults; each is stated."""
    captions = captions_of(corpus) if corpus.caption is not None else None
    negatives = negatives_of(corpus) if corpus.negatives is not None else None
    stated, given = [], {name: Assumption(name, value, name.split()[-1], GIVEN, f"--{name.replace(' ', '-')}")
                         for name, value in numbers.items() if value}
    if captions and "caption tokens" not in {*seen.known, *given} and captions.prompt.max_new_tokens < LONG:
        given["caption tokens"] = Assumption("caption tokens", captions.prompt.max_new_tokens, "tokens", ASSUMED,
                                             f"all that the prompt {captions.prompt.name} allows")
    if gpus:
        stated += [Assumption(f"section {name}", "defaults", "", ASSUMED, "corpus.yaml has none")
                   for name, section in (("caption", captions), ("negatives", negatives)) if section is None]
        negatives = negatives or Negatives(model="SDXL")
    captioning = None
    if captions or gpus:
        chosen = _captioner(captions, model)
        stated.append(chosen)
        local = captions.transformers if captions else None
        captioning = Captioning(find_captioner(str(chosen.value)), local.quantisation if local else "none")
    machine, about = _machine(corpus, seen, gpus, cpus, card, bool(captioning or negatives))
    return Setting(corpus, seen, machine, captioning, negatives, given, (*about, *stated))


def _captioner(captions: Captions | None, given: Captioner | None) -> Assumption:
    """The option's captioner, or the one that the configured model is called after."""
    if given:
        return Assumption("caption model", given.name, "", GIVEN, "--caption-model")
    backend = captions and (captions.transformers or captions.openai)
    called = [name for name in CAPTIONERS if backend and name in backend.model.lower()]
    if called:
        return Assumption("caption model", called[0], "", GIVEN, "corpus.yaml")
    unknown = f"{backend.model} is not known; say --caption-model" if backend else "say --caption-model NAME"
    return Assumption("caption model", CAPTIONER, "", ASSUMED, unknown)


def _machine(corpus: Corpus, seen: Observation, gpus: int | None, cpus: int | None, card: Card | None,
             needed: bool) -> tuple[Machine, list[Assumption]]:
    """What the jobs may use, and why."""
    needed = needed or any(metric.device == "cuda" for metric in corpus.score.metrics)
    measured_on = next((found for run in seen.runs.values() if (found := _known(run.card))), None)
    used = max((round(run.cpus) for run in seen.runs.values()), default=0)
    machine = Machine(cpus or used or cores(), int(needed) if gpus is None else gpus,
                      card or measured_on or CARDS[CARD])
    about = [Assumption("cores", machine.cpus, "cores", GIVEN if cpus else MEASURED if used else ASSUMED,
                        "--cpus" if cpus else "as many as the measured runs had" if used else "those of this machine")]
    if machine.gpus:
        about.append(Assumption("GPUs", machine.gpus, f"x {machine.card.name}", GIVEN if gpus and card else ASSUMED,
                                "--gpus and --card say otherwise" if not (gpus and card) else "--gpus, --card"))
    return machine, about


def _known(name: str | None) -> Card | None:
    try:
        return find_card(name) if name else None
    except ConfigError:
        return None


def as_data(result: Forecast, setting: Setting) -> dict:
    """The forecast as plain values; hours and rates that are not known are null."""
    machine = setting.machine
    return {"machine": {"cpus": machine.cpus, "gpus": machine.gpus, "card": machine.card.name},
            "jobs": [asdict(job) for job in result.jobs], "totals": asdict(result.totals),
            "assumptions": [asdict(each) for each in result.assumptions], "warnings": list(result.warnings)}


def show(result: Forecast, setting: Setting) -> None:
    """The forecast for people: a line per job, the totals, remarks, and everything that was assumed."""
    screen, machine = Console(highlight=False, markup=False), setting.machine
    if not screen.is_terminal:
        screen = Console(highlight=False, markup=False, width=120)      # a file has no edge to wrap at
    cards = f" and {machine.gpus} x {machine.card.name}" if machine.gpus else ""
    screen.print(f"{result.jobs[0].rows:,} images on {machine.cpus} cores{cards}, one stage after the other")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("job")
    for name in ("rows", "rows/s", "hours", "CPU-hours", "GPU-hours", "written", "shards"):
        table.add_column(name, justify="right", no_wrap=True)
    jobs = (*result.jobs, result.totals)
    for job in jobs:
        table.add_row(*line(job), style="bold" if job is jobs[-1] else None)
    screen.print(table)
    for job in jobs:
        if job.note:
            screen.print(f"{job.name}: {job.note}")
    if not (setting.captioning or setting.negatives):
        screen.print("caption, negatives: not in corpus.yaml; --gpus N plans them too")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("assumed", "", "", "origin", "from"):
        table.add_column(name, justify="right" if len(table.columns) == 1 else "left")
    for each in result.assumptions:
        value = each.value if isinstance(each.value, str) else short(each.value)
        table.add_row(each.name, value, each.unit, each.origin, each.source)
    screen.print()
    screen.print(table)


def line(job: JobPlan) -> list[str]:
    """The cells of a job."""
    rows = f"{job.rows:,}" if job.name != "total" else ""
    rate = short(job.rate) if job.name != "total" else ""
    gpu_hours = "" if job.gpu_hours == 0 else short(job.gpu_hours)
    return [job.name, rows, rate, short(job.hours), short(job.cpu_hours), gpu_hours, size(job.bytes),
            f"{job.shards:,}" if job.shards else ""]


def short(value: float | None) -> str:
    """Three figures or whole numbers: 0.0123, 1.23, 45.6, 7,890; "?" for what is not known."""
    if value is None:
        return "?"
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else "<0.001"


def size(count: float) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count / 1000:,.3g} PB"


def register(app: typer.Typer) -> None:
    """Adds `plan`."""
    app.command()(plan)
