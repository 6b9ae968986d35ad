"""The client of Ray's Jobs API against a real head with a token, and against servers that misbehave."""

import contextlib
import http.server
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dags.ray_jobs import (
    DashboardAway,
    Follower,
    NoSuchJob,
    RayJobs,
    RayJobsError,
    address_from,
    auth_token,
    base_id,
)
from tests.dags.head import free_ports, wait_for


def follow(jobs, job_id, seconds=60):
    """(the ended job, its lines in the pieces in which they came)."""
    follower, pieces, end = Follower(jobs, job_id, every_s=0.5), [], time.monotonic() + seconds
    while time.monotonic() < end:
        job, lines = follower.look()
        pieces += [lines] if lines else []
        if not job.active:
            return job, pieces
        time.sleep(0.3)
    raise AssertionError(f"{job_id} has not ended")


def test_a_job_is_followed_line_by_line_and_a_second_caller_attaches(head):
    jobs = RayJobs(head)
    before = time.time()
    job, attached = jobs.attach_or_submit("twice", "echo one; sleep 5; printf 'two\\nthree'; exit 3",
                                          num_cpus=1, memory=10**8, metadata={"step": "score"})
    assert (job.id, job.active, attached) == ("twice-1", True, False) and abs(job.started - before) < 60
    again, attached = jobs.attach_or_submit("twice", "echo never")
    assert (again.id, attached) == ("twice-1", True)
    ended, pieces = follow(jobs, "twice-1")
    assert (ended.status, ended.exit_code, ended.active) == ("FAILED", 3, False)
    lines = [line for piece in pieces for line in piece]
    assert lines[-2:] == ["two", "three"] and lines.count("one") == 1
    assert "two" not in next(piece for piece in pieces if "one" in piece), "the log came only at the end"
    assert "two" not in ended.message
    assert jobs.attach_or_submit("twice", "true")[0].id == "twice-2"


@pytest.mark.slow
def test_a_stopped_job_is_not_attached_to(head):
    jobs = RayJobs(head)
    jobs.attach_or_submit("stopped", "sleep 600")
    wait_for(lambda: jobs.job("stopped-1").status == "RUNNING", 30)
    jobs.stop("stopped-1")
    wait_for(lambda: jobs.job("stopped-1").status == "STOPPED", 30)
    jobs.stop("stopped-1")
    job, attached = jobs.attach_or_submit("stopped", "true")
    assert (job.id, attached) == ("stopped-2", False)


@pytest.mark.slow
def test_a_job_that_succeeded_is_done_again_when_asked_again(head):
    jobs = RayJobs(head)
    jobs.attach_or_submit("done", "true")
    assert follow(jobs, "done-1")[0].status == "SUCCEEDED"
    assert jobs.attach_or_submit("done", "true")[0].id == "done-2"


def test_of_many_callers_at_once_one_submits(head):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: RayJobs(head).attach_or_submit("race", "sleep 20"), range(6)))
    assert {job.id for job, _ in answers} == {"race-1"}
    assert [attached for _, attached in answers].count(False) == 1
    RayJobs(head).stop("race-1")


def test_the_newest_job_is_the_one_of_the_highest_number(head):
    jobs = RayJobs(head)
    for name in ("count-10", "count-9", "count-9-1", "count", "other-count-11"):
        jobs.submit(name, "true")
    assert [job.id for job in jobs.jobs("count")] == ["count-9", "count-10"]


def test_a_job_that_the_cluster_does_not_know(head):
    for ask in (RayJobs(head).job, RayJobs(head).log, RayJobs(head).stop):
        with pytest.raises(NoSuchJob, match="none-1"):
            ask("none-1")


def test_a_wrong_token_is_told_by_the_name_of_its_variable(head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(RayJobsError, match=r"(?s)40[13].*RAY_AUTH_TOKEN_PATH") as error:
        RayJobs(head).jobs("x")
    assert "0" * 64 not in str(error.value)


def test_the_token_may_lie_in_a_file(head, monkeypatch, tmp_path):
    (tmp_path / "token").write_text(auth_token() + "\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert RayJobs(head).jobs("none") == []


def test_where_the_token_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert auth_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n")
    assert auth_token({}) == "at home"
    assert auth_token({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "set"}) is None
    assert auth_token({"RAY_AUTH_TOKEN": " set ", "RAY_AUTH_TOKEN_PATH": "/none"}) == "set"
    with pytest.raises(RayJobsError, match="RAY_AUTH_TOKEN_PATH=/none/token"):
        auth_token({"RAY_AUTH_TOKEN_PATH": "/none/token"})


def test_the_address_is_rays_own_variable():
    assert address_from({}) == "http://127.0.0.1:8265"
    assert address_from({"RAY_API_SERVER_ADDRESS": "https://ray:1"}) == "https://ray:1"
    with pytest.raises(RayJobsError, match="RAY_API_SERVER_ADDRESS"):
        RayJobs("ray://head:10001")


def test_a_dashboard_that_is_away_is_waited_for(head):
    jobs = RayJobs(head)
    jobs.submit("patient-1", "true")
    follower = Follower(jobs, "patient-1", patience_s=1.5)
    away = RayJobs(f"http://127.0.0.1:{free_ports(1)[0]}")
    follower.jobs = away
    assert follower.look() == (None, [])
    follower.jobs = jobs
    assert follower.look()[0].id == "patient-1"
    follower.jobs = away
    time.sleep(1.6)
    with pytest.raises(DashboardAway, match=r"no answer from Ray's dashboard at http://127.*RAY_API_SERVER_ADDRESS"):
        follower.look()


@contextlib.contextmanager
def server(status, body=b"", **headers):
    """An HTTP server that gives one answer to everything; yields (address, the requests' headers)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", seen
        listening.shutdown()


@pytest.mark.parametrize("status, body, kind, said", [
    (500, b"the agent is not up", DashboardAway, "500: the agent is not up"),
    (503, b"", DashboardAway, "503: Service Unavailable"),
    (400, b"bad entrypoint", RayJobsError, "400: bad entrypoint"),
    (200, b"<html>", RayJobsError, "is it Ray's dashboard"),
])
def test_an_answer_that_is_none_is_told(status, body, kind, said):
    with server(status, body) as (address, _), pytest.raises(RayJobsError) as error:
        RayJobs(address).jobs("x")
    assert type(error.value) is kind and said in str(error.value) and address in str(error.value)


def test_the_token_follows_no_redirect(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with (server(200, b"[]") as (elsewhere, seen), server(302, Location=elsewhere) as (address, asked),
          pytest.raises(RayJobsError, match="302")):
        RayJobs(address).jobs("x")
    assert asked[0]["Authorization"] == "Bearer secret" and not seen


def test_an_id_is_readable_and_its_own():
    names = ["corpus", "manual__2026-01-01T00:00:00+00:00", "score"]
    assert base_id(*names).startswith("corpus-score-") and base_id(*names) == base_id(*names)
    others = [base_id(*names), base_id("corpus", "manual__2026-01-02T00:00:00+00:00", "score"),
              base_id("a-b", "r", "c"), base_id("a", "r", "b-c"), base_id("a", "b-r", "c"),
              base_id("x" * 200, "r", "y" * 200)]
    assert len(set(others)) == len(others)
    assert all(len(name) <= 60 and name.replace("-", "").isalnum() for name in others)
