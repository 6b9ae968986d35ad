"""The lock: one run at a time, and a dead holder blocks nobody."""

import json
import socket
import subprocess
import sys
import time

import pytest

from pipeline.lock import Lock, WorkspaceBusy
from pipeline.storage import Folder


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path):
    folder = Folder.at(str(tmp_path))
    with Lock(folder, "clearshard run x"), pytest.raises(WorkspaceBusy, match=r"`clearshard run x`.*process \d+"), \
            Lock(folder, "clearshard score x"):
        pass
    with Lock(folder, "again"):
        pass
    assert folder.names() == []


def test_a_holder_that_was_killed_is_replaced_at_once(tmp_path):
    program = ("import time; from pipeline.lock import Lock; from pipeline.storage import Folder\n"
               f"with Lock(Folder.at({str(tmp_path)!r}), 'doomed'): print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(WorkspaceBusy, match="doomed"), Lock(Folder.at(str(tmp_path)), "early"):
        pass
    process.kill()
    process.wait()
    with Lock(Folder.at(str(tmp_path)), "heir") as lock:
        assert json.loads((tmp_path / "lock.json").read_text())["token"] == lock.token


@pytest.mark.parametrize(("age", "refused"), [(5, True), (90, False)])
def test_a_holder_on_another_machine_counts_until_its_heart_stops(tmp_path, age, refused):
    record = {"token": "t", "host": "elsewhere", "pid": 1, "started": 0, "beat": time.time() - age}
    (tmp_path / "lock.json").write_text(json.dumps(record))
    if refused:
        with pytest.raises(WorkspaceBusy, match="elsewhere"), Lock(Folder.at(str(tmp_path)), "x"):
            pass
    else:
        with Lock(Folder.at(str(tmp_path)), "x"):
            assert json.loads((tmp_path / "lock.json").read_text())["host"] == socket.gethostname()


def test_a_garbled_lock_file_does_not_block(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with Lock(Folder.at(str(tmp_path)), "x"):
        pass


def test_of_many_runs_at_once_exactly_one_gets_it(tmp_path):
    program = ("import sys, time; from pipeline.lock import Lock, WorkspaceBusy; from pipeline.storage import Folder\n"
               "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
               "try:\n  with Lock(Folder.at(sys.argv[1]), 'race'): print('won', flush=True); time.sleep(2)\n"
               "except WorkspaceBusy: print('refused')")
    start = str(time.time() + 3)
    (tmp_path / "lock.json").write_text(json.dumps({"token": "dead", "host": socket.gethostname(), "pid": 2**22 + 1,
                                                    "started": 0}))
    racers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), start], stdout=subprocess.PIPE, text=True)
              for _ in range(6)]
    assert sorted(r.communicate()[0].strip() for r in racers) == ["refused"] * 5 + ["won"]
