"""How many images a second the degrader makes, against Real-ESRGAN's chain on basicsr in the same run.

    python benchmarks/degradation.py [FOLDER] [--batches 24] [--usm-batches 3]
    python benchmarks/degradation.py [FOLDER] --processes 2     does a second process double it?
    python benchmarks/degradation.py [FOLDER] --memory 10000    does memory grow with batches and keys?
    python benchmarks/degradation.py [FOLDER] --device cuda     throughput of the torch route; no host synchronisation

512-pixel crops of the photographs in FOLDER (made-up pictures without one), batches of 8, one thread each. Ways take
turns on the same batches; times are CPU time of the process, so that a busy machine does not show. The reference draws
scales and noise per batch, so its time varies: take many batches. Needs the extra `reference`.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from degrade import Recipe, SecondOrderDegrader, load_recipe  # noqa: E402

BATCH, SIDE = 8, 512


def crops(folder: Path | None, count: int = 64) -> torch.Tensor:
    """(N, 3, 512, 512) uint8, from the largest photographs of a folder or made up."""
    found = []
    for path in sorted(folder.rglob("*"), key=lambda path: -path.stat().st_size) if folder else []:
        image = cv2.imread(str(path)) if path.is_file() else None
        if image is not None and min(image.shape[:2]) >= SIDE:
            top, left = (image.shape[0] - SIDE) // 2, (image.shape[1] - SIDE) // 2
            found.append(np.ascontiguousarray(image[top:top + SIDE, left:left + SIDE, ::-1].transpose(2, 0, 1)))
        if len(found) == count:
            break
    if not found:
        from conftest import photograph
        found = [np.ascontiguousarray(np.array(photograph(seed, SIDE, SIDE)).transpose(2, 0, 1)) for seed in range(16)]
    return torch.from_numpy(np.stack(found))


def without_usm(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"steps": tuple(step for step in recipe.steps if step.op != "usm")})


def batches(images: torch.Tensor, count: int, size: int = BATCH) -> Iterator[tuple[torch.Tensor, list[str]]]:
    for number in range(count):
        chosen = [(number * size + i) % len(images) for i in range(size)]
        yield images[chosen].float() / 255, [f"{number}/{i}" for i in range(size)]


def one_thread(images: torch.Tensor, count: int, usm: bool) -> None:
    from reference import Reference
    recipe = load_recipe("realesrgan_x4")
    degrader = SecondOrderDegrader(recipe if usm else without_usm(recipe))
    reference = Reference()

    def one_by_one(hq: torch.Tensor, keys: list[str]) -> None:
        for image in hq:
            reference(image[None], usm=usm)

    ways: dict[str, Callable] = {
        "basicsr, batches of 8": lambda hq, keys: reference(hq, usm=usm),
        "basicsr, one by one (SeeSR, PASD)": one_by_one,
        "degrade": degrader,
        "degrade, bytes in and out": degrader}
    if usm:
        del ways["basicsr, one by one (SeeSR, PASD)"]
    spent = dict.fromkeys(ways, 0.0)
    for number, (hq, keys) in enumerate(batches(images, count + 1)):
        whole = (hq * 255).round().byte()
        for name, way in ways.items():
            given = whole if "bytes" in name else hq
            start = time.process_time()
            way(given, keys)
            spent[name] += (time.process_time() - start) * (number > 0)       # the first batch warms up
    base = spent["basicsr, batches of 8"]
    print(f"\n{'with' if usm else 'without'} USM, {count} batches of {BATCH}:")
    for name, seconds in spent.items():
        print(f"  {name:36}{seconds / count / BATCH * 1e3:9.2f} ms{base / seconds:8.1f} x")


def _work(task: tuple[torch.Tensor, int]) -> float:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    images, count = task
    degrader = SecondOrderDegrader(without_usm(load_recipe("realesrgan_x4")))
    for hq, keys in batches(images, 4):
        degrader(hq, keys)
    start = time.perf_counter()
    for hq, keys in batches(images, count):
        degrader(hq, keys)
    return count * BATCH / (time.perf_counter() - start)


def scaling(images: torch.Tensor, processes: int, count: int) -> None:
    """Wall time: the sum of what processes manage side by side, against one alone. Best of five, in turns."""
    rates = {1: 0.0, processes: 0.0}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for _ in range(5):
            for number in rates:
                rates[number] = max(rates[number], sum(pool.map(_work, [(images[:16], count)] * number)))
    print(f"images a second: {rates[1]:.0f} in one process, {rates[processes]:.0f} in {processes}: "
          f"{rates[processes] / rates[1]:.2f} x")


def memory(images: torch.Tensor, count: int) -> None:
    degrader = SecondOrderDegrader(load_recipe("realesrgan_x4"))
    small = images[:8, :, :96, :96].float() / 255
    for number in range(count + 1):
        degrader(small, [f"{number}/{i}" for i in range(8)], epoch=number)
        if number % max(1, count // 10) == 0:
            with open("/proc/self/statm") as status:
                resident = int(status.read().split()[1]) * resource.getpagesize() / 2 ** 20
            print(f"  after {number + 1:6} batches: {resident:7.1f} MiB")


def on_device(images: torch.Tensor, device: str, count: int) -> None:
    from degrade.watch import ValuesRefused
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{name}, torch {torch.__version__}, batches of 512-pixel crops, realesrgan_x4 per sample")
    recipe = load_recipe("realesrgan_x4")
    for usm in (False, True):
        degrader = SecondOrderDegrader(recipe if usm else without_usm(recipe), route="torch")
        for size in (8, 16, 32, 64):
            work = [(hq.to(device), keys) for hq, keys in batches(images, 4, size)]
            for hq, keys in work:
                degrader(hq, keys)
            degrader.watch.check()
            _wait(device)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            start = time.perf_counter()
            for number in range(count):
                hq, keys = work[number % len(work)]
                degrader(hq, keys, epoch=number)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            host = time.perf_counter() - start
            _wait(device)
            seconds = time.perf_counter() - start
            print(f"  {'with' if usm else 'without'} USM, {size:2} images: {count * size / seconds:8.0f} images/s, "
                  f"host busy {host / seconds:4.0%}")
    hq, keys = work[0]
    parameters = [degrader.draw(key, (SIDE, SIDE)) for key in keys]
    wrong = (degrader.apply(hq, parameters).cpu() - SecondOrderDegrader(recipe).apply(hq.cpu(), parameters)).abs() * 255
    print(f"  against the CPU route: mean {wrong.mean():.4f}, at most {wrong.max():.0f} grey levels")
    try:
        degrader(hq * 2, keys)
        degrader.watch.check()
        print("  values outside [0, 1] were NOT refused")
    except ValuesRefused as refused:
        print(f"  refused: {refused}")
    _reference_on(device, work, count)


def _reference_on(device: str, work: list, count: int) -> None:
    try:
        from reference import Reference
    except ImportError as error:
        print(f"  no reference: {error}")
        return
    reference = Reference(device=device)
    reference(work[0][0], usm=False)
    _wait(device)
    start = time.perf_counter()
    for number in range(count):
        reference(work[number % len(work)][0], usm=False)
    _wait(device)
    print(f"  basicsr without USM, {len(work[0][1])} images: "
          f"{count * len(work[0][1]) / (time.perf_counter() - start):8.0f} images/s")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--usm-batches", type=int, default=3)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--device")
    options = parser.parse_args()
    images = crops(options.folder)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    if options.processes:
        scaling(images, options.processes, options.batches)
    elif options.memory:
        memory(images, options.memory)
    elif options.device:
        on_device(images, options.device, options.batches)
    else:
        one_thread(images, options.batches, usm=False)
        one_thread(images, options.usm_batches, usm=True)


if __name__ == "__main__":
    main()
