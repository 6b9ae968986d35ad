"""Captions: what the job costs over a bare `generate` loop, and on a GPU how near to the ideal LLaVA-13B's shape comes.

    python benchmarks/captioning.py                      # on a CPU: the tiny LLaVA, through Ray and without
    python benchmarks/captioning.py --device cuda        # LLaVA-1.5-13B's shape with random weights, in bfloat16
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

IDEAL_TFLOPS, BANDWIDTH_TB = 790.0, 4.8     # of an H200, as docs/planning.md has them


def job_against_loop(images: int, batch: int, layers: int) -> None:
    """The whole job through Ray, in its steady state, against `generate` on the same batches in this process.

    layers: 0 for the tiny LLaVA, whose answer takes a millisecond, less than to decode a picture; otherwise one as deep
    with random weights, which takes as long as it takes a GPU to run a real one.
    """
    from caption.captions import CaptionJob
    from caption.config import captions_of
    from models import tiny_llava
    from models.fingerprint import fingerprint
    from pipeline import config
    from pipeline.cluster import Cluster
    from pipeline.stages import STAGES, Session
    from pipeline.storage import Folder
    with tempfile.TemporaryDirectory() as root:
        model, pile, workspace = Path(root) / "llava", Path(root) / "pile", Path(root) / "w"
        pictures = tiny_llava.sample_photographs()
        if layers:
            grown(model, layers)
        else:
            tiny_llava.build(model, pictures)
        pile.mkdir()
        for i in range(images):
            image = list(pictures.values())[i % len(pictures)].resize((320, 256))
            image.putpixel((0, 0), (i % 256, i // 256, 7))          # so that none is the copy of another
            image.save(pile / f"{i:05d}.png")
        workspace.mkdir()
        (workspace / "corpus.yaml").write_text(CORPUS.format(pile=pile, model=model, batch=batch))
        folder = Folder.at(str(workspace))
        corpus, cluster = config.load(folder), Cluster(workers=2)
        session = Session(folder, corpus, cluster)
        for name in ("ingest", "score", "select", "tile"):
            STAGES[name].run(session)
        job = CaptionJob(folder, corpus, fingerprint(captions_of(corpus).transformers.model))
        units, marks = job.pending(), []
        cluster.run(job, units, watch=lambda totals: marks.append((time.perf_counter(), totals.rows)))
        cluster.stop()
        # Without the start of Ray and the loading of the model: from the third unit's end to the last.
        (begun, before), (ended, rows) = marks[2], marks[-1]
        through_job = (ended - begun) / (rows - before)
        alone = bare_loop(job, units)
    print(f"{rows} captions, {len(units)} units, batches of {batch}, {f'{layers} layers' if layers else 'tiny LLaVA'}, "
          "one thread")
    print(f"  generate alone        {1e3 * alone:7.2f} ms a caption")
    print(f"  the job, steady state {1e3 * through_job:7.2f} ms a caption, {through_job / alone:.3f} of it")


def grown(folder: Path, layers: int) -> None:
    """The tiny LLaVA with a deeper and wider text model and random weights; it never says the end token."""
    import transformers

    from models import tiny_llava
    small, processor = tiny_llava.untrained()
    config = small.config
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads = 512, 1376, layers, 8
    text.num_key_value_heads, text.head_dim = 8, 64
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(small.generation_config, name))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


CORPUS = """
sources: [{{uri: {pile}}}]
select: {{min_side: 64, keep_near_duplicates: true, facts: {{sharpness: {{min: 0}}, flat_share: {{max: 1}},
  noise: {{max: 1000}}, blockiness: {{max: 1000}}, upscale: {{max: 100}}, border: {{max: 1}}, entropy: {{min: 0}},
  clipped_dark: {{max: 1}}, clipped_bright: {{max: 1}}}}}}
tile: {{mode: whole, size: 256, min_texture: 0}}
caption:
  transformers: {{model: {model}, batch_size: {batch}, device: cpu}}
  retry: null
  prompt: {{name: long, question: "Describe this image and its style in a very detailed manner.", max_new_tokens: 40,
    min_words: 3}}
"""


def bare_loop(job: object, units: list) -> float:
    """Seconds a caption of `generate` on the batches that the job makes, prepared beforehand."""
    from caption.backends import cut, expected_length
    from caption.local import Captioner
    from caption.shown import Shown, Tensors
    config = job.config
    torch.set_num_threads(1)
    prepare = Tensors(Shown(job.corpus.score.limits, config.max_side, 60), config.transformers.model)
    batches = [prepare(rows) for unit in units
               for rows in cut(sorted(job.rows(unit), key=expected_length), config.transformers.batch_size)]
    captioner = Captioner(config.transformers)
    inputs = [{name: torch.tensor(array) for name, array in batch.inputs.items()} for batch in batches]
    captioner(inputs[0], 40)
    started = time.perf_counter()
    for batch in inputs:
        captioner(batch, 40)
    return (time.perf_counter() - started) / sum(len(batch.rows) for batch in batches)


def shape_of_13b(device: str, tiny: bool) -> torch.nn.Module:
    """LLaVA-1.5-13B's shape, or a toy's, with random weights in bfloat16."""
    import transformers
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14) if not tiny else transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14)
    text = transformers.LlamaConfig(
        vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        max_position_embeddings=4096) if not tiny else transformers.LlamaConfig(
        vocab_size=32064, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000,
                                      vision_feature_select_strategy="default", vision_feature_layer=-2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def real_shape(device: str, batches: list[int], tokens: int, tiny: bool) -> None:
    """Images and tokens a second at several batch sizes, against batch one and against what the memory allows."""
    model = shape_of_13b(device, tiny)
    weights = sum(parameter.numel() for parameter in model.parameters())
    text = model.config.text_config
    cache = 2 * text.num_hidden_layers * text.hidden_size * 2               # bytes a token, keys and values in bfloat16
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {weights / 1e9:.2f} G weights in bfloat16, 576 + 60 tokens in, {tokens} "
          "out")
    first = None
    for batch in batches:
        ids = torch.full((batch, 636), 5, device=device)
        ids[:, 2:578] = 32000
        pixels = torch.randn(batch, 3, 336, 336, device=device, dtype=torch.bfloat16)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                           max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rate = batch / min(seconds)
        first = first or rate
        read = 2 * weights + batch * cache * (636 + tokens / 2)             # bytes read for each step of decoding
        prefill = 2 * weights * 636 * batch / (IDEAL_TFLOPS * 1e12)
        ideal = batch / (prefill + tokens * read / (BANDWIDTH_TB * 1e12))
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""
        print(f"  batch {batch:4d}: {rate:8.3f} images/s, {rate * tokens:9.1f} tokens/s, {rate / first:6.2f} x batch "
              f"{batches[0]}, {rate / ideal:6.3f} of an H200's ideal ({ideal:.1f} images/s){peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640, help="for the job on a CPU")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--layers", type=int, default=6, help="of the text model; 0: the tiny LLaVA")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=200, help="generated per caption, on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--toy", action="store_true", help="a toy's shape, to try the script itself")
    options = parser.parse_args()
    np.random.seed(0)
    if options.device == "cuda" or options.toy:
        real_shape(options.device, options.batches, options.tokens, options.toy)
    else:
        job_against_loop(options.images, options.batch, options.layers)


if __name__ == "__main__":
    main()
