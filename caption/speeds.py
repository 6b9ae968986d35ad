"""How many rows a second one core or one GPU does: measured, timed, by arithmetic, or assumed; in this order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import ConfigDict, Field

from degrade.strict import ConfigError, Strict

from .arithmetic import Captioner, replica, sdxl_tflop
from .assumptions import ARITHMETIC, ASSUMED, BENCHMARKS, MEASURED, PUBLISHED, Assumption, Ledger
from .cards import Card, find_card
from .config import Negatives

SERIAL, CORES, GPUS = "serial", "cores", "gpus"     # what makes a job faster: nothing, more cores, more GPUs

Ideal = Callable[[Card], float]     # rows a second of one GPU of a card, with nothing lost


class Run(Strict):
    """The last real run of a job, as `reports/rates.json` has it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rows: int = Field(gt=0)
    seconds: float = Field(gt=0, allow_inf_nan=False, description="wall time")
    cpus: float = Field(1, ge=0, allow_inf_nan=False, description="cores that the job could use")
    gpus: float = Field(0, ge=0, allow_inf_nan=False)
    card: str | None = None

    def __str__(self) -> str:
        places = f"{self.gpus:g} x {self.card or 'GPU'}" if self.gpus else f"{self.cpus:g} cores"
        return f"{self.rows} rows in {self.seconds:.1f} s on {places}"


@dataclass(frozen=True)
class Machine:
    """What the jobs may use."""

    cpus: int
    gpus: int
    card: Card


@dataclass(frozen=True)
class Captioning:
    """Which captioner, and how its weights are held: none, 8bit or 4bit."""

    model: Captioner
    quantisation: str = "none"


def cpu_speed(name: str, kind: str, runs: Mapping[str, Run], seconds: Mapping[str, float]) -> Assumption | None:
    """Rows a second of one core (of the whole job if it is serial); None if nothing tells.

    runs: by job. seconds: of one core per row, where a few rows were timed.
    """
    def rate(value: float, origin: str, source: str) -> Assumption:
        return Assumption(f"{name} rate", value, "rows/s" + (" per core" if kind == CORES else ""), origin, source)
    if name in runs:
        run = runs[name]
        return rate(run.rows / run.seconds / (max(run.cpus, 1) if kind == CORES else 1), MEASURED, str(run))
    if name in seconds:
        return rate(1 / seconds[name], MEASURED, "a few rows, timed now on one core")
    if name in BENCHMARKS:
        return rate(BENCHMARKS[name], ASSUMED, "docs/benchmarks.md")
    if name in ("tile", "shard"):
        score = cpu_speed("score", kind, runs, seconds)
        return rate(float(score.value), ASSUMED, "as score, which decodes an image for every row too")
    return None


def gpu_speed(name: str, ideal: Ideal | None, run: Run | None, card: Card, ledger: Ledger) -> Assumption | None:
    """Rows a second of one GPU: measured, if need be on another card, or the ideal rate times the efficiency.

    ideal: None if the arithmetic does not know the job; cards are then compared by their TFLOP/s, and without a
    measurement the answer is None.
    """
    def rate(value: float, origin: str, source: str) -> Assumption:
        return Assumption(f"{name} rate", value, "rows/s per GPU", origin, source)
    measured_on = _card_of(name, run, ledger)
    if run and measured_on:
        compare = ideal or (lambda each: each.tflops)
        ratio = compare(card) / compare(measured_on)
        scaled = "" if card == measured_on else f"; times {ratio:.2f}, the arithmetic's ratio of {card.name} to it"
        return rate(run.rows / run.seconds / run.gpus * ratio, MEASURED, f"{run}{scaled}")
    if ideal is None:
        return None
    return rate(ideal(card) * ledger.value("efficiency"), ARITHMETIC, f"ideal {ideal(card):.3g}/s, times efficiency")


def _card_of(name: str, run: Run | None, ledger: Ledger) -> Card | None:
    """The card that a job was measured on; warns if the run tells nothing about cards."""
    if run is None:
        return None
    if not run.gpus:
        ledger.warnings.append(f"{name} has run without GPUs of its own ({run}), which says nothing about a card")
        return None
    try:
        return find_card(run.card or "")
    except ConfigError:
        ledger.warnings.append(f"{name} was measured on {run.card!r}, a card that is not known; that run is not used")
        return None


def note_card(card: Card, ledger: Ledger) -> None:
    ledger.note(Assumption(f"operations of {card.name}", card.tflops, "TFLOP/s", ASSUMED, card.tflops_source))
    ledger.note(Assumption(f"bandwidth of {card.name}", card.bandwidth_tb_s, "TB/s", PUBLISHED, card.source))
    ledger.note(Assumption(f"memory of {card.name}", card.memory_gb, "GB", PUBLISHED, card.source))


def caption_ideal(captioning: Captioning, machine: Machine, ledger: Ledger) -> tuple[Ideal, int]:
    """Ideal captions a second per GPU, and how many GPUs hold one replica; warns if that is more than one."""
    model, quantisation = captioning.model, captioning.quantisation
    tokens = max(1, round(ledger.value("caption tokens")))
    held = replica(model, tokens, machine.card, quantisation)
    ledger.note(Assumption("captions at a time", held.batch, "per replica", ARITHMETIC,
                           f"{model.name}: {held.weights_gb:.1f} GB of weights, {model.kv_bytes / 1e6:.2f} MB of cache "
                           f"a token, {model.prompt_tokens} + {tokens} tokens"))
    if held.gpus > 1:
        smaller = {q: replica(model, tokens, machine.card, q).gpus for q in ("8bit", "4bit")}
        ledger.warnings.append(_does_not_fit(model.name, held.weights_gb, held.gpus, machine, smaller))
    return lambda card: replica(model, tokens, card, quantisation).per_gpu, held.gpus


def _does_not_fit(model: str, weights_gb: float, gpus: int, machine: Machine, smaller: dict[str, int]) -> str:
    card, idle = machine.card, machine.gpus % gpus
    text = (f"caption: {model} ({weights_gb:.1f} GB of weights) does not fit into one {card.name} of "
            f"{card.memory_gb:g} GB; planned with {gpus} GPUs per replica")
    if machine.gpus < gpus:
        text += f", although --gpus is {machine.gpus}"
    elif idle:
        text += f", which leaves {idle} of {machine.gpus} idle"
    better = next((f". Weights held in {q} need {count}" for q, count in smaller.items() if count < gpus), "")
    return text + better + (" (caption.transformers.quantisation)" if better else "")


def negatives_ideal(negatives: Negatives, ledger: Ledger) -> tuple[Ideal, int]:
    """Ideal images a second per GPU; one GPU holds SDXL (7 GB)."""
    tflop = sdxl_tflop(negatives.mode, negatives.steps, negatives.strength, negatives.size)
    ledger.note(Assumption("operations of a negative", tflop, "TFLOP", ARITHMETIC, f"SDXL {negatives.mode}, "
                           f"{negatives.steps} steps at {negatives.size} pixels, with guidance"))
    return lambda card: card.tflops / tflop, 1
