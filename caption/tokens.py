"""CLIP tokens: how many a text has, and the version of it that fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .clean import sentences

LIMIT = 77                                   # positions of both SDXL text encoders, begin and end tokens included
CLAUSE = re.compile(r"(?<=[,;:—–])\s+")


@dataclass(frozen=True)
class Tokens:
    """Counts CLIP tokens with a CLIPTokenizer; without one it counts nothing, since an estimate would mislead.

    transformers is imported only by `load`: it takes seconds, and most workers never count.
    """

    tokenizer: Any = None

    @classmethod
    def load(cls, folder: str | Path) -> Tokens:
        """A tokenizer from a local folder, such as `tokenizer/` of SDXL's diffusers folder; nothing is downloaded.

        Raises:
            FileNotFoundError: the folder holds no tokenizer.
        """
        folder = Path(folder)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(f"{folder} holds neither tokenizer.json nor vocab.json; "
                                    "name the tokenizer folder of a CLIP or SDXL model")
        from transformers import CLIPTokenizer
        return cls(CLIPTokenizer.from_pretrained(folder, local_files_only=True))

    def count(self, text: str) -> int | None:
        """Tokens of a text with the begin and end tokens (2 for an empty text); None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])


def fit(text: str, tokens: Tokens, limit: int = LIMIT, keep: str = "") -> str | None:
    """The beginning of a text that has at most `limit` tokens, ended by `keep`; None without a tokenizer.

    Whole sentences; where they leave more than half of the room empty, also whole clauses of the next one. A first
    clause that is too long is cut after a word, a first word that is too long after a character. A text that fits
    stays as it is, a text that is not empty never becomes empty, and fitting twice changes nothing.

    Raises:
        ValueError: `keep` and the limit leave no room for a part of the text.
    """
    if tokens.count("") is None:
        return None
    text, keep = " ".join(text.split()), " ".join(keep.split())
    if keep and (text == keep or text.endswith(" " + keep)):
        text = text.removesuffix(keep).rstrip()

    def size(body: str) -> int:
        return tokens.count(f"{body} {keep}" if body and keep else body or keep)

    if size("") > limit:
        raise ValueError(f"{size('')} of {limit} tokens are begin, end and the words to keep {keep!r}; shorten them")
    body = _longest(text, size, limit)
    if text and not body:
        raise ValueError(f"{size('')} of {limit} tokens are begin, end and the words to keep {keep!r}, which leaves no "
                         "room for text; raise the limit or shorten the words")
    return f"{body} {keep}".strip()


def _longest(text: str, size: Callable[[str], int], limit: int) -> str:
    if size(text) <= limit:
        return text
    pieces = sentences(text)
    count = _how_many(pieces, " ".join, size, limit)
    body = " ".join(pieces[:count])
    if count and size(body) - size("") > (limit - size("")) / 2:
        return body
    clauses = CLAUSE.split(pieces[count])

    def with_clauses(taken: Sequence[str]) -> str:
        return " ".join((*pieces[:count], _ended(" ".join(taken))))

    extra = _how_many(clauses, with_clauses, size, limit)
    if extra:
        return with_clauses(clauses[:extra])
    if body:
        return body
    words = clauses[0].split()
    taken = _how_many(words, lambda some: _ended(" ".join(some)), size, limit)
    if taken:
        return _ended(" ".join(words[:taken]))
    return words[0][:_how_many(words[0], "".join, size, limit)]


def _ended(text: str) -> str:
    """A clause or words as a sentence."""
    return re.sub(r"[\s,;:—–-]+$", "", text) + "." if re.search(r"\w", text) else text


def _how_many(pieces: Sequence[str], join: Callable[[Sequence[str]], str], size: Callable[[str], int],
              limit: int) -> int:
    """The most pieces from the beginning that fit, by bisection: CLIP never merges across spaces, so more is longer."""
    low, high = 0, len(pieces)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(join(pieces[:middle])) <= limit else (low, middle - 1)
    return low
