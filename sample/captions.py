"""What is to be seen in an image that is to be restored: from a file beside it, or from a captioner that looks at the
first stage's reading of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from caption.config import LocalModel
from caption.prompts import load_prompt
from caption.text import describe
from models.robust import RobustEncoder
from models.supir_folder import index_of
from pipeline.decode import Limits, decode

from . import pixels, vae_tiles
from .memory import Memory
from .restore import Input


def beside(source: Input) -> str:
    """The text of `a.txt` beside `a.jpg`, in one line; "" if there is none."""
    path = source.path.with_suffix(".txt")
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split()) if path.is_file() else ""


def stored(out: Path, source: Input) -> Path:
    """Where the caption of an input is kept, so that a second run asks nobody."""
    return out / f"{source.name}.caption.txt"


def caption_all(sources: Iterable[Input], out: Path, model: Path, captioner: str, memory: Memory, *,
                scale: float, limits: Limits, say: Callable[[str], None]) -> None:
    """Writes the captions that are missing: first all first stages, then all answers, one model in memory at a time."""
    pending = [source for source in sources if not stored(out, source).is_file()]
    if not pending:
        return
    seen = {}
    for source, image in _first_stages(pending, model, memory, scale, limits, say):
        seen[source] = image
    from caption.local import Captioner
    talker, prompt = Captioner(LocalModel(model=captioner, device=str(memory.device))), load_prompt("supir")
    for source, image in seen.items():
        inputs = talker.preparer([image], [prompt.question])
        answer = talker(inputs, prompt.max_new_tokens)[0]
        text = describe(answer.text, prompt=prompt, finish_reason=answer.finish_reason).text
        stored(out, source).parent.mkdir(parents=True, exist_ok=True)
        stored(out, source).write_text(text + "\n", encoding="utf-8")
        say(f"{source.name}: {text}")
    del talker
    _free()


def _first_stages(sources: list[Input], model: Path, memory: Memory, scale: float, limits: Limits,
                  say: Callable[[str], None]):
    """(source, (H, W, 3) uint8 image with a short side of 512) of all that can be read."""
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(index_of(model)["prior"] / "vae", torch_dtype=memory.dtype).to(memory.device)
    robust = RobustEncoder.from_pretrained(model / "robust_encoder", torch_dtype=memory.dtype).to(memory.device)
    for source in sources:
        try:
            image = decode(source.path.read_bytes(), limits)
        except Exception as error:      # restoring it says what is wrong
            say(f"{source.name}: no caption, it cannot be read ({type(error).__name__})")
            continue
        sizes = pixels.plan(image.shape[:2], scale, short=512)
        placed = pixels.prepare(image, sizes).to(memory.device, memory.dtype)
        moments = vae_tiles.encode(vae, placed, encoder=robust.encoder, tile=memory.vae_tile)
        decoded = vae_tiles.decode(vae, moments.chunk(2, dim=1)[0], tile=memory.vae_tile)
        yield source, pixels.finish(decoded.float().cpu(), sizes)
    del vae, robust
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
