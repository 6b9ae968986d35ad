"""Pools of actors: units reach workers with room, whatever dies, and none waits behind the slowest."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.ahead import Batch, ahead
from pipeline.cluster import Cluster
from pipeline.config import ConfigError
from pipeline.jobs import Job, Outcome, Replicas, Unit
from pipeline.pool import JobStopped


@dataclass
class Noted(Job):
    """Writes a file per unit, with the process that did it and when."""

    folder: str
    pool: Replicas
    name = "noted"

    def pending(self):
        return []

    def tidy(self):
        pass

    def rehearse(self, unit, rows):
        return 0

    def load(self):
        (Path(self.folder) / f"loaded-{os.getpid()}").touch()

    def run(self, unit, isolate=False):
        self.work(unit, isolate)
        (Path(self.folder) / f"{unit.key}-{os.getpid()}").touch()
        return Outcome(unit.key, 1)

    def work(self, unit, isolate):
        time.sleep(0.01)


def units(count):
    return [Unit(f"u{i:02d}", 1, "x") for i in range(count)]


def done(folder):
    """Per unit the processes that did it."""
    found = {}
    for path in Path(folder).glob("u*"):
        key, _, process = path.name.partition("-")
        found.setdefault(key, []).append(process)
    return found


def loaded(folder):
    return len(list(Path(folder).glob("loaded-*")))


def test_each_unit_is_done_once_and_a_worker_loads_once(ray_here, tmp_path):
    class Both(Noted):
        def work(self, unit, isolate):
            end = time.monotonic() + 60
            while loaded(self.folder) < 2:          # so that one does not do it all while the other still starts
                assert time.monotonic() < end, "the other worker never loaded"
                time.sleep(0.01)
            time.sleep(0.05)

    totals = Cluster().run(Both(str(tmp_path), Replicas(2, 0.0)), units(30))
    by_unit = done(tmp_path)
    assert totals.units == 30 and sorted(by_unit) == [unit.key for unit in units(30)]
    assert all(len(processes) == 1 for processes in by_unit.values())
    assert loaded(tmp_path) == 2 == len({process for [process] in by_unit.values()})


def test_no_more_workers_start_than_there_is_work_for(ray_here, tmp_path):
    Cluster().run(Noted(str(tmp_path), Replicas(5, 0.0)), units(1))
    assert loaded(tmp_path) == 1


def test_units_run_side_by_side_in_one_worker(ray_here, tmp_path):
    class Met(Noted):
        def work(self, unit, isolate):
            (Path(self.folder) / f"in-{unit.key}").touch()
            end = time.monotonic() + 20
            while len(list(Path(self.folder).glob("in-*"))) < 2:
                assert time.monotonic() < end, "the other unit never began"
                time.sleep(0.01)

    # A third unit waits, so that the worker is given two.
    assert Cluster().run(Met(str(tmp_path), Replicas(1, 0.0, depth=2)), units(3)).units == 3
    assert loaded(tmp_path) == 1


def test_a_worker_that_dies_is_replaced_and_its_units_are_repeated(ray_here, tmp_path):
    class Dies(Noted):
        def work(self, unit, isolate):
            mark = Path(self.folder) / f"died-{unit.key}"
            if unit.key in ("u03", "u07") and not mark.exists():
                mark.touch()
                os._exit(1)

    totals = Cluster().run(Dies(str(tmp_path), Replicas(2, 0.0)), units(12))
    assert totals.units == 12 and totals.restarts >= 2 and len(done(tmp_path)) == 12


@pytest.mark.slow
def test_a_unit_that_kills_its_worker_is_done_in_isolation_the_third_time(ray_here, tmp_path):
    class Heavy(Noted):
        def work(self, unit, isolate):
            if unit.key == "u01" and not isolate:
                os._exit(1)

    assert Cluster().run(Heavy(str(tmp_path), Replicas(1, 0.0, depth=1)), units(4)).units == 4


@pytest.mark.slow
def test_a_unit_that_always_kills_its_worker_ends_the_job_with_advice(ray_here, tmp_path):
    class Always(Noted):
        def work(self, unit, isolate):
            if unit.key == "u01":
                os._exit(1)

    with pytest.raises(JobStopped, match="u01 took its worker down 5 times"):
        Cluster().run(Always(str(tmp_path), Replicas(1, 0.0, depth=1)), units(2))


def test_a_model_that_cannot_be_loaded_is_one_error_and_not_an_endless_restart(ray_here, tmp_path):
    class Misnamed(Noted):
        def load(self):
            super().load()
            raise ConfigError("no such folder")

    with pytest.raises(ConfigError, match="no such folder"):
        Cluster().run(Misnamed(str(tmp_path), Replicas(1, 0.0)), units(2))
    assert loaded(tmp_path) == 1


@pytest.mark.slow
def test_workers_that_die_while_they_load_end_the_job(ray_here, tmp_path):
    class Crashes(Noted):
        def load(self):
            super().load()
            os._exit(1)

    with pytest.raises(JobStopped, match="died while they loaded"):
        Cluster().run(Crashes(str(tmp_path), Replicas(1, 0.0)), units(2))
    assert loaded(tmp_path) == 3


def test_gpus_that_are_not_there_are_asked_for_in_vain_and_said_so(ray_here, tmp_path):
    with pytest.raises(JobStopped, match="asks for 1 GPUs"):
        Cluster().run(Noted(str(tmp_path), Replicas(None, 1.0)), units(2))


@pytest.mark.slow
def test_the_slowest_worker_does_not_hold_the_rest(ray_here, tmp_path):
    class Uneven(Noted):
        def work(self, unit, isolate):
            first = min(Path(self.folder).glob("loaded-*"), key=lambda path: path.name).name
            time.sleep(1.0 if first == f"loaded-{os.getpid()}" else 0.05)

    # Both are there before the units begin, so that neither is first by chance.
    job = Uneven(str(tmp_path), Replicas(2, 0.0, depth=2))
    Cluster().run(job, units(40))
    shares = sorted(list(done(tmp_path).values()).count([process]) for process in
                    {process for [process] in done(tmp_path).values()})
    # The slow one took no more than it could do while the fast one did the rest.
    assert sum(shares) == 40 and shares[0] <= 8


class Prepared:
    """Prepares rows; one of them takes its process down."""

    def __init__(self, fatal=None):
        self.fatal = fatal

    def __call__(self, rows):
        if any(row["ref"] == self.fatal for row in rows):
            os._exit(1)
        return Batch(rows, [row["ref"] * 2 for row in rows])


def test_batches_come_prepared_and_in_order(ray_here):
    batches = [[{"ref": f"{i}{j}"} for j in range(3)] for i in range(9)]
    got = list(ahead(Prepared(), batches))
    assert [batch.rows for batch in got] == batches and got[4].inputs == ["4040", "4141", "4242"]


def test_batches_are_prepared_no_further_ahead_than_asked(ray_here):
    taken = []

    def source():
        for i in range(10):
            taken.append(i)
            yield [{"ref": str(i)}]

    batches = ahead(Prepared(), source(), depth=3)
    next(batches)
    assert len(taken) <= 4


@pytest.mark.slow
def test_a_row_that_crashes_its_preparation_fails_alone(ray_here):
    got = list(ahead(Prepared("b"), [[{"ref": "a"}, {"ref": "b"}, {"ref": "c"}], [{"ref": "d"}]]))
    failures = {row["ref"]: wrong["error"] for batch in got for row, wrong in batch.failures("caption")}
    assert failures == {"b": "crashed"}
    assert [ref for batch in got for ref in (batch.inputs or [])] == ["aa", "cc", "dd"]


def test_an_error_of_the_preparation_itself_reaches_the_caller(ray_here):
    def misconfigured(rows):
        raise ConfigError("no processor")
    with pytest.raises(ConfigError, match="no processor"):
        list(ahead(misconfigured, [[{"ref": "a"}]]))
