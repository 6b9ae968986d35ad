"""What happens when something dies, fills up or is taken away in the middle of a run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.storage import WorkspaceError
from tests.conftest import REPOSITORY, clearshard, configure, photograph, rows_of_table, tars

TABLES = ("sources", "scores", "selection", "tiles", "quarantine/score")


def rows(workspace):
    """All tables as sets, without the number of the part that a row fell into."""
    return {name: {tuple((k, str(v)) for k, v in row.items() if k != "part") for row in rows_of_table(workspace, name)}
            for name in TABLES}


@pytest.fixture(scope="module")
def large_pile(tmp_path_factory):
    """Enough work that a kill has something to hit."""
    folder = tmp_path_factory.mktemp("large") / "pile"
    folder.mkdir()
    for seed in range(60):
        photograph(seed, 512, 512).save(folder / f"{seed}.jpg", quality=92)
    (folder / "half.jpg").write_bytes((folder / "0.jpg").read_bytes()[:9000])
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, large_pile, on_cluster):
    workspace = configure(tmp_path_factory.mktemp("calm") / "w", large_pile)
    clearshard("run", workspace, env=on_cluster)
    return workspace


def start_run(workspace, env=None):
    return subprocess.Popen([sys.executable, str(REPOSITORY / "clearshard.py"), "run", str(workspace)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}))


def killed_at(workspace, moment, env):
    """Starts `run` and kills the driver (-9) after so many seconds; whether it was still running."""
    process = start_run(workspace, env)
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def same_as_undisturbed(workspace, undisturbed, env=None):
    assert rows(workspace) == rows(undisturbed)
    assert tars(workspace) == tars(undisturbed) != {}
    assert clearshard("verify", workspace, env=env).returncode == 0


def kill_often(folder, large_pile, undisturbed, kills, longest, seed, env=None):
    """Kills runs at random moments, four to a workspace, and finishes each workspace."""
    generator, hit, attempt = random.Random(seed), 0, 0
    while hit < kills:
        workspace = folder / f"w{attempt // 4}"
        if not workspace.exists():
            configure(workspace, large_pile)
        hit += killed_at(workspace, generator.uniform(1.0, longest), env)
        attempt += 1
        if attempt % 4 == 0 or hit == kills:
            clearshard("run", workspace, env=env)
            same_as_undisturbed(workspace, undisturbed, env)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, large_pile, undisturbed, on_cluster):
    # The cluster lives on, and with it for a moment the workers of the killed run.
    kill_often(tmp_path, large_pile, undisturbed, 3, 7.0, seed=1, env=on_cluster)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments(tmp_path, large_pile, undisturbed):
    kill_often(tmp_path, large_pile, undisturbed, 20, 16.0, seed=2)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_twice(tmp_path, large_pile, undisturbed, on_cluster):
    workspace = configure(tmp_path / "w", large_pile)
    process, killed = start_run(workspace), 0
    while process.poll() is None and killed < 3:
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if is_busy(p)]
        if workers and list((workspace / "scores").glob("*")):
            workers[0].kill()
            killed += 1
            time.sleep(0.5)
        time.sleep(0.05)
    output = process.communicate()
    assert process.returncode == 0 and killed, output
    same_as_undisturbed(workspace, undisturbed, on_cluster)


def is_busy(process):
    try:
        return "ray::_work" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_sigterm_ends_a_run_cleanly(tmp_path, large_pile, on_cluster):
    workspace = configure(tmp_path / "w", large_pile)
    process = start_run(workspace, on_cluster)
    while process.poll() is None and not list((workspace / "sources").glob("*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in errors and "Traceback" not in errors
    assert not (workspace / "lock.json").exists()


@pytest.mark.slow
def test_two_runs_on_one_workspace_the_second_is_refused(tmp_path, large_pile, on_cluster):
    workspace = configure(tmp_path / "w", large_pile)
    process = start_run(workspace, on_cluster)
    try:
        while not (workspace / "lock.json").exists():
            time.sleep(0.05)
        second = clearshard("run", workspace, check=False, env=on_cluster)
        assert second.returncode == 3 and f"process {process.pid}" in second.stderr
        assert clearshard("score", workspace, "--dry-run").returncode == 0      # looking is allowed
    finally:
        process.communicate()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB. Mounting one needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_command_goes_on_later(small_disk, large_pile, undisturbed, on_cluster):
    workspace = configure(small_disk / "w", large_pile)
    result = clearshard("run", workspace, check=False, env=on_cluster)
    assert result.returncode == 1 and "No space left on device" in result.stderr and "same command" in result.stderr
    assert "Traceback" not in result.stderr
    subprocess.run(["mount", "-o", "remount,size=300m", small_disk], check=True)
    clearshard("run", workspace, env=on_cluster)
    same_as_undisturbed(workspace, undisturbed, on_cluster)


def test_a_folder_that_cannot_be_written_is_a_clear_error_and_the_job_goes_on_later(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest")
    (workspace / "scores").write_text("a file in the place of the folder")      # root may write anywhere else
    with pytest.raises(WorkspaceError, match=r"cannot list .*scores: Not a directory"):
        run(workspace, "score")
    (workspace / "scores").unlink()
    run(workspace)
    assert tars(workspace)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_lost_permission_is_a_clear_error(tmp_path, large_pile, on_cluster):
    workspace = configure(tmp_path / "w", large_pile)
    clearshard("ingest", workspace)
    (workspace / "sources").chmod(0o500)
    workspace.chmod(0o500)
    try:
        result = clearshard("score", workspace, check=False, env=on_cluster)
        assert result.returncode == 1 and "Permission denied" in result.stderr
    finally:
        workspace.chmod(0o700)
        (workspace / "sources").chmod(0o700)
    shutil.rmtree(workspace)
