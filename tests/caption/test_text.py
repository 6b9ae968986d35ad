"""Captions: what is made of an answer, and what of it fits CLIP."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption.prompts import load_prompt, load_quality
from caption.text import FLAGS, Tokens, clean, describe, fit, sentences

from .answers import ANSWERS

SUPIR = load_prompt("supir")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A CLIP tokenizer with whole tokens for some common words; the rest falls into letters."""
    shown = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    shown += [chr(256 + i) for i in range(256 - len(shown))]
    merges = {}
    for word in ("the", "and", "image", "side", "dog", "large", "brown", "blue", "white", "highly", "detailed"):
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merges[f"{symbols[0]} {symbols[1]}"] = None
            symbols[:2] = [symbols[0] + symbols[1]]
    vocabulary = [*shown, *(c + "</w>" for c in shown), *(pair.replace(" ", "") for pair in merges)]
    folder = tmp_path_factory.mktemp("tokenizer")
    numbers = {token: i for i, token in enumerate([*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return Tokens.load(folder)


# Cleaning

@pytest.mark.parametrize(("raw", "text"), [
    ("The image features a red car.", "A red car."),
    ("The image shows two men. The image also features a dog.", "Two men. A dog."),
    ("This image depicts the old town of Porto at night.", "The old town of Porto at night."),
    ("In this image, there is a cat on a sofa.", "A cat on a sofa."),
    ("In the photo, we can see an iPhone on a desk.", "An iPhone on a desk."),
    ("The photo captures iPhone cases in a row.", "iPhone cases in a row."),
    ("The picture prominently displays a clock.", "A clock."),
    ("This is a picture of a bridge.", "A bridge."),
    ("The image features, in the centre, a vase.", "In the centre, a vase."),
    ("This is a close-up photo of an eye.", "A close-up photo of an eye."),
    ("The image is a painting of a ship.", "A painting of a ship."),
    ("In this image, a man is standing in the rain.", "A man is standing in the rain."),
])
def test_openers_go_and_the_sentence_stays_whole(raw, text):
    assert clean(raw) == text


@pytest.mark.parametrize("text", [
    "The image is dark and grainy.", "The image shows how bread is made.", "The image captures the essence of summer.",
    "The black and white image shows a man.", "The image features in a magazine.", "The imagery features waves.",
    "There is a dog on the beach.",
    "The image shows a man and captures his smile.", "A painter shows the image to a child."])
def test_sentences_that_would_not_survive_without_their_opener_keep_it(text):
    assert clean(text) == text


@pytest.mark.parametrize(("raw", "text"), [
    ("ASSISTANT: A dog runs.</s>", "A dog runs."),
    ("USER: <image>\nWhat is it? ASSISTANT: A dog runs.", "A dog runs."),
    ("A dog runs.\nUSER: And now? ASSISTANT: It sleeps.", "A dog runs."),
    ("Sure! Here is a detailed description of the image:\n\nA dog runs.", "A dog runs."),
    ("Here's the caption: The image shows a dog.", "A dog."),
    ("\"A dog runs.\"", "A dog runs."),
    (SUPIR.question + "\nA dog runs.", "A dog runs."),
    ("<|im_start|>A dog runs.<|im_end|>", "A dog runs."),
    ("[INST] A dog runs. [/INST]", "A dog runs.")])
def test_what_belongs_to_the_chat_goes(raw, text):
    assert clean(raw, SUPIR.question) == text


@pytest.mark.parametrize(("raw", "text"), [
    ("A dog.\n\nA cat\n", "A dog."),
    ("# Description\n\nA **brown** dog\nand a *white* cat.", "A brown dog and a white cat."),
    ("- A dog\n- A cat\n* Two birds", "A dog. A cat. Two birds."),
    ("Things to see:\n1. **Sky**: blue.\n2. `Sea`: green.", "Things to see: Sky: blue. Sea: green."),
    ("A [dog](http://a.b/c) runs.\n\n---\n\nIt is `wet`.", "A dog runs. It is wet."),
    ("# A dog on the beach", "A dog on the beach."),
    ("5 * 3 * 2 boxes and snake_case_names.", "5 * 3 * 2 boxes and snake_case_names.")])
def test_markdown_becomes_one_paragraph(raw, text):
    assert clean(raw) == text


def test_what_nobody_sees_goes():
    assert clean("A\u200b dog\x00\u202e\x1b runs\ufeff\ufffd\u00a0on\tsand.") == "A dog runs on sand."
    assert clean("A cafe\u0301 at night.") == "A café at night."


def test_an_unfinished_sentence_goes_when_others_are_whole():
    assert clean("A dog runs. It has a blue collar and") == "A dog runs."
    assert clean("a dog with a blue collar and,") == "A dog with a blue collar and."


@pytest.mark.parametrize("raw", ["", " \n", "\x00\x01\x02", "...", "***", "\u200b", "USER: what?", "</s>"])
def test_an_answer_without_a_word_is_empty(raw):
    assert clean(raw) == ""


def test_closing_remarks_go_when_asked_but_never_the_whole_caption():
    assert clean(ANSWERS[1]).endswith("sense of movement and energy.")
    assert clean(ANSWERS[1], commentary=False).endswith("the right side of the image.")
    assert clean("Overall, the image conveys a sense of calm.", commentary=False)
    assert clean(ANSWERS[7], commentary=False) == clean(ANSWERS[7])


def test_html_in_an_answer_is_words_like_others():
    assert clean("A sign reads <script>alert(1)</script> in red.") == "A sign reads <script>alert(1)</script> in red."


@pytest.mark.parametrize("raw", ANSWERS)
def test_a_good_answer_keeps_its_words_and_begins_with_its_content(raw):
    text = clean(raw, SUPIR.question)
    assert text[0].isupper() and text[-1] == "." and "\n" not in text
    assert not text.startswith(("The image", "This image", "In this image", "The picture", "The photo"))
    assert text.split()[-5:] == raw.split()[-5:] and len(text.split()) >= len(raw.split()) - 7


MARKS = st.lists(st.sampled_from([
    "The image features ", "a dog", ". ", "\n", "- ", "# ", "**", "*", "1. ", "USER:", "ASSISTANT: ", "[a](b)", "<|x|>",
    "</s>", "e\u0301", "\u0301", "\u200b", "Sure! ", "Overall, ", "This is ", "```", "`", "_", "St. ", ",", "\"", "ŉ",
    "…", "Here is a caption: ", "the image ", "and", " "]), max_size=12).map("".join)


@settings(deadline=None)
@given(st.text() | MARKS, st.sampled_from(["", SUPIR.question, "a dog"]), st.booleans())
def test_cleaning_a_clean_caption_changes_nothing(raw, question, commentary):
    text = clean(raw, question, commentary)
    assert clean(text, question, commentary) == text == unicodedata.normalize("NFC", text)
    assert text.isprintable() and text == " ".join(text.split())


@settings(deadline=None)
@given(st.text() | MARKS)
def test_sentences_joined_are_the_paragraph(text):
    assert " ".join(sentences(text)) == " ".join(text.split())


def test_titles_decimals_and_initials_end_no_sentence():
    assert len(sentences(ANSWERS[8])) == 3
    assert sentences("J. R. Smith, ca. 1920. It is 3.5 m high!") == ["J. R. Smith, ca. 1920.", "It is 3.5 m high!"]


# Tokens and fitting

def test_tokens_count_the_begin_and_end(tokens):
    assert tokens.count("") == 2 and tokens.count("the large dog") == 5 and tokens.count("the " * 100) == 102


def test_without_a_tokenizer_nothing_is_counted():
    assert Tokens().count("a dog") is None and fit("a dog", Tokens()) is None


def test_a_folder_without_a_tokenizer_says_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json; name the tokenizer folder"):
        Tokens.load(tmp_path)


def test_whole_sentences_come_first(tokens):
    assert fit("The dog. The large dog. The brown dog.", tokens, limit=11) == "The dog. The large dog."


def test_then_whole_clauses(tokens):
    assert fit("The large dog, the white dog, the dog.", tokens, limit=11) == "The large dog, the white dog."
    assert fit("The dog. The brown dog, and the blue and white and brown dog.", tokens, limit=14) == \
        "The dog. The brown dog."


def test_then_whole_words_then_letters(tokens):
    assert fit("the large brown white dog", tokens, limit=6) == "the large brown."
    assert fit("x" * 500, tokens, limit=10) == "x" * 8


def test_words_to_keep_survive(tokens):
    text = fit("The dog. The large dog. The brown dog.", tokens, limit=10, keep="highly detailed")
    assert text == "The dog. highly detailed" and tokens.count(text) <= 10
    assert fit("", tokens, keep="highly detailed") == "highly detailed"


def test_words_to_keep_that_leave_no_room_are_an_error(tokens):
    with pytest.raises(ValueError, match="14 of 10 tokens"):
        fit("", tokens, limit=10, keep="dog " * 12)
    with pytest.raises(ValueError, match="no room for text"):
        fit("A dog.", tokens, limit=10, keep="dog " * 8)
    with pytest.raises(ValueError, match="no room for text"):
        fit("A dog.", tokens, limit=2)


def test_the_quality_words_of_supir_can_be_kept_beside_a_long_caption(tokens):
    words = load_quality("supir").positive
    limit = tokens.count(words) + 60
    text = fit(clean(ANSWERS[1]), tokens, limit, keep=words)
    assert text.endswith(words) and len(text) > len(words) + 20 and tokens.count(text) <= limit


@settings(deadline=None)
@given(st.text(max_size=300) | MARKS | st.sampled_from(ANSWERS), st.integers(8, 120), st.sampled_from(["", "the dog"]))
def test_what_fits_is_short_enough_and_fits_again(tokens, text, limit, keep):
    short = fit(text, tokens, limit, keep)
    assert tokens.count(short) <= limit and short.endswith(keep) and fit(short, tokens, limit, keep) == short
    assert bool(short) == bool(text.strip() or keep)


@pytest.mark.parametrize("raw", ANSWERS)
def test_a_fitted_caption_is_its_beginning(tokens, raw):
    text = clean(raw)
    for limit in (20, 40, 77, 200, 1000):
        assert text.startswith(fit(text, tokens, limit).rstrip("."))


# All of it

def test_an_answer_becomes_a_caption(tokens):
    caption = describe("ASSISTANT: " + ANSWERS[0], prompt=SUPIR, tokens=tokens, limit=60)
    assert caption.good and caption.raw == "ASSISTANT: " + ANSWERS[0] and caption.text.startswith("A large brown dog")
    assert caption.tokens == tokens.count(caption.text) > 60 >= tokens.count(caption.short)


@pytest.mark.parametrize("raw", ["", "\x00\x01\x02", "\ud800", "</s>", "...", SUPIR.question, "USER: hello"])
def test_an_empty_caption_is_never_good(tokens, raw):
    caption = describe(raw, prompt=SUPIR, tokens=tokens)
    assert (caption.text, caption.short, caption.good) == ("", "", False) and "empty" in caption.flags
    assert caption.raw.encode().decode() == caption.raw


@settings(deadline=None)
@given(st.text(st.characters()) | MARKS)
def test_any_answer_becomes_a_caption_that_can_be_stored(raw):
    caption = describe(raw, prompt=SUPIR)
    assert (caption.raw + caption.text).encode().decode() == caption.raw + caption.text
    assert bool(caption.text) != ("empty" in caption.flags)
    assert list(caption.flags) == [flag for flag in FLAGS if flag in caption.flags]


def test_an_answer_that_is_no_text_is_an_error():
    with pytest.raises(TypeError, match="NoneType; a failed request"):
        describe(None, prompt=SUPIR)


def test_the_echo_is_that_of_the_question_that_was_asked():
    own = load_prompt({"name": "own", "question": "Describe it. [The page says: {alt_text}.]", "min_words": 2})
    question = own.ask({"alt_text": "a boat on the calm lake"})
    assert "echo" in describe("The page says: a boat on the calm lake.", prompt=own, question=question).flags
    assert describe("A boat on a lake.", prompt=own, question=question).good
