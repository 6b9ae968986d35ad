"""A trace of a few steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch

from .ranks import Ranks

WARM = 2            # steps before it begins


class Profile:
    """Records `steps` steps of the first rank, after a warm-up, into `trace.json`; 0: none."""

    def __init__(self, steps: int, out: Path, ranks: Ranks) -> None:
        self.steps, self.out, self.done = steps if ranks.first else 0, out, 0
        self.recorder: torch.profiler.profile | None = None

    def stepped(self) -> None:
        """After each step."""
        if not self.steps:
            return
        self.done += 1
        if self.done == WARM:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.recorder = torch.profiler.profile(activities=kinds, record_shapes=True)
            self.recorder.start()
        elif self.recorder is not None and self.done == WARM + self.steps:
            self.recorder.stop()
            self.out.mkdir(parents=True, exist_ok=True)
            self.recorder.export_chrome_trace(str(self.out / "trace.json"))
            self.recorder, self.steps = None, 0
