"""What `corpus.yaml` says about captions and negatives. Nothing heavy is imported here."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from degrade.strict import ConfigError, Strict, check
from pipeline.config import NAME, Corpus, Range
from pipeline.scores import FACTS
from pipeline.selection import is_number

from .prompts import Prompt, Quality, load_prompt, load_quality


class LocalModel(Strict):
    """A model on the workers' own devices, and how it is held."""

    model: str = Field(min_length=1, description="folder in transformers' layout, the same path on every node")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, or balanced: spread over the worker's GPUs")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantisation: Literal["none", "8bit", "4bit"] = Field("none", description="of the weights; needs bitsandbytes")
    batch_size: int = Field(16, ge=1, description="images at a time; halved where they do not fit")


class Server(Strict):
    """Where a model is served, and how hard it may be asked."""

    url: str = Field(pattern=r"^https?://", description="up to and including /v1")
    model: str = Field(min_length=1, description="the name that the server knows")
    concurrency: int = Field(64, ge=1, description="requests under way, of each replica")
    timeout_s: float = Field(120.0, gt=0, description="for one answer")
    retries: int = Field(5, ge=0, description="after time-outs, dropped connections, nonsense, 429 and 5xx")
    backoff_s: float = Field(1.0, ge=0, description="before the first retry; doubles each time, up to a minute")
    patience_s: float = Field(300.0, gt=0, description="without any answer at all, the job stops")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if one is needed")


class Sampling(Strict):
    """How an answer is drawn: greedy at temperature 0."""

    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int = 0


class Workers(Strict):
    """The pool of a job that keeps a model."""

    replicas: int | None = Field(None, ge=1, description="workers; null: one per place for `gpus`, without GPUs one")
    gpus: float | None = Field(None, ge=0, description="of each: a fraction, or several; null: 1 if there are any")


class Captions(Workers):
    """The section `caption` of corpus.yaml. Either `transformers` or `openai` says where the model is."""

    transformers: LocalModel | None = None
    openai: Server | None = None
    name: str = Field("main", pattern=r"^[a-z0-9_-]+$", description="of this set; several lie side by side")
    prompt: Prompt = Field("supir", validate_default=True, description="a preset's name, or a prompt of one's own")
    sampling: Sampling = Sampling()
    retry: Sampling | None = Field(Sampling(temperature=0.7), description="for flagged answers; null: no second try")
    max_side: int | None = Field(1024, ge=28, description="pixels of the longer side shown; null: as it is")
    commentary: bool = Field(True, description="keep closing remarks such as 'Overall, …'")
    tokenizer: str | None = Field(None, description="folder of CLIP's tokenizer, for `tokens` and `short`")
    limit: int = Field(77, ge=3, description="CLIP tokens of `short`")

    _prompt = field_validator("prompt", mode="before")(lambda value: value if isinstance(value, Prompt)
                                                       else load_prompt(value))

    @model_validator(mode="after")
    def _one_backend(self) -> Captions:
        if (self.transformers is None) == (self.openai is None):
            raise ValueError("name one of `transformers: {model: FOLDER}` and `openai: {url: …, model: NAME}`")
        return self


# What a generated image is flagged for: every range must hold. Ranges over the facts of docs/scores.md, and `likeness`.
NEGATIVE_FLAGS = {
    "black": {"clipped_dark": Range(min=0.9)},
    "blank": {"flat_share": Range(min=0.995)},
    "broken": {"noise": Range(min=40.0)},
    "good": {"likeness": Range(min=0.8)},
}


class Negatives(Workers):
    """The section `negatives` of corpus.yaml. The defaults are SUPIR's: image-to-image at strength 0.5."""

    model: str = Field(min_length=1, description="folder of SDXL in diffusers' layout, the same path on every node")
    count: int = Field(100_000, ge=1)
    mode: Literal["image_to_image", "text_to_image"] = "image_to_image"
    strength: float = Field(0.5, gt=0, le=1, description="of image_to_image: share of the steps that are done")
    steps: int = Field(30, ge=1, le=1000)
    guidance_scale: float = Field(5.0, ge=1)
    size: int = Field(1024, ge=64, multiple_of=8, description="pixels of each side")
    words: Quality = Field("supir_negatives", validate_default=True, description="preset or own: what is painted")
    with_caption: bool = Field(True, description="paint the caption of the tile, with the words behind it")
    negative_prompt: str = Field("", description="what guidance leads away from")
    seed: int = 0
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    batch_size: int = Field(4, ge=1, description="images at a time; halved where they do not fit")
    flags: dict[str, dict[str, Range]] = Field(NEGATIVE_FLAGS, description="flag: ranges of facts; {} flags none")

    @field_validator("flags")
    @classmethod
    def _of_known_facts(cls, flags: dict[str, dict[str, Range]]) -> dict[str, dict[str, Range]]:
        known = [fact.name for fact in FACTS if is_number(fact)] + ["likeness"]
        for fact in (fact for ranges in flags.values() for fact in ranges if fact not in known):
            near = difflib.get_close_matches(fact, known, n=1, cutoff=0.5)
            raise ValueError(f"{fact!r} is no number that is computed; "
                             + (f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"))
        return flags

    @model_validator(mode="after")
    def _paints_something(self) -> Negatives:
        if not self.words.negative.strip():
            raise ValueError(f"words: {self.words.name!r} has no negative words, and they are the caption")
        if self.mode == "image_to_image" and int(self.steps * self.strength) < 1:
            raise ValueError(f"strength {self.strength:g} of steps {self.steps} leaves no step; raise one of them")
        return self

    _words = field_validator("words", mode="before")(lambda value: value if isinstance(value, Quality)
                                                     else load_quality(value))


EXAMPLES = {
    "caption": "caption:\n  transformers: {model: /models/llava-1.5-13b-hf}\n  prompt: supir",
    "negatives": "negatives:\n  model: /models/stable-diffusion-xl-base-1.0\n  count: 100000",
}


def captions_of(corpus: Corpus) -> Captions:
    """The section `caption`, checked; raises ConfigError, also where there is none."""
    return _section(corpus.caption, "caption", Captions)


def negatives_of(corpus: Corpus) -> Negatives:
    """The section `negatives`, checked; raises ConfigError, also where there is none."""
    return _section(corpus.negatives, "negatives", Negatives)


def _section(values: dict[str, Any] | None, name: str, model: type[Strict]) -> Any:
    if values is None:
        raise ConfigError(f"{NAME} has no section `{name}`. For example:\n{EXAMPLES[name]}")
    return check(model, values, f"{NAME}: {name}")
