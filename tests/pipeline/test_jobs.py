"""Jobs: rows that fail, hang or take their process down."""

import os
import signal
import time
from dataclasses import dataclass

import pyarrow as pa
import pytest

from pipeline.cluster import Cluster, JobStopped
from pipeline.isolation import Isolated, RowCrashed
from pipeline.jobs import RowJob, RowTimeout, Timed, Unit, limited
from pipeline.storage import Folder
from pipeline.tables import QUARANTINE, Table

ROWS = pa.schema([("ref", pa.string()), ("name", pa.string()), ("do", pa.string())])
DONE = pa.schema([("ref", pa.string()), ("process", pa.int64())])


@dataclass
class Troubled(RowJob):
    """Does to each row what the row asks for."""

    workspace: Folder
    row_timeout_s: float = 2.0
    name = "troubled"

    def __post_init__(self):
        self.input, self.output = Table(self.workspace / "in", ROWS), Table(self.workspace / "out", DONE)
        self.quarantine, self.settings = Table(self.workspace / "quarantine" / "troubled", QUARANTINE), {}

    def rows(self, unit):
        return self.input.read(unit.parts["input"]).to_pylist()

    def process(self, row):
        if row["do"] == "raise":
            raise ValueError("as asked")
        if row["do"] == "hang":
            time.sleep(60)
        if row["do"] == "hang in C":
            sum(range(10**12))      # one call into C for hours: no signal handler can run
        if row["do"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if row["do"] == "kill the worker once":
            marker = self.workspace.local + "/killed"
            if not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return {"ref": row["ref"], "process": os.getpid()}


def job_of(tmp_path, **units):
    job = Troubled(Folder.at(str(tmp_path)))
    for number, (name, actions) in enumerate(units.items()):
        rows = [{"ref": f"{name}-{i}", "name": f"{name}-{i}.jpg", "do": do} for i, do in enumerate(actions)]
        job.input.write(f"{number:06d}-{len(rows)}-{name}", "i", rows)
    return job


def finished(job):
    done = {row["ref"] for row in job.output.dataset().to_table().to_pylist()}
    failed = {row["ref"]: row["error"] for row in job.quarantine.dataset().to_table().to_pylist()}
    return done, failed


def test_a_row_that_raises_is_quarantined_and_its_neighbours_are_done(tmp_path, ray_here):
    job = job_of(tmp_path, a=["", "raise", ""], b=[""])
    totals = Cluster().run(job, job.pending())
    assert finished(job) == ({"a-0", "a-2", "b-0"}, {"a-1": "ValueError"})
    assert (totals.rows, totals.failed, totals.errors) == (4, 1, {"ValueError": 1})
    assert job.pending() == []


def test_a_row_that_crashes_its_process_is_found_and_the_others_are_done(tmp_path, ray_here):
    job = job_of(tmp_path, a=["", "crash", "", "crash"], b=["", ""])
    totals = Cluster().run(job, job.pending())
    assert finished(job) == ({"a-0", "a-2", "b-0", "b-1"}, {"a-1": "crashed", "a-3": "crashed"})
    assert totals.restarts == 2


def test_a_row_that_hangs_is_interrupted(tmp_path, ray_here):
    job = job_of(tmp_path, a=["", "hang", ""])
    Cluster().run(job, job.pending())
    assert finished(job) == ({"a-0", "a-2"}, {"a-1": "timeout"})


@pytest.mark.slow
def test_a_row_that_hangs_in_c_is_found_too(tmp_path, ray_here):
    job = job_of(tmp_path, a=["", "hang in C"])
    job.row_timeout_s = 1.0
    Cluster().run(job, job.pending())
    assert finished(job) == ({"a-0"}, {"a-1": "crashed"})


def test_a_killed_worker_costs_nothing_but_the_repetition_of_its_unit(tmp_path, ray_here):
    job = job_of(tmp_path, a=["", "kill the worker once", ""], b=["", ""])
    totals = Cluster().run(job, job.pending())
    assert finished(job) == ({"a-0", "a-1", "a-2", "b-0", "b-1"}, {})
    assert totals.restarts == 1


def test_a_unit_that_cannot_be_done_ends_the_job_with_advice(tmp_path, ray_here, monkeypatch):
    @dataclass
    class Doomed(Troubled):
        def run(self, unit, isolate=False):
            os.kill(os.getpid(), signal.SIGKILL)

    job = Doomed(job_of(tmp_path, a=[""]).workspace)
    with pytest.raises(JobStopped, match=r"took its worker down 5 times.*--workers"):
        Cluster().run(job, job.pending())


def test_an_isolated_call_returns_values_and_names_crashes_and_hangs():
    with Isolated(str.upper, 5.0) as call:
        assert call("a") == "A"
    with Isolated(time.sleep, 0.5) as call:
        with pytest.raises(RowCrashed, match=r"hung for longer than 0.5"):
            call(30)
        assert call(0) is None
    with Isolated(os._exit, 5.0) as call, pytest.raises(RowCrashed, match="crashed"):
        call(1)


def test_a_time_limit_interrupts_and_leaves_no_alarm_behind():
    with Timed(time.sleep, 0.1) as call:
        with pytest.raises(RowTimeout):
            call(5)
        assert call(0) is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_cuts_the_last_unit():
    units = [Unit(str(i), 10, "") for i in range(4)]
    assert [(u.key, u.first) for u in limited(units, 25)] == [("0", None), ("1", None), ("2", 5)]
    assert limited(units, None) == units
