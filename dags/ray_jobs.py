"""Ray's Jobs API over HTTP. Standard library only: Airflow's environment has no Ray, and needs none."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 30.0
PATIENCE_S = 600.0              # a head node that is started again is back within this
CHARACTERS_PER_S = 1_000_000
ACTIVE = ("PENDING", "RUNNING")


class RayJobsError(RuntimeError):
    """The Jobs API refused a request; the message says which, why, and what to do."""


class DashboardAway(RayJobsError):
    """The dashboard does not answer, or answers with a fault of its own. It may come back."""


class NoSuchJob(RayJobsError):
    """The cluster does not know the job."""


@dataclass(frozen=True)
class Job:
    """What the Jobs API says of one job; `started` in seconds since 1970."""

    id: str
    status: str
    message: str = ""
    exit_code: int | None = None
    started: float | None = None

    @property
    def active(self) -> bool:
        return self.status in ACTIVE


class _StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None     # a redirect would take the token to another host


def address_from(environment: os._Environ | dict[str, str] = os.environ) -> str:
    """Where the dashboard is: RAY_API_SERVER_ADDRESS, as for `ray job submit`; default: this machine."""
    return environment.get("RAY_API_SERVER_ADDRESS") or ADDRESS


def auth_token(environment: os._Environ | dict[str, str] = os.environ) -> str | None:
    """The cluster's token where Ray itself looks: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        RayJobsError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if environment.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"].strip()
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.expanduser().read_text().strip() or None
    except OSError as error:
        if named:
            raise RayJobsError(f"RAY_AUTH_TOKEN_PATH={named}: {error.strerror}; name the file with the token") from None
        return None


def base_id(*names: str) -> str:
    """A job id for these names (DAG, run, step): readable, at most 60 characters, different for different names."""
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", f"{names[0]}-{names[-1]}").strip("-")[:40]
    return f"{readable}-{digest}"


@dataclass(frozen=True)
class RayJobs:
    """A cluster's Jobs API.

    Every method raises DashboardAway where trying again may help, and RayJobsError where it will not.
    """

    address: str
    timeout_s: float = TIMEOUT_S
    _opener: Any = field(default_factory=lambda: urllib.request.build_opener(_StayHere), repr=False, compare=False)

    def __post_init__(self) -> None:
        if urllib.parse.urlsplit(self.address).scheme not in ("http", "https"):
            raise RayJobsError(f"{self.address!r} is no dashboard: RAY_API_SERVER_ADDRESS is of the form {ADDRESS}")

    def submit(self, job_id: str, entrypoint: str, *, num_cpus: float = 0, memory: int = 0, num_gpus: float = 0,
               metadata: dict[str, str] | None = None) -> None:
        """Starts a shell command as a job; an id that exists is refused."""
        resources = {"entrypoint_num_cpus": num_cpus, "entrypoint_memory": memory,
                     "entrypoint_num_gpus": num_gpus}
        self._request("POST", "/api/jobs/", {
            "entrypoint": entrypoint, "submission_id": job_id, "metadata": metadata or {},
            **{name: value for name, value in resources.items() if value}})

    def job(self, job_id: str) -> Job:
        """One job. Raises NoSuchJob."""
        return _job(self._request("GET", f"/api/jobs/{urllib.parse.quote(job_id, safe='')}"))

    def jobs(self, base: str) -> list[Job]:
        """The jobs BASE-1, BASE-2, … in this order."""
        numbered = ((re.fullmatch(re.escape(base) + r"-(\d+)", row.get("submission_id") or ""), row)
                    for row in self._request("GET", "/api/jobs/"))
        return [_job(row) for _, row in sorted(((int(match[1]), row) for match, row in numbered if match),
                                               key=lambda pair: pair[0])]

    def log(self, job_id: str, since: int = 0) -> str:
        """What the job has written, from the character `since` on."""
        return (self._request("GET", f"/api/jobs/{urllib.parse.quote(job_id, safe='')}/logs").get("logs") or "")[since:]

    def stop(self, job_id: str) -> None:
        """Asks the job to end: SIGTERM, and SIGKILL after a few seconds. One that has ended stays as it is."""
        self._request("POST", f"/api/jobs/{urllib.parse.quote(job_id, safe='')}/stop", {})

    def attach_or_submit(self, base: str, entrypoint: str, **options: Any) -> tuple[Job, bool]:
        """The newest job of BASE if it is active, else a new one with the next number; and whether it was there.

        A job that ended is never taken for the answer: whoever asks again wants the command to run again, and a
        command that has nothing left to do ends at once. Of two callers at the same time one submits and both follow.
        """
        jobs = self.jobs(base)
        if jobs and jobs[-1].active:
            return jobs[-1], True
        number = int(jobs[-1].id.rpartition("-")[2]) + 1 if jobs else 1
        job_id = f"{base}-{number}"
        try:
            self.submit(job_id, entrypoint, **options)
        except RayJobsError:
            # Either another caller was first, or the answer to this call was lost.
            try:
                return self.job(job_id), True
            except RayJobsError:
                pass
            raise
        return self.job(job_id), False

    def _request(self, method: str, path: str, body: dict | None = None) -> Any:
        headers = {"Accept": "application/json"}
        if token := auth_token():
            headers["Authorization"] = f"Bearer {token}"
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.address.rstrip("/") + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=self.timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, method, path) from None
        except (OSError, http.client.HTTPException) as error:     # URLError is an OSError
            reason = getattr(error, "reason", None) or error
            raise DashboardAway(f"no answer from Ray's dashboard at {self.address}: {reason}; is the head node up, and "
                                "is RAY_API_SERVER_ADDRESS its address as seen from here?") from None
        except ValueError:
            raise RayJobsError(f"{self.address} answered {method} {path} with something that is no JSON: is it Ray's "
                               "dashboard? Set RAY_API_SERVER_ADDRESS") from None

    def _refusal(self, error: urllib.error.HTTPError, method: str, path: str) -> RayJobsError:
        text = error.read().decode(errors="replace").strip()
        said = f"{self.address} answered {method} {path} with {error.code}: {text[-2000:] or error.reason}"
        if error.code in (401, 403):
            return RayJobsError(f"{said}\nset RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to the cluster's token "
                                "in the environment of this process")
        if error.code == 404:
            return NoSuchJob(said)
        return DashboardAway(said) if error.code >= 500 else RayJobsError(said)


