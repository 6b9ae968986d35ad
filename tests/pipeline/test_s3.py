"""Object storage over HTTP: sources and workspace on a server that speaks S3."""

import io
import subprocess
import sys
import tarfile
import time

import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY, clearshard, configure, photograph

boto3 = pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def s3():
    """(client, environment) of a moto server on loopback."""
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test",
                   "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="test",
                          aws_secret_access_key="test", region_name="us-east-1")
    yield client, environment
    server.stop()


@pytest.fixture
def bucket(s3, tmp_path):
    """A bucket with photographs below photos/, one of them damaged, and one tar of photographs."""
    client, environment = s3
    name = f"corpus-{tmp_path.name.replace('_', '-').lower()[-20:]}".strip("-")
    client.create_bucket(Bucket=name)
    for seed in range(6):
        photograph(seed).save(tmp_path / f"{seed}.jpg", quality=92)
        client.upload_file(str(tmp_path / f"{seed}.jpg"), name, f"photos/inner {seed}/日本 {seed}.jpg")
    client.put_object(Bucket=name, Key="photos/half.jpg", Body=(tmp_path / "0.jpg").read_bytes()[:5000])
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for seed in (7, 8):
            photograph(seed).save(tmp_path / f"{seed}.jpg", quality=92)
            tar.add(tmp_path / f"{seed}.jpg", f"{seed}.jpg")
    client.upload_file(str(tmp_path / "more.tar"), name, "more.tar")
    return client, environment, name


def put_config(client, bucket, tmp_path, *sources, extra=""):
    configure(tmp_path / "config", *sources, extra=extra)
    client.upload_file(str(tmp_path / "config" / "corpus.yaml"), bucket, "w/corpus.yaml")


def keys(client, bucket, prefix):
    return {item["Key"]: item["ETag"] for page in client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=prefix) for item in page.get("Contents", [])}


@pytest.mark.slow
def test_a_corpus_from_s3_to_s3_and_a_second_run_that_does_nothing(bucket, tmp_path):
    client, environment, name = bucket
    put_config(client, name, tmp_path, f"s3://{name}/photos", f"s3://{name}/more.tar")
    first = clearshard("run", f"s3://{name}/w", env=environment).stdout
    assert "9 listed, 9 new" in first and "truncated 1" in first and "8 samples in 2 shards" in first
    before = keys(client, name, "w/")
    assert {"w/shards/hq-000000.tar", "w/shards/manifest.parquet", "w/reports/corpus.html"} < set(before)
    assert "w/lock.json" not in before and not [key for key in before if "tmp" in key]
    second = clearshard("run", f"s3://{name}/w", env=environment).stdout
    assert second.count("nothing to do") == 7 and keys(client, name, "w/") == before
    assert "all well" in clearshard("verify", f"s3://{name}/w", env=environment).stdout
    manifest = pq.read_table(io.BytesIO(client.get_object(Bucket=name, Key="w/shards/manifest.parquet")["Body"].read()))
    assert {row["uri"] for row in manifest.to_pylist()} == {f"s3://{name}/more.tar"} | {
        f"s3://{name}/photos/inner {seed}/日本 {seed}.jpg" for seed in range(6)}


@pytest.mark.slow
def test_a_held_s3_workspace_is_refused_and_a_killed_holder_is_replaced(bucket, tmp_path):
    client, environment, name = bucket
    put_config(client, name, tmp_path, f"s3://{name}/photos")
    holder = ("import sys, time; from pipeline.lock import Lock; from pipeline.storage import Folder\n"
              "with Lock(Folder.at(sys.argv[1]), 'long run'): print('held', flush=True); time.sleep(60)")
    import os
    process = subprocess.Popen([sys.executable, "-c", holder, f"s3://{name}/w"], stdout=subprocess.PIPE, text=True,
                               cwd=REPOSITORY, env=os.environ | environment)
    assert process.stdout.readline() == "held\n"
    refused = clearshard("ingest", f"s3://{name}/w", env=environment, check=False)
    assert refused.returncode == 3 and "long run" in refused.stderr
    process.kill()
    process.wait()
    assert "7 new" in clearshard("ingest", f"s3://{name}/w", env=environment).stdout


def test_an_s3_workspace_without_configuration_and_a_bucket_that_is_not_there_are_clear_errors(bucket, tmp_path):
    client, environment, name = bucket
    result = clearshard("run", f"s3://{name}/nothing", env=environment, check=False)
    assert result.returncode == 2 and "clearshard init" in result.stderr
    put_config(client, name, tmp_path, "s3://no-such-bucket-here/photos")
    started = time.monotonic()
    result = clearshard("ingest", f"s3://{name}/w", env=environment, check=False)
    assert result.returncode == 2 and "no-such-bucket-here" in result.stderr and "Traceback" not in result.stderr
    assert time.monotonic() - started < 60


def test_init_writes_to_s3(bucket):
    client, environment, name = bucket
    clearshard("init", f"s3://{name}/fresh", "--source", f"face=s3://{name}/photos", env=environment)
    text = client.get_object(Bucket=name, Key="fresh/corpus.yaml")["Body"].read().decode()
    assert f"s3://{name}/photos" in text and "group: face" in text
