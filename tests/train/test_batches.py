"""Batches: the same pixels however the work is divided, and what happens when data, workers or the run go wrong."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from degrade import SecondOrderDegrader
from degrade.strict import ConfigError, check
from pipeline.decode import decode
from pipeline.shards import index_bytes
from pipeline.tar import TarWriter
from tests.conftest import REPOSITORY, photograph
from train import CorpusError, Reading, TooManyCorrupt
from train.batches import Batch, Data, Loader, WorkerDied

CROP = 48
SMALL = "face-000000-1"         # narrower than the crop
BROKEN = "hq-000001-2"          # no image, though its bytes are those that were written


def write(folder: Path, groups: dict[str, list[int]]) -> Path:
    """Photographs of several sizes in shards with so many samples each; two of them are of no use."""
    said = {}
    for group, sizes in groups.items():
        for number, samples in enumerate(sizes):
            name = f"{group}-{number:06d}"
            with TarWriter(str(folder / f"{name}.tar")) as writer:
                for sample in range(samples):
                    key, data = f"{name}-{sample}", io.BytesIO()
                    width = CROP - 8 if key == SMALL else 64 + 8 * sample
                    photograph(len(writer.members), width, 80).save(data, "jpeg", quality=92)
                    image = b"<html>404</html>" if key == BROKEN else data.getvalue()
                    writer.add([(f"{key}.jpg", image), (f"{key}.json", b"{}")]
                               + [(f"{key}.txt", f"caption of {key}".encode())] * (sample % 2))
            (folder / f"{name}.index.parquet").write_bytes(index_bytes(writer, "0" * 12))
            said[name] = {"samples": samples, "bytes": writer.size, "xxh3": writer.xxh3}
    (folder / "corpus.json").write_text(json.dumps({"shards": said}))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """12 samples of hq in 2 shards, 3 faces."""
    return str(write(tmp_path_factory.mktemp("corpus"), {"hq": [6, 6], "face": [3]}))


@pytest.fixture
def loader(corpus):
    """loader(workers=0, …): a Loader with a global batch of 8 in micro-batches of 4, closed after the test."""
    made = []

    def make(micro_batch: int = 4, rank: int = 0, ranks: int = 1, batch: int = 8, **data: object) -> Loader:
        data = {"corpus": [corpus], "crop": CROP, "workers": 0, "reading": Reading(max_corrupt=1)} | data
        made.append(Loader(Data(**data), 7, batch=batch, micro_batch=micro_batch, rank=rank, ranks=ranks))
        return made[-1]

    yield make
    for one in made:
        one.close()


def joined(batches: list[Batch]) -> tuple[list, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What micro-batches hold together."""
    rows = [row for batch in batches for row in zip(batch.positions, batch.keys, batch.epochs, batch.groups,
                                                    batch.texts, batch.replaced, strict=True)]
    return rows, *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("hq", "lq", "sizes"))


def taken(loader: Loader, step: int, count: int) -> list[Batch]:
    batches = loader.batches(step)
    return [next(batches) for _ in range(count)]


# What a batch is ---------------------------------------------------------------------------------------------

def test_batches_are_the_same_for_any_workers_ranks_and_micro_batches(loader):
    rows, *tensors = joined(taken(loader(8), 1, 2))         # steps 1 and 2
    assert [row[0] for row in rows] == list(range(8, 24)) and {row[5] for row in rows} == {None, BROKEN, SMALL}

    def split(micro_batch: int, ranks: int, workers: int) -> list[Batch]:
        per_rank = 8 // ranks // micro_batch
        parts = [taken(loader(micro_batch, rank, ranks, workers=workers), 1, 2 * per_rank) for rank in range(ranks)]
        return [batch for step in range(2) for part in parts for batch in part[step * per_rank:(step + 1) * per_rank]]

    for way in ((1, 1, 0), (2, 2, 0), (4, 1, 2), (2, 2, 2)):
        found, *others = joined(split(*way))
        assert found == rows
        assert all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def test_a_sample_is_a_crop_of_its_image_and_its_degradation_by_key_and_epoch(loader, corpus):
    one = loader()
    batch, degrader, flipped = one.at(range(40)), SecondOrderDegrader("supir", 7), []
    assert batch.hq.shape == batch.lq.shape == (40, 3, CROP, CROP) and batch.hq.dtype == batch.lq.dtype == torch.uint8
    for number, (key, epoch) in enumerate(zip(batch.keys, batch.epochs, strict=True)):
        sample = one.reader[batch.positions[number]]
        height, width, top, left, *target = batch.sizes[number].int().tolist()
        whole = decode(sample.image)
        assert (height, width) == whole.shape[:2] and target == [CROP, CROP]
        crop, hq = np.s_[top:top + CROP, left:left + CROP], batch.hq[number].permute(1, 2, 0).numpy()
        flipped.append(np.array_equal(hq, whole[:, ::-1][crop]))
        assert flipped[-1] or np.array_equal(hq, whole[crop])
        lq, parameters = degrader.image(hq, key, epoch)
        assert np.array_equal(batch.lq[number].permute(1, 2, 0).numpy(), lq)
        assert batch.degradation[number] == parameters
        assert batch.texts[number] == (sample.text or "") and key.startswith(batch.groups[number])
    assert 8 <= sum(flipped) <= 32 and "" in batch.texts
    assert len({tuple(row) for row in batch.sizes[:, 2:4].tolist()}) > 25


