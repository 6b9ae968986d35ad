"""The captioner on this machine, with a tiny LLaVA that knows ten photographs by heart."""

import shutil

import numpy as np
import pytest
import torch

from caption.config import LocalModel, Sampling
from caption.local import Captioner, Preparer
from degrade.strict import ConfigError
from models.tiny_llava import PHOTOGRAPHS, QUESTIONS, sample_photographs

ROOM = 40         # tokens


@pytest.fixture(scope="module")
def captioner(tiny_models):
    return Captioner(LocalModel(model=str(tiny_models / "llava"), device="cpu"))


@pytest.fixture(scope="module")
def asked():
    """Images, questions of two lengths in turn, and the captions that are right."""
    images = {name: np.asarray(image) for name, image in sample_photographs().items()}
    questions = [QUESTIONS[i % 2] for i in range(len(images))]
    right = [PHOTOGRAPHS[name].long if question == QUESTIONS[0] else PHOTOGRAPHS[name].short
             for name, question in zip(images, questions, strict=True)]
    return list(images.values()), questions, right


def texts(generated):
    return [one.text for one in generated]


def test_each_image_of_a_batch_gets_the_answer_to_its_own_question(captioner, asked):
    images, questions, right = asked
    got = captioner(captioner.preparer(images, questions), ROOM)
    assert texts(got) == right
    assert {one.finish_reason for one in got} == {"stop"}


def test_a_shuffled_batch_gets_shuffled_answers_and_one_alone_its_own(captioner, asked):
    images, questions, right = asked
    order = [7, 2, 9, 0, 4, 1]
    got = captioner(captioner.preparer([images[i] for i in order], [questions[i] for i in order]), ROOM)
    assert texts(got) == [right[i] for i in order]
    assert texts(captioner(captioner.preparer(images[3:4], questions[3:4]), ROOM)) == right[3:4]


def test_padding_on_the_right_would_not_go_unnoticed(captioner, asked):
    images, questions, right = asked
    captioner.preparer.processor.tokenizer.padding_side = "right"
    try:
        got = captioner(captioner.preparer(images, questions), ROOM)
    finally:
        captioner.preparer.processor.tokenizer.padding_side = "left"
    assert texts(got) != right


def test_an_answer_without_room_says_so(captioner, asked):
    images, questions, right = asked
    short = captioner(captioner.preparer(images[:1], questions[:1]), 4)[0]
    assert (short.finish_reason, short.tokens) == ("length", 4)
    assert right[0].startswith(short.text)


def test_sampling_repeats_with_its_seed_and_leaves_the_callers_generator_alone(captioner, asked):
    images, questions, _ = asked
    inputs = captioner.preparer(images, questions)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (texts(captioner(inputs, ROOM, Sampling(temperature=2.0, top_p=1.0, seed=seed)))
                           for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_batch_that_does_not_fit_is_halved_until_it_does(captioner, asked, monkeypatch):
    images, questions, right = asked
    generate, sizes = captioner.model.generate, []

    def narrow(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(captioner.model, "generate", narrow)
    assert texts(captioner(captioner.preparer(images, questions), ROOM)) == right
    assert max(size for size in sizes if size <= 3) == 3 and sizes[:2] == [10, 5]


def test_one_image_that_does_not_fit_is_an_error_with_the_remedy(captioner, asked, monkeypatch):
    def full(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(captioner.model, "generate", full)
    images, questions, _ = asked
    with pytest.raises(MemoryError, match="quantisation"):
        captioner(captioner.preparer(images[:2], questions[:2]), ROOM)


@pytest.mark.parametrize(("lost", "words"), [
    ("tokenizer.json", "tokenizer"), ("processor_config.json", "processor"), ("chat_template.jinja", "chat template"),
    ("config.json", "config.json"), ("model.safetensors", "weights")])
def test_a_folder_that_lacks_a_file_says_what_it_should_hold(tiny_models, tmp_path, lost, words):
    folder = tmp_path / "llava"
    shutil.copytree(tiny_models / "llava", folder)
    (folder / lost).unlink()
    with pytest.raises(ConfigError, match=rf"(?s){folder}.*{words}"):
        Captioner(LocalModel(model=str(folder), device="cpu"))


def test_a_folder_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match="hf download"):
        Preparer(str(tmp_path / "nowhere"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tiny_models):
    with pytest.raises(ConfigError, match="sees no GPU"):
        Captioner(LocalModel(model=str(tiny_models / "llava"), device="cuda"))


def test_a_model_of_another_kind_is_refused(tiny_models):
    with pytest.raises(ConfigError, match="sdxl"):
        Captioner(LocalModel(model=str(tiny_models / "sdxl"), device="cpu"))
