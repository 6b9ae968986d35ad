"""Report: one self-contained page that shows what was kept, what was not, and why.

Counts and histograms come from queries; pictures are samples, chosen by the hash of their content, so that
the page of a million images is as large as that of a thousand.
"""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import duckdb
import jinja2

from . import scores
from .config import Corpus
from .decode import decode
from .dedup import duplicates
from .ingest import sources
from .jobs import Timed, error_class
from .plan import captions, negatives
from .query import database
from .report_models import captioned, painted
from .score import metric_table, read_image, scores_table
from .selection import DUPLICATE, REPLACED, is_number, quoted, ranges, rules, selection
from .shards import stated
from .storage import Folder
from .tables import QUARANTINE, Table, contents, digest
from .thumbnails import thumbnail_bytes
from .tile import tiles

PAGE, STATE = "corpus.html", "corpus.inputs.json"
KEPT_SHOWN, REASON_SHOWN, CLUSTERS_SHOWN, ERRORS_SHOWN, SHARDS_SHOWN = 30, 10, 12, 5, 100
BINS = 40


def write_report(workspace: Folder, corpus: Corpus) -> str:
    """Writes `reports/corpus.html` unless it is up to date; returns where it is."""
    folder, tables = workspace / "reports", all_tables(workspace, corpus)
    inputs = digest(6, corpus.model_dump(), stated(workspace / "shards"),
                    contents(tables))
    with contextlib.suppress(FileNotFoundError, ValueError):
        if folder.exists(PAGE) and json.loads(folder.read(STATE)) == inputs:
            return str(folder / PAGE)
    with database(**{name: table.dataset() for name, table in tables.items()}) as db:
        page = Page(db, corpus, workspace)
        text = page.html()
    folder.write(PAGE, text.encode("utf-8", "replace"))
    folder.write(STATE, json.dumps(inputs).encode())
    return str(folder / PAGE)


def all_tables(workspace: Folder, corpus: Corpus) -> dict[str, Table]:
    stages = ["ingest", "fetch", "score", "tile", "caption", "negatives", "shard",
              *(f"metric-{m.name}" for m in corpus.score.metrics)]
    return ({"sources": sources(workspace), "scores": scores_table(workspace), "duplicates": duplicates(workspace),
             "selection": selection(workspace), "tiles": tiles(workspace),
             "captions": captions(workspace, corpus), "negatives": negatives(workspace)}
            | {f"metric_{m.name}": metric_table(workspace, m.name) for m in corpus.score.metrics}
            | {f"quarantine_{s.replace('-', '_')}": Table(workspace / "quarantine" / s, QUARANTINE) for s in stages})


