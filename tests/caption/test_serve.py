"""The caption job with a model that is served: by the real `transformers serve`, and by a server that counts."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.pool import JobStopped
from pipeline.report import write_report
from pipeline.storage import Folder
from tests.caption.test_captions import OPEN, SENTENCE, SHORT, photographs, quarantined, table  # noqa: F401
from tests.caption.test_served import said, serving
from tests.conftest import photograph
from tests.pipeline.test_cluster import free_port

STAGES = ("ingest", "score", "dedup", "select", "tile")


@contextlib.contextmanager
def transformers_serve(model, port):
    """`transformers serve` on loopback, until the block ends."""
    process = subprocess.Popen(
        [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(model), "--device", "cpu",
         "--port", str(port)], env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < end, "the server did not start"
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(0.3)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write(workspace, sources, model, url, prompt=SENTENCE, **settings):
    workspace.mkdir(parents=True, exist_ok=True)
    more = "".join(f", {name}: {value}" for name, value in settings.items())
    (workspace / "corpus.yaml").write_text(f"""
sources: [{{uri: {str(sources)!r}}}]
select: {{min_side: 64, facts: {OPEN}}}
tile: {{mode: whole, size: 192, min_texture: 0}}
caption:
  openai: {{url: {url!r}, model: {str(model)!r}, backoff_s: 0.05{more}}}
  prompt: {prompt}
""")
    return workspace


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_served_model_captions_every_photograph_and_a_dead_server_costs_no_row(
        tmp_path, photographs, tiny_models, run):  # noqa: F811
    port = free_port()
    workspace = write(tmp_path / "w", photographs, tiny_models / "llava", f"http://127.0.0.1:{port}/v1", retries=1,
                      patience_s=1)
    run(workspace, *STAGES)
    with pytest.raises(JobStopped, match="Is the server up"):
        run(workspace, "caption")
    with transformers_serve(tiny_models / "llava", port):
        run(workspace, "caption", limit=4)
        assert len(table(workspace)[0]) == 4
    with pytest.raises(JobStopped, match="Is the server up"):
        run(workspace, "caption")
    with transformers_serve(tiny_models / "llava", port):
        run(workspace, "caption")
    assert {row["caption"] for row in table(workspace)[0].values()} == set(SHORT.values())
    assert {row["model"] for row in table(workspace)[0].values()} == {str(tiny_models / "llava")}
    assert quarantined(workspace) == {}


def test_the_bound_of_requests_is_kept_full_over_the_borders_of_units(tmp_path, run):
    (tmp_path / "pile").mkdir()
    for seed in range(60):
        photograph(seed, 200, 200).save(tmp_path / "pile" / f"{seed:02d}.png")
    asked, answered = 0, 0

    async def only_when_full(times, sent):
        """Answers in turn, each of the first forty only while eight are under way: a client that waits for the last
        of a group before it asks on never gets the first."""
        nonlocal asked, answered
        mine, asked = asked, asked + 1
        while answered < min(mine, 40) or (server.now < 8 and mine < 40):
            await asyncio.sleep(0.01)
        answered += 1
        return said("A wave of many colours on a wall.")

    with serving(only_when_full) as server:
        workspace = write(tmp_path / "w", tmp_path / "pile", "m", server.url, concurrency=8, timeout_s=60)
        run(workspace, *STAGES)
        run(workspace, "caption")
    assert asked == 60 == table(workspace)[1]  # none was asked again after a timeout
    assert server.most == 8


def test_refusals_and_nonsense_are_never_good_captions_and_nothing_in_them_is_html(tmp_path, run):
    (tmp_path / "pile").mkdir()
    answers = {"a": "I'm sorry, but I cannot see the image.", "b": "\x01\x02\x03\x04",
               "c": "A red wall, red as a rose.", "d": "<script>alert(1)</script> stands on a wall."}
    for seed, name in enumerate(answers):
        photograph(seed, 200, 200).save(tmp_path / "pile" / f"{name}.png")

    async def odd(times, sent):
        name = sent["messages"][-1]["content"][1]["text"].split()[-1]
        return said(answers[name.partition(".")[0]])

    with serving(odd) as server:
        prompt = '{name: own, question: "What is {name}", min_words: 3}'
        workspace = write(tmp_path / "w", tmp_path / "pile", "m", server.url, prompt, retries=0)
        run(workspace, *STAGES, "caption", "shard")
    rows = {row["question"].split()[-1][0]: row for row in table(workspace)[0].values()}
    assert rows["a"]["flags"] == ["refusal"] and rows["c"]["flags"] == [] and rows["b"]["caption"] is None
    assert "control" in rows["b"]["flags"] and rows["a"]["attempts"] == 2
    folder = Folder.at(str(workspace))
    page = Path(write_report(folder, config.load(folder))).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "\x01" not in page
    captions = pq.read_table(workspace / "shards" / "manifest.parquet")["caption"].to_pylist()
    assert set(captions) == {answers["c"], rows["d"]["caption"]}
