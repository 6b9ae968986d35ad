"""The trigger and the operator by themselves, against a real Ray head."""

import asyncio

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from dags.graph import Step
from dags.ray_operator import RayJobOperator, RayJobTrigger
from tests.dags.head import free_ports, wait_for


async def first(trigger):
    return (await anext(trigger.run())).payload


def test_a_job_beyond_its_time_is_stopped(jobs):
    jobs.submit("late-1", "echo begun; sleep 600")
    wait_for(lambda: jobs.job("late-1").status == "RUNNING", 30)
    event = asyncio.run(first(RayJobTrigger(jobs.address, "late-1", False, timeout_s=1, poll_s=0.5)))
    assert event["status"] == "STOPPED" == jobs.job("late-1").status and event["timed_out"]
    with pytest.raises(AirflowException, match=r"(?s)late-1 ended as STOPPED after its time of 5 s.*begun"):
        RayJobOperator(step=Step("score", timeout_s=5)).ended(None, event)


def test_a_job_that_the_cluster_forgot_fails_the_attempt(jobs):
    event = asyncio.run(first(RayJobTrigger(jobs.address, "never-1", False, timeout_s=60)))
    assert event["status"] == "LOST" and "never-1 does not exist" in event["message"]


def test_a_kill_while_the_dashboard_is_away_is_tried_again_and_then_told(monkeypatch):
    monkeypatch.setattr("dags.ray_operator.STOP_PAUSE_S", 0.1)
    trigger = RayJobTrigger(f"http://127.0.0.1:{free_ports(1)[0]}", "x-1", False, timeout_s=60)
    with pytest.raises(Exception, match="no answer from Ray's dashboard"):
        asyncio.run(trigger.on_kill())


@pytest.mark.parametrize("exit_code, kind", [(1, AirflowException), (2, AirflowFailException),
                                             (127, AirflowFailException), (None, AirflowException)])
def test_what_repetition_cannot_mend_fails_for_good(exit_code, kind):
    event = {"job_id": "a-1", "attached": True, "timed_out": False, "status": "FAILED", "message": "said",
             "exit_code": exit_code, "tail": "the last line"}
    with pytest.raises(AirflowException, match=r"(?s)a-1 ended as FAILED: said.*the last line") as error:
        RayJobOperator(step=Step("score")).ended(None, event)
    assert type(error.value) is kind
