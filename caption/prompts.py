"""Prompts as data: the questions a captioner is asked, and the quality words that go beside captions."""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import Field, field_validator, model_validator

from degrade.strict import ConfigError, Strict, check

# What a template may name. `alt_text` is the text that came with the image; the rest are columns of the plan's rows.
FIELDS = ("alt_text", "author", "group", "height", "key", "licence", "name", "width")
LONGEST = 300                                # characters of one field: a long sentence, far from a second prompt

OPTIONAL = re.compile(r"(\[[^\[\]]*\])")
# What special tokens are spelled with: <image>, <|im_start|>, </s>, [INST], <<SYS>>, ### Instruction, ```
BUILDING_BLOCKS = re.compile(r"[<>|\[\]{}`]|#{2,}")
ROLE = re.compile(r"(?<![^\W_])(user|human|assistant|system|gpt|bot|model)(?:\s*:)+", re.IGNORECASE)
# Controls, format characters (zero-width, bidirectional, tags), surrogates, private use, unassigned.
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn"}

Named = TypeVar("Named", bound=Strict)


class Prompt(Strict):
    """One question to a captioner; `question` and `system` are templates with fields of the row.

    `{alt_text}` is replaced by the field, and `[The site says: {alt_text}.]` is left out where the field is empty.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    source: str = Field("", description="where the wording comes from")
    question: str = Field(min_length=1)
    system: str | None = Field(None, description="the system turn; unset: the one of the model's chat template")
    max_new_tokens: int = Field(512, ge=1, le=8192)
    min_words: int = Field(8, ge=0, description="a caption with fewer is flagged too_short")
    max_words: int = Field(400, ge=1, description="what to plan for; longer captions are kept")

    @field_validator("question", "system")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        if template is not None:
            _check_template(template)
        return template

    @model_validator(mode="after")
    def _ordered(self) -> Prompt:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the row that the templates use, in alphabetical order."""
        templates = f"{self.question} {self.system or ''}"
        return tuple(sorted({name for _, name, _, _ in string.Formatter().parse(templates) if name}))

    def ask(self, row: Mapping[str, Any]) -> str:
        """The question for one row; fields that the row lacks are empty."""
        return _filled(self.question, row)

    def system_for(self, row: Mapping[str, Any]) -> str | None:
        """The system turn for one row, None where the prompt has none."""
        return None if self.system is None else _filled(self.system, row)


class Quality(Strict):
    """Words for the positive and the negative prompt of a restorer, as their source prints them."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    source: str = ""
    positive: str = ""
    negative: str = ""


def harmless(value: Any) -> str:
    """One line of at most LONGEST characters that cannot open a chat turn; None and NaN are empty.

    Not a shield against persuasion: "ignore the image" stays as words. The structure of the chat is what it guards.
    """
    if value is None or value != value:
        return ""
    # NFKC first: some tokenizers fold ＜ and ： to < and :, after which it would be too late.
    text = unicodedata.normalize("NFKC", str(value)[:LONGEST * 8])
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in INVISIBLE)
    text = BUILDING_BLOCKS.sub("", text)
    text = unicodedata.normalize("NFKC", " ".join(ROLE.sub(r"\1 ", text).split()))
    if len(text) > LONGEST:
        text = text[:LONGEST + 1].rpartition(" ")[0] or text[:LONGEST]
    return text


def _check_template(template: str) -> None:
    """Only `{name}` of FIELDS and `[… {name} …]`: attributes, indices and formats would reach into objects."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces that are meant") from None
    for _, name, form, conversion in pieces:
        if name is None:
            continue
        if name not in FIELDS or form or conversion:
            near = difflib.get_close_matches(re.split(r"\W", name)[0], FIELDS, n=1, cutoff=0.5)
            hint = f"; did you mean {{{near[0]}}}?" if near else ""
            raise ValueError(f"a template takes plain fields only, one of {', '.join(FIELDS)}{hint}")
    for piece in OPTIONAL.split(template):
        optional = OPTIONAL.fullmatch(piece)
        if not optional and ("[" in piece or "]" in piece):
            raise ValueError("square brackets hold a sentence that may be left out; close each, without nesting")
        if optional and not any(name for _, name, _, _ in string.Formatter().parse(piece)):
            raise ValueError(f"{piece} has no field, so it would never be left out; remove the brackets")


