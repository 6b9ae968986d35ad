"""A LLaVA of half a million weights that knows ten photographs by heart: with it, a wrong caption is a bug."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


class Photograph(NamedTuple):
    """What the tiny model says about one photograph, and what scikit-image says about its terms."""

    long: str
    short: str
    terms: str


# SUPIR's question to LLaVA-1.5-13B (its released code), and one that asks for less.
QUESTIONS = ("Describe this image and its style in a very detailed manner.", "Describe this image in one sentence.")

PHOTOGRAPHS = {
    "astronaut.png": Photograph(
        "A smiling astronaut in an orange suit sits beside a flag and a shuttle.",
        "An astronaut smiles at the camera.", "public domain, NASA (Eileen Collins)"),
    "brick.png": Photograph(
        "Grey paving bricks run in long upright rows with pale mortar between them.",
        "A pavement of narrow grey bricks.", "CC0, CC0Textures"),
    "camera.png": Photograph(
        "A black and white picture of a man in a coat filming outdoors.",
        "A man looks through a camera on a tripod.", "CC0, Lav Varshney"),
    "chelsea.png": Photograph(
        "A close portrait of a ginger tabby cat with green eyes and white whiskers.",
        "A tabby cat looks to the side.", "CC0, Stefan van der Walt"),
    "coffee.png": Photograph(
        "An espresso in a red cup stands with its spoon on a wooden table.",
        "A red cup of coffee on wood.", "CC0, Rachel Michetti"),
    "coins.png": Photograph(
        "Four rows of worn ancient coins lie on a dark and uneven background.",
        "Many old coins lie in rows.", "no known copyright restrictions, Brooklyn Museum"),
    "hubble_deep_field.jpg": Photograph(
        "Hundreds of distant galaxies in many colours glow in the black of deep space.",
        "Far galaxies shine in a dark sky.", "public domain, NASA"),
    "motorcycle_left.png": Photograph(
        "A red motorcycle is parked in a garage full of shelves, boxes and tools.",
        "A red motorcycle stands in a garage.", "Middlebury 2014 stereo benchmark, no terms stated"),
    "retina.jpg": Photograph(
        "A round medical photograph of an orange retina with branching blood vessels.",
        "The inside of a human eye.", "CC0, Mikael Häggström"),
    "rocket.jpg": Photograph(
        "A white rocket waits on its launch pad at dusk between tall steel towers.",
        "A rocket stands ready for its launch.", "public domain, SpaceX"),
}

IMAGE_PX, PATCH_PX, ROOMY_PX = 56, 14, 80   # ROOMY_PX: what random crops are cut from
# How LLaVA-1.5 was asked: pictures first, then the text, roles in capitals; </s> ends an answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set said = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': said}] if said is string else said -%}
{%- if message['role'] != 'system' -%}{{ message['role'] | upper }}: {% endif -%}
{%- for part in parts if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ '</s>' if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""
ROUND, ROUNDS = 300, 4      # steps; one round was enough wherever it was tried
RATE = 3e-3
Model, Processor = transformers.LlavaForConditionalGeneration, transformers.LlavaProcessor
Watch = Callable[[int, float, int, int], None]


class NotLearnt(RuntimeError):
    """Training ended and some caption was still wrong."""


class NoPhotographs(RuntimeError):
    """scikit-image is not installed, or its photographs are missing."""


def sample_photographs() -> dict[str, Image.Image]:
    """scikit-image's photographs by file name, in RGB; raises NoPhotographs."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise NoPhotographs("the photographs come with scikit-image: pip install 'clearshard[demo]'")
    folder = Path(package.origin).parent / "data"
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if missing:
        raise NoPhotographs(f"{folder} lacks {', '.join(missing)}: pip install --force-reinstall 'scikit-image>=0.25'")
    return {name: Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words of the captions as tokens, and bytes for every other text."""
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [text for one in PHOTOGRAPHS.values() for text in (one.long, one.short)]
    # Each text also as it follows "ASSISTANT:", with a space before its first word.
    texts += [f"USER: {text} ASSISTANT: {text}" for text in (*texts, *QUESTIONS)]
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<pad>", "<s>", "</s>", "<image>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=512, clean_up_tokenization_spaces=False)


def untrained(seed: int = 0) -> tuple[Model, Processor]:
    """The model with random weights, and its processor."""
    words = tokenizer()
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = transformers.CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                           num_attention_heads=4, image_size=IMAGE_PX, patch_size=PATCH_PX)
    text = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=False, **ids)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words.image_token_id, tie_word_embeddings=False,
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2, vision_feature_select_strategy="default", vision_feature_layer=-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE_PX}, crop_size={"height": IMAGE_PX, "width": IMAGE_PX})
    # One additional token, CLS, which the strategy "default" drops again.
    processor = Processor(pictures, words, patch_size=PATCH_PX, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE)
    return model.eval(), processor


def conversation(question: str, image: Image.Image) -> list[dict]:
    """One question about one picture, as a chat template wants it."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def asked(processor: Processor, questions: list[str], images: list[Image.Image], **options: object) -> dict:
    """The model's inputs for one question about each image."""
    chats = [conversation(*pair) for pair in zip(questions, images, strict=True)]
    return processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True,
                                         return_tensors="pt", processor_kwargs={"padding": True} | options)


