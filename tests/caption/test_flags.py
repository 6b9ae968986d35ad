"""Flags: what is flagged, and what looks like it and is not."""

import pytest

from caption.clean import clean
from caption.flags import flags
from caption.prompts import load_prompt
from caption.text import describe

from .answers import ANSWERS

SUPIR = load_prompt("supir")


def flagged(text, **rest):
    return flags(text, text, **rest)


@pytest.mark.parametrize("raw", ANSWERS)
def test_a_good_answer_has_no_flag(raw):
    assert describe(raw, prompt=SUPIR).flags == ()


@pytest.mark.parametrize("text", [
    "I'm sorry, but I cannot assist with that request.", "I am unable to view images directly.",
    "As an AI language model, I do not have eyes.", "I can’t see the image you are referring to.",
    "Unfortunately, no image was provided with your message.", "Could you please upload the image again?",
    "I apologize, but the picture did not load.", "I cannot identify people in photographs.",
    "Unable to process the image.", "Sorry, something went wrong.", "There is no image attached to describe."])
def test_a_refusal_is_flagged(text):
    assert "refusal" in flagged(text)


@pytest.mark.parametrize("text", [
    "A card on the table reads \"I'm sorry for your loss\".", "A sign says ‘I'm sorry, we are closed’ in red letters.",
    "A blind man who is unable to see holds a white cane.", "A robot with the letters AI on its chest.",
    "A woman looks sorry and apologizes to a child.", "I can't help but notice the bright red door.",
    "The number plate cannot be read.", "A policeman views an image on a screen.",
    "There is no image in the empty frame."])
def test_what_only_looks_like_a_refusal_is_not(text):
    assert "refusal" not in flagged(text)


@pytest.mark.parametrize("text", [
    "A very very very very large dog.", "There are people in the background. There are people in the background.",
    "A cat, a dog, a cat, a dog, a cat, a dog, a cat.", "Aaaaaaaaaaaaaaaaaaaaaaaah.",
    clean(ANSWERS[0]) + " The man is wearing a hat" + ", and the man is wearing a hat" * 4 + ".",
    " ".join(f"There is a chair on the left side of the {thing}." for thing in ("room", "table", "door", "wall")),
    "A red car. A blue car is parked. A tree. A blue car is parked."])
def test_a_loop_is_flagged(text):
    assert "repetition" in flagged(text)


@pytest.mark.parametrize("text", [
    "Rows of boats lie side by side by side in the harbour.", "A sign reads \"NO NO NO\".",
    "One man stands on the left side of the image, another man on the right side of the image.",
    "A very, very tall tower.", "Red flowers, yellow flowers, white flowers and blue flowers fill the window.",
    "A dog. A dog.", "Two people walk; two people sit; two people talk to each other.", "Loading 0000000 percent.",
    "There is a sink on the left side of the counter, a bowl on the right side of the counter, a clock on the left "
    "side of the wall and a plant near the door, which is open."])
def test_ordinary_repetition_is_not_flagged(text):
    assert "repetition" not in flagged(text)


@pytest.mark.parametrize("text", [
    "图片中有一只棕色的狗躺在木制门廊上。", "На изображении большая коричневая собака лежит на крыльце.",
    "この画像には茶色の犬が写っています。", "Un perro grande está acostado en el porche, y la luz es muy suave.",
    "Das Bild zeigt einen großen Hund, der auf einer Veranda liegt und mit dem Ball spielt.",
    "Un grand chien est couché sur le porche, avec une balle et des fleurs dans le fond.",
    "Un grosso cane è sdraiato sul portico con una palla e dei fiori.",
    "Um cachorro grande está deitado na varanda e uma bola está ao seu lado.",
    "Een grote hond ligt op het terras met een bal en wat bloemen van de buren."])
def test_another_language_is_flagged(text):
    assert "wrong_language" in flagged(text, prompt=SUPIR.question)


@pytest.mark.parametrize("text", [
    "A sign reading 北京大学 hangs above the gate of a university.",
    "The façade of the café \"Le Chat Noir\" in Paris.",
    "Las Vegas, Los Angeles, La Jolla and El Paso on a road sign.",
    "A poster with the words “Пиво и хлеб всегда есть”.",
    "A portrait of Vincent van de Velde by Jan van der Meer.", "Sushi, ramen and onigiri on a tatami mat.",
    "A book titled \"Der Herr der Ringe und das Ende\" on a shelf.", "Dog.", "Ein Mann.", "Playa del Mar.",
    "A book called Der Herr der Ringe und das Ende is on the shelf with a lamp and a cup."])
def test_names_quotations_and_single_words_of_another_language_are_not_flagged(text):
    assert "wrong_language" not in flagged(text, prompt=SUPIR.question)


def test_a_question_in_another_language_may_be_answered_in_it():
    asked = "Beschreibe das Bild und den Stil, der auf dem Bild zu sehen ist."
    assert "wrong_language" not in flagged("Ein Hund liegt auf der Wiese und spielt mit dem Ball.", prompt=asked)


@pytest.mark.parametrize("text", [
    SUPIR.question, "Please describe this image and its style in a very detailed manner.",
    "A dog. Describe this image and its style in a very detailed way.", "DESCRIBE THIS IMAGE AND ITS STYLE IN A VERY",
    "You wanted me to describe this image and its style in a very detailed manner, here.",
    "Task: describe this image, and its style, in a very detailed manner."])
def test_an_echo_of_the_question_is_flagged(text):
    assert "echo" in flagged(text, prompt=SUPIR.question)


@pytest.mark.parametrize("text", [
    "The style of this image is very detailed.", "A poster that describes a very detailed manner of folding.",
    "An image and its frame on a wall.", "Its style is that of a woodcut.", "A detailed drawing of this building.",
    "A guide describes this image to a group."])
def test_words_of_the_question_are_no_echo(text):
    assert "echo" not in flagged(text, prompt=SUPIR.question)


@pytest.mark.parametrize("raw", [
    "\x00\x01\x02\x03", "A dog \x1b[31m\x1b[0m\x07 runs", "\ufffd\ufffd\ufffd A d\ufffdg", "\x00", "\ue000" * 9,
    "Dog\x08\x08\x08\x08", "A \udcff\udcfe\udcfd dog"])
def test_control_characters_are_flagged(raw):
    assert "control" in flags(clean(raw), raw)


@pytest.mark.parametrize("raw", [
    "A dog\nruns\r\n\ton sand.", "\ufeffA dog.", "Emoji 👨\u200d👩\u200d👧 here.", "A café — “open”.", "A dog\x00.",
    "كلب\u200f كبير",
    ANSWERS[1] + "\x00\x01\x02"])
def test_line_breaks_emoji_and_single_slips_are_no_control_characters(raw):
    assert "control" not in flags(clean(raw), raw)


@pytest.mark.parametrize(("text", "short"), [
    ("A dog.", True), ("Yes.", True), ("A photo.", True), ("Dog, cat.", True), ("It's black.", True), ("1 2 3.", True),
    ("A dog runs fast.", False), ("Snow-covered mountain peaks.", False), ("Four red cars parked.", False),
    ("A man's old hat.", False), (clean(ANSWERS[0]), False), ("Tea, milk, bread, jam.", False)])
def test_fewer_words_than_asked_is_too_short(text, short):
    assert ("too_short" in flagged(text, minimum_words=4)) == short


@pytest.mark.parametrize(("reason", "cut"), [("length", True), ("stop", False), ("eos", False), ("", False)])
def test_an_answer_that_hit_its_limit_is_truncated(reason, cut):
    assert ("truncated" in flags("A dog.", "A dog.", finish_reason=reason)) == cut
