"""From a model's answer to a caption: one paragraph of whole sentences that begins with the content."""

from __future__ import annotations

import re
import unicodedata

from .prompts import INVISIBLE

REPLACEMENT = "\ufffd"                       # stands for bytes that were no text
CLOSERS = "\"'”’)]»*_"
WHOLE = re.compile(rf"[.!?…。！？][{re.escape(CLOSERS)}]*$")
STOP = re.compile(rf"[.!?…。！？]+[{re.escape(CLOSERS)}]*\s+")
# After these a full stop is no end: titles, Latin abbreviations, initials and single letters (U.S., J. Smith).
ABBREVIATION = re.compile(r"(?:^|[\s(\"'“‘.])"
                          r"(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Ft|No|vs|etc|approx|ca|cf|[ei]\.[eg])\.$")

TOKEN = re.compile(r"<\|[^<>|]{1,40}\|>|</?s>|<(?:image|pad|unk|bos|eos)>|<(?:start|end)_of_turn>"
                   r"|\[/?INST\]|<</?SYS>>", re.IGNORECASE)
TRANSCRIPT = re.compile(r"^(?:USER|Human|###\s*Human):.*?(?:ASSISTANT|Assistant|AI):", re.DOTALL)
IN_QUOTES = re.compile(r"^(?:\"([^\"]*)\"|“([^“”]*)”)\.?$")
NEXT_TURN = re.compile(r"(?:^|\s)(?:USER|Human|### ?[A-Z]\w+):.*", re.DOTALL)
SPEAKER = re.compile(r"^(?:(?:assistant|ai|gpt|bot|answer|response|caption|description|image description)\s*:\s*)+",
                     re.IGNORECASE)
POLITE = re.compile(r"^(?:(?:sure|certainly|of course|absolutely)(?:[!,.]| thing[!,.])\s*)?"
                    r"here(?:['’]s| is) (?:a|an|the|my|your)\b[^.:!?]{0,80}\b(?:description|caption)\b[^.:!?]{0,60}:\s*"
                    r"|^(?:(?:sure|certainly|of course|absolutely)[!.]\s+)+", re.IGNORECASE)

HEADING = re.compile(r"^\s*#{1,6}\s+(?!Human|Assistant)")
BULLET = re.compile(r"^\s*(?:[-*+•▪–]|\d{1,2}[.)])\s+")
RULE = re.compile(r"^\s*(?:[-*_=~]\s*){3,}$|^\s*```\w*\s*$")
EMPHASIS = re.compile(r"(?<![*\w])(\*{1,3})(?=[^\s*])([^*]*[^\s*])\1(?![*\w])"
                      r"|(?<![_\w])(_{1,3})(?=[^\s_])([^_]*[^\s_])\3(?![_\w])")
LINK = re.compile(r"!?\[([^\[\]]{0,300})\]\([^()\s]{0,500}\)")

NOUN = r"(?:image|picture|photo|photograph|photography|scene|snapshot|shot)"
SHOWS = (r"(?:features|shows|depicts|captures|displays|presents|portrays|showcases|illustrates|contains|includes"
         r"|consists of|is of|appears to (?:show|be of|depict))")
# "captures the essence of" and "shows how" name no thing, and "shows a man and captures …" needs its subject.
NOT_A_THING = (rf"(?![^.]*\band (?:also )?{SHOWS}\b)"
               r"(?!(?:how|that|what|where|us|you|to|and|or|as|in|on|at|with|from)\b|(?:(?:a|an|the)\s+)?(?:\w+\s+)?"
               r"(?:sense|feeling|essence|mood|beauty|atmosphere|moment|impression)\b)(?=\w|[\"'“‘])")
OPENER = re.compile(
    rf"^(?:(?:in|within)\s+(?:this|the)\s+{NOUN},?\s+(?:there\s+(?:is|are)|(?:we|you|one)\s+(?:can\s+)?see|i\s+(?:can\s+)?see)\s+"
    rf"|in\s+(?:this|the)\s+{NOUN},\s+"
    rf"|(?:the|this)\s+{NOUN}\s+(?:\w+ly\s+|also\s+)*{SHOWS}\s+{NOT_A_THING}"
    rf"|(?:the|this)\s+{NOUN}\s+(?:\w+ly\s+|also\s+)*{SHOWS},\s+(?=\w[^,.]*,\s)"
    rf"|this\s+is\s+(?:a|an|the)\s+{NOUN}\s+(?:of|showing|featuring|depicting)\s+{NOT_A_THING}"
    rf"|(?:the|this)\s+{NOUN}\s+is\s+(?:a|an)\s+{NOUN}\s+(?:of|showing|featuring|depicting)\s+{NOT_A_THING}"
    rf"|(?:this|(?:the|this)\s+{NOUN})\s+is\s+(?=an?\s+))", re.IGNORECASE)
