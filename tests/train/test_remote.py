"""Shards behind a network: object storage, slow and failing servers, the cache of whole shards."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.storage import Folder
from tests.pipeline.test_s3 import s3  # noqa: F401
from tests.train.conftest import image
from train import Corpus, CorpusError, Patience, Reader, ReadFailed, Reading
from train.cache import Ranges, WholeShards
from train.corpus import Shard
from train.reader import whole_is_cheaper

QUICK = Patience(timeout=0.5, retries=3, wait=0.01)


class Server(BaseHTTPRequestHandler):
    """One object as S3 gives it; of requests for bytes the first `fail` get an error, the next `hang` no answer."""

    data, fail, hang, asked = bytes(range(256)) * 200, 0, 0, 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("Last-Modified", "Sat, 01 Nov 2025 00:00:00 GMT")
        self.end_headers()

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked += 1
        if kind.fail > 0:
            kind.fail -= 1
            return self.send_error(400)     # S3's client by itself tries others again
        if kind.hang > 0:
            kind.hang -= 1
            time.sleep(0.8)
            return None
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = self.data[first:last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{len(self.data)}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """(handler class, shard) of a server on loopback."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    handler = type("Handler", (Server,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{served.server_address[1]}")
        yield handler, Shard(Folder("s3://bucket/data"), "hq-000000", "hq", 1, len(handler.data), "0")
        served.shutdown()


def test_errors_and_silence_are_asked_again(server):
    handler, shard = server
    handler.fail, handler.hang = 1, 1
    started = time.monotonic()
    assert Ranges(QUICK).read(shard, 1000, 300) == handler.data[1000:1300]
    assert handler.asked == 3 and 0.5 < time.monotonic() - started < 5
    while handler.asked < 4:        # S3's client goes on in the thread that was left behind
        time.sleep(0.05)


def test_a_server_that_never_answers_ends_in_an_error_that_names_the_shard(server):
    handler, shard = server
    handler.fail = 10**6
    with pytest.raises(ReadFailed, match=r"hq-000000.tar.*4 tries of up to 0.5 s.*last checkpoint"):
        Ranges(QUICK).read(shard, 0, 10)
    assert handler.asked == 4


def test_a_whole_shard_is_fetched_once_and_a_failure_on_the_way_leaves_nothing_half(server, tmp_path):
    handler, shard = server
    cache = WholeShards(str(tmp_path), 10**6, 4, QUICK)
    handler.fail = 10**6
    with pytest.raises(ReadFailed):
        cache.opened(shard)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []
    handler.fail = handler.asked = 0
    cache.announce("hq", [shard])
    found = []
    readers = [threading.Thread(target=lambda: found.append(cache.read(shard, 100, 50))) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [handler.data[100:150]] * 8 and handler.asked == 1
    assert WholeShards(str(tmp_path), 10**6, 4, QUICK).opened(shard).read(0, 9) == handler.data[:9]
    assert handler.asked == 1       # another process of this machine finds the copy


def test_the_cache_never_holds_more_than_its_limit_and_drops_the_longest_unused(server, tmp_path):
    _, shard = server
    shards = [Shard(shard.folder, f"hq-{number:06d}", "hq", 1, shard.bytes, "0") for number in range(6)]
    cache = WholeShards(str(tmp_path), 3 * shard.bytes, 4, QUICK)
    for number in (0, 1, 2, 0, 3, 4):
        cache.opened(shards[number])
        time.sleep(0.01)
        held = [entry for entry in os.scandir(tmp_path) if entry.name.endswith(".tar")]
        assert sum(entry.stat().st_size for entry in held) <= cache.limit
    assert {entry.path for entry in held} == {cache._path(shards[number]) for number in (0, 3, 4)}
    cache.limit = 2 * shard.bytes           # another process with less room for all
    cache.opened(shards[5])
    assert {entry.path for entry in os.scandir(tmp_path) if entry.name.endswith(".tar")} == {
        cache._path(shards[number]) for number in (4, 5)}


def test_what_is_being_fetched_counts_and_what_a_killed_process_left_goes(server, tmp_path):
    _, shard = server
    shards = [Shard(shard.folder, f"hq-{number:06d}", "hq", 1, shard.bytes, "0") for number in range(3)]
    cache = WholeShards(str(tmp_path), 3 * shard.bytes, 4, QUICK)
    left, going = (tmp_path / f"{name}.tar.tmp-1" for name in ("left", "going"))
    for path in (left, going):
        path.write_bytes(bytes(shard.bytes))
    os.utime(left, (0, 0))
    for each in shards:
        cache.opened(each)
        time.sleep(0.01)
    assert not left.exists() and going.exists()
    assert [os.path.exists(cache._path(each)) for each in shards] == [False, True, True]


def test_whole_shards_are_fetched_where_most_of_them_is_used(tmp_path):
    remote, local = Folder("s3://bucket/shards"), Folder.at(str(tmp_path))
    large = [Shard(remote, "hq-000000", "hq", 1000, 10**9, "0")]
    assert whole_is_cheaper(large, 1) and whole_is_cheaper(large, 1 / 8) and not whole_is_cheaper(large, 1 / 64)
    assert not whole_is_cheaper([Shard(local, "hq-000000", "hq", 1000, 10**9, "0")], 1)


@pytest.fixture
def bucket(s3, workspace, monkeypatch):  # noqa: F811
    client, environment = s3
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client.create_bucket(Bucket="training")
    for path in (workspace / "shards").iterdir():
        client.upload_file(str(path), "training", f"w/shards/{path.name}")
    yield "s3://training/w"


def test_samples_from_s3_are_those_of_a_local_disk_by_whole_shards_and_by_ranges(bucket, workspace, tmp_path):
    weights, local = {"hq": 40, "face": 5}, Corpus.open(str(workspace))
    expected = [sample.key for sample in map(Reader(local, Reading(window=2, weights=weights)).__getitem__, range(60))]
    for share, kind in ((1.0, WholeShards), (1e-6, Ranges)):
        reader = Reader(Corpus.open(bucket), Reading(window=2, weights=weights, share=share, cache=str(tmp_path / "c")))
        assert isinstance(reader.source, kind)
        samples = [reader[position] for position in range(60)]
        assert [sample.key for sample in samples] == expected
        assert all(sample.image == image(sample.key) for sample in samples)
        assert reader.fingerprint() == Reader(local, Reading(window=2, weights=weights)).fingerprint()
    held = [entry for entry in os.scandir(tmp_path / "c") if entry.name.endswith(".tar")]
    assert len(held) == 7           # of 8 shards one is empty
    with pytest.raises(CorpusError, match="two windows of 2 shards of each group can take"):
        Reader(Corpus.open(bucket), Reading(window=2, cache_bytes=1000, cache=str(tmp_path / "c")))
