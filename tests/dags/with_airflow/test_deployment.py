"""Scheduler, API server and triggerer as in a deployment, one worker slot, and jobs that take long."""

import time

from tests.dags.head import wait_for
from tests.dags.with_airflow.airflow_home import services

RUN = "the-run"


def test_waiting_holds_no_slot_a_restart_stops_nothing_and_a_user_stops_the_job(jobs, airflow_environment, script):
    program = script("echo begins $1; exec sleep 600")

    def states(dag):
        return {row["submission_id"].rpartition("-")[2]: row["status"] for row in jobs._request("GET", "/api/jobs/")
                if row["metadata"].get("run_id") == RUN and row["metadata"]["dag_id"] == dag}

    def log(dag, task, attempt=1):
        path = f"/api/v2/dags/{dag}/dagRuns/{RUN}/taskInstances/{task}/logs/{attempt}"
        return [row["event"] for row in airflow.rest("GET", path)["content"]]

    with services(airflow_environment | {"CLEARSHARD": str(program)}) as airflow:
        for dag in ("captions", "negatives"):
            airflow.rest("POST", f"/api/v2/dags/{dag}/dagRuns",
                         {"dag_run_id": RUN, "logical_date": None, "conf": {"workspace": "/nowhere"}})
        # Two tasks wait although there is one slot, and what their jobs say is in their logs by now.
        wait_for(lambda: states("captions") == states("negatives") == {"1": "RUNNING"}, 60)
        wait_for(lambda: "begins caption" in log("captions", "caption"), 30)

        airflow.stop("triggerer")
        airflow.start("triggerer")
        wait_for(lambda: log("captions", "caption").count("begins caption") == 2, 60)     # its successor follows
        time.sleep(3)
        assert states("captions") == states("negatives") == {"1": "RUNNING"}

        airflow.rest("PATCH", f"/api/v2/dags/captions/dagRuns/{RUN}/taskInstances/caption", {"new_state": "failed"})
        wait_for(lambda: states("captions") == {"1": "STOPPED"}, 30)
        assert states("negatives") == {"1": "RUNNING"}

        airflow.rest("POST", "/api/v2/dags/negatives/clearTaskInstances",
                     {"dag_run_id": RUN, "task_ids": ["negatives"], "dry_run": False, "only_failed": False})
        wait_for(lambda: states("negatives") == {"1": "STOPPED", "2": "RUNNING"}, 60)
        airflow.rest("PATCH", f"/api/v2/dags/negatives/dagRuns/{RUN}", {"state": "failed"})
        wait_for(lambda: states("negatives") == {"1": "STOPPED", "2": "STOPPED"}, 30)
