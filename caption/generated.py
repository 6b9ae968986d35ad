"""What a model said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Generated:
    """An answer and how it ended."""

    text: str
    tokens: int | None              # generated, the end token included
    finish_reason: Literal["stop", "length"]