def _job(row: dict) -> Job:
    started = row.get("start_time")
    message = (row.get("message") or "").partition(", last available logs")[0]      # which the log has too
    return Job(row["submission_id"], row["status"], message, row.get("driver_exit_code"),
               started / 1000 if started else None)


class Follower:
    """Follows one job: its state, and the lines of its log that are new since the last look.

    A dashboard that is away is waited for, `patience_s` long. The pause to the next look, `pause_s`, grows from one
    second to `every_s`; and beyond where the log is long, because the API gives it only as a whole: at most a million
    characters are read in a second.
    """

    def __init__(self, jobs: RayJobs, job_id: str, *, every_s: float = 5.0, patience_s: float = PATIENCE_S):
        self.jobs, self.job_id, self.every_s, self.patience_s = jobs, job_id, every_s, patience_s
        self.pause_s = min(1.0, every_s)
        self._seen, self._unended = 0, ""
        self._heard = time.monotonic()

    def look(self) -> tuple[Job | None, list[str]]:
        """(job, new lines); the job is None when the dashboard is away.

        Raises:
            DashboardAway: and it has been for longer than the patience.
            NoSuchJob: the cluster has forgotten the job, which a head node does that was started anew.
            RayJobsError: as RayJobs does.
        """
        try:
            job = self.jobs.job(self.job_id)        # before the log, so that an ended job's log is whole
        except DashboardAway:
            if time.monotonic() - self._heard > self.patience_s:
                raise
            return None, []
        self._heard = time.monotonic()
        try:
            text = self.jobs.log(self.job_id, self._seen)
        except DashboardAway as error:
            # The log lies on the node where the command ran, and may be gone with it; the job's state is not.
            return job, [] if job.active else [f"the rest of the log cannot be read: {error}"]
        self._seen += len(text)
        self.pause_s = max(min(1.5 * self.pause_s, self.every_s), self._seen / CHARACTERS_PER_S)
        *lines, self._unended = (self._unended + text).split("\n")
        if not job.active and self._unended:
            lines.append(self._unended)
            self._unended = ""
        return job, lines
