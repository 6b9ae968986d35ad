"""Report: one page that shows the truth, whatever the files are called and whatever became of them."""

import html
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.report import write_report
from pipeline.score import scores_table
from pipeline.storage import Folder
from tests.conftest import configure, photograph, rows_of_table


class Elements(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "link", "line", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def report(workspace):
    folder = Folder.at(str(workspace))
    path = write_report(folder, config.load(folder))
    with open(path, encoding="utf-8") as file:
        return file.read()


def funnel(page):
    """{step: (left, gone)} as the page says it."""
    found = re.findall(r'<div class="(?:stage|rule|error)">([^<]*)</div>\s*<div class="bar \w+" title="(\d+) left'
                       r'(?:, (\d+) gone)?', page)
    return {html.unescape(name): (int(left), int(gone or 0)) for name, left, gone in found}


@pytest.fixture
def workspace(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    return workspace


def test_the_page_refers_to_nothing_outside_itself(workspace):
    page = report(workspace)
    elements = Elements(page)
    assert elements.open == []      # every tag is closed
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in elements.tags}
    for tag, attributes in elements.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:image/jpeg;base64,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert sum(tag == "img" for tag, _ in elements.tags) >= 6


def test_the_funnel_tells_what_the_tables_hold(workspace):
    steps = funnel(report(workspace))
    chosen = rows_of_table(workspace, "selection")
    reasons = Counter(row["reason"] for row in chosen if not row["kept"])
    assert steps["listed"] == (len(rows_of_table(workspace, "sources")), 0) == (11, 0)
    assert steps["not decodable"] == (8, 3)
    assert {name: gone for name, (_, gone) in steps.items() if name in reasons} == reasons
    assert steps["kept images"] == (sum(row["kept"] for row in chosen), 0) == (6, 0)
    assert [name for name in steps if steps[name][1]] == ["not decodable", "too_small", "duplicate"]
    tiles = rows_of_table(workspace, "tiles")
    assert steps.get("without a textured tile", (0, 0))[1] == sum(not row["tiles"] for row in tiles)
    manifest = pq.read_table(workspace / "shards" / "manifest.parquet")
    assert f"<b>{manifest.num_rows}</b>samples in shards" in report(workspace)


def test_after_every_step_as_many_are_left_as_were_there_less_those_that_went(workspace):
    steps = list(funnel(report(workspace)).items())
    for (_, (before, _)), (name, (left, gone)) in pairwise(steps):
        assert left == before - gone, name


@pytest.mark.parametrize("stages", [(), ("ingest",), ("ingest", "score"), ("ingest", "score", "dedup", "select")])
def test_the_page_comes_out_at_any_point_of_a_run(tmp_path, pile, run, stages):
    workspace = configure(tmp_path / "w", pile)
    if stages:
        run(workspace, *stages)
    steps = funnel(report(workspace))
    assert steps["listed"][0] == (11 if stages else 0)
    waiting = {(): 0, ("ingest",): 11, ("ingest", "score"): 8}.get(stages, 0)
    assert steps.get("not scored or selected yet", (0, 0))[1] == waiting
    assert steps["kept images"][0] == (6 if "select" in stages else 0)


def test_with_nothing_kept_the_page_says_so(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile, extra="")
    text = (workspace / "corpus.yaml").read_text()
    (workspace / "corpus.yaml").write_text(text.replace("min_side: 256", "min_side: 9999"))
    run(workspace)
    page = report(workspace)
    assert funnel(page)["kept images"] == (0, 0) and funnel(page)["too_small"][1] == 8
    assert "Nothing was kept" in page


def test_with_every_image_refused_the_page_shows_the_errors(tmp_path, run):
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a.jpg").write_bytes(b"<html>")
    workspace = configure(tmp_path / "w", tmp_path / "pile")
    text = (workspace / "corpus.yaml").read_text()
    (workspace / "corpus.yaml").write_text(text.replace("max_error_rate: 0.9", "max_error_rate: 1"))
    run(workspace)
    page = report(workspace)
    assert funnel(page)["not decodable"] == (0, 1) and "not_an_image" in page and "Nothing was kept" in page


HOSTILE = ["<script>alert(1)<script>.jpg", "\"><img src=x onerror=alert(1)>.jpg", "a'b&amp;c.jpg", "{{ 7 * 7 }}.jpg",
           "line\nbreak.jpg", "日本‮gpj.jpg"]


def test_names_are_shown_and_never_interpreted(tmp_path, run):
    pile = tmp_path / "pile"
    pile.mkdir()
    for seed, name in enumerate(HOSTILE):
        photograph(seed).save(pile / name, quality=92)
        (pile / f"broken {name}").write_bytes(b"<b>not an image</b>")
    with open(bytes(pile) + b"/\xff\xfe.jpg", "wb") as file:
        photograph(50).save(file, "JPEG", quality=92)
    workspace = configure(tmp_path / "w", pile)
    run(workspace)
    page = report(workspace)
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.tags}
    assert not any("onerror" in attributes for _, attributes in elements.tags)
    names = {attributes.get("alt") for tag, attributes in elements.tags if tag == "img"}
    assert set(HOSTILE) | {"��.jpg"} <= names
    text = "".join(elements.text)
    assert sum(f"broken {name}" in text for name in HOSTILE) == 5       # as many examples as are shown of a class


