"""Synthetic degradation: a recipe and a name make the low-quality partner of an image, the same one every time."""

from __future__ import annotations

import importlib

_HOMES = {"SecondOrderDegrader": "degrader", "InputRefused": "degrader", "Recipe": "recipe", "load_recipe": "recipe",
          "presets": "recipe", "ConfigError": "strict"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    # Looked up when asked for, so that what needs only `degrade.strict` does not load torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
