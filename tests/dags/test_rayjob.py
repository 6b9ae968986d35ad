"""dags/rayjob.yaml against tests/golden/dags/rayjob.schema.json: the fields that it uses, as KubeRay defines them."""

import json
import re

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from clearshard import app
from tests.dags.head import REPOSITORY

SCHEMA = json.loads((REPOSITORY / "tests/golden/dags/rayjob.schema.json").read_text())


def manifest() -> dict:
    return yaml.safe_load((REPOSITORY / "dags" / "rayjob.yaml").read_text())


def cluster(document: dict) -> dict:
    return document["spec"]["rayClusterSpec"]


def test_the_manifest_is_what_kuberay_takes():
    jsonschema.validate(manifest(), SCHEMA)


def misspelt(document):
    document["spec"]["backofLimit"] = document["spec"].pop("backoffLimit")


def misspelt_inside(document):
    container = cluster(document)["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]
    container["envfrom"] = container.pop("envFrom")


def wrong_type(document):
    cluster(document)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def wrong_word(document):
    cluster(document)["authOptions"]["mode"] = "tokens"


def missing(document):
    del cluster(document)["workerGroupSpecs"][0]["maxReplicas"]


@pytest.mark.parametrize("mistake", [misspelt, misspelt_inside, wrong_type, wrong_word, missing])
def test_a_mistake_is_found(mistake):
    document = manifest()
    mistake(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_version_of_ray_is_the_one_that_is_installed_with_us():
    locked = re.search(r"^ray==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.M)
    assert cluster(manifest())["rayVersion"] == locked[1]


def test_its_command_is_one_of_ours():
    program, command, workspace = manifest()["spec"]["entrypoint"].split()
    assert program == "clearshard" and workspace.startswith("s3://")
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_every_pod_has_the_storage_and_only_the_gpu_group_asks_for_gpus():
    groups = {"head": cluster(manifest())["headGroupSpec"],
              **{group["groupName"]: group for group in cluster(manifest())["workerGroupSpecs"]}}
    for name, group in groups.items():
        container, = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "clearshard-storage"}}], name
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu"), name
        assert group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0), name
