"""The whole path, in one process: from a messy folder to shards that stock webdataset reads."""

import hashlib
import io
import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from pipeline.cluster import JobStopped
from pipeline.config import Corpus, load
from pipeline.ingest import ingest
from pipeline.plan import captions
from pipeline.score import metric_table
from pipeline.storage import Folder
from tests.conftest import configure, photograph, rows_of_table, tars


def test_every_file_ends_in_the_scores_or_in_the_quarantine_and_the_rest_in_shards(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    listed, scored = rows_of_table(workspace, "sources"), rows_of_table(workspace, "scores")
    refused = {row["name"]: row["error"] for row in rows_of_table(workspace, "quarantine/score")}
    assert refused == {"page.jpg": "not_an_image", "empty.png": "empty", "half.jpg": "truncated"}
    assert {row["ref"] for row in listed} == {r["ref"] for r in scored} | {
        r["ref"] for r in rows_of_table(workspace, "quarantine/score")}
    reasons = [row["reason"] for row in rows_of_table(workspace, "selection")]
    assert sorted(filter(None, reasons)) == ["duplicate", "too_small"]
    assert sum(row["kept"] for row in rows_of_table(workspace, "selection")) == 6
    manifest = pq.read_table(workspace / "shards" / "manifest.parquet")
    assert manifest.num_rows == sum(len(row["tiles"]) for row in rows_of_table(workspace, "tiles")) == 8
    assert sorted(tars(workspace)) == ["hq-000000.tar", "hq-000001.tar"]


def test_stock_webdataset_reads_the_shards_and_gets_the_tiles(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    text = (workspace / "corpus.yaml").read_text().replace("samples: 4", "samples: 4, encoding: png")
    (workspace / "corpus.yaml").write_text(text)
    run(workspace)
    urls = [str(workspace / "shards" / name) for name in tars(workspace)]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == 8
    for sample in samples:
        about = sample["json"]
        source = Image.open(about["uri"].removeprefix("file://")).convert("RGB")
        tile = about["tile"]
        crop = source.crop((tile["x"], tile["y"], tile["x"] + 256, tile["y"] + 256))
        # JPEG sources may differ by a rounding of the decoder's upsampling; PNG ones not at all.
        worst = max(abs(a - b) for a, b in zip(crop.tobytes(), sample["png"].tobytes(), strict=True))
        assert worst <= (0 if about["name"].endswith("png") else 2)


def test_the_same_sources_give_byte_identical_tars_in_another_workspace(tmp_path, pile, run):
    for name in "ab":
        run(configure(tmp_path / name, pile))
    assert tars(tmp_path / "a") == tars(tmp_path / "b") != {}


def test_a_second_run_does_nothing(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in workspace.rglob("*")}
    lines = run(workspace)
    assert {line.split(": ")[1] for line in lines if not line.startswith("ingest")} == {"nothing to do"}
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in workspace.rglob("*")} == before


def test_new_images_are_added_in_new_shards_and_nothing_else_is_done_again(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    before, parts = tars(workspace), {p.name for p in (workspace / "tiles").iterdir()}
    photograph(50).save(pile / "new.jpg", quality=92)
    lines = run(workspace)
    assert "ingest: 12 listed, 1 new" in lines[0]
    assert any(line.startswith("score: 1 rows") for line in lines)
    after = tars(workspace)
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"hq-000002.tar"}
    assert parts < {p.name for p in (workspace / "tiles").iterdir()}
    assert pq.read_table(workspace / "shards" / "manifest.parquet").num_rows == 9


def test_a_tighter_threshold_reads_no_image_and_drops_only_what_it_must(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    before = tars(workspace)
    for path in pile.rglob("*.jpg"):
        os.utime(path)      # touched, not ingested again: select and tile must not look at the files
    scores = rows_of_table(workspace, "scores")
    largest = max(row["width"] for row in scores)
    text = (workspace / "corpus.yaml").read_text()
    text = text.replace("min_side: 256", f"min_side: 256, where: {{narrow: width < {largest}}}")
    (workspace / "corpus.yaml").write_text(text)
    lines = run(workspace, "dedup", "select", "tile", "shard")
    assert any(line.startswith("tile: 0 rows") for line in lines)      # all taken over from before
    kept = {row["uid"] for row in rows_of_table(workspace, "selection") if row["kept"]}
    held = pq.read_table(workspace / "shards" / "manifest.parquet")["uid"].to_pylist()
    assert len(kept) == 5 and set(held) == kept
    assert set(tars(workspace)) <= set(before)


def test_limit_does_so_many_rows_and_the_next_run_the_rest(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest")
    assert "score: 3 rows" in run(workspace, "score", limit=3)[0]
    assert "score: 8 rows" in run(workspace, "score")[0]
    assert len(rows_of_table(workspace, "scores")) + len(rows_of_table(workspace, "quarantine/score")) == 11


def test_a_limit_within_a_part_is_exact_and_its_rows_are_not_scored_again(tmp_path, pile, run, monkeypatch):
    monkeypatch.setattr("pipeline.ingest.PARTS_WANTED", 1)
    workspace = configure(tmp_path / "w", pile)
    folder = Folder.at(str(workspace))
    ingest(folder, load(folder))        # in this process, where the patch holds
    assert "score: 3 rows" in run(workspace, "score", limit=3)[0]
    line = run(workspace, "score")[0]
    assert "score: 8 rows" in line and "3 already known" in line
    assert len({row["ref"] for row in rows_of_table(workspace, "scores")}) == 8


def test_quarantined_rows_are_tried_again_only_when_asked(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    source = json.loads(json.dumps(rows_of_table(workspace, "sources")))
    half = next(row for row in source if row["name"] == "half.jpg")
    status = os.stat(pile / "half.jpg")
    photograph(1).save(pile / "half.jpg", quality=92)       # the source is mended under the same name
    assert "score: nothing to do" in run(workspace, "score")[0]
    line = run(workspace, "score", retry_errors=True)[0]
    assert "score: 3 rows" in line and "2 in quarantine" in line
    assert half["ref"] in {row["ref"] for row in rows_of_table(workspace, "scores")}
    assert status.st_size == 9000


def test_a_file_that_vanishes_after_ingest_is_a_row_of_the_quarantine(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest")
    (pile / "3.jpg").unlink()
    run(workspace, "score")
    assert {"name": "3.jpg", "error": "not_found"}.items() <= next(
        row for row in rows_of_table(workspace, "quarantine/score") if row["name"] == "3.jpg").items()


def test_a_file_that_changes_before_the_shards_is_refused_and_named(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest", "score", "dedup", "select", "tile")
    photograph(77).save(pile / "3.jpg", quality=92)
    lines = run(workspace, "shard")
    assert any("changed 1" in line for line in lines)
    assert pq.read_table(workspace / "shards" / "manifest.parquet").num_rows == 7


def test_a_replaced_file_is_scored_anew_and_its_old_row_steps_back(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    photograph(78, 330, 300).save(pile / "3.jpg", quality=92)
    run(workspace)
    rows = {row["ref"]: row["uri"] for row in rows_of_table(workspace, "sources") if row["name"] == "3.jpg"}
    reasons = [row["reason"] for row in rows_of_table(workspace, "selection") if row["ref"] in rows]
    assert sorted(reasons, key=str) == [None, "replaced"]


def test_a_rotten_source_stops_the_job(tmp_path, run):
    pile = tmp_path / "rotten"
    pile.mkdir()
    for i in range(150):
        (pile / f"{i}.jpg").write_bytes(b"<html>" if i % 3 else b"")
    workspace = configure(tmp_path / "w", pile)
    run(workspace, "ingest")
    with pytest.raises(JobStopped, match=r"score stopped: \d+ of \d+ rows failed, mostly 'not_an_image'.*--retry"):
        run(workspace, "score", max_error_rate=0.1)


def test_the_original_jpeg_is_kept_when_the_tile_is_the_whole_picture(tmp_path, run):
    pile = tmp_path / "pile"
    pile.mkdir()
    photograph(9, 256, 256).save(pile / "exact.jpg", quality=91)
    run(configure(tmp_path / "w", pile))
    with tarfile.open(fileobj=io.BytesIO(tars(tmp_path / "w")["hq-000000.tar"])) as tar:
        data = tar.extractfile(tar.getnames()[0]).read()
    assert hashlib.sha256(data).digest() == hashlib.sha256((pile / "exact.jpg").read_bytes()).digest()


def test_captions_join_the_shards_when_there_are_any(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    key = pq.read_table(workspace / "shards" / "manifest.parquet")["key"][0].as_py()
    table = captions(Folder.at(str(workspace)), Corpus())
    table.write("000000-1-x", "model", [{"key": key, "caption": "a wave", "model": "m"}])
    before = tars(workspace)
    run(workspace, "shard")
    changed = [name for name, data in tars(workspace).items() if data != before[name]]
    with tarfile.open(workspace / "shards" / changed[0]) as tar:
        assert len(changed) == 1 and tar.extractfile(f"{key}.txt").read() == b"a wave"
        assert json.loads(tar.extractfile(f"{key}.json").read())["caption_model"] == "m"


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    assert "11 new" in run(workspace, "ingest", dry_run=True)[0]
    assert [path.name for path in workspace.iterdir()] == ["corpus.yaml"]
    run(workspace, "ingest")
    before = sorted(workspace.rglob("*"))
    line = run(workspace, "score", dry_run=True)[0]
    assert "11 rows pending" in line and "ms each" in line
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.slow
def test_an_optional_metric_is_computed_once_and_can_decide(tmp_path, pile, run):
    pytest.importorskip("pyiqa")
    metric = "score: {metrics: [{name: piqe, kind: pyiqa, model: piqe, device: cpu, size: 128}]}\n"
    workspace = configure(tmp_path / "w", pile, extra=metric)
    assert any(line.startswith("metric-piqe: 8 rows") for line in run(workspace))
    values = metric_table(Folder.at(str(workspace)), "piqe").dataset().to_table()["value"].to_pylist()
    limit = sorted(values)[3] + 1e-6
    text = (workspace / "corpus.yaml").read_text()
    text = text.replace("min_side: 256", f"min_side: 1, metrics: {{piqe: {{max: {limit}}}}}")
    (workspace / "corpus.yaml").write_text(text)
    assert "metric-piqe: nothing to do" in run(workspace)
    reasons = [row["reason"] for row in rows_of_table(workspace, "selection")]
    assert reasons.count("piqe_high") == sum(value > limit for value in values) > 0


def test_groups_make_their_own_shards(tmp_path, pile, run):
    other = tmp_path / "faces"
    other.mkdir()
    photograph(30).save(other / "face.jpg", quality=92)
    workspace = configure(tmp_path / "w", pile, f"{{uri: {str(other)!r}, group: face}}")
    run(workspace)
    assert "face-000000.tar" in tars(workspace)
    summary = json.loads((workspace / "shards" / "corpus.json").read_text())
    assert summary["groups"]["face"]["samples"] == 1 and summary["config"]["tile"]["size"] == 256