def test_another_epoch_crops_and_degrades_a_sample_otherwise(loader):
    batch = loader(flip=False, reading=Reading(weights={"hq": 1})).at(range(36))
    for key in set(batch.keys):
        same = [number for number, other in enumerate(batch.keys) if other == key and not batch.replaced[number]]
        assert [batch.epochs[number] for number in same] == [0, 1, 2] or key == BROKEN
        assert len({batch.hq[number].numpy().tobytes() for number in same}) == len(same)
        assert len({json.dumps(batch.degradation[number]) for number in same}) == len(same)


def test_neither_a_recipe_nor_flips_are_needed_and_lq_may_be_made_behind_the_workers(loader):
    plain = loader(recipe=None, flip=False).at(range(8))
    assert plain.lq is None and plain.degradation is None
    here, there = loader(degrade_on="device"), loader()
    assert not here.crops.degrade and torch.equal(here.at(range(8)).lq, there.at(range(8)).lq)


def test_the_seed_of_the_run_orders_unless_reading_has_one_and_groups_repeat(loader, corpus):
    def order(run_seed: int, **reading: int) -> dict:
        data = Data(corpus=[corpus], crop=CROP, reading=Reading(**reading))
        return Loader(data, run_seed, batch=1, micro_batch=1).reader.fingerprint()

    assert order(1)["seed"] == 1 and order(1, seed=5) == order(2, seed=5) and order(1, seed=5)["seed"] == 5
    assert loader(repeat={"face": 4}).reader.fingerprint()["weights"] == {"face": "1", "hq": "1"}
    with pytest.raises(CorpusError, match="no group 'faces'; did you mean 'face'"):
        loader(repeat={"faces": 4})


def test_the_random_numbers_of_the_run_are_left_alone(loader):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    taken(loader(), 0, 2)
    assert torch.equal(torch.get_rng_state(), before)


# Refusals ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("cut", "said"), [
    ({"batch": 30, "micro_batch": 4, "ranks": 2}, "30 .* micro-batches of 4 for 2 ranks: .* multiple of 8; take "
                                                  "batch = 24 or 32, or micro_batch = 3"),
    ({"batch": 4, "micro_batch": 4, "ranks": 2}, "multiple of 8; take batch = 8, or micro_batch = 2"),
    ({"batch": 9, "micro_batch": 2, "ranks": 2}, "multiple of 4; take batch = 8 or 12$"),
    ({"batch": 8, "micro_batch": 0, "ranks": 2}, "batch = 8 and micro_batch = 0: both must be 1 or more"),
])
def test_a_batch_that_cannot_be_cut_evenly_is_refused_with_its_neighbours(loader, cut, said):
    with pytest.raises(ConfigError, match=said):
        loader(**cut)


@pytest.mark.parametrize(("values", "said"), [
    ({"recip": "supir"}, "unknown key 'recip'; did you mean 'recipe'?"),
    ({"crop": 100}, "crop: .*multiple of 8"),
    ({"corpus": []}, "corpus: .*at least 1"),
    ({"repeat": {"face": 2}, "reading": {"weights": {"hq": 1}}}, "repeat and reading.weights both say"),
])
def test_a_mistake_in_the_configuration_names_the_key(values, said):
    with pytest.raises(ConfigError, match=said):
        check(Data, {"corpus": ["c"]} | values, "data")


def test_a_recipe_of_another_size_is_refused(loader):
    with pytest.raises(ConfigError, match=r"realesrgan_x4: its result is 4 times smaller .* `output: hq`"):
        loader(recipe="realesrgan_x4")
    with pytest.raises(ConfigError, match="did you mean 'supir'"):
        loader(recipe="supirr")


