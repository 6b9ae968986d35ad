"""What a corpus is made from and what is kept: `corpus.yaml`, checked.

Every default is the value that most corpora for image restoration should have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from degrade import strict
from degrade.strict import ConfigError, Strict

from .decode import Limits
from .metrics import MetricConfig
from .storage import Folder

NAME = "corpus.yaml"


class Columns(Strict):
    """Which columns of a table hold what. Unset ones are recognised by their usual names."""

    uri: str | None = None
    bytes: str | None = None
    licence: str | None = None
    author: str | None = None
    group: str | None = None
    text: str | None = None


class Source(Strict):
    """One place that images come from."""

    uri: str = Field(description="folder, glob, table (.parquet, .csv, .jsonl), WebDataset .tar or URL")
    group: str = Field("hq", pattern=r"^[a-z0-9_]+$", description="names the shards; weighted in training")
    licence: str | None = None
    author: str | None = None
    kind: Literal["auto", "files", "table", "tar"] = "auto"
    extensions: tuple[str, ...] = Field((), description="only these, e.g. [jpg, png]; empty: every file")
    follow_links: bool = True
    columns: Columns = Columns()


class Fetch(Strict):
    """How http(s) sources are downloaded."""

    concurrency: int = Field(32, ge=1, description="requests under way in one worker")
    timeout_s: float = Field(30.0, gt=0, description="for one request, redirects included")
    retries: int = Field(3, ge=0, description="after time-outs, dropped connections, 408, 429 and 5xx")
    backoff_s: float = Field(1.0, ge=0, description="before the first retry; doubles each time")
    max_bytes: int = Field(64 << 20, gt=0)
    max_redirects: int = Field(5, ge=0)
    allow_private: bool = Field(False, description="also fetch from private, loopback and link-local hosts")
    robots_tags: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex"),
        description="refuse images whose X-Robots-Tag has one of these; [] ignores the header")
    user_agent: str = "clearshard"


class Score(Strict):
    limits: Limits = Limits()
    metrics: tuple[MetricConfig, ...] = ()
    row_timeout_s: float = Field(120.0, gt=0, description="an image that takes longer is quarantined")


class Dedup(Strict):
    max_distance: int = Field(4, ge=0, le=10, description="bits of the 64-bit perceptual hash")
    mirrored: bool = Field(False, description="also find mirrored copies")


class Range(Strict):
    min: float | None = Field(None, allow_inf_nan=False)
    max: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Select(Strict):
    """What is kept. A rule that does not apply to an image (no JPEG quality in a PNG) lets it pass."""

    min_side: int = Field(1024, ge=1, description="pixels of the shorter side")
    max_aspect: float = Field(4.0, ge=1, description="longer side by shorter side")
    facts: dict[str, Range] = Field(default_factory=dict, description="range per fact; adds to the defaults")
    metrics: dict[str, Range] = Field(default_factory=dict, description="range per optional metric")
    keep_grey: bool = True
    keep_near_duplicates: bool = False
    where: dict[str, str] = Field(default_factory=dict, description="rule name: SQL condition to be kept")
    caption_flags: tuple[str, ...] = Field(
        ("empty", "control", "refusal", "echo", "repetition"),
        description="a tile whose caption has one of these stays out of the shards; [] keeps all")


class Tile(Strict):
    mode: Literal["best", "grid", "whole"] = "best"
    size: int = Field(1024, ge=64)
    max_tiles: int = Field(4, ge=1, description="of one image, in mode best")
    min_texture: float = Field(0.25, ge=0, le=1, description="least share of a tile that is not flat")


class Shard(Strict):
    samples: int = Field(1000, ge=1, description="in one tar")
    encoding: Literal["jpeg", "webp", "png"] = Field("jpeg", description="jpeg: 4:4:4; webp: lossless")
    quality: int = Field(95, ge=90, le=100, description="of jpeg")
    seed: int = Field(0, description="of the order of images over the shards")


class Corpus(Strict):
    """The whole of `corpus.yaml`."""

    sources: tuple[Source, ...] = ()
    fetch: Fetch = Fetch()
    score: Score = Score()
    dedup: Dedup = Dedup()
    select: Select = Select()
    tile: Tile = Tile()
    shard: Shard = Shard()
    caption: dict[str, Any] | None = Field(None, description="checked by `caption.config`; null: no captions")
    negatives: dict[str, Any] | None = Field(None, description="checked by `caption.config`; null: none")
    max_error_rate: float = Field(0.5, ge=0, le=1, description="a job stops above this share of failed rows")


def load(workspace: Folder) -> Corpus:
    """Reads `corpus.yaml`.

    Raises:
        ConfigError: absent, not YAML, an unknown key (with the nearest name) or a value out of range.
    """
    try:
        text = workspace.read(NAME).decode()
    except FileNotFoundError:
        raise ConfigError(f"{workspace} has no {NAME}. Make it a workspace with: "
                          f"clearshard init {workspace} --source FOLDER") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{workspace / NAME} is not UTF-8 text: {error}") from None
    return parse(text, str(workspace / NAME))


def parse(text: str, where: str = NAME) -> Corpus:
    """Checks the text of a configuration; `where` names it in errors."""
    return strict.parse(Corpus, text, where)


def template(sources: list[tuple[str, str]]) -> str:
    """A commented `corpus.yaml` for new workspaces; `sources` are (uri, group)."""
    text = (Path(__file__).parent / "corpus.yaml.j2").read_text()
    import jinja2
    return jinja2.Environment(keep_trailing_newline=True).from_string(text).render(
        sources=[(yaml.safe_dump(uri, default_style='"').strip(), group) for uri, group in sources])
