"""`airflow dags test` on SQLite, the real clearshard on a real Ray head."""

import json
import os
import subprocess
import sys
import textwrap

from dags.graph import GRAPHS
from tests.dags.head import PROGRAMS, REPOSITORY
from tests.dags.with_airflow.airflow_home import airflow

CORPUS = [step.name for step in GRAPHS["corpus"]]


def jobs_of(jobs, dag):
    """(step, number, state) of every job of a DAG, in the order in which they began."""
    rows = [row for row in jobs._request("GET", "/api/jobs/") if row["metadata"].get("dag_id") == dag
            and row["metadata"]["run_id"].startswith("manual__")]
    return [(row["metadata"]["task_id"], int(row["submission_id"].rpartition("-")[2]), row["status"])
            for row in sorted(rows, key=lambda row: row["start_time"])]


def entrypoint(jobs, step):
    return next(row["entrypoint"] for row in jobs._request("GET", "/api/jobs/")
                if row["metadata"].get("task_id") == step)


BEGIN = """import json, sys
from airflow.dag_processing.dagbag import DagBag
bag, answer = DagBag(sys.argv[1]), []
"""


def in_airflow(environment, program, *arguments):
    """The list `answer` that a program fills, which has the DAGs of this repository as `bag`."""
    run = subprocess.run([sys.executable, "-c", f"{BEGIN}{textwrap.dedent(program)}\nprint(json.dumps(answer))",
                          REPOSITORY / "dags", *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_file_is_imported_and_the_dags_are_the_graphs(airflow_environment):
    errors, found = in_airflow(airflow_environment, """
        answer += [bag.import_errors, {name: {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks}
                                       for name, dag in bag.dags.items()}]
        """)
    assert not errors
    assert found == {name: {step.name: list(step.after) for step in steps} for name, steps in GRAPHS.items()}


def test_a_corpus_is_made_although_a_step_fails_first(jobs, airflow_environment, workspace, script):
    marker = workspace.parent / "failed"
    program = script(f"[ $1 = score ] && [ ! -e {marker} ] && touch {marker} && echo made to fail && exit 1\n"
                     f"exec {PROGRAMS / 'clearshard'} \"$@\"")
    conf = {"workspace": str(workspace), "arguments": {"score": ["--max-error-rate", "0.5"]}}
    run = airflow(airflow_environment | {"CLEARSHARD": str(program)}, "dags", "test", "corpus", "-c", json.dumps(conf))
    assert run.returncode == 0, run.stdout[-8000:]
    ends = [(name, 1, "SUCCEEDED") for name in CORPUS]
    ends[1:2] = [("score", 1, "FAILED"), ("score", 2, "SUCCEEDED")]
    assert jobs_of(jobs, "corpus") == ends
    for line in ("made to fail", "ingest: 3 listed", "score: 3 rows", "all well"):     # the jobs' logs
        assert line in run.stdout
    assert f"score {workspace} --address auto --max-error-rate 0.5" in entrypoint(jobs, "score")
    assert os.environ["RAY_AUTH_TOKEN"] not in run.stdout
    assert list((workspace / "shards").glob("*.tar")) and (workspace / "reports" / "corpus.html").exists()


TRAINING = {"encoder": "/d/encoder.yaml", "adaptor": "/d/adaptor.yaml", "workers": "8", "model": "/d/run/model",
            "images": "/d/my photos", "evaluation": "/d/evaluation", "gpus": "0"}


def test_a_training_goes_from_encoder_to_evaluation_with_the_words_of_its_parameters(jobs, airflow_environment, script):
    program = script('echo "was given $#: $@"')
    conf = TRAINING | {"arguments": {"adaptor": ["--accept-changes"]}}
    run = airflow(airflow_environment | {"CLEARSHARD": str(program)}, "dags", "test", "training", "-c",
                  json.dumps(conf))
    assert run.returncode == 0, run.stdout[-8000:]
    assert jobs_of(jobs, "training") == [(name, 1, "SUCCEEDED") for name in ("encoder", "adaptor", "evaluate")]
    for line in ("was given 6: train /d/encoder.yaml --ray 8 --address auto",
                 "was given 7: train /d/adaptor.yaml --ray 8 --address auto --accept-changes",
                 "was given 5: evaluate /d/run/model /d/my photos --out /d/evaluation"):
        assert line in run.stdout


def test_what_a_repetition_cannot_mend_is_not_repeated(jobs, airflow_environment, script):
    program = script("echo corpus.yaml: no such key; exit 2")
    run = airflow(airflow_environment | {"CLEARSHARD": str(program)}, "dags", "test", "negatives", "-c",
                  '{"workspace": "/nowhere"}')
    assert jobs_of(jobs, "negatives") == [("negatives", 1, "FAILED")]
    assert "exit code 2" in run.stdout and "its last lines:" in run.stdout and "no such key" in run.stdout


def test_a_run_with_wrong_parameters_does_not_begin(jobs, airflow_environment):
    run = airflow(airflow_environment, "dags", "test", "captions", "-c",
                  '{"workspace": "w", "arguments": {"scoer": []}}')
    assert run.returncode != 0 and not jobs_of(jobs, "captions")
    assert "ParamValidationError" in run.stdout and "scoer" in run.stdout


def test_parameters_are_checked(airflow_environment):
    good = [{"workspace": "s3://b/c"}, {"workspace": "w", "arguments": {"verify": ["--quick"]}}]
    bad = [{}, {"workspace": ""}, {"workspace": "--help"}, {"workspace": "w", "arguments": {"verify": "--quick"}},
           {"workspace": "w", "arguments": {"verify": ["--address", "elsewhere:6379"]}},
           {"workspace": "w", "arguments": {"verify": ["--address=elsewhere:6379"]}}]
    assert accepted(airflow_environment, "captions", good + bad) == [True] * len(good) + [False] * len(bad)


def test_parameters_of_a_training_are_checked(airflow_environment):
    asked = {name: value for name, value in TRAINING.items() if name not in ("workers", "gpus")}
    bad = [{}, asked | {"model": "--out"}, TRAINING | {"workers": "0"}, TRAINING | {"workers": "2 --set"},
           TRAINING | {"gpus": "many"}, asked | {"workspace": "w"} | {"images": ""}]
    assert accepted(airflow_environment, "training", [asked, TRAINING, *bad]) == [True, True] + [False] * len(bad)


def accepted(environment, dag, confs):
    """Whether a DAG takes each of these as a run's parameters."""
    return in_airflow(environment, """
        import copy
        from airflow.sdk.exceptions import ParamValidationError
        for conf in json.loads(sys.argv[3]):
            params = copy.deepcopy(bag.dags[sys.argv[2]].params)
            try:
                params.update(conf)
                answer.append(bool(params.validate()))
            except ParamValidationError:
                answer.append(False)
        """, dag, json.dumps(confs))