COMMENTARY = re.compile(
    rf"^(?:(?:overall|in summary|in conclusion|all in all)\b"
    rf"|(?:the|this)\s+(?:overall\s+)?(?:{NOUN}|composition|atmosphere|mood|combination)\b[^.]{{0,120}}?"
    rf"\b(?:conveys?|evokes?|creat(?:es?|ing)|adds?|gives?|suggests?|captures?)\b[^.]{{0,60}}"
    rf"\b(?:sense|feeling|impression|mood|atmosphere|essence|moment)\b)",
    re.IGNORECASE)


def visible(text: str) -> str:
    """NFC text without control, zero-width, bidirectional and other characters that nobody sees; lines are kept."""
    text = text.replace("\r\n", "\n").replace(REPLACEMENT, "")
    kept = (c for c in text if c.isspace() or unicodedata.category(c) not in INVISIBLE)
    return unicodedata.normalize("NFC", "".join("\n" if c in "\n\r\v\f\x85\u2028\u2029" else " " if c.isspace() else c
                                               for c in kept))


def sentences(text: str) -> list[str]:
    """The sentences of one paragraph; joined by spaces they are the paragraph again. The last may be unfinished."""
    text = " ".join(text.split())
    found, start = [], 0
    for stop in STOP.finditer(text):
        before, after = text[start:stop.end()].rstrip(), text[stop.end():stop.end() + 1]
        if after.islower() or ABBREVIATION.search(before):
            continue
        found.append(before)
        start = stop.end()
    return found + ([text[start:]] if text[start:] else [])


def clean(raw: str, question: str = "", commentary: bool = True) -> str:
    """The caption in a model's answer: one paragraph of whole sentences, content first; empty if there is none.

    Lists and markdown are flattened; echoes of the chat, "The image features" and an unfinished last sentence go.
    `question` is removed where the answer repeats it; `commentary=False` also drops closing remarks ("Overall, …").
    Cleaning a clean caption changes nothing.
    """
    text = raw
    while (again := _pass(text, question, commentary)) != text:      # "Answer: Sure! The image shows …" peels in turns
        text = again
    return text


def _pass(text: str, question: str, commentary: bool) -> str:
    text = _answer(visible(text), question)
    text = " ".join(_flat(text).split())
    if not any(c.isalnum() for c in text):
        return ""
    whole = sentences(text)
    if len(whole) > 1 and not WHOLE.search(whole[-1]):
        whole.pop()
    while not commentary and len(whole) > 1 and COMMENTARY.match(whole[-1]):
        whole.pop()
    text = " ".join(_content_first(sentence) for sentence in whole)
    return text if WHOLE.search(text) else re.sub(r"[\s,;:\-–—]+$", "", text) + "."


def _answer(text: str, question: str) -> str:
    """Without special tokens, the turns of others, the speaker's name and the question."""
    text = TRANSCRIPT.sub("", TOKEN.sub(" ", text).strip())
    text = NEXT_TURN.sub("", text).strip()
    text = POLITE.sub("", SPEAKER.sub("", text))
    text = IN_QUOTES.sub(lambda found: (found[1] or found[2] or "").strip(), text)
    words = [re.escape(word) for word in question.split()]
    return re.sub(r"^\W{0,3}" + r"\s+".join(words), "", text, flags=re.IGNORECASE).lstrip() if words else text


def _flat(text: str) -> str:
    """Markdown to prose: items of a list become sentences, headings go where there is other text."""
    lines = [line for line in text.split("\n") if not RULE.match(line)]
    prose = [line for line in lines if line.strip() and not HEADING.match(line)]
    lines = lines if not prose else [line for line in lines if not HEADING.match(line)]
    flat, listed = [], 0
    for line in lines:
        bullet = bool(BULLET.match(line))
        if (bullet or not line.strip()) and flat:
            flat[-1] = _ended(flat[-1])
        listed += bullet
        line = LINK.sub(r"\1", BULLET.sub("", HEADING.sub("", line)).replace("`", ""))
        flat.append(EMPHASIS.sub(lambda found: found[2] or found[4], line).strip())
        flat = flat if flat[-1] else flat[:-1]
        last_is_item = bullet
    if listed > 1 and last_is_item and flat:         # an item without a full stop is no unfinished sentence
        flat[-1] = _ended(flat[-1])
    return " ".join(flat)


def _ended(line: str) -> str:
    return line if not line or WHOLE.search(line) or line[-1] in ":,;" else line + "."


def _content_first(sentence: str) -> str:
    """A sentence without "The image features", with a capital unless its first word has its own (iPhone)."""
    rest = OPENER.sub("", sentence)
    rest = rest if any(c.isalnum() for c in rest) else sentence
    first = rest.split(" ", 1)[0]
    capital = rest[:1].upper()
    return capital + rest[1:] if len(capital) == 1 and not any(c.isupper() for c in first[1:]) else rest
