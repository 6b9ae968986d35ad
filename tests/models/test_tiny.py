"""The tiny models: the captioner knows its photographs; generator and restorer answer to their inputs."""

import importlib.util
import itertools
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from clearshard import app
from models import commands, tiny_llava, tiny_sdxl, tiny_supir
from models.supir_folder import load
from models.tiny_llava import PHOTOGRAPHS, QUESTIONS
from tests.conftest import REPOSITORY

NAMES = list(PHOTOGRAPHS)


@pytest.fixture(scope="module")
def llava(tiny_models):
    """ask(questions, images, **options): answers of the saved model."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_models / "llava")
    processor = AutoProcessor.from_pretrained(tiny_models / "llava")

    def ask(questions, images, **options):
        return tiny_llava.captions(model, processor, questions, images, **options)

    return SimpleNamespace(model=model, processor=processor, ask=ask, images=tiny_llava.sample_photographs())


def wanted(which):
    return [PHOTOGRAPHS[name][which] for name in NAMES]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", [lambda image: image, tiny_llava.recoded, tiny_llava.halved],
                         ids=["as it is", "JPEG 95", "half size"])
def test_a_batch_of_all_photographs_gets_each_its_caption(llava, which, change):
    images = [change(llava.images[name]) for name in NAMES]
    assert llava.ask([QUESTIONS[which]] * len(NAMES), images) == wanted(which)


def test_captions_follow_their_images_and_their_questions_through_a_mixed_batch(llava):
    order = np.random.default_rng(0).permutation(len(NAMES))
    which = [position % 2 for position in range(len(NAMES))]
    answers = llava.ask([QUESTIONS[one] for one in which], [llava.images[NAMES[place]] for place in order])
    assert answers == [PHOTOGRAPHS[NAMES[place]][one] for place, one in zip(order, which, strict=True)]
    assert len({*wanted(0), *wanted(1)}) == 2 * len(NAMES)


def test_one_at_a_time_answers_as_in_a_batch(llava):
    assert llava.ask(QUESTIONS[:1], [llava.images["coffee.png"]]) == [PHOTOGRAPHS["coffee.png"].long]


def test_padding_on_the_right_makes_every_shorter_prompt_fail(llava):
    questions = [QUESTIONS[position % 2] for position in range(len(NAMES))]
    answers = llava.ask(questions, list(llava.images.values()), padding_side="right")
    right = [answer == PHOTOGRAPHS[name][position % 2]
             for position, (name, answer) in enumerate(zip(NAMES, answers, strict=True))]
    assert right == [question == QUESTIONS[0] for question in questions]


@pytest.mark.parametrize("form", ["<image>\n{}", "<image>\n{} ASSISTANT:", "USER: <image>\n{}", "USER: <image>\n{} "])
@pytest.mark.parametrize("which", [0, 1])
def test_without_the_whole_chat_template_no_answer_is_right(llava, form, which):
    inputs = llava.processor(text=[form.format(QUESTIONS[which])] * len(NAMES), images=list(llava.images.values()),
                             padding=True, return_tensors="pt")
    tokens = llava.model.generate(**inputs, do_sample=False, max_new_tokens=32)[:, inputs["input_ids"].shape[1]:]
    answers = [text.strip() for text in llava.processor.batch_decode(tokens, skip_special_tokens=True)]
    assert not any(answer == right for answer, right in zip(answers, wanted(which), strict=True))


def test_the_prompt_has_the_form_of_llava_1_5(llava):
    prompt = llava.processor.apply_chat_template(tiny_llava.conversation(QUESTIONS[0], llava.images["coffee.png"]),
                                                 add_generation_prompt=True, tokenize=False)
    assert prompt == f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:"
    assert llava.processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("text", ["A red cup.", "Zürich, 日本 \n\t two  spaces", "don't 50% {} <b> \u0000"])
def test_any_text_survives_the_tokenizer(llava, text):
    words = llava.processor.tokenizer
    assert words.decode(words.encode(text), skip_special_tokens=True) == text


def test_the_saved_model_is_the_one_that_was_in_memory(tmp_path):
    model, processor = tiny_llava.untrained()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert sum(value.numel() for value in again.values()) < 600_000
    image = Image.new("RGB", (60, 90), "red")
    here, there = (tiny_llava.asked(one, [QUESTIONS[0]], [image])
                   for one in (processor, AutoProcessor.from_pretrained(tmp_path)))
    assert all(torch.equal(here[key], there[key]) for key in ("input_ids", "attention_mask", "pixel_values"))


def test_the_same_seed_trains_the_same_weights_and_leaves_the_generator_alone():
    def weights(seed):
        model, processor = tiny_llava.untrained(seed)
        taught = tiny_llava.lessons(processor, tiny_llava.sample_photographs())
        list(itertools.islice(tiny_llava.training(model, taught, seed, 50), 4))
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    before = torch.get_rng_state()
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_model_that_does_not_learn_is_not_saved(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_llava, "ROUND", 2)
    monkeypatch.setattr(tiny_llava, "ROUNDS", 1)
    with pytest.raises(tiny_llava.NotLearnt, match=r"after 2 steps \d+ answers are wrong"):
        tiny_llava.build(tmp_path / "llava", tiny_llava.sample_photographs())
    assert not (tmp_path / "llava").exists()


@pytest.fixture(scope="module")
def sdxl(tiny_models):
    """paint(prompt, seed, image=None): (H, W, 3) in [0, 1], from the saved pipeline."""
    pipelines = [kind.from_pretrained(tiny_models / "sdxl")
                 for kind in (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)

    def paint(prompt, seed, image=None):
        given = {"width": 128, "height": 96} if image is None else {"image": image, "strength": 0.5}
        return pipelines[image is not None](prompt, num_inference_steps=4, output_type="np",
                                            generator=torch.Generator().manual_seed(seed), **given).images[0]

    return paint


def apart(one, other):
    """Mean difference of two pictures, of 1."""
    return float(np.abs(one - other).mean())


def test_pictures_from_text_depend_on_prompt_and_seed(sdxl):
    picture = sdxl("a green cat", 0)
    assert picture.shape == (96, 128, 3) and np.isfinite(picture).all() and picture.std() > 0.05
    assert apart(picture, sdxl("a green cat", 0)) == 0
    assert apart(picture, sdxl("an oil painting of a rocket", 0)) > 0.01
    assert apart(picture, sdxl("a green cat", 1)) > 0.01


def test_pictures_from_pictures_depend_on_prompt_seed_and_picture(sdxl):
    cat, coffee = (tiny_llava.sample_photographs()[name].resize((128, 96)) for name in ("chelsea.png", "coffee.png"))
    picture = sdxl("a green cat", 0, cat)
    assert picture.shape == (96, 128, 3) and np.isfinite(picture).all() and picture.std() > 0.05
    assert apart(picture, sdxl("a green cat", 0, cat)) == 0
    assert apart(picture, sdxl("an oil painting of a rocket", 0, cat)) > 0.01
    assert apart(picture, sdxl("a green cat", 1, cat)) > 0.01
    assert apart(picture, sdxl("a green cat", 0, coffee)) > 0.01


def test_the_generator_is_built_as_sdxl_is(tiny_models):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_models / "sdxl")
    widths = [encoder.config.hidden_size for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    assert pipeline.unet.config.cross_attention_dim == sum(widths)
    assert pipeline.vae_scale_factor == 8 and pipeline.vae.config.scaling_factor == 0.13025
    for words, pad in ((pipeline.tokenizer, "<|endoftext|>"), (pipeline.tokenizer_2, "!")):
        ids = words("A cat, in Zürich 日本", padding="max_length", truncation=True)["input_ids"]
        assert len(ids) == 77 and words.pad_token == pad and words.convert_ids_to_tokens(ids[-1]) == pad
        assert words.decode(ids, skip_special_tokens=True).replace("!", "").strip() == "a cat , in zürich 日本"


def test_the_generators_weights_are_its_seeds_and_leave_the_callers_generator_alone(tiny_models):
    before = torch.get_rng_state()
    again, other = tiny_sdxl.assemble(0), tiny_sdxl.assemble(1)
    assert torch.equal(torch.get_rng_state(), before)
    saved = StableDiffusionXLPipeline.from_pretrained(tiny_models / "sdxl")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        here, there, else_ = (getattr(one, part).state_dict() for one in (again, saved, other))
        assert all(torch.equal(here[name], there[name]) for name in here)
        assert not all(torch.equal(here[name], else_[name]) for name in here)


def test_the_restorers_weights_are_its_seeds_and_all_of_it_can_move(tiny_models, tmp_path):
    before = torch.get_rng_state()
    again, other = (tiny_supir.assemble(tiny_models / "sdxl", seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("sdxl", "supir"):
        shutil.copytree(tiny_models / part, tmp_path / part)
    net, _, robust = load(tmp_path / "supir")
    for here, there, else_ in ((again[0], net.adaptor, other[0]), (again[1], robust, other[1])):
        assert all(map(torch.equal, here.state_dict().values(), there.state_dict().values()))
        assert not any(map(torch.equal, here.parameters(), else_.parameters()))
    assert all(parameter.any() for parameter in net.adaptor.parameters())       # no connector is left at zero


def test_the_command_leaves_three_models_with_cards_and_says_how_to_use_them(tiny_models):
    said = (tiny_models / "said.txt").read_text()
    assert "34 of 34 answers right" in said and "from_pretrained" in said
    assert sorted(path.name for path in tiny_models.iterdir()) == ["llava", "said.txt", "sdxl", "supir"]
    assert (tiny_models / "sdxl" / "model_index.json").exists()
    for kind in ("llava", "sdxl", "supir"):
        assert "toy" in (tiny_models / kind / "MODEL_CARD.md").read_text()
        assert not list((tiny_models / kind).rglob("*.bin"))
    assert tiny(tiny_models).output.count("there already") == 3


@pytest.fixture
def written(monkeypatch):
    """Writers that take no time; the counts of what they wrote."""
    counts = dict.fromkeys(commands.Kind, 0)

    def writer(kind):
        def write(folder):
            counts[kind] += 1
            (folder / "weights").write_text(str(counts[kind]))
            return commands.MADE
        return write

    monkeypatch.setattr(commands, "WRITERS", {kind: writer(kind) for kind in commands.Kind})
    return counts


def tiny(*arguments):
    return CliRunner().invoke(app, ["models", "tiny", *map(str, arguments)])


def test_what_is_there_is_kept_unless_forced(written, tmp_path):
    assert tiny(tmp_path, "--only", "llava").exit_code == 0
    assert not (tmp_path / "sdxl").exists()
    assert "there already" in tiny(tmp_path, "--only", "llava").output and written["llava"] == 1
    assert tiny(tmp_path, "--force").exit_code == 0
    assert written == {"llava": 2, "sdxl": 1, "supir": 1}
    assert sorted(path.name for path in (tmp_path / "llava").iterdir()) == ["MODEL_CARD.md", "weights"]


def test_the_restorer_alone_brings_its_prior(written, tmp_path):
    assert tiny(tmp_path, "--only", "supir").exit_code == 0
    assert written == {"llava": 0, "sdxl": 1, "supir": 1}
    assert "there already" not in tiny(tmp_path, "--only", "supir", "--force").output
    assert written == {"llava": 0, "sdxl": 1, "supir": 2}


def test_a_killed_runs_folder_goes_and_a_running_ones_stays(written, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, alive = tmp_path / f".llava-unfinished-{child.pid}-x", tmp_path / ".llava-unfinished-1-x"
    dead.mkdir()
    alive.mkdir()
    (dead / "config.json").write_text("{")
    assert tiny(tmp_path, "--only", "llava").exit_code == 0
    assert not dead.exists() and alive.exists() and (tmp_path / "llava" / "weights").exists()


def test_somebody_elses_model_is_never_replaced(written, tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text("{}")
    result = tiny(tmp_path, "--force")
    assert result.exit_code == 1 and "none of this command's models" in result.output
    assert (tmp_path / "llava" / "config.json").read_text() == "{}" and written["llava"] == 0


def test_without_scikit_image_one_line_says_what_to_install(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "skimage" else find(name, *rest))
    result = tiny(tmp_path, "--only", "llava")
    assert result.exit_code == 1 and "pip install 'clearshard[demo]'" in result.output
    assert not any(tmp_path.iterdir())


def test_the_command_line_loads_no_torch():
    program = "import sys, models.supir_commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
