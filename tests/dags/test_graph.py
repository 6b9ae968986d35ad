"""The graphs: their order, and that every step is a command that clearshard has."""

import subprocess
import sys

import pytest
import typer

from clearshard import STAGES, app
from dags.graph import GRAPHS, GraphError, Step, chain, if_configured, order, parameters
from tests.dags.head import REPOSITORY

COMMANDS = typer.main.get_command(app).commands
ALL = {(graph, step.name): step for graph, steps in GRAPHS.items() for step in steps}


def names(steps):
    return [step.name for step in steps]


def test_the_corpus_is_made_in_this_order():
    assert names(order(GRAPHS["corpus"])) == ["ingest", "score", "dedup", "select", "tile", "caption", "negatives",
                                              "shard", "verify", "report"]


def test_every_stage_is_a_step_of_the_corpus():
    assert set(STAGES) <= set(names(GRAPHS["corpus"]))     # `clearshard run` takes the order from there


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_has_one_step_at_a_time(graph):
    steps = order(GRAPHS[graph])        # a workspace has one writer
    assert [step.after for step in steps] == [(), *((name,) for name in names(steps[:-1]))]


def test_an_order_keeps_to_the_list_where_it_may():
    steps = Step("c", after=("a", "b")), Step("b"), Step("d", after=("c",)), Step("a")
    assert names(order(steps)) == ["b", "a", "c", "d"]


@pytest.mark.parametrize("steps, said", [
    ((Step("a", after=("b",)), Step("b", after=("a",))), "a, b waits for another"),
    ((Step("x"), Step("a", after=("a",))), "each of a waits"),
    ((Step("score"), Step("b", after=("scor",))), "score?"),
    ((Step("a"), Step("b", after=("zzz",))), "it has a, b"),
    ((Step("a"), Step("a")), "two steps called a"),
])
def test_what_has_no_order_is_refused(steps, said):
    with pytest.raises(GraphError) as error:
        order(steps)
    assert said in str(error.value)


def test_a_step_is_the_command_that_a_user_types():
    step, = chain(if_configured(Step("caption")))
    assert step.command({"workspace": "s3://b/c"}, address="auto", extra=["--limit", "5"]) == [
        "clearshard", "caption", "s3://b/c", "--address", "auto", "--if-configured", "--limit", "5"]
    assert Step("report", distributed=False).command({"workspace": "w"}, program="/x/clearshard", address="auto") == [
        "/x/clearshard", "report", "w"]


def test_a_training_is_what_a_user_types():
    given = {"encoder": "/d/encoder.yaml", "adaptor": "/d/{adaptor}.yaml", "workers": "8", "model": "/d/adaptor/model",
             "images": "/d/photos", "evaluation": "/d/evaluation", "gpus": "1"}
    assert [step.command(given, address="auto")[1:] for step in GRAPHS["training"]] == [
        ["train", "/d/encoder.yaml", "--ray", "8", "--address", "auto"],
        ["train", "/d/{adaptor}.yaml", "--ray", "8", "--address", "auto"],
        ["evaluate", "/d/adaptor/model", "/d/photos", "--out", "/d/evaluation"]]
    assert set(parameters(GRAPHS["training"])) == set(given)


@pytest.mark.parametrize("graph, name", sorted(ALL))
def test_a_step_has_a_command_and_its_options(graph, name):
    step = ALL[graph, name]
    known = COMMANDS[step.verb or name]
    given = {key: one.default or "/d" for key, one in parameters([step]).items()}
    known.make_context(name, step.command(given, address="auto")[2:])      # fails on what the command does not take
    assert ("--address" in {option for parameter in known.params for option in parameter.opts}) == step.distributed


def test_airflow_needs_nothing_of_ours_but_the_standard_library():
    program = ("import sys; before = set(sys.modules); import dags.graph, dags.ray_jobs; "
               "print({name.split('.')[0] for name in set(sys.modules) - before} "
               "- set(sys.stdlib_module_names) - {'dags'})")
    answer = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stdout + answer.stderr
