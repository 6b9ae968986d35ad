"""Recipes: which operators make a low-quality image, in which order, with which ranges. Frozen; YAML in and out."""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import yaml
from pydantic import Field, model_validator

from .blur import Blur
from .camera import Camera
from .canvas import Canvas
from .jpeg import Jpeg, Webp
from .keyed import Draws
from .noise import Noise
from .operator import Frame, Operator, Positive, Probability, Size, Step, as_float
from .resize import Resize
from .sharpen import Sharpen, Usm
from .strict import ConfigError, Strict, check, parse

PRESETS = Path(__file__).parent / "recipes"
SMALLEST = 16                                # pixels of the shorter side of an image that can be degraded


class Round(Operator):
    """To whole grey levels, as saving a file does."""

    op: Literal["round"] = "round"

    def draw(self, draws: Draws, frame: Frame) -> Step:
        return {}

    @staticmethod
    def cpu(image: np.ndarray, step: Step) -> np.ndarray:
        return np.clip(np.rint(as_float(image)), 0, 255)

    @staticmethod
    def batch(canvas: Canvas, steps: Sequence[Step]) -> Canvas:
        return canvas.with_pixels(canvas.pixels.round().clip(0, 255))


class Order(Strict):
    """Two groups of operators, of which one or the other comes first."""

    op: Literal["order"] = "order"
    probability: Probability = Field(0.5, description="of `first` coming before `second`")
    first: tuple[AnyStep, ...]
    second: tuple[AnyStep, ...]


class Option(Strict):
    weight: Positive = 1.0
    steps: tuple[AnyStep, ...]


class Choice(Strict):
    """One of several groups of operators, by weight. A group may be empty."""

    op: Literal["choice"] = "choice"
    options: tuple[Option, ...] = Field(min_length=2)


AnyStep = Annotated[Blur | Resize | Noise | Jpeg | Webp | Usm | Sharpen | Camera | Round | Order | Choice,
                    Field(discriminator="op")]
OPERATORS: dict[str, type[Operator]] = {
    kind.model_fields["op"].default: kind for kind in (Blur, Resize, Noise, Jpeg, Webp, Usm, Sharpen, Camera, Round)}
Order.model_rebuild()
Option.model_rebuild()
Choice.model_rebuild()


