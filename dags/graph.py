"""Which commands make a corpus and which train on one, in which order.

Standard library only: Airflow's environment has nothing else.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

HOUR_S = 3600
DAY_S = 24 * HOUR_S


class GraphError(ValueError):
    """Steps that no order can satisfy."""


@dataclass(frozen=True)
class Step:
    """One command of a graph: what a user would type, and what it may cost.

    A step may be repeated at any moment: the command goes on where it stopped. `arguments` are the command's first
    words, with the run's parameters in braces. `num_cpus` and `memory` (bytes) are for the command itself, which lists
    and plans; its tasks ask Ray for their own. With both zero Ray keeps the command on the head node, where the death
    of a worker does not reach it.
    """

    name: str
    after: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    verb: str = ""                  # the command, where it is not called as the step
    arguments: tuple[str, ...] = ("{workspace}",)
    distributed: bool = True        # joins Ray, and takes --address
    num_cpus: float = 0
    memory: int = 0
    gpu: bool = False               # the command itself computes on as many as the parameter `gpus` says
    retries: int = 3
    timeout_s: float = DAY_S        # from submission, waiting for resources included

    @property
    def parameters(self) -> list[str]:
        """What a run has to give, in the order of the command's words."""
        names = [name for word in self.arguments for _, name, _, _ in string.Formatter().parse(word) if name]
        return [*names, *(["gpus"] if self.gpu else [])]

    def command(self, given: Mapping[str, str], *, program: str = "clearshard", address: str | None = None,
                extra: Iterable[str] = ()) -> list[str]:
        """The command's words: PROGRAM NAME ARGUMENTS [--address ADDRESS] OPTIONS EXTRA."""
        arguments = [word.format_map(given) for word in self.arguments]
        joined = ["--address", address] if address and self.distributed else []
        return [program, self.verb or self.name, *arguments, *joined, *self.options, *extra]


@dataclass(frozen=True)
class Parameter:
    """What a run of a graph is asked for. A value that began with a dash would be an option of the command."""

    description: str
    pattern: str = "^[^-]"
    default: str | None = None


PARAMETERS = {
    "workspace": Parameter("Folder of the corpus, e.g. s3://bucket/corpus"),
    "encoder": Parameter("Configuration of the robust encoder's training, on a disk that all machines share"),
    "adaptor": Parameter("Configuration of the adaptor's training; its task.encoder is the other's `out`"),
    "workers": Parameter("Ranks of each training", "^[1-9][0-9]*$", "1"),
    "model": Parameter("The SUPIR that comes of it: the folder `model` in the adaptor's `out`"),
    "images": Parameter("Folder of good pictures, which are degraded, restored and compared"),
    "evaluation": Parameter("Folder of the evaluation"),
    "gpus": Parameter("Cards of the evaluation, 0 or 1", "^[01]$", "1"),
}


def parameters(steps: Iterable[Step]) -> dict[str, Parameter]:
    """What a run of these steps is asked for."""
    return {name: PARAMETERS.get(name, Parameter(name)) for step in steps for name in step.parameters}


def order(steps: Iterable[Step]) -> list[Step]:
    """The steps such that each comes after all that it names; otherwise as listed.

    Raises:
        GraphError: two steps of one name, a name in `after` that no step has, or a cycle.
    """
    waiting = list(steps)
    names = [step.name for step in waiting]
    for step in waiting:
        if names.count(step.name) > 1:
            raise GraphError(f"the graph has two steps called {step.name}: give one of them another name")
        for name in step.after:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, 1)
                raise GraphError(f"step {step.name} comes after {name}, which the graph does not have"
                                 + (f": {nearest[0]}?" if nearest else f"; it has {', '.join(names)}"))
    ordered: list[Step] = []
    while waiting:
        done = {step.name for step in ordered}
        ready = next((step for step in waiting if done.issuperset(step.after)), None)
        if ready is None:
            names = ", ".join(step.name for step in waiting)
            raise GraphError(f"each of {names} waits for another: remove one `after`")
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def chain(*steps: Step) -> tuple[Step, ...]:
    """The steps one after the other. A workspace has one writer, so steps side by side would only wait."""
    return tuple(replace(step, after=tuple(before.name for before in steps[max(0, i - 1):i]))
                 for i, step in enumerate(steps))


def if_configured(step: Step) -> Step:
    """The step, doing nothing where corpus.yaml has no section for it."""
    return replace(step, options=(*step.options, "--if-configured"))


def training(name: str) -> Step:
    """A training by Ray Train, whose configuration is the parameter of the same name."""
    return Step(name, verb="train", arguments=(f"{{{name}}}", "--ray", "{workers}"), timeout_s=60 * DAY_S)


CAPTION = Step("caption", timeout_s=14 * DAY_S)
NEGATIVES = Step("negatives", timeout_s=14 * DAY_S)
# Verify says the same when asked again; report reads images in its own process, so it asks for a processor.
SHARDS = (Step("shard", timeout_s=7 * DAY_S), Step("verify", retries=1),
          Step("report", distributed=False, num_cpus=1, timeout_s=6 * HOUR_S))

GRAPHS: Mapping[str, tuple[Step, ...]] = MappingProxyType({
    "corpus": chain(
        Step("ingest", timeout_s=7 * DAY_S),
        Step("score", timeout_s=14 * DAY_S),
        Step("dedup"),
        Step("select"),
        Step("tile"),
        if_configured(CAPTION),
        if_configured(NEGATIVES),
        *SHARDS,
    ),
    "captions": chain(CAPTION, if_configured(NEGATIVES), *SHARDS),
    "negatives": chain(NEGATIVES, *SHARDS),
    "training": chain(
        training("encoder"),
        training("adaptor"),
        Step("evaluate", arguments=("{model}", "{images}", "--out", "{evaluation}"), distributed=False, num_cpus=1,
             gpu=True, timeout_s=2 * DAY_S),
    ),
})
