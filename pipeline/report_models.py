"""What models made, for the report: captions and negatives. All text here is data, and the page escapes it."""

from __future__ import annotations

import base64

import duckdb

from .config import Corpus
from .crops import Crops
from .decode import decode
from .jobs import Timed, error_class
from .selection import quoted
from .thumbnails import thumbnail_bytes
from .tile import KEY

SHOWN, FLAG_SHOWN = 12, 4
LONGEST = 600           # characters of a caption on the page


def captioned(db: duckdb.DuckDBPyConnection, corpus: Corpus) -> dict:
    """How many captions there are, what they are flagged for, and some of each kind with their tiles."""
    count, good, tokens, models = db.sql("""
        select count(*), count(*) filter (len(coalesce(flags, [])) = 0), median(tokens), list(distinct model)
        from captions""").fetchall()[0]
    flags = db.sql("""select flag, count(*) from (select unnest(flags) as flag from captions) group by flag
                      order by count(*) desc, flag""").fetchall()
    unwanted = set(corpus.select.caption_flags)
    groups = [{"flag": flag, "count": number, "dropped": flag in unwanted,
               "examples": _examples(db, corpus, f"list_contains(flags, {quoted(flag)})", FLAG_SHOWN)}
              for flag, number in flags]
    return {"count": count, "good": good, "tokens": tokens, "models": sorted(filter(None, models or [])),
            "examples": _examples(db, corpus, "len(coalesce(flags, [])) = 0", SHOWN), "flags": groups}


def _examples(db: duckdb.DuckDBPyConnection, corpus: Corpus, condition: str, limit: int) -> list[dict]:
    rows = db.sql(f"""
        with chosen as (select * from captions where {condition} order by md5(key) limit {limit}),
        flat as (select ref, uid, unnest(tiles) as tile from tiles),
        named as (
            select {KEY} as key, *
            from flat),
        one as (select key, arg_min(named, ref) as at_tile from named semi join chosen using (key) group by key)
        select chosen.*, at_tile.tile, at_tile.uid, sources.* exclude (text), sources.text as alt_text
        from chosen left join one using (key) left join sources on sources.ref = at_tile.ref order by md5(key)
        """).to_arrow_table().to_pylist()
    crops = Crops(corpus.score.limits)
    return [_picture(row, lambda r: crops.pixels(r)) | {
        "text": shortened(row["caption"] or row["raw"] or ""), "flags": row["flags"] or [], "alt_text": row["alt_text"]}
        for row in rows]


def painted(db: duckdb.DuckDBPyConnection, corpus: Corpus) -> dict:
    """How many negatives there are, what they are flagged for, and some of them."""
    count, good = db.sql("select count(*), count(*) filter (len(flags) = 0) from negatives").fetchall()[0]
    flags = db.sql("""select flag, count(*) as count from (select unnest(flags) as flag from negatives) group by flag
                      order by count desc, flag""").fetchall()
    rows = db.sql(f"""select *, json_extract_string(provenance, '$.prompt') as prompt from negatives
                      order by len(flags) > 0, md5(key) limit {SHOWN}""").to_arrow_table().to_pylist()

    def read(row: dict) -> object:
        from .storage import read_bytes
        return decode(read_bytes(row["uri"], row["offset"], row["length"]), corpus.score.limits)
    return {"count": count, "good": good, "flags": [{"flag": flag, "count": number} for flag, number in flags],
            "examples": [_picture(row | {"name": row["key"]}, read) | {
                "text": shortened(row["prompt"] or ""), "flags": row["flags"]} for row in rows]}


def _picture(row: dict, read: object) -> dict:
    tile = row.get("tile") or {"out_width": 0, "out_height": 0}
    about = {"name": row["name"], "size": f"{tile['out_width']} × {tile['out_height']}", "image": None, "problem": None}
    try:
        with Timed(lambda r: thumbnail_bytes(read(r)), 60) as make:
            about["image"] = "data:image/jpeg;base64," + base64.b64encode(make(row)).decode()
    except Exception as error:      # the page must come out whatever became of the files
        about["problem"] = error_class(error)
    return about


def shortened(text: str) -> str:
    """A text as the page shows it: control characters as what they are called, and not too long."""
    shown = "".join(c if c.isprintable() or c == " " else "\ufffd" for c in text.replace("\n", " "))
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + " …"
