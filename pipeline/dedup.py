"""Dedup: clusters of equal and of nearly equal images. Which of them stays is decided by `select`."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa

from .config import Dedup
from .copies import clusters
from .jobs import Job, Outcome, Unit
from .query import database
from .score import scores_table
from .storage import Folder
from .tables import DUPLICATES, Table, digest

KEY = "all"


def duplicates(workspace: Folder) -> Table:
    return Table(workspace / "duplicates", DUPLICATES)


@dataclass
class DedupJob(Job):
    """One unit over the whole corpus: 8 bytes of hash and a few more per image in memory."""

    workspace: Folder
    config: Dedup
    name = "dedup"

    def pending(self) -> list[Unit]:
        parts = scores_table(self.workspace).parts()
        expected = digest(self.name, 1, self.config.model_dump(), sorted((k, p.content) for k, p in parts.items()))
        done = duplicates(self.workspace).parts().get(KEY)
        if not parts or (done is not None and done.inputs == expected):
            return []
        return [Unit(KEY, sum(int(key.split("-")[1]) for key in parts), expected)]

    def tidy(self) -> None:
        duplicates(self.workspace).tidy()

    def rehearse(self, unit: Unit, rows: int) -> int:
        return 0

    def run(self, unit: Unit, isolate: bool = False) -> Outcome:
        table = duplicates(self.workspace)
        earlier = table.parts().get(KEY)
        with database(scores=scores_table(self.workspace).dataset()) as db:
            db.execute(f"create table images as {RANKED}")
            found = near_copies(db, self.config)
            db.register("found", found)
            rows = db.sql(MEMBERS).to_arrow_table()
        table.write(KEY, unit.inputs, rows.select(DUPLICATES.names), replaces=earlier, content=unit.inputs)
        return Outcome(unit.key, unit.rows)


# The best image first: more pixels, then more bytes for each (less compressed), then a stable order.
RANKED = """select ref, uid, phash, phash_mirror, row_number() over (
    order by width::bigint * height desc, bytes desc, uid, ref) - 1 as place from scores"""

# All images of a cluster: its keeper, copies with equal bytes of any member, and near ones.
MEMBERS = """
    with exact as (
        select min(place) as first, uid from images group by uid having count(*) > 1),
    clustered as (
        select images.ref, images.uid, images.place, coalesce(found.cluster, exact.first) as cluster,
               found.distance, found.mirrored
        from images left join exact on exact.uid = images.uid left join found on found.uid = images.uid
        where exact.uid is not null or found.uid is not null),
    ordered as (
        select *, row_number() over (partition by cluster order by place) - 1 as rank,
               row_number() over (partition by uid order by place) - 1 as copy from clustered)
    select ref, uid, cluster, rank,
           case when rank = 0 then 'keeper' when copy > 0 then 'exact'
                when mirrored then 'mirrored' else 'near' end as kind,
           coalesce(distance, 0)::int as distance from ordered order by cluster, rank"""


def near_copies(db: duckdb.DuckDBPyConnection, config: Dedup) -> pa.Table:
    """Clusters of more than one distinct picture: uid, cluster (place of the keeper), distance, mirrored."""
    images = db.sql("""select min(place) as place, any_value(phash) as phash, any_value(phash_mirror) as mirror
                           from images where phash is not null group by uid order by place""").fetchnumpy()
    place = np.asarray(images["place"], np.int64)
    result = clusters(np.asarray(images["phash"], np.uint64), -place, config.max_distance,
                      mirrored=np.asarray(images["mirror"], np.uint64) if config.mirrored else None)
    member = np.flatnonzero(result.cluster >= 0)
    table = pa.table({"place": place[member], "cluster": place[result.cluster[member]],
                      "distance": result.distance[member], "mirrored": result.mirrored[member]})
    db.register("member", table)
    return db.sql("select uid, member.* exclude (place) from member join images using (place)").to_arrow_table()