def test_rules_and_metrics_with_quotes_are_counted_and_shown(tmp_path, pile, run):
    workspace = configure(tmp_path / "w", pile)
    text = (workspace / "corpus.yaml").read_text()
    rule = """min_side: 10, where: {'it''s <b>"small"</b>': "width > 100 and 'a' = 'a'"}"""
    (workspace / "corpus.yaml").write_text(text.replace("min_side: 256", rule))
    run(workspace)
    page = report(workspace)
    assert funnel(page)["it's <b>\"small\"</b>"][1] == 1
    text = "".join(Elements(page).text)
    assert "it's <b>\"small\"</b> · 1" in text and "keep if width > 100 and 'a' = 'a'" in text


def test_a_reason_of_an_earlier_configuration_is_still_counted(workspace):
    text = (workspace / "corpus.yaml").read_text()
    (workspace / "corpus.yaml").write_text(text.replace("min_side: 256", "min_side: 256, where: {a: 'width > 1'}"))
    before = funnel(report(workspace))
    assert before["too_small"][1] == 1
    (workspace / "corpus.yaml").write_text(text.replace("min_side: 256", "keep_grey: false"))
    assert funnel(report(workspace)) == before


def test_the_page_does_not_grow_with_the_corpus(workspace):
    multiply(workspace, 20)     # the sheets of samples are full now
    page = report(workspace)
    assert funnel(page)["listed"][0] == 220 and funnel(page)["kept images"][0] == 120
    multiply(workspace, 10)
    larger = report(workspace)
    assert funnel(larger)["listed"][0] == 2200 and len(larger) < 1.1 * len(page)


def multiply(workspace, times):
    """So many times the rows in every table, with refs of their own: the files stay as they are."""
    from pipeline.dedup import duplicates
    from pipeline.ingest import sources
    from pipeline.selection import selection
    from pipeline.tables import QUARANTINE, Table
    from pipeline.tile import tiles
    folder = Folder.at(str(workspace))
    for table in (sources(folder), scores_table(folder), duplicates(folder), selection(folder), tiles(folder),
                  Table(folder / "quarantine" / "score", QUARANTINE)):
        rows = table.dataset().to_table().to_pylist()
        for part in table.parts().values():
            table.folder.delete(part.file)
        made = [row | {"ref": f"{row['ref']}-{i}"} for i in range(times) for row in rows]
        for number, row in enumerate(made):
            row |= {"cluster": row["cluster"] * times + number // len(rows)} if "cluster" in row else {}
        table.write(f"000000-{len(made)}-all", "i", made)


def test_an_up_to_date_page_is_left_alone_and_a_changed_corpus_makes_it_anew(workspace, run, pile):
    report(workspace)
    page = workspace / "reports" / "corpus.html"
    before = page.stat().st_mtime_ns, page.stat().st_ino, page.read_bytes()
    report(workspace)
    assert (page.stat().st_mtime_ns, page.stat().st_ino, page.read_bytes()) == before
    photograph(70).save(pile / "new.jpg", quality=92)
    run(workspace)
    assert funnel(report(workspace))["listed"][0] == 12


def test_a_page_that_was_deleted_is_written_again(workspace):
    report(workspace)
    (workspace / "reports" / "corpus.html").unlink()
    assert funnel(report(workspace))["listed"][0] == 11


def test_files_that_vanished_or_changed_leave_a_place_in_the_sheet(workspace, pile):
    (pile / "0.jpg").unlink()
    (pile / "1.jpg").write_bytes(b"no longer a picture")
    page = report(workspace)
    assert funnel(page)["kept images"][0] == 6
    text = "".join(Elements(page).text)
    assert "not_found" in text and "not_an_image" in text


def test_every_number_has_a_histogram_that_holds_all_images_and_marks_its_threshold(workspace):
    page = report(workspace)
    charts = dict(re.findall(r'aria-label="histogram of (\w+)">(.*?)</svg>', page, re.S))
    for name in ("width", "sharpness", "noise", "entropy", "border", "jpeg_quality"):
        counts = [int(total) for total in re.findall(r": (\d+), kept \d+</title>", charts[name])]
        assert sum(counts) == (7 if name == "jpeg_quality" else 8)
    assert "threshold 75" in charts["jpeg_quality"] and "threshold" not in charts["width"]
    assert not {"phash", "grey", "uid", "format"} & set(charts)


def test_metrics_have_histograms_too(workspace):
    from pipeline.score import metric_table
    folder = Folder.at(str(workspace))
    values = [{"ref": row["ref"], "value": 10.0 * i} for i, row in enumerate(rows_of_table(workspace, "scores"))]
    metric_table(folder, "musiq").write("000000-8-part", "i", values)
    (workspace / "corpus.yaml").write_text(
        (workspace / "corpus.yaml").read_text() + "score: {metrics: [{name: musiq, kind: pyiqa, model: musiq}]}\n")
    assert "histogram of musiq" in report(workspace)