class Recipe(Strict):
    """A named sequence of operators that turns an image of any size into its low-quality partner."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    source: str = Field("", description="where the ranges come from")
    scale: Annotated[int, Field(ge=1, le=16)] = Field(4, description='the size "lq" is that of the input by this')
    output: Literal["lq", "hq"] = Field("lq", description="the size of the result")
    untouched: Probability = Field(0.0, description="share of samples that are resized only")
    steps: tuple[AnyStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ends_at_its_size(self) -> Recipe:
        last = {"hq" if self.scale == 1 and size == "lq" else size for size in _sizes(self.steps, {"hq"})}
        if last != {"hq" if self.scale == 1 else self.output}:
            raise ValueError(f'steps: the result must have the size "{self.output}" for every sample, so the last '
                             f'resize must always happen and be exact: {{op: resize, to: {self.output}}}')
        return self

    @functools.cached_property
    def nodes(self) -> tuple[Node, ...]:
        return _named(self.steps, Counter())

    def operators(self) -> Iterator[Operator]:
        """Every operator that a sample may meet."""
        groups = [self.nodes]
        while groups:
            for node in groups.pop():
                groups += node.groups
                if isinstance(node.operator, Operator):
                    yield node.operator

    def draw(self, seed: int, key: str, epoch: int, size: Size, compat: bool = False) -> list[Step | None]:
        """The parameters of one sample: a step per slot, None where an operator is not applied.

        Every sample of a recipe has the same slots, so those of a batch can be applied together.
        """
        def draws(purpose: str) -> Draws:
            return Draws(seed, key, epoch, purpose)

        steps, _ = _draw(self.nodes, draws, Frame(hq=size, scale=self.scale, now=size, compat=compat))
        if self.untouched and draws("untouched").chance(self.untouched):
            last = max((slot for slot, step in enumerate(steps) if step and step["op"] == "resize"), default=None)
            steps = [step if slot == last and self.output == "lq" else None for slot, step in enumerate(steps)]
        return steps

    def to_yaml(self) -> str:
        """Its text, from which `load_recipe` makes the same recipe."""
        return yaml.dump(self.model_dump(mode="json", exclude_none=True), Dumper=Flow, sort_keys=False, width=110)


class Node(NamedTuple):
    """An operator with the purpose of its draws: its name and its number among those of that name."""

    purpose: str
    operator: Operator | Order | Choice
    groups: tuple[tuple[Node, ...], ...] = ()

    @property
    def slots(self) -> int:
        sizes = [sum(node.slots for node in group) for group in self.groups]
        return sum(sizes) + sizes[0] if isinstance(self.operator, Order) else sum(sizes) or not self.groups


def _named(steps: Sequence[Any], count: Counter) -> tuple[Node, ...]:
    nodes = []
    for step in steps:
        count[step.op] += 1
        purpose = f"{step.op}.{count[step.op]}"
        groups = (step.first, step.second) if isinstance(step, Order) else \
            tuple(option.steps for option in step.options) if isinstance(step, Choice) else ()
        nodes.append(Node(purpose, step, tuple(_named(group, count) for group in groups)))
    return tuple(nodes)


def _draw(nodes: Sequence[Node], draws: Callable[[str], Draws], frame: Frame) -> tuple[list[Step | None], Frame]:
    """The steps of a group of operators, and where the image stands after them."""
    steps: list[Step | None] = []
    for purpose, operator, groups in nodes:
        name = draws(purpose)
        if isinstance(operator, Operator):
            step = {"op": operator.op} | operator.draw(name, frame) if name.chance(operator.probability) else None
            if step and "height" in step:
                frame = frame.at((step["height"], step["width"]))
            steps.append(step)
            continue
        if isinstance(operator, Order):
            first, second = groups
            places, taken = (first, second, first), ((0, 1) if name.chance(operator.probability) else (1, 2))
        else:
            places = groups
            taken = (name.choice({i: option.weight for i, option in enumerate(operator.options)}),)
        for place, group in enumerate(places):
            drawn = [None] * sum(node.slots for node in group)
            if place in taken:
                drawn, frame = _draw(group, draws, frame)
            steps += drawn
    return steps, frame


def _sizes(steps: Sequence[Any], sizes: set[str]) -> set[str]:
    """The sizes that samples may have after some operators, from those before: "hq", "lq" or "drawn"."""
    for step in steps:
        if isinstance(step, Order):
            sizes = (_sizes((*step.first, *step.second), sizes) | _sizes((*step.second, *step.first), sizes))
        elif isinstance(step, Choice):
            sizes = set().union(*(_sizes(option.steps, sizes) for option in step.options))
        elif isinstance(step, Resize):
            new = {step.to if step.exact else "drawn"}
            sizes = new if step.probability == 1 else sizes | new
    return sizes


class Flow(yaml.SafeDumper):
    """Block style with lists of plain values on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.Node:
        plain = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)


Flow.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data))


def presets() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_recipe(name: str | Path | dict[str, Any]) -> Recipe:
    """A preset by its name, a recipe from a YAML file, or one from a mapping.

    Raises:
        ConfigError: no such preset or file (with the nearest name), not YAML, an unknown key, a value out of range,
            or a sequence that cannot give a result of one size.
    """
    if isinstance(name, dict):
        return check(Recipe, name, "recipe")
    path = PRESETS / f"{name}.yaml" if str(name) in presets() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(str(name), presets(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(presets())}"
        why = "no preset and no file of that name" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"recipe {str(name)!r}: {why}; {hint}") from None
    return parse(Recipe, text, str(name))
