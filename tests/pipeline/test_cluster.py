"""What docs/cluster.md says: `ray start` on two nodes, `ray job submit`, a workspace on object storage; and a
node that dies in the middle. Both nodes are on this machine."""

import contextlib
import io
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY, photograph
from tests.pipeline.test_s3 import keys, put_config, s3  # noqa: F401  (a fixture)

RAY = os.path.join(os.path.dirname(sys.executable), "ray")
CLEARSHARD = [sys.executable, str(REPOSITORY / "clearshard.py")]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_node(arguments, environment):
    """`ray start --block` in a process group of its own."""
    return subprocess.Popen([RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *arguments],
                            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True)


def kill_node(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def two_nodes(s3):  # noqa: F811
    """(dashboard URL, GCS address, environment, head, worker)."""
    environment = os.environ | s3[1] | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    gcs, dashboard, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="rc", dir="/tmp")
    address = f"127.0.0.1:{gcs}"
    head = start_node(["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1",
                       f"--temp-dir={folder}", f"--dashboard-agent-listen-port={free_port()}"], environment)
    wait_for(lambda: status(address, environment, nodes=1), 60)
    worker = start_node([f"--address={address}", f"--dashboard-agent-listen-port={free_port()}"], environment)
    wait_for(lambda: status(address, environment, nodes=2), 60)
    yield f"http://127.0.0.1:{dashboard}", address, environment, head, worker
    kill_node(worker)
    kill_node(head)
    shutil.rmtree(folder, ignore_errors=True)


def status(address, environment, nodes):
    answer = subprocess.run([RAY, "status", f"--address={address}"], env=environment, capture_output=True, text=True)
    return answer.stdout.count("1 node_") >= nodes


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.5)


MODELS = """
caption:
  transformers: {{model: {models}/llava, batch_size: 2}}
  prompt: {{name: sentence, question: "Describe this image in one sentence.", max_new_tokens: 40, min_words: 4}}
  replicas: 2
negatives: {{model: {models}/sdxl, count: 200, size: 64, steps: 8, dtype: float32, batch_size: 2, replicas: 2}}
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_submitted_job_survives_the_death_of_a_node_in_every_stage(s3, two_nodes, tiny_models, tmp_path):  # noqa: F811
    client, _ = s3
    dashboard, address, environment, _, worker = two_nodes
    client.create_bucket(Bucket="cluster")
    for seed in range(40):
        photograph(seed, 512, 512).save(tmp_path / "p.jpg", quality=92)
        client.upload_file(str(tmp_path / "p.jpg"), "cluster", f"photos/{seed:02d}.jpg")
    put_config(client, "cluster", tmp_path, "s3://cluster/photos", extra=MODELS.format(models=tiny_models))
    job = subprocess.Popen([RAY, "job", "submit", f"--address={dashboard}", "--", *CLEARSHARD, "run", "s3://cluster/w"],
                           env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for table in ("scores", "captions/main", "negatives/images"):
        wait_for(lambda table=table: job.poll() is not None or keys(client, "cluster", f"w/{table}/"), 120)
        kill_node(worker)
        if table != "negatives/images":     # a node that joins is used
            worker = start_node([f"--address={address}", f"--dashboard-agent-listen-port={free_port()}"], environment)
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 0 and "samples in" in output, output
    verify = subprocess.run([*CLEARSHARD, "verify", "s3://cluster/w", f"--address={address}"], env=environment,
                            capture_output=True, text=True)
    assert verify.returncode == 0 and "all well" in verify.stdout, verify.stdout + verify.stderr
    scored = sum(int(key.split("/")[-1].split("-")[1]) for key in keys(client, "cluster", "w/scores/"))
    assert scored == 40
    answer = client.get_object(Bucket="cluster", Key="w/shards/manifest.parquet")
    manifest = pq.read_table(io.BytesIO(answer["Body"].read()))
    groups = manifest.group_by("group").aggregate([("key", "count"), ("key", "count_distinct"), ("caption", "count")])
    counts = {row["group"]: row for row in groups.to_pylist()}
    assert counts["negative"]["key_count"] == counts["negative"]["key_count_distinct"] == 200
    assert counts["hq"]["key_count"] == counts["hq"]["caption_count"] == counts["hq"]["key_count_distinct"]
