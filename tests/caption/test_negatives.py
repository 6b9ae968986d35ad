"""Negatives: what is planned, that each image depends on its row alone, and what happens when something goes wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from caption.negatives import NegativesJob, PlanNegativesJob, planned
from caption.painting import Sources, painter
from models.fingerprint import fingerprint
from pipeline import scores
from pipeline.config import ConfigError, Corpus, load
from pipeline.dedup import DedupJob
from pipeline.ingest import ingest, sources
from pipeline.plan import captions, negatives
from pipeline.score import ScoreJob
from pipeline.selection import SelectJob
from pipeline.storage import Folder, read_bytes
from pipeline.tables import SOURCES, TILES
from pipeline.tile import TileJob, tiles
from pipeline.verify import VerifyJob, table_problems
from tests.caption.test_painting import ROUNDING, WORDS, apart, settings
from tests.conftest import REPOSITORY, clearshard, configure, photograph, rows_of_table, tars

TILES_MADE = 10
KILLED = 200        # images of the run that is killed: three parts of 64, and 8


# A corpus with ten tiles, and the two jobs in this process ---------------------------------------------------

def photographs(folder: Path) -> Path:
    folder.mkdir()
    for seed in range(TILES_MADE // 2):
        photograph(seed, 600, 300).save(folder / f"{seed}.jpg", quality=92)
    return folder


def done(job) -> int:
    """Does all that is pending of a job; how many rows."""
    job.tidy()
    return sum(job.run(unit).rows for unit in job.pending())


def corpus_of(workspace: Path, pile: Path) -> Path:
    """A workspace up to its tiles."""
    configure(workspace, f"{{uri: {str(pile)!r}, licence: CC0, author: nobody}}")
    text = (workspace / "corpus.yaml").read_text()
    (workspace / "corpus.yaml").write_text(text.replace("samples: 4", "samples: 4, encoding: png"))
    folder, corpus = Folder.at(str(workspace)), load(Folder.at(str(workspace)))
    ingest(folder, corpus)
    for job in (ScoreJob(folder, corpus.score), DedupJob(folder, corpus.dedup), SelectJob(folder, corpus),
                TileJob(folder, corpus)):
        done(job)
    assert sum(len(row["tiles"]) for row in rows_of_table(workspace, "tiles")) == TILES_MADE
    return workspace


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    return corpus_of(folder / "w", photographs(folder / "pile"))


@pytest.fixture
def workspace(tiled, tmp_path):
    return Path(shutil.copytree(tiled, tmp_path / "w"))


def settle(workspace: Path, model: object = "/nowhere", **settings) -> Corpus:
    """Writes the section `negatives` of corpus.yaml in the place of the one that was there."""
    small = {"model": str(model), "count": 12, "size": 64, "steps": 4, "dtype": "float32", "device": "cpu",
             "batch_size": 5, "flags": {}}
    text = (workspace / "corpus.yaml").read_text().partition("negatives:")[0]
    (workspace / "corpus.yaml").write_text(f"{text}negatives: {json.dumps(small | settings)}\n")
    return load(Folder.at(str(workspace)))


def plan(workspace: Path, **settings) -> list[dict]:
    """Plans; the rows of the plan in their order."""
    corpus, folder = settle(workspace, **settings), Folder.at(str(workspace))
    done(PlanNegativesJob(folder, corpus))
    table = planned(folder)
    return [row for _, part in sorted(table.parts().items()) for row in table.read(part).to_pylist()]


def job_of(workspace: Path, model: Path, retry_errors: bool = False, **settings) -> NegativesJob:
    """The job that paints, with its plan made."""
    plan(workspace, model=model, **settings)
    folder = Folder.at(str(workspace))
    return NegativesJob(folder, load(folder), fingerprint(model), retry_errors)


def paint(workspace: Path, model: Path, **settings) -> dict[str, dict]:
    """Plans and paints; the rows of the images by key."""
    done(job_of(workspace, model, **settings))
    return images(workspace)


def images(workspace: Path) -> dict[str, dict]:
    rows = negatives(Folder.at(str(workspace))).dataset().to_table().to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def refused(workspace: Path) -> dict[str, str]:
    return {row["ref"]: row["error"] for row in rows_of_table(workspace, "quarantine/negatives")}


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(read_bytes(row["uri"], row["offset"], row["length"]))).convert("RGB"))


def same_images(first: dict[str, dict], second: dict[str, dict]) -> None:
    assert first.keys() == second.keys() and first
    assert max(apart(pixels(first[key]), pixels(second[key])) for key in first) <= ROUNDING


def files(folder: Path) -> dict[str, tuple]:
    """Every part and tar with what changes when it is written again."""
    paths = (path for path in folder.glob("*") if path.suffix in (".parquet", ".tar"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def names(workspace: Path) -> set[str]:
    """The tars that the images lie in."""
    return {row["uri"].rpartition("/")[2] for row in images(workspace).values()}


# The plan ---------------------------------------------------------------------------------------------------

def test_each_tile_is_planned_once_before_any_is_planned_twice(workspace):
    rows = plan(workspace, count=2 * TILES_MADE + 3)
    rounds = [rows[:TILES_MADE], rows[TILES_MADE:-3], rows[-3:]]
    assert [len({row["source"] for row in some}) for some in rounds] == [TILES_MADE, TILES_MADE, 3]
    assert [{row["round"] for row in some} for some in rounds] == [{0}, {1}, {2}]
    assert [row["source"] for row in rounds[0]] != [row["source"] for row in rounds[1]]
    assert len({row["key"] for row in rows}) == len({row["seed"] for row in rows}) == len(rows) == 23
    assert {row["words"] for row in rows} == {WORDS}
    assert {(row["licence"], row["author"]) for row in rows} == {("CC0", "nobody")}


def test_the_same_images_in_another_folder_are_planned_the_same(workspace, tmp_path):
    other = corpus_of(tmp_path / "elsewhere", photographs(tmp_path / "pile"))
    first, second = plan(workspace, count=25), plan(other, count=25)
    assert [row["uri"] for row in first] != [row["uri"] for row in second]
    for name in ("key", "source", "round", "seed"):
        assert [row[name] for row in first] == [row[name] for row in second]


def test_a_higher_count_goes_on_behind_the_rows_and_images_that_are_there(workspace, tmp_path, sdxl):
    other = shutil.copytree(workspace, tmp_path / "other")
    before, rows = paint(workspace, sdxl, count=70), plan(workspace, model=sdxl, count=70)
    there = [files(workspace / "negatives" / name) for name in ("plan", "images", "tars")]
    job = job_of(workspace, sdxl, count=140)
    assert done(job) == 70
    for name, earlier in zip(("plan", "images", "tars"), there, strict=True):
        assert earlier.items() <= files(workspace / "negatives" / name).items()
    more = plan(workspace, model=sdxl, count=140)
    assert more[:70] == rows and [row["key"] for row in more] == [row["key"] for row in plan(other, count=140)]
    after = images(workspace)
    assert len(after) == 140 and {key: after[key] for key in before} == before


def test_a_lower_count_takes_nothing_away(workspace, sdxl):
    before = paint(workspace, sdxl, count=70)
    job = job_of(workspace, sdxl, count=5)
    assert job.pending() == [] and done(job) == 0
    assert images(workspace) == before and len(planned(job.workspace).dataset().to_table()) == 70


def test_a_lower_count_paints_no_part_of_the_plan_beyond_it(workspace, sdxl):
    assert len(plan(workspace, model=sdxl, count=140)) == 140
    assert 5 <= done(job_of(workspace, sdxl, count=5)) <= 64


@pytest.mark.parametrize("change", [{"words": "supir_brief"}, {"seed": 1}, {"mode": "text_to_image"}])
def test_other_words_or_seed_or_mode_plan_and_paint_everything_anew(workspace, sdxl, change):
    before = paint(workspace, sdxl, count=70)
    job = job_of(workspace, sdxl, count=66, **change)
    assert set(images(workspace)) < set(before)         # those of the parts that are gone left at once
    assert done(job) == 66
    after = images(workspace)
    assert len(after) == 66 and not {row["made"] for row in after.values()} & {row["made"] for row in before.values()}
    job.tidy()
    assert set(files(workspace / "negatives" / "tars")) == names(workspace)


def test_a_plan_that_was_killed_is_finished_to_the_same_rows(workspace, tmp_path):
    other = shutil.copytree(workspace, tmp_path / "other")
    whole, rows = plan(other, count=200), plan(workspace, count=200)
    assert rows == whole
    folder = workspace / "negatives" / "plan"
    for path in sorted(folder.glob("*.parquet"))[2:]:       # as after a kill while more rows were added
        path.unlink()
    assert plan(workspace, count=200) == whole
    (folder / "state.json").unlink()                        # and in the first plan, whose settings come last
    sorted(folder.glob("*.parquet"))[1].unlink()
    assert plan(workspace, count=200) == whole
    assert set(files(folder)) == set(files(other / "negatives" / "plan"))


def test_text_to_image_needs_no_tiles(tmp_path, sdxl):
    painted = paint(configure(tmp_path / "w", "unused"), sdxl, mode="text_to_image", count=7)
    about = [json.loads(row["provenance"]) for row in painted.values()]
    assert len(about) == 7 and {one["source"] for one in about} == {None}
    assert {one["prompt"] for one in about} == {WORDS} and {one["scores"]["likeness"] for one in about} == {None}


def test_image_to_image_without_tiles_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no tiles to paint over.*clearshard tile"):
        plan(configure(tmp_path / "w", "unused"))


def caption_tiles(workspace: Path) -> dict[str, str | None]:
    """A caption for three of the tiles, one of them flagged; what each tile's subject should be."""
    keys = sorted(row["source"] for row in plan(workspace, count=TILES_MADE, seed=99))
    table = captions(Folder.at(str(workspace)), Corpus())
    table.write("000000-3-x", "model", [
        {"key": keys[0], "caption": "A red cup. It is full.", "short": "A red cup.", "flags": []},
        {"key": keys[1], "caption": "the cat", "flags": None},
        {"key": keys[2], "caption": "I cannot see it", "flags": ["refusal"]}])
    return dict.fromkeys(keys) | {keys[0]: "A red cup.", keys[1]: "the cat"}


