"""What can be trained: each task a configuration with an objective. A new one is a class here, and one more name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .prior import Autoencoder, Prior
from .supir import Adaptor, Encoder

AnyTask = Annotated[Encoder | Adaptor | Prior | Autoencoder, Field(discriminator="name")]