@dataclass
class Page:
    """Gathers what the page shows; each method is one section."""

    db: duckdb.DuckDBPyConnection
    corpus: Corpus
    workspace: Folder

    def html(self) -> str:
        self.db.execute("create temp table quarantine as " + " union all ".join(
            f"select * from {name}" for name in all_tables(self.workspace, self.corpus) if name.startswith("quara")))
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text())
        return template.render(
            workspace=str(self.workspace), funnel=self.funnel(), facts=self.facts(), kept=self.kept(),
            rejected=self.rejected(), clusters=self.clusters(), errors=self.errors(), shards=self.shards(),
            captions=captioned(self.db, self.corpus), negatives=painted(self.db, self.corpus),
            config=self.corpus, rule_count=len(rules(self.corpus)))

    def rows(self, sql: str) -> list[dict]:
        return self.db.sql(sql).to_arrow_table().to_pylist()

    def one(self, sql: str) -> int:
        return self.db.sql(sql).fetchall()[0][0] or 0

    def funnel(self) -> list[dict]:
        """Steps from listed to sharded: name, how many are left, how many went here, why."""
        unfetched = self.one("select count(*) from quarantine_fetch")
        listed = self.one("select count(*) from sources") + unfetched
        steps, left = [{"name": "listed", "left": listed, "gone": 0, "kind": "stage"}], listed
        undecodable = self.one("select count(*) from quarantine_score")
        judged = self.one("select count(*) from selection")
        losses = [("not fetched", unfetched, "error"), ("not decodable", undecodable, "error"),
                  *((reason, count, "rule") for reason, count in self.reasons()),
                  ("not scored or selected yet", listed - unfetched - undecodable - judged, "rule")]
        for name, gone, kind in losses:
            left -= gone
            if gone:
                steps.append({"name": name, "left": left, "gone": gone, "kind": kind})
        return [*steps, *self._outcome()]

    def reasons(self) -> list[tuple[str, int]]:
        """How many images each reason took, in the order in which the rules are asked."""
        order = [REPLACED, *rules(self.corpus), DUPLICATE]
        counts = {r["reason"]: r["count"] for r in
                  self.rows("select reason, count(*) as count from selection where not kept group by reason")}
        # What no rule says now is of an earlier corpus.yaml: the selection is behind.
        return [(reason, counts[reason]) for reason in [*order, *sorted(set(counts) - set(order))] if reason in counts]

    def _outcome(self) -> list[dict]:
        kept = self.one("select count(*) from selection where kept")
        failed = self.one("select count(*) from quarantine_tile")
        without = self.one("select count(*) from tiles where len(tiles) = 0")
        samples = self.one("select sum(len(tiles)) from tiles")
        lost = {"name": "not readable any more", "left": kept - failed, "gone": failed, "kind": "error"}
        untiled = {"name": "without a textured tile", "left": kept - failed - without, "gone": without, "kind": "rule"}
        return [{"name": "kept images", "left": kept, "gone": 0, "kind": "stage"}, *([lost] if failed else []),
                *([untiled] if without else []),
                {"name": "samples (tiles)", "left": samples, "gone": 0, "kind": "samples"}]

    def facts(self) -> list[dict]:
        """A histogram of every numeric fact and metric: all images and the kept ones, and the thresholds."""
        columns = [(f.name, f'"{f.name}"', f.unit, f.description, "scores") for f in scores.FACTS if is_number(f)]
        columns += [(m.name, '"value"', "", f"{m.kind} {m.model}", f"metric_{m.name}")
                    for m in self.corpus.score.metrics]
        limits = ranges(self.corpus)
        return [chart for name, column, unit, about, table in columns
                if (chart := self._histogram(name, column, unit, about, table, limits.get(name)))]

    def _histogram(self, name: str, column: str, unit: str, about: str, table: str, limits: object) -> dict | None:
        low, high, count = self.db.sql(f"""
            select quantile_cont({column}, 0.002), quantile_cont({column}, 0.998), count({column}) from {table}
            where isfinite({column}::double)""").fetchall()[0]
        if not count:
            return None
        edges = [v for v in (limits.min, limits.max) if v is not None] if limits else []
        low, high = min([low, *edges]), max([high, *edges])
        width = (high - low) / BINS or 1.0
        bins = self.db.sql(f"""
            select least(greatest(floor(({column} - {low}) / {width}), 0), {BINS - 1})::int as bin, count(*),
                   count(*) filter (kept) from {table} left join selection on selection.ref = {table}.ref
            where isfinite({column}::double) group by bin""").fetchall()
        top = max(total for _, total, _ in bins)
        bars = [{"x": 100 * b / BINS, "w": 100 / BINS - 0.3, "all": 100 * total / top, "kept": 100 * kept / top,
                 "title": f"{number(low + b * width)} to {number(low + (b + 1) * width)}: {total}, kept {kept}"}
                for b, total, kept in sorted(bins)]
        marks = [{"x": 100 * (edge - low) / (width * BINS), "value": number(edge)} for edge in edges]
        return {"name": name, "unit": unit, "about": about, "bars": bars, "marks": marks, "low": number(low),
                "high": number(high), "count": count}

    def kept(self) -> list[dict]:
        return self.pictures(f"where kept order by md5(uid) limit {KEPT_SHOWN}")

    def rejected(self) -> list[dict]:
        """Per reason, in the order of the rules: how many, and some of them."""
        return [{"reason": reason, "count": count, "rule": rules(self.corpus).get(reason, ""),
                 "pictures": self.pictures(f"where reason = {quoted(reason)} order by md5(uid) limit {REASON_SHOWN}")}
                for reason, count in self.reasons()]

    def pictures(self, condition: str) -> list[dict]:
        rows = self.rows(f"""select sources.*, scores.width, scores.height from (select * from selection {condition}) s
                             join sources on sources.ref = s.ref join scores on scores.ref = s.ref""")
        return [thumbnail(row, self.corpus) for row in rows]

    def clusters(self) -> dict:
        """The largest clusters and a sample of the others, members side by side."""
        sizes = self.rows("""select cluster, count(*) as size from duplicates group by cluster
                             order by size desc, cluster""") if self.one("select count(*) from duplicates") else []
        shown = sizes[: CLUSTERS_SHOWN // 2] + sizes[CLUSTERS_SHOWN // 2:][:: max(1, len(sizes) // CLUSTERS_SHOWN)]
        groups = []
        for row in shown[:CLUSTERS_SHOWN]:
            members = self.rows(f"""
                select sources.*, d.kind, d.distance, selection.kept, scores.width, scores.height from duplicates d
                join sources on sources.ref = d.ref join scores on scores.ref = d.ref
                left join selection on selection.ref = d.ref
                where d.cluster = {row['cluster']} order by d.rank limit 6""")
            groups.append({"size": row["size"], "members": [
                thumbnail(m, self.corpus) | {"kind": m["kind"], "distance": m["distance"], "kept": m["kept"]}
                for m in members]})
        return {"count": len(sizes), "images": sum(r["size"] for r in sizes), "groups": groups}

    def errors(self) -> list[dict]:
        classes = self.rows("""select stage, error, count(*) as count from quarantine group by all
                               order by count desc, stage, error""")
        for row in classes:
            row["examples"] = self.rows(
                f"""select name, message from quarantine where stage = {quoted(row['stage'])} and
                    error = {quoted(row['error'])} order by ref limit {ERRORS_SHOWN}""")
        return classes

    def shards(self) -> dict:
        known = stated(self.workspace / "shards")
        rows = [{"name": name} | shard for name, shard in sorted(known.items())]
        return {"count": len(rows), "samples": sum(r["samples"] for r in rows), "bytes": sum(r["bytes"] for r in rows),
                "rows": rows[:SHARDS_SHOWN]}


def thumbnail(row: dict, corpus: Corpus) -> dict:
    """A small picture of a source row as a data URI, or the reason why there is none."""
    limits = corpus.score.limits
    about = {"name": row["name"], "size": f"{row['width']} × {row['height']}", "image": None, "problem": None}
    try:
        with Timed(lambda r: thumbnail_bytes(decode(read_image(r, limits.max_bytes), limits)), 60) as make:
            about["image"] = "data:image/jpeg;base64," + base64.b64encode(make(row)).decode()
    except Exception as error:      # the page must come out whatever became of the files
        about["problem"] = error_class(error)
    return about


def number(value: float) -> str:
    """A number as short as it stays clear."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