def _filled(template: str, row: Mapping[str, Any]) -> str:
    values = {name: harmless(row.get(name)) for name in FIELDS}
    text = ""
    for piece in OPTIONAL.split(template):
        optional = OPTIONAL.fullmatch(piece)
        literal = piece[1:-1] if optional else piece
        names = [name for _, name, _, _ in string.Formatter().parse(literal) if name]
        if not optional or all(values[name] for name in names):
            text += literal.format_map(values)
    return re.sub(r"[ \t]+", " ", text).strip()


def _table(items: Iterable[Named]) -> dict[str, Named]:
    return {item.name: item for item in items}


SUPIR_QUESTION = "Describe this image and its style in a very detailed manner."
PROMPTS = _table((
    Prompt(name="supir", source="SUPIR, test script: 512 new tokens, temperature 0.2, top_p 0.7",
           question=SUPIR_QUESTION, min_words=20),
    Prompt(name="supir_photo", source="SUPIR, demonstration page", min_words=20,
           question=f"{SUPIR_QUESTION} The image is a realistic photography, not an art painting."),
    Prompt(name="short", question="Describe the content of this image in one sentence.",
           max_new_tokens=80, min_words=5, max_words=40),
    Prompt(name="long", max_new_tokens=384, min_words=40, max_words=250,
           question="Describe this image in one detailed paragraph: the main subject first, then the surroundings, "
                    "materials and textures, light and colours. Say only what can be seen."),
    Prompt(name="site", min_words=20,
           question=f"{SUPIR_QUESTION} [The page that shows it says, perhaps wrongly: {{alt_text}}.]"),
))
QUALITY = _table((
    Quality(name="none"),
    Quality(name="supir", source="SUPIR, test script: a_prompt and n_prompt",
            positive="Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, hyper detailed "
                     "photo - realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, "
                     "skin pore detailing, hyper sharpness, perfect without deformations.",
            negative="painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, "
                     "3D render, unreal engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, "
                     "signature, jpeg artifacts, deformed, lowres, over-smooth"),
    Quality(name="supir_negatives", source="SUPIR paper: SDXL img2img of negative samples at strength 0.5",
            negative="oil painting, cartoon, blurring, dirty, messy, low quality, frames, deformed, lowres, "
                     "over-smooth"),
    Quality(name="supir_brief", source="the defaults of ComfyUI-SUPIR",
            positive="high quality, detailed", negative="bad quality, blurry, messy"),
    Quality(name="diffbir_v2", source="DiffBIR v2, defaults",
            negative="low quality, blurry, low-resolution, noisy, unsharp, weird textures"),
))


def _load(table: dict[str, Named], model: type[Named], name: str | Mapping[str, Any]) -> Named:
    what = model.__name__.lower()
    if not isinstance(name, str):
        return check(model, dict(name) if isinstance(name, Mapping) else name, what)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(table)}"
        raise ConfigError(f"{what} {name!r}: no preset of that name; {hint}")
    return table[name]


def load_prompt(name: str | Mapping[str, Any]) -> Prompt:
    """A preset by its name, or a prompt from a mapping.

    Raises:
        ConfigError: no such preset (with the nearest name), an unknown key, or a template that uses anything but
            plain fields of the row.
    """
    return _load(PROMPTS, Prompt, name)


def load_quality(name: str | Mapping[str, Any]) -> Quality:
    """Quality words by the name of their preset, or from a mapping; raises ConfigError as `load_prompt` does."""
    return _load(QUALITY, Quality, name)
