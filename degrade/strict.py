"""Configuration that is checked: YAML in, frozen pydantic models out, errors that name key, value and remedy."""

from __future__ import annotations

import difflib
import typing
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OnceLoader(yaml.SafeLoader):
    """YAML in which a key that is written twice is a mistake; PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(model: type[Model], text: str, where: str) -> Model:
    """Checks YAML text against a model; `where` names the text in errors.

    Raises:
        ConfigError: not YAML, an unknown key (with the nearest name) or a value out of range.
    """
    try:
        values = yaml.load(text, OnceLoader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    return check(model, values, where)


def check(model: type[Model], values: Any, where: str) -> Model:
    """Checks values against a model, as `parse` does."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, and is a {type(values).__name__}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {explain(model, e)}" for e in error.errors())) from None


def explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    """One line of a pydantic error: the key, the value, what is allowed and the nearest known name."""
    key = ".".join(str(step) for step in error["loc"])
    if error["type"] != "extra_forbidden":
        # What a validator of a whole model refuses, it names itself.
        whole = error["type"] == "value_error" and isinstance(error["input"], dict | BaseModel)
        found = "" if whole else f" (found {error['input']!r})"
        return (f"{key}: " if key else "") + error["msg"].removeprefix("Value error, ") + found
    known = _fields_at(model, error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _fields_at(model: type[BaseModel], path: tuple) -> list[str]:
    """The keys that the model at a path of the configuration has."""
    kind: Any = model
    for step in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and step in kind.model_fields:
            kind = kind.model_fields[step].annotation
        else:       # a place in a list, a name in a mapping, or the tag of a union, which pydantic adds to the path
            kind = next((one for one in _models_in(kind) if step in _tags(one)), kind)
    return sorted(_models_in(kind)[0].model_fields)


def _tags(model: type[BaseModel]) -> tuple:
    """The words by which a union tells this model from others: the only values of its `op` or `name`."""
    fields = (model.model_fields[name] for name in ("op", "name") if name in model.model_fields)
    return tuple(word for field in fields for word in typing.get_args(field.annotation))


def _models_in(kind: Any) -> list[type[BaseModel]]:
    """Every model inside an annotation such as tuple[Annotated[A | B, …], ...] or dict[str, C]."""
    if isinstance(kind, type) and not typing.get_args(kind) and issubclass(kind, BaseModel):
        return [kind]
    return [model for inner in typing.get_args(kind) for model in _models_in(inner)]