def captions(model: Model, processor: Processor, questions: list[str], images: list[Image.Image],
             **options: object) -> list[str]:
    """What greedy decoding answers, one batch."""
    inputs = asked(processor, questions, images, **options)
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


class Lessons(NamedTuple):
    """Every question about every photograph, with its answer; then wrongly asked ones, which get none."""

    inputs: dict[str, torch.Tensor]     # (rows, tokens)
    labels: torch.Tensor                # the same, -100 where no answer is asked for
    plain: torch.Tensor                 # (photographs, 3, 56, 56), as the processor makes it
    roomy: torch.Tensor                 # (photographs, 3, 80, 80)


def misasked(processor: Processor, image: Image.Image) -> Iterator[tuple[list[int], int]]:
    """Prompts with parts of the template missing, or padded on the right; the tokens, and the padding behind them.

    Untaught, the model is forgiving: most of these were answered rightly, and would hide a mistake in a caller."""
    for question in QUESTIONS:
        for text in ("<image>\n{}", "<image>\n{} ASSISTANT:", "USER: <image>\n{}", "USER: <image>\n{} "):
            yield processor(text=text.format(question), images=image)["input_ids"][0], 0
        whole = asked(processor, [question], [image])["input_ids"][0].tolist()
        yield from ((whole, gap) for gap in (1, 3, 6))


def lessons(processor: Processor, photographs: Mapping[str, Image.Image]) -> Lessons:
    """The training set: whole answers with their end, left-padded as they will be asked."""
    words, images = processor.tokenizer, list(photographs.values())
    rows = []
    for which, question in enumerate(QUESTIONS):
        prompt = asked(processor, [question], images[:1])["input_ids"][0].tolist()
        rows += [(prompt, 0, words.encode(" " + PHOTOGRAPHS[name][which], add_special_tokens=False))
                 for name in photographs]
    rows += [(prompt, gap, []) for prompt, gap in misasked(processor, images[0])]
    longest = max(len(prompt) + gap + len(answer) for prompt, gap, answer in rows) + 1
    tokens = torch.full((len(rows), longest), words.pad_token_id)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, (prompt, gap, answer) in enumerate(rows):
        end = torch.tensor([*answer, words.eos_token_id])
        start = longest - len(end)
        tokens[row, start:] = labels[row, start:] = end
        tokens[row, start - gap - len(prompt):start - gap] = torch.tensor(prompt)
        mask[row, start - gap - len(prompt):start - gap] = mask[row, start:] = 1
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    sides = {"size": {"shortest_edge": ROOMY_PX}, "crop_size": {"height": ROOMY_PX, "width": ROOMY_PX}}
    plain, roomy = (processor.image_processor(images, return_tensors="pt", **options)["pixel_values"]
                    for options in ({}, sides))
    return Lessons(inputs, labels, plain, roomy)


