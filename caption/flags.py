"""What is wrong with a caption, by rules that can be read: flags for `select`, never a reason to lose a row."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from math import ceil

from .clean import REPLACEMENT, sentences

FLAGS = ("empty", "control", "refusal", "echo", "repetition", "wrong_language", "too_short", "truncated")

QUOTED = re.compile(r"\"[^\"]{0,300}\"|“[^”]{0,300}”|«[^»]{0,300}»|(?<!\w)'(?:[^']|(?<=\w)'(?=\w)){0,300}'(?!\w)")
REFUSAL = re.compile(
    r"\bI(?:'m| am)(?: very| so| really)? (?:sorry|unable|not able|not allowed|afraid I)\b"
    r"|(?:^|[.!?]\s)(?:sorry,|unable to)|\bthere is no (?:image|picture|photo) (?:here|attached|provided|to|in your)\b"
    r"|\bI apologi[sz]e\b|\bmy apologies\b"
    r"|\bI (?:can(?:not|'t| not)|could(?: not|n't)|do(?: not|n't)|won't|will not)"
    r" (?:\w+ly )?(?:see|view|assist|help(?! but)|process|analy[sz]e|provide|identify|describe|access|open|load|"
    r"fulfil|comply|have (?:access|the ability)|comment|discuss)\b"
    r"|\bas an? (?:AI|artificial intelligence|(?:\w+ )?language model|text-based)\b"
    r"|\b(?:please|could you|can you) (?:upload|provide|share|attach|send)\b"
    r"|\bno (?:image|picture|photo) (?:was|is|has been|appears to be|appears) (?:\w+ )?"
    r"(?:provided|attached|uploaded|visible|shown)\b"
    r"|\b(?:content|usage|safety) polic(?:y|ies)\b", re.IGNORECASE)

# The commonest words of each language, without those that English shares ("no", "do", "die" of a coin).
SMALL_WORDS = {language: frozenset(words.split()) for language, words in {
    "English": "the and of is with are there to that it at which its this by from has an his her their as be in on",
    "Spanish": "el la los las una del con y que es está están por para su sus muy hay se un sobre también",
    "German": "der das und ist mit ein eine einen einem einer auf im von zu den dem sind sich nicht auch es ihr",
    "French": "le la les des une et est avec dans sur du un au aux qui que sont il elle ses cette ce",
    "Italian": "il lo la gli della del di una con e che è sono nel nella un sul sulla dei delle si anche",
    "Portuguese": "o os uma da dos das e que é são na em um seu sua está mais ao",
    "Dutch": "de het een en van met op zijn er dat te voor naar aan ook niet wordt zich"}.items()}


def flags(text: str, raw: str, *, finish_reason: str = "stop", prompt: str = "",
          minimum_words: int = 0) -> tuple[str, ...]:
    """What is wrong with a cleaned caption, in the order of FLAGS: `raw` is what the model answered to `prompt`.

    `finish_reason` is "length" where generation hit its limit of tokens, as vLLM and OpenAI's API name it.
    """
    found = {
        "empty": not any(c.isalnum() for c in text),
        "control": is_control(raw),
        "refusal": is_refusal(text),
        "echo": is_echo(text or raw, prompt),
        "repetition": is_repetition(text),
        "wrong_language": not is_foreign(prompt) and is_foreign(text),
        "too_short": bool(text) and len(words_of(text)) < minimum_words,
        "truncated": finish_reason == "length",
    }
    return tuple(name for name in FLAGS if found[name])


def words_of(text: str) -> list[str]:
    """Words in small letters; apostrophes stay inside."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", _straight(text).casefold())


def is_control(raw: str) -> bool:
    """Over 2% controls, replacement, surrogate, private or unassigned characters, and three of them; or over half."""
    bad = sum(c == REPLACEMENT or unicodedata.category(c) in {"Cc", "Cs", "Co", "Cn"} for c in raw if not c.isspace())
    return (bad >= 3 and bad > 0.02 * len(raw)) or bad > len(raw) / 2


def is_refusal(text: str) -> bool:
    """Speaks of itself as unable, or asks for the image; words in quotation marks are on a sign, and do not count."""
    return bool(REFUSAL.search(QUOTED.sub(" ", _straight(text))))


def is_echo(text: str, prompt: str) -> bool:
    """Holds at least 80% of a sentence of the prompt, and four words, in one run."""
    words = " ".join(words_of(text))
    for sentence in sentences(prompt):
        asked = words_of(sentence)
        length = max(4, ceil(0.8 * len(asked)))
        runs = (" ".join(asked[i:i + length]) for i in range(len(asked) - length + 1))
        if any(f" {run} " in f" {words} " for run in runs):
            return True
    return False


def is_repetition(text: str) -> bool:
    """A loop: three copies of some words in a row, a sentence that comes twice, or a quarter of 4-grams seen before.

    Three copies count from six words on, and of one word four copies ("side by side by side" is no loop). A sentence
    counts from five words on, the share from 24 words on. A character loops when it comes 12 times in a row.
    """
    words = words_of(text)
    for length in range(1, len(words) // 3 + 1):
        needed = 3 if length == 1 else 2 * length
        run = 0
        for now, before in zip(words[length:], words, strict=False):
            run = run + 1 if now == before else 0
            if run >= needed:
                return True
    said = Counter(tuple(words_of(sentence)) for sentence in sentences(text))
    if any(count > 1 and len(sentence) >= 5 for sentence, count in said.items()):
        return True
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    seen_before = 1 - len(set(grams)) / len(grams) if len(words) >= 24 else 0
    return seen_before > 0.25 or bool(re.search(r"([^\W_])\1{11}", text))


def is_foreign(text: str) -> bool:
    """Not English: over 20% (and four) letters outside Latin, or mostly the small words of another language.

    Quotations do not count. The small words are those of Spanish, German, French, Italian, Portuguese and Dutch: three
    different ones in small letters ("La Jolla" is a name), 15% of all words, and more than twice as many as English
    ones. Other languages in Latin script pass.
    """
    text = QUOTED.sub(" ", _straight(text))
    letters = [c for c in text if c.isalpha()]
    other = sum(not c.isascii() and not unicodedata.name(c, "").startswith("LATIN") for c in letters)
    if other >= 4 and other > 0.2 * len(letters):
        return True
    words = re.findall(r"[^\W\d_]+", text)
    hits = {language: [word for word in words if word in small] for language, small in SMALL_WORDS.items()}
    english = len(hits.pop("English"))
    return any(len(set(found)) >= 3 and len(found) >= 0.15 * len(words) and len(found) > 2 * english
               for found in hits.values())


def _straight(text: str) -> str:
    return text.replace("’", "'").replace("‘", "'")