def test_captions_without_flags_become_subjects(workspace):
    subjects = caption_tiles(workspace)
    assert {row["source"]: row["subject"] for row in plan(workspace, count=TILES_MADE)} == subjects
    without = plan(workspace, count=TILES_MADE, with_caption=False)
    assert {row["subject"] for row in without} == {None}


def test_another_model_or_strength_paints_the_same_plan_anew(workspace, sdxl):
    before = paint(workspace, sdxl)
    job = job_of(workspace, sdxl)
    for other in (replace(job, model="another"), job_of(workspace, sdxl, strength=0.75)):
        assert done(other) == 12 and images(workspace).keys() == before.keys()
    assert done(job) == 12 and images(workspace) == before


def test_without_captions_only_those_images_are_painted_anew_that_had_one(workspace, sdxl):
    subjects = caption_tiles(workspace)
    before = paint(workspace, sdxl, count=TILES_MADE)
    job = job_of(workspace, sdxl, count=TILES_MADE, with_caption=False)
    assert done(job) == 2
    changed = {row["source"] for row in plan(workspace, model=sdxl, count=TILES_MADE, with_caption=False)
               if images(workspace)[row["key"]] != before[row["key"]]}
    assert changed == {key for key, subject in subjects.items() if subject}


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_planned_in_seconds(tmp_path):
    workspace, count = configure(tmp_path / "w", "unused"), 100_000
    folder, size, per_image = Folder.at(str(workspace)), 1000, 4
    squares = [[{"x": 512 * i, "y": 0, "width": 512, "height": 512, "out_width": 512, "out_height": 512, "texture": 0.5}
                for i in range(per_image)]] * size
    for part in range(52):
        refs = [f"{part:08x}{i:016x}" for i in range(size)]
        empty = {name: pa.nulls(size, SOURCES.field(name).type) for name in SOURCES.names}
        listed = empty | {"ref": refs, "uri": [f"file:///{ref}" for ref in refs], "group": ["hq"] * size}
        sources(folder).write(f"{part:06d}-{size}-s", "i", pa.table(listed, schema=SOURCES), content="c")
        tiles(folder).write(f"{part:06d}-{size}-s", "i", content="c", rows=pa.table(
            {"ref": refs, "uid": refs, "group": ["hq"] * size, "tiles": pa.array(squares, TILES.field("tiles").type)}))
    started = time.perf_counter()
    rows = done(PlanNegativesJob(folder, settle(workspace, count=count)))
    print(f"{count} rows of {52 * size * per_image} tiles planned in {time.perf_counter() - started:.1f} s")
    table = planned(folder).dataset().to_table(columns=["key", "source", "round", "seed"])
    assert rows == table.num_rows == count
    assert len(set(table["key"].to_pylist())) == count
    assert len(set(table["source"].to_pylist())) == count and set(table["round"].to_pylist()) == {0}


