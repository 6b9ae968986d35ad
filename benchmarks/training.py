"""Training SUPIR's adaptor: the loop beside its bare step, and on a GPU the same step written naively.

    python benchmarks/training.py                               # on a CPU, with the mini's shape and two workers
    python benchmarks/training.py --device cuda --shape sdxl    # random weights of SUPIR's real shape; 8 GB in --folder

`bare` prepares the same batches, which already lie on the device, and does forward, backward, clipping and update: what
any loop has to do. `loop` is `clearshard train` from shards, with decoding, degradation, running mean and log. `naive`
(CUDA only) is the usual script: float32 autoencoder and text encoders in each step, a loss read in each micro-step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from feeding import picture, write
from painting import pipelines

from degrade.strict import check
from models import mini, tiny_sdxl
from models.robust import RobustEncoder
from train.config import Training
from train.loop import Trainer
from train.named import Named
from train.ranks import Ranks

WARM = 3


def prior(folder: Path, shape: str) -> None:
    """Random weights of the mini's or of SDXL's shape, and a robust encoder beside them."""
    if (folder / "robust_encoder").is_dir():
        return
    if shape == "mini":
        mini.build(folder / "prior")
        from diffusers import AutoencoderKL
        vae = AutoencoderKL.from_pretrained(folder / "prior" / "vae")
    else:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
        whole = pipelines("cuda", toy=False)["text-to-image"]
        vae = whole.vae
        words = tiny_sdxl.tokenizer(tiny_sdxl.END), tiny_sdxl.tokenizer("!")
        marks = {"bos_token_id": words[0].bos_token_id, "eos_token_id": words[0].eos_token_id,
                 "vocab_size": len(words[0])}
        first = CLIPTextModel(CLIPTextConfig(**marks, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                             num_attention_heads=12, projection_dim=768))
        second = CLIPTextModelWithProjection(CLIPTextConfig(
            **marks, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280, hidden_act="gelu"))
        parts = {"unet": whole.unet, "vae": vae, "text_encoder": first.bfloat16(), "text_encoder_2": second.bfloat16(),
                 "tokenizer": words[0], "tokenizer_2": words[1]}
        for name, part in parts.items():
            part.save_pretrained(folder / "prior" / name)
    RobustEncoder.from_vae(vae).save_pretrained(folder / "robust_encoder")


def configuration(folder: Path, options: argparse.Namespace) -> Training:
    return check(Training, {
        "task": {"name": "supir.adaptor", "prior": str(folder / "prior"), "encoder": str(folder),
                 "depth": options.depth},
        "data": {"corpus": [str(folder / "corpus")], "crop": options.crop, "workers": options.workers},
        "out": str(folder / f"run-{time.time_ns()}"), "images": options.batch * options.steps * 2,
        "batch": options.batch, "optimizer": {"rate": 1e-5, "kind": options.optimizer}, "compile": options.compile,
        "checkpointing": options.checkpointing, "log_every": options.steps, "deterministic": False,
        "validation": {"every": 10 ** 9, "images": 1, "previews": 0}, "checkpoints": {"every": 10 ** 9},
    }, "benchmark")


def bare(trainer: Trainer, steps: int) -> float:
    """Seconds a step, without shards and without what surrounds a step."""
    count = trainer.config.batch
    batches = [trainer.loader.at(range(number * count, (number + 1) * count)) for number in range(2)]

    def step(number: int) -> None:
        trainer.losses(batches[number % 2])["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(list(trainer.trained.values()), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    return timed(step, steps, trainer.ranks.device)


def naive(trainer: Trainer, steps: int) -> float:
    """Seconds a step as scripts often have it."""
    objective, device = trainer.objective, trainer.ranks.device
    batch = trainer.loader.at(range(trainer.config.batch))
    objective.vae.float()
    objective.robust.float()
    objective.text.encoders.float()

    def step(number: int) -> None:
        objective.text.known.clear()
        with torch.no_grad():
            inputs = objective.prepare(batch, Named(number, batch.keys, batch.epochs))
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(inputs)["loss"].mean()
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(list(trainer.trained.values()), 1.0, foreach=False)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    return timed(step, steps, device)


def timed(step: Callable[[int], None], steps: int, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    for number in range(WARM):
        step(number)
    wait()
    begin = time.perf_counter()
    for number in range(steps):
        step(number)
    wait()
    return (time.perf_counter() - begin) / steps


def looped(trainer: Trainer) -> dict[str, float]:
    """The last line of the log of a run."""
    trainer.say = lambda text: None
    trainer.config.out.mkdir(parents=True, exist_ok=True)
    trainer.fit()
    lines = [json.loads(line) for line in (trainer.config.out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "images_per_s" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=["mini", "sdxl"], default="mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--reps", type=int, default=2, help="of everything; the best counts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--depth", default="released")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--folder", help="scratch folder; kept for the next run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(options.folder or scratch), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prior(folder, options.shape)
    if not (folder / "corpus" / "corpus.json").is_file():
        (folder / "corpus").mkdir(exist_ok=True)
        write(folder / "corpus", [picture(seed, max(512, options.crop)) for seed in range(options.samples)])
        from train.foreign import index_foreign
        index_foreign(str(folder / "corpus"))
    ranks = Ranks.start(options.device)

    def trainer() -> Trainer:
        return Trainer(configuration(folder, options), ranks, lambda text: None)
    found: dict[str, Any] = {"bare": [], "loop": [], "naive": [], "wait": []}
    for _ in range(options.reps):
        one = trainer()
        found["bare"].append(bare(one, options.steps))
        if options.device == "cuda":
            found["naive"].append(naive(one, options.steps))
        del one
        line = looped(trainer())
        found["loop"].append(options.batch / line["images_per_s"])
        found["wait"].append(line["data_wait"])
    reference = min(found["bare"])
    print(f"{options.shape}, {options.device}, crop {options.crop}, batch {options.batch}, {os.cpu_count()} cores, "
          f"torch {torch.__version__}")
    print(f"{'':8} {'s/step':>8} {'images/s':>9} {'ratio':>6}")
    for name in ("bare", "loop", "naive"):
        if found[name]:
            best = min(found[name])
            print(f"{name:8} {best:8.3f} {options.batch / best:9.2f} {best / reference:6.2f}")
    print(f"data wait of the loop {min(found['wait']):.1%}; " + ", ".join(
        f"{name} {line[name]:.3g}" for name in ("tflops", "mfu", "memory_gib") if name in line))


if __name__ == "__main__":
    main()