# Damage ------------------------------------------------------------------------------------------------------

def test_what_cannot_be_cropped_is_replaced_counted_and_said(loader, caplog):
    one = loader(workers=2)
    batches = taken(one, 0, 8)
    replaced = [(key, reason) for batch in batches for key, reason in zip(batch.replaced, batch.reasons, strict=True)]
    assert one.seen == 32 and one.replaced == sum(key is not None for key, _ in replaced) > 2
    assert dict(replaced)[None] is None and set(dict(replaced)) == {None, BROKEN, SMALL}
    assert f"an image of 80 x {CROP - 8} pixels is smaller than the crop of {CROP}; lower data.crop" in caplog.text
    assert f"{BROKEN} of group hq is damaged and replaced: not_an_image" in caplog.text
    assert one.waited > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_above_the_accepted_rate_the_run_stops_with_keys_and_reason(loader, workers):
    one = loader(workers=workers, reading=Reading(max_corrupt=0.001))
    with pytest.raises(TooManyCorrupt, match=rf"^2 of \d+ samples are damaged, .*{BROKEN}.*\(the last: "):
        taken(one, 0, 20)
    assert one.replaced == 2


def test_errors_of_workers_arrive_as_they_are(loader):
    with pytest.raises(TooManyCorrupt) as caught:
        taken(loader(workers=2, crop=256), 0, 1)
    assert "smaller than the crop of 256; lower data.crop, or select larger tiles" in str(caught.value)
    assert "Traceback" not in str(caught.value)


# Processes ---------------------------------------------------------------------------------------------------

def pids(loader: Loader) -> list[int]:
    return [worker.pid for worker in loader._running._workers]


def gone(processes: list[int], seconds: float = 10) -> bool:
    """Whether all these processes end in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
                       for pid in processes):
                return True
        time.sleep(0.05)
    return False


def test_closing_ends_workers_and_batches_and_another_step_begins_anew(loader):
    one = loader(workers=1)
    first = one.batches(3)
    assert next(first).positions == [24, 25, 26, 27] and next(first).hq.is_shared()
    before = pids(one)
    second = one.batches(5)
    assert next(second).positions == [40, 41, 42, 43] and list(first) == []
    assert gone(before)
    before = pids(one)
    one.close()
    assert list(second) == [] and gone(before)


@pytest.mark.slow           # DataLoader looks after its workers every five seconds
def test_a_killed_worker_is_an_error_with_a_remedy(loader):
    one = loader(workers=2)
    batches = one.batches()
    next(batches)
    before = pids(one)
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=rf"process {before[1]}.*exit code -9.*lower data.workers = 2.*/dev/shm"):
        for _ in range(20):
            next(batches)
    assert gone(before)


PROGRAM = """
import signal, sys
from train.batches import Data, Loader
if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: print("signal", number, flush=True))
    data = Data(corpus=[sys.argv[1]], crop=48, workers=2, reading={"max_corrupt": 1})
    loader = Loader(data, 7, batch=4, micro_batch=4)
    batches = loader.batches()
    print(next(batches).positions, [worker.pid for worker in loader._running._workers], flush=True)
    for line in sys.stdin:
        print(next(batches).positions, flush=True)
    1 / 0
"""


@pytest.fixture
def run_of(corpus, tmp_path):
    """A run in a process group of its own, that has its first batch: (process, pids of its workers)."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py"), corpus], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    positions, workers = process.stdout.readline().split("] ")
    assert positions == "[0, 1, 2, 3"
    yield process, json.loads(workers)
    process.kill()


def test_workers_leave_signals_to_the_run_and_do_not_outlive_it(run_of):
    process, workers = run_of
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
        assert process.stdout.readline() == f"signal {number}\n"
    for step in range(1, 8):            # more than was under way
        print(step, file=process.stdin, flush=True)
        assert process.stdout.readline() == f"{list(range(4 * step, 4 * step + 4))}\n"
    process.kill()
    assert gone(workers) and "Traceback" not in process.stderr.read()


@pytest.mark.slow           # another start of a process that loads torch, and of its server
def test_a_run_that_fails_ends_with_its_workers(run_of):
    process, workers = run_of
    process.stdin.close()
    assert process.wait(10) == 1 and gone(workers)
    assert process.stderr.read().endswith("ZeroDivisionError: division by zero\n")
