"""From what a model answered to what is stored: the caption, the version that fits CLIP, its tokens and its flags."""

from __future__ import annotations

from dataclasses import dataclass

from .clean import clean, sentences
from .flags import FLAGS, flags
from .prompts import Prompt
from .tokens import LIMIT, Tokens, fit

__all__ = ["FLAGS", "LIMIT", "Caption", "Tokens", "clean", "describe", "fit", "flags", "sentences"]


@dataclass(frozen=True)
class Caption:
    """An answer and what was made of it. All of it is data: nothing in it is run, parsed or safe to put into HTML."""

    raw: str
    text: str
    short: str | None                        # at most `limit` CLIP tokens; None without a tokenizer
    tokens: int | None                       # of `text`, begin and end tokens included
    flags: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Has text, and no flag."""
        return bool(self.text) and not self.flags


def describe(raw: str, *, prompt: Prompt, question: str | None = None, finish_reason: str = "stop",
             tokens: Tokens | None = None, limit: int = LIMIT, commentary: bool = True) -> Caption:
    """The caption in a model's answer to `question`, which is what `prompt.ask(row)` gave; unset: its template.

    Raises:
        TypeError: `raw` is not text. An answer without a word is no error, but the flag `empty`.
    """
    if not isinstance(raw, str):
        raise TypeError(f"an answer is text, and this is {type(raw).__name__}; a failed request is not a caption")
    asked = prompt.question if question is None else question
    stored = raw.encode("utf-8", "replace").decode()                  # Arrow holds no lone surrogates
    text = clean(raw, asked, commentary)
    tokens = tokens or Tokens()
    found = flags(text, raw, finish_reason=finish_reason, prompt=asked, minimum_words=prompt.min_words)
    return Caption(stored, text, fit(text, tokens, limit), tokens.count(text), found)
