"""Fetch: a real server on loopback that behaves and misbehaves."""

import asyncio
import http.server
import ipaddress
import threading
import time
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Fetch
from pipeline.fetch import FetchRefused, client, fetch, refuse_private, robots_tags
from pipeline.storage import read_bytes
from tests.conftest import configure, photograph, rows_of_table, tars


class Handler(http.server.BaseHTTPRequestHandler):
    pictures: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        name = self.path.lstrip("/")
        action = getattr(self, f"_{name.split('/')[0]}", None)
        if action is not None:
            action(name)
        elif name in self.pictures:
            self.answer(200, self.pictures[name])
        else:
            self.answer(404, b"<html>gone</html>")

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if not headers.get("Transfer_Encoding"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _busy(self, name):      # answers at the third try
        self.answer(200 if self.asked.count(self.path) > 2 else 503, self.pictures["0.jpg"])

    def _slow(self, name):
        time.sleep(2)

    def _hop(self, name):
        self.answer(302, Location="/0.jpg")

    def _loop(self, name):
        self.answer(302, Location="/loop")

    def _refused(self, name):
        self.answer(200, self.pictures["0.jpg"], X_Robots_Tag="googlebot: noindex, noai")

    def _endless(self, name):
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(1000):
                self.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    for i in range(4):
        photograph(i).save(tmp_path / "p.jpg", quality=92)
        Handler.pictures[f"{i}.jpg"] = (tmp_path / "p.jpg").read_bytes()
    Handler.asked.clear()
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_address[1]}"
    service.shutdown()


FAST = {"allow_private": True, "backoff_s": 0.01, "timeout_s": 1.0, "max_bytes": 1 << 20, "retries": 3}


def get(url, **options):
    config = Fetch(**FAST | options)

    async def once():
        async with client(config) as session:
            return await fetch(session, url, config)
    return asyncio.run(once())


def test_a_busy_server_is_asked_again_and_a_redirect_followed(server):
    assert get(f"{server}/busy") == get(f"{server}/hop") == Handler.pictures["0.jpg"]
    assert Handler.asked.count("/busy") == 3


@pytest.mark.parametrize(("path", "reason", "times"), [
    ("none.jpg", "http_404", 1), ("slow", "timeout", 4), ("loop", "redirects", 6), ("refused", "robots", 1),
    ("endless", "too_many_bytes", 1)])
def test_what_cannot_be_had_has_a_class_and_its_number_of_tries(server, path, reason, times):
    with pytest.raises(FetchRefused) as caught:
        get(f"{server}/{path}")
    assert caught.value.reason == reason and Handler.asked.count(f"/{path}") == times


def test_private_addresses_are_refused_by_number_and_by_name(server):
    for url in (server, server.replace("127.0.0.1", "localhost"), "http://169.254.169.254/latest/meta-data"):
        with pytest.raises(FetchRefused, match="allow_private"):
            get(f"{url}/0.jpg", allow_private=False)
    assert Handler.asked == []


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.1.1", "::1", "fe80::1%eth0", "169.254.169.254", "0.0.0.0"])
def test_addresses_that_are_not_public(address):
    with pytest.raises(FetchRefused):
        refuse_private("host", address)
    refuse_private("host", "93.184.215.14")
    assert ipaddress.ip_address("93.184.215.14").is_global


def test_robots_tags_of_any_agent_are_read():
    assert robots_tags(["noindex, NoAI", "somebot: noimageai"]) == {"noindex", "noai", "noimageai"}


def test_the_owners_refusal_can_be_overridden_on_purpose(server):
    assert get(f"{server}/refused", robots_tags=()) == Handler.pictures["0.jpg"]


def test_urls_of_a_table_are_fetched_once_and_become_shards(tmp_path, server, run):
    urls = [f"{server}/{name}" for name in ("0.jpg", "1.jpg", "gone.jpg", "2.jpg", "refused")]
    pq.write_table(pa.table({"url": urls, "caption": list("abcde"), "license": ["CC0"] * 5}), tmp_path / "urls.parquet")
    workspace = configure(tmp_path / "w", tmp_path / "urls.parquet",
                          extra="fetch: {allow_private: true, backoff_s: 0.01}\n")
    lines = run(workspace)
    assert "5 new, 5 of them to fetch" in lines[0] and "2 in quarantine (http_404 1, robots 1)" in lines[1]
    rows = rows_of_table(workspace, "sources")
    assert sorted((row["name"], row["text"], row["licence"]) for row in rows) == [
        (urls[0], "a", "CC0"), (urls[1], "b", "CC0"), (urls[3], "d", "CC0")]
    assert {read_bytes(r["uri"], r["offset"], r["length"]) for r in rows} == {
        Handler.pictures[f"{i}.jpg"] for i in range(3)}
    asked = len(Handler.asked)
    assert "fetch: nothing to do" in run(workspace) and len(Handler.asked) == asked
    assert tars(workspace)


def test_a_url_that_comes_back_is_fetched_on_request(tmp_path, server, run):
    pq.write_table(pa.table({"url": [f"{server}/0.jpg", f"{server}/late.jpg"]}), tmp_path / "urls.parquet")
    workspace = configure(tmp_path / "w", tmp_path / "urls.parquet",
                          extra="fetch: {allow_private: true, backoff_s: 0.01}\n")
    run(workspace, "ingest")
    Handler.pictures["late.jpg"] = Handler.pictures["3.jpg"]
    try:
        run(workspace, "ingest", "score", retry_errors=True)
    finally:
        del Handler.pictures["late.jpg"]
    assert len(rows_of_table(workspace, "scores")) == 2 and rows_of_table(workspace, "quarantine/fetch") == []
    assert Handler.asked.count("/0.jpg") == 1


def test_images_in_the_cells_of_a_table_become_files(tmp_path, run):
    cells = []
    for i in range(3):
        photograph(i).save(tmp_path / "p.jpg", quality=92)
        cells.append((tmp_path / "p.jpg").read_bytes())
    images = [{"bytes": c, "path": f"{i}.jpg"} for i, c in enumerate([*cells, None])]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", row_group_size=2)
    workspace = configure(tmp_path / "w", tmp_path / "t.parquet")
    run(workspace)
    assert {read_bytes(r["uri"], r["offset"], r["length"]) for r in rows_of_table(workspace, "sources")} == set(cells)
    assert [row["error"] for row in rows_of_table(workspace, "quarantine/fetch")] == ["empty"]
    assert tars(workspace)
