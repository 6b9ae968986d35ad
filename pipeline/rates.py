"""How fast each job last ran, for `clearshard plan`: `reports/rates.json`."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING

from .jobs import Job
from .storage import Folder

if TYPE_CHECKING:
    from .cluster import Totals

NAME = "rates.json"
ENOUGH_S, ENOUGH_ROWS = 10.0, 10_000        # a shorter run with fewer rows measures how it starts


def note(workspace: Folder, job: Job, totals: Totals) -> None:
    """Keeps the rate of a run that did enough, and on what it ran."""
    if totals.seconds < ENOUGH_S and totals.rows < ENOUGH_ROWS:
        return
    rates = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        rates = json.loads((workspace / "reports").read(NAME))
    rates = rates if isinstance(rates, dict) else {}
    rates[job.name] = {"rows": totals.rows, "seconds": round(totals.seconds, 3), **_machines(job)}
    (workspace / "reports").write(NAME, json.dumps(rates, indent=1, sort_keys=True).encode())


def _machines(job: Job) -> dict:
    ray = sys.modules["ray"]
    have = ray.cluster_resources()
    card = next((name.partition(":")[2] for name in sorted(have) if name.startswith("accelerator_type:")), None)
    uses_gpus = have.get("GPU", 0) if job.num_gpus or (job.pool and job.pool.gpus != 0) else 0
    return {"cpus": have.get("CPU", 0), "gpus": uses_gpus, "card": card if uses_gpus else None}
