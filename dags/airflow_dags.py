"""Airflow's DAGs: one for each graph, one task for each step. See docs/dags.md."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import Param, dag

from dags.graph import GRAPHS, order, parameters
from dags.ray_operator import RayJobOperator


def build(name: str) -> None:
    """Makes the DAG of a graph; Airflow finds it by itself."""
    steps = order(GRAPHS[name])
    # Not another cluster's address: the command would show it the token.
    arguments = {"type": "array", "items": {"type": "string", "pattern": "^(?!--address)"}}

    @dag(
        dag_id=name,
        tags=["clearshard"],
        schedule=None,
        catchup=False,
        max_active_runs=1,
        params={
            **{key: Param(*([one.default] if one.default else []), type="string", pattern=one.pattern,
                          description=one.description) for key, one in parameters(steps).items()},
            "arguments": Param({}, type="object", properties={step.name: arguments for step in steps},
                               additionalProperties=False,
                               description='More arguments for a step, e.g. {"score": ["--max-error-rate", "0.2"]}'),
        },
        # The first delay is Airflow's own setting, [core] default_task_retry_delay.
        default_args={"retry_exponential_backoff": 2, "max_retry_delay": timedelta(hours=1)},
    )
    def graph() -> None:
        tasks = {step.name: RayJobOperator(step=step) for step in steps}
        for step in steps:
            for before in step.after:
                tasks[before] >> tasks[step.name]

    graph()


for name in GRAPHS:
    build(name)
