"""A step of a graph as an Airflow task: submit the Ray job, leave the worker, come back when it has ended.

The trigger's class is imported by name in the triggerer, so the folder above `dags/` belongs in PYTHONPATH there.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.triggers.base import BaseTrigger, TriggerEvent

from dags.graph import Step
from dags.ray_jobs import DashboardAway, Follower, RayJobs, RayJobsError, address_from, base_id

POLL_S = 5.0
TAIL_LINES = 30
STOP_TRIES, STOP_PAUSE_S = 5, 3.0       # together less than Airflow's on_kill_timeout of 30 s
# What a repetition cannot mend: 2 is an error in corpus.yaml or the arguments; 126 and 127 are the shell's for a
# program that cannot be started.
HOPELESS = (2, 126, 127)


class RayJobTrigger(BaseTrigger):
    """Follows one Ray job, writes its log to the task's log, and fires when it has ended.

    A user who marks the task as failed or succeeded, or clears it, stops the job. A triggerer that ends does not: the
    next one follows the same job, and its log begins anew.
    """

    def __init__(self, dashboard: str, job_id: str, attached: bool, timeout_s: float, poll_s: float = POLL_S):
        super().__init__()
        self.dashboard, self.job_id, self.attached = dashboard, job_id, attached
        self.timeout_s, self.poll_s = timeout_s, poll_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "dags.ray_operator.RayJobTrigger", {
            "dashboard": self.dashboard, "job_id": self.job_id, "attached": self.attached,
            "timeout_s": self.timeout_s, "poll_s": self.poll_s}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        end = {"job_id": self.job_id, "attached": self.attached, "timed_out": False}
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            follower = Follower(RayJobs(self.dashboard), self.job_id, every_s=self.poll_s)
            while True:
                job, lines = await asyncio.to_thread(follower.look)
                for line in lines:
                    self.log.info("%s", line)
                tail.extend(lines)
                if job is None:
                    self.log.warning("%s does not answer; trying on", self.dashboard)
                elif not job.active:
                    break
                elif job.started and time.time() > job.started + self.timeout_s and not end["timed_out"]:
                    end["timed_out"] = True
                    await self.on_kill()
                await asyncio.sleep(follower.pause_s)
            end |= {"status": job.status, "message": job.message, "exit_code": job.exit_code}
        except RayJobsError as error:
            end |= {"status": "LOST", "message": str(error), "exit_code": None}
        yield TriggerEvent(end | {"tail": "\n".join(tail)})

    async def on_kill(self) -> None:
        """Stops the job. Airflow calls this when a user acts on the task, never when the triggerer ends."""
        for tries_left in reversed(range(STOP_TRIES)):
            try:
                await asyncio.to_thread(RayJobs(self.dashboard, timeout_s=STOP_PAUSE_S).stop, self.job_id)
            except DashboardAway:
                if not tries_left:
                    raise
                await asyncio.sleep(STOP_PAUSE_S)
            else:
                self.log.info("asked Ray to stop %s", self.job_id)
                return


class RayJobOperator(BaseOperator):
    """Runs one step on what the run's parameters name, as a Ray job.

    The job's id is made of the DAG, the run, the step and a number. A retry follows the job of the attempt before while
    it is active, and else submits the next number: the command runs once at a time, whatever happens to Airflow.

    From the environment of Airflow's processes, and never from a run's parameters: RAY_API_SERVER_ADDRESS (the
    dashboard), RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and CLEARSHARD (the program on the cluster; default: clearshard).
    Who may start a run could otherwise send the token elsewhere, or run any program.
    """

    def __init__(self, *, step: Step, **kwargs: Any):
        super().__init__(task_id=step.name, retries=step.retries, **kwargs)
        self.step = step
        self.submitted: tuple[str, str] | None = None

    def execute(self, context: Any) -> None:
        params, run = context["params"], context["dag_run"]
        command = self.step.command(params, program=os.environ.get("CLEARSHARD", "clearshard"),
                                    address="auto", extra=params["arguments"].get(self.step.name, ()))
        dashboard = address_from()
        base = base_id(self.dag_id, run.run_id, self.step.name)
        job, attached = RayJobs(dashboard).attach_or_submit(
            base, shlex.join(command), num_cpus=self.step.num_cpus, memory=self.step.memory,
            num_gpus=int(params["gpus"]) if self.step.gpu else 0,
            metadata={"dag_id": self.dag_id, "run_id": run.run_id, "task_id": self.task_id})
        self.submitted = dashboard, job.id
        self.log.info("%s Ray job %s at %s: %s", "following" if attached else "submitted", job.id, dashboard,
                      shlex.join(command))
        self.defer(trigger=RayJobTrigger(dashboard, job.id, attached, self.step.timeout_s), method_name="ended")

    def ended(self, context: Any, event: dict[str, Any]) -> str:
        """What comes of the job's end. Returns its id.

        Raises:
            AirflowFailException: it failed in a way that trying again cannot mend.
            AirflowException: it failed, was stopped, ran too long, or the cluster forgot it; Airflow tries again.
        """
        if event["status"] == "SUCCEEDED":
            return event["job_id"]
        if event["status"] == "STOPPED" and event["attached"] and not event["timed_out"]:
            # A cleared task is here again before its former self has been stopped: that stop was not meant for us.
            self.log.info("%s was stopped for an attempt before this one; submitting the next", event["job_id"])
            return self.execute(context)
        after = f" after its time of {self.step.timeout_s:.0f} s" if event["timed_out"] else ""
        text = (f"Ray job {event['job_id']} ended as {event['status']}{after}: {event['message']}\n"
                f"its last lines:\n{event['tail']}\nthe same command goes on from what is finished")
        raise (AirflowFailException if event["exit_code"] in HOPELESS else AirflowException)(text)

    def on_kill(self) -> None:
        """The task was cancelled between submitting and leaving the worker."""
        if self.submitted:
            dashboard, job_id = self.submitted
            RayJobs(dashboard).stop(job_id)