def test_tiles_are_read_at_the_size_that_is_painted(workspace):
    job = job_of(workspace, workspace, count=TILES_MADE)
    rows = job.rows(job.pending()[0])
    for size in (64, 256, 320):
        batch = Sources(job.corpus.score.limits, settings(workspace, size=size), 60.0)(rows)
        assert not batch.failed and {image.shape for image in batch.inputs["images"]} == {(size, size, 3)}
        if size == 256:
            tile, whole = rows[0]["tile"], np.asarray(Image.open(rows[0]["uri"].removeprefix("file://")))
            assert apart(batch.inputs["images"][0], whole[tile["y"]:tile["y"] + 256, tile["x"]:tile["x"] + 256]) <= 2


# The job: what is painted, and what fails -----------------------------------------------------------------------

def test_batches_of_one_and_of_five_give_the_same_table(workspace, tmp_path, sdxl):
    caption_tiles(workspace)
    other = Path(shutil.copytree(workspace, tmp_path / "other"))
    same_images(paint(workspace, sdxl, batch_size=1), paint(other, sdxl, batch_size=5))


def full_above(limit: int, pipeline, sizes: list[int]):
    """The pipeline, on a device that holds so many images."""
    def narrow(**inputs):
        sizes.append(len(inputs["prompt"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pipeline(**inputs)
    return narrow


def test_a_batch_that_does_not_fit_is_halved_until_it_does(workspace, tmp_path, sdxl, monkeypatch):
    whole, sizes = paint(Path(shutil.copytree(workspace, tmp_path / "other")), sdxl, count=5), []
    job = job_of(workspace, sdxl, count=5)
    paints = painter(job.config)
    monkeypatch.setattr(paints, "pipeline", full_above(2, paints.pipeline, sizes))
    assert done(job) == 5
    assert sizes == [5, 2, 3, 1, 2]
    same_images(images(workspace), whole)


def test_one_image_that_does_not_fit_is_a_row_of_the_quarantine_with_the_remedy(workspace, sdxl, monkeypatch):
    job = job_of(workspace, sdxl, count=3)
    paints = painter(job.config)
    monkeypatch.setattr(paints, "pipeline", full_above(0, paints.pipeline, []))
    done(job)
    assert set(refused(workspace).values()) == {"out_of_memory"} and not images(workspace)
    assert all("bfloat16" in row["message"] for row in rows_of_table(workspace, "quarantine/negatives"))
    monkeypatch.undo()
    assert job.pending() == []
    assert done(job_of(workspace, sdxl, count=3, retry_errors=True)) == 3
    assert len(images(workspace)) == 3 and not refused(workspace)


def test_an_image_of_nan_is_quarantined_and_its_neighbours_are_kept(workspace, sdxl, monkeypatch):
    job = job_of(workspace, sdxl, count=5)
    paints = painter(job.config)
    pipeline = paints.pipeline

    def overflown(**inputs):
        result = pipeline(**inputs)
        result.images[1, 5:9, 7] = np.nan
        return result

    monkeypatch.setattr(paints, "pipeline", overflown)
    second = job.rows(job.pending()[0])[1]["key"]
    done(job)
    assert refused(workspace) == {second: "not_finite"}
    assert len(images(workspace)) == 4 and second not in images(workspace)


def test_a_source_that_vanished_is_quarantined_and_mended_when_asked(tmp_path, sdxl):
    workspace = corpus_of(tmp_path / "w", photographs(tmp_path / "pile"))
    (tmp_path / "pile" / "3.jpg").rename(tmp_path / "3.jpg")
    photograph(77, 600, 300).save(tmp_path / "pile" / "1.jpg")
    good, bad = paint(workspace, sdxl, count=TILES_MADE), refused(workspace)
    assert sorted(bad.values()) == ["changed"] * 2 + ["not_found"] * 2
    assert len(good) == TILES_MADE - 4 and not good.keys() & bad.keys()
    (tmp_path / "3.jpg").rename(tmp_path / "pile" / "3.jpg")
    assert done(job_of(workspace, sdxl, count=TILES_MADE)) == 0
    assert done(job_of(workspace, sdxl, count=TILES_MADE, retry_errors=True)) == 4
    assert set(refused(workspace).values()) == {"changed"}
    after = images(workspace)
    assert len(after) == TILES_MADE - 2 and {key: after[key] for key in good} == good


def test_refused_rows_of_a_plan_that_is_gone_leave_the_quarantine(tmp_path, sdxl):
    workspace = corpus_of(tmp_path / "w", photographs(tmp_path / "pile"))
    (tmp_path / "pile" / "3.jpg").unlink()
    paint(workspace, sdxl, count=TILES_MADE)
    assert len(refused(workspace)) == 2
    paint(workspace, sdxl, count=TILES_MADE + 1, mode="text_to_image")
    assert not refused(workspace) and len(images(workspace)) == TILES_MADE + 1


def test_other_ranges_flag_anew_without_painting(workspace, sdxl):
    before = paint(workspace, sdxl)
    there = files(workspace / "negatives" / "tars")
    middle = median(json.loads(row["facts"])["entropy"] for row in before.values())
    job = job_of(workspace, sdxl, flags={"plain": {"entropy": {"max": middle}}})
    assert done(job) == 0
    after = images(workspace)
    plain = {key for key, row in after.items() if json.loads(row["facts"])["entropy"] <= middle}
    assert 0 < len(plain) < 12 and {key for key, row in after.items() if row["flags"] == ["plain"]} == plain
    assert {key: row | {"flags": []} for key, row in after.items()} == before
    assert files(workspace / "negatives" / "tars") == there


# Shards -----------------------------------------------------------------------------------------------------

def members(workspace: Path) -> dict[str, bytes]:
    """Everything in the tars of the negatives."""
    found = {}
    for path in sorted((workspace / "shards").glob("negative-*.tar")):
        with tarfile.open(path) as tar:
            found |= {name: tar.extractfile(name).read() for name in tar.getnames()}
    return found


def well(workspace: Path) -> bool:
    folder = Folder.at(str(workspace))
    job = VerifyJob(folder, load(folder))
    problems = [text for unit in job.pending() for text in job.run(unit).errors] + table_problems(folder, load(folder))
    assert problems == []
    return True


def test_negatives_become_a_group_of_shards_with_words_and_provenance(workspace, sdxl, run):
    caption_tiles(workspace)
    run(workspace, "shard")
    photographs = tars(workspace)
    made = paint(workspace, sdxl, count=9)
    run(workspace, "shard")
    assert {name: data for name, data in tars(workspace).items() if name.startswith("hq")} == photographs != {}
    assert sorted(set(tars(workspace)) - set(photographs)) == [f"negative-{i:06d}.tar" for i in range(3)]
    found, listed = members(workspace), {row["name"]: row for row in rows_of_table(workspace, "sources")}
    assert len(found) == 27
    for row in plan(workspace, model=sdxl, count=9):
        key, about, source = row["key"], json.loads(found[f"{row['key']}.json"]), listed[row["name"]]
        assert found[f"{key}.txt"].decode() == WORDS
        assert found[f"{key}.png"] == read_bytes(*(made[key][name] for name in ("uri", "offset", "length")))
        assert about["source"] == {name: source[name] for name in ("uri", "name", "licence", "author")} | {
            "uid": row["uid"], "tile": row["tile"], "key": row["source"]}
        assert about["prompt"] == f"{row['subject'] or ''} {WORDS}".strip()
        expected = {"key": key, "group": "negative", "generated": True, "seed": row["seed"], "mode": "image_to_image",
                    "model": fingerprint(sdxl), "strength": 0.5, "steps": 4, "size": 64, "guidance_scale": 5.0,
                    "negative_prompt": "", "dtype": "float32", "encoding": "png"}
        assert {name: about[name] for name in expected} == expected
        assert about["scores"] == json.loads(made[key]["facts"])
        assert about["scores"].keys() == {fact.name for fact in scores.FACTS} | {"likeness"}
        assert about["uid"] == about["scores"]["uid"] == made[key]["uid"]
    assert well(workspace)


def test_the_provenance_of_a_fetched_source_names_where_it_came_from(tmp_path, sdxl):
    (tmp_path / "w").mkdir()
    workspace = corpus_of(tmp_path / "w", photographs(tmp_path / "w" / "originals"))     # where `fetch` puts files
    abouts = [json.loads(row["provenance"])["source"] for row in paint(workspace, sdxl, count=2).values()]
    assert len(abouts) == 2 and all(about["uri"] == about["name"] for about in abouts)


def test_flagged_images_stay_out_of_the_shards_until_the_ranges_let_them_in(workspace, sdxl, run):
    made = paint(workspace, sdxl)
    middle = median(json.loads(row["facts"])["entropy"] for row in made.values())
    for flags in ({"plain": {"entropy": {"max": middle}}}, {}):
        after = paint(workspace, sdxl, flags=flags)
        run(workspace, "shard")
        held = {name.partition(".")[0] for name in members(workspace)}
        assert held == {key for key, row in after.items() if not row["flags"]} and well(workspace)
    assert held == set(made)
    manifest = pq.read_table(workspace / "shards" / "manifest.parquet").to_pylist()
    assert {row["key"] for row in manifest if row["group"] == "negative"} == held


def test_images_of_other_words_take_the_place_of_the_earlier_in_the_shards(workspace, sdxl, run):
    paint(workspace, sdxl, count=66)
    run(workspace, "shard")
    rows = paint(workspace, sdxl, count=5, words="supir_brief")
    run(workspace, "shard")
    held = members(workspace)
    assert {name.partition(".")[0] for name in held} == set(rows) and len(rows) == 5
    assert {data for name, data in held.items() if name.endswith(".txt")} == {b"bad quality, blurry, messy"}
    assert well(workspace)


# The command ------------------------------------------------------------------------------------------------

def test_a_limit_paints_so_many_and_the_next_run_the_rest(workspace, sdxl):
    job = job_of(workspace, sdxl)
    [unit] = job.pending()
    assert job.run(replace(unit, first=5)).rows == 5 and len(images(workspace)) == 5
    assert done(job) == 7 and len(images(workspace)) == 12


def test_a_model_without_its_unet_ends_the_run_at_once_with_one_message(workspace, sdxl, tmp_path, run):
    folder = Path(shutil.copytree(sdxl, tmp_path / "sdxl"))
    shutil.rmtree(folder / "unet")
    settle(workspace, folder)
    with pytest.raises(ConfigError, match=rf"{folder} holds no unet/config\.json: .*hf download"):
        run(workspace, "negatives")
    assert not images(workspace)
    settle(workspace, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere: no model is there.*hf download"):
        run(workspace, "negatives")


def killed_in_the_middle(workspace: Path, env: dict) -> dict[str, tuple]:
    """Starts `clearshard negatives` and kills its process group (-9) once images are there; the parts there then."""
    folder, command = workspace / "negatives" / "images", [sys.executable, str(REPOSITORY / "clearshard.py")]
    process = subprocess.Popen([*command, "negatives", str(workspace), "--count", str(KILLED)], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True, env=os.environ | env)
    while process.poll() is None and not files(folder):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return files(folder)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_images_of_an_undisturbed_one(workspace, tmp_path, sdxl, on_cluster):
    calm = paint(Path(shutil.copytree(workspace, tmp_path / "calm")), sdxl, count=KILLED)
    settle(workspace, sdxl, flags={"all": {"width": {"min": 1}}})
    there = killed_in_the_middle(workspace, on_cluster)
    assert 0 < 64 * len(there) < KILLED
    stray = workspace / "negatives" / "tars" / "000003-8-0123456789ab.tar"      # of a unit that was nearly done
    stray.write_bytes(b"images without rows")
    (stray.parent / ".tmp-0123456789ab-half.tar").write_bytes(b"half")
    said = clearshard("negatives", workspace, "--count", KILLED, env=on_cluster).stdout
    assert 0 < int(re.search(r"negatives: (\d+) rows in", said)[1]) <= KILLED - 64 * len(there)
    assert f"negatives: 0 of {KILLED} without a flag; flagged: all {KILLED}" in said
    assert there.items() <= files(workspace / "negatives" / "images").items()
    after = images(workspace)
    same_images(after, calm)
    for name in ("seed", "prompt", "source"):
        assert all(json.loads(after[key]["provenance"])[name] == json.loads(calm[key]["provenance"])[name]
                   for key in calm)
    assert {path.name for path in (workspace / "negatives" / "tars").iterdir()} == names(workspace)
