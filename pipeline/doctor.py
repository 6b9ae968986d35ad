"""Doctor: is this environment fit for the work, and what mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import typer
from packaging.version import Version
from rich.console import Console

# torch 2.N goes with torchvision 0.(N + 15), each minor release of the one with one of the other.
TORCHVISION_AHEAD = 15


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: `ok`, `note` (works, less than it could) or `bad` (something will fail)."""

    state: str
    what: str
    mend: str = ""


def python() -> Finding:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("ok" if good else "bad", f"Python {version}", "" if good else "use Python 3.11, 3.12 or 3.13")


def torch_pair() -> Finding:
    """Whether torch and torchvision were built for each other: imported in a process of its own, where the
    wrong pair fails."""
    try:
        torch, vision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    except importlib.metadata.PackageNotFoundError as error:
        return Finding("bad", f"{error.name} is not installed", "make install")
    wanted = Version(torch).minor + TORCHVISION_AHEAD if Version(torch).major == 2 else None
    test = subprocess.run([sys.executable, "-c", "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), "
                           "torch.zeros(1), 0.5)"], capture_output=True, text=True)
    if test.returncode == 0:
        return Finding("ok", f"torch {torch} and torchvision {vision} match")
    last = test.stderr.strip().splitlines()[-1:] or ["no message"]
    expected = f" (torch {torch} goes with torchvision 0.{wanted})" if wanted else ""
    return Finding("bad", f"torch {torch} and torchvision {vision} do not work together: {last[0]}",
                   f"install both from the same index with uv: make install{expected}")


def gpu() -> Finding:
    import torch
    if not torch.cuda.is_available():
        return Finding("note", "no GPU: the corpus needs none; training and large captioners do",
                       "on a machine that has one: is the driver at least as new as CUDA " + str(torch.version.cuda))
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("ok", "GPU: " + ", ".join(f"{c.name}, {c.total_memory / 2**30:.0f} GiB" for c in cards))


def packages() -> list[Finding]:
    """The packages that every job needs, by importing them."""
    found = []
    for module, package in (("cv2", "opencv-python"), ("PIL", "pillow"), ("simplejpeg", "simplejpeg"),
                            ("pyarrow", "pyarrow"), ("duckdb", "duckdb"), ("webdataset", "webdataset")):
        try:
            importlib.import_module(module)
            found.append(Finding("ok", f"{package} {importlib.metadata.version(package)}"))
        except Exception as error:      # a broken binary may raise anything
            found.append(Finding("bad", f"{package}: {error}", "make install"))
    return found


def ray() -> Finding:
    """Starts Ray in a process of its own and runs one task."""
    program = ("import ray; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False, "
               "logging_level='ERROR'); print(ray.get(ray.remote(lambda: 41 + 1).remote()), ray.__version__)")
    try:
        test = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Finding("bad", "Ray did not start within two minutes", "is /dev/shm at least 1 GB, loopback allowed?")
    answer = test.stdout.split()
    if test.returncode == 0 and answer[:1] == ["42"]:
        return Finding("ok", f"Ray {answer[1]} runs tasks")
    return Finding("bad", "Ray does not run: " + (test.stderr.strip().splitlines() or ["no message"])[-1],
                   "make install; then look into " + os.path.join(tempfile.gettempdir(), "ray"))


def machine() -> list[Finding]:
    memory, cores = psutil.virtual_memory().available / 2**30, os.cpu_count() or 1
    disk = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    return [
        Finding("ok" if memory > 2 * cores else "note", f"{cores} cores, {memory:.0f} GiB of free memory",
                "" if memory > 2 * cores else "a 200-megapixel JPEG takes about 1 GiB in a worker: --workers N"),
        Finding("ok" if disk > 10 else "note", f"{disk:.0f} GiB free in the temporary folder",
                "" if disk > 10 else "queries spill there; set TMPDIR to a larger disk"),
    ]


def optional_weights() -> list[Finding]:
    """What the optional scores would need."""
    from .metrics import MetricConfig, missing
    found = []
    for name in ("piqe", "niqe", "musiq", "clipiqa"):
        lacking = missing(MetricConfig(name=name, kind="pyiqa", model=name))
        state, ready = ("note", " is not ready") if lacking else ("ok", "")
        found.append(Finding(state, f"optional score {name}{ready}", lacking or ""))
    return found


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    python, packages, torch_pair, gpu, ray, machine, optional_weights)


def doctor() -> None:
    """Check the environment: torch and torchvision, Ray, GPU, disk, optional weights; say what mends it."""
    console, bad = Console(highlight=False, soft_wrap=True), 0
    for check in CHECKS:
        found = check()
        for finding in found if isinstance(found, list) else [found]:
            colour = {"ok": "green", "note": "yellow", "bad": "red"}[finding.state]
            console.print(f"[{colour}]{finding.state:>4}[/] ", end="")
            console.print(finding.what, markup=False)
            if finding.mend:
                console.print(f"       {finding.mend}", markup=False)
            bad += finding.state == "bad"
    console.print("something above must be mended first" if bad else "ready")
    raise typer.Exit(1 if bad else 0)