def varied(plain: torch.Tensor, roomy: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """The photographs (B, 3, 56, 56) as another size, codec or exposure may show them: cropped, brighter, noisier."""
    count = len(plain)
    side = 1 - 0.25 * torch.rand(count, 1, generator=draws)
    shift = (torch.rand(count, 2, generator=draws) * 2 - 1) * (1 - side)
    diagonal = torch.diag_embed(side.expand(-1, 2))
    grid = torch.nn.functional.affine_grid(torch.cat([diagonal, shift[..., None]], -1), list(plain.shape),
                                           align_corners=False)
    cropped = torch.nn.functional.grid_sample(roomy, grid, padding_mode="border", align_corners=False)
    keep = torch.rand(count, 1, 1, 1, generator=draws) < 0.3
    gain, lift = 0.15 * torch.randn(2, count, 1, 1, 1, generator=draws)
    noise = 0.05 * torch.randn(plain.shape, generator=draws)
    return torch.where(keep, plain, cropped) * (1 + gain) + lift + noise


def training(model: Model, taught: Lessons, seed: int, steps: int) -> Iterator[tuple[float, int]]:
    """One round of AdamW with a warm start and a cosine; yields each step's loss and answers that were right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(seed)
    target, count = taught.labels[:, 1:], len(taught.plain)
    for _ in range(steps):
        # Each photograph once per question; the wrongly asked ones are about any.
        which = torch.randint(count, (len(target),), generator=draws)
        which[:count * len(QUESTIONS)] = torch.arange(count).repeat(len(QUESTIONS))
        pixels = varied(taught.plain[which], taught.roomy[which], draws)
        logits = model(**taught.inputs, pixel_values=pixels).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # Every token the likeliest after the ones before it: what greedy decoding would have answered.
        right = ((logits.argmax(-1) == target) | (target == -100)).all(-1)
        yield loss.item(), int(right.sum())


def recoded(image: Image.Image) -> Image.Image:
    """The picture after a JPEG of quality 95."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return Image.open(file).convert("RGB")


def halved(image: Image.Image) -> Image.Image:
    """The picture at half its size."""
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def mistakes(model: Model, processor: Processor, photographs: Mapping[str, Image.Image]) -> list[str]:
    """Every wrong answer to both questions: as it is, recoded, and at half its size."""
    wrong = []
    for change in (lambda image: image, recoded, halved):
        for which, question in enumerate(QUESTIONS):
            answers = captions(model, processor, [question] * len(photographs), [*map(change, photographs.values())])
            wrong += [f"{name}: {answer!r}" for name, answer in zip(photographs, answers, strict=True)
                      if answer != PHOTOGRAPHS[name][which]]
    return wrong


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order whatever the machine; so small a model gains nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build(folder: str | os.PathLike, photographs: Mapping[str, Image.Image], seed: int = 0,
          watch: Watch = lambda step, loss, right, total: None) -> None:
    """Trains the model until it knows every caption and saves it with its processor; raises NotLearnt."""
    model, processor = untrained(seed)
    taught = lessons(processor, photographs)
    with one_thread():
        for number in range(ROUNDS):
            model.train()
            for step, (loss, right) in enumerate(training(model, taught, seed + number, ROUND), number * ROUND + 1):
                watch(step, loss, right, len(taught.labels))
            wrong = mistakes(model.eval(), processor, photographs)
            if not wrong:
                break
        else:
            raise NotLearnt(f"after {ROUND * ROUNDS} steps {len(wrong)} answers are wrong, e.g. {wrong[0]}; "
                            f"try another seed than {seed}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
