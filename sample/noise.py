"""Noise for samplers: every draw a function of (seed, image, step, purpose), so that a batch changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from degrade.keyed import Draws

Noise = Callable[[int, torch.Tensor], torch.Tensor]         # (step, x) -> standard normals of x's shape and device


class KeyedNoise:
    """Standard normals for a batch of named images.

    Stochastic samplers are often given the increments of a Brownian path through sigma. Over given sigmas those
    increments, divided by their standard deviation, are independent standard normals, and so are these. What a stored
    path would add is the same path at another number of steps.

    Drawn on the CPU by a counter-based generator of numpy: equal for every device, tile size and batch.

    Args:
        seed: of the run.
        keys: a name per image of the batch, such as its file's.
    """

    def __init__(self, seed: int, keys: Sequence[str]) -> None:
        self.seed, self.keys = seed, tuple(keys)

    def __call__(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """(B, …) float32 like x: the noise that a sampler adds in a step."""
        return self.draw(step, "step", x)

    def draw(self, step: int, purpose: str, x: torch.Tensor) -> torch.Tensor:
        if len(x) != len(self.keys):
            raise ValueError(f"noise for {len(self.keys)} images was asked for a batch of {len(x)}; name each image")
        drawn = [self._one(key, step, purpose, tuple(x.shape[1:])) for key in self.keys]
        return torch.from_numpy(np.stack(drawn)).to(x.device)

    def _one(self, key: str, step: int, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        draws = Draws(self.seed, key, step, f"sample:{purpose}")
        counter = np.random.Philox(key=[draws.integer(1 << 64), draws.integer(1 << 64)])
        return np.random.Generator(counter).standard_normal(shape, dtype=np.float32)

    def start(self, like: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 unit noise from which an image begins; `samplers.start` brings it to its sigma."""
        return self.draw(0, "start", like)
