"""What a step costs, counted on the meta device: operations, parameters, memory. Nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from caption.cards import find_card
from degrade.strict import ConfigError

from .config import Training
from .crops import Batch
from .named import Named

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """Of one image; a multiply-add counts as two operations, bytes are those of bf16 maps."""

    operations: float
    trained: int                # parameters
    frozen: int
    maps: int                   # bytes that the backward pass needs
    parts: dict[str, int]       # trained parameters of each part


def count(config: Training) -> Cost:
    """The cost of one image of a configuration, forward and backward, without text, whose embeddings are cached."""
    objective = config.task.build(META)
    batch = blank(config.data.crop, objective.needs_lq)
    sizes: dict[int, int] = {}
    ours = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ours:
            sizes[storage._cdata] = storage.nbytes()
            kept_alive.append(tensor)       # so that no later storage takes its place
        return tensor
    kept_alive: list[torch.Tensor] = []
    draws = Named(0, batch.keys, batch.epochs)
    with torch.no_grad():
        objective.prepare(batch, draws)         # from now on the embeddings of its text are known
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            inputs = objective.prepare(batch, draws)
        with saved_tensors_hooks(kept, lambda tensor: tensor):
            loss = objective(inputs)["loss"]
        loss.sum().backward()
    trained = {name: parameter.numel() for name, parameter in objective.named_parameters() if parameter.requires_grad}
    parts: dict[str, int] = {}
    for name, size in trained.items():
        part = ".".join(name.split(".")[:2])
        parts[part] = parts.get(part, 0) + size
    everything = sum(parameter.numel() for parameter in objective.parameters())
    return Cost(counter.get_total_flops(), sum(trained.values()), everything - sum(trained.values()),
                sum(sizes.values()) // 2, parts)        # counted in float32


def blank(crop: int, lq: bool) -> Batch:
    """One sample without pixels."""
    pixels = torch.empty((1, 3, crop, crop), dtype=torch.uint8, device=META)
    return Batch(positions=[0], keys=["blank"], epochs=[0], groups=["hq"], texts=[""], hq=pixels,
                 lq=torch.empty_like(pixels) if lq else None, sizes=torch.empty((1, 6), device=META), replaced=[None],
                 reasons=[None], degradation=None)


def operations(config: Training) -> float:
    """Operations of one image."""
    return count(config).operations


def peak_tflops(device: torch.device, bf16: bool) -> float | None:
    """What large matrix multiplications reach on a device in bf16; None where that is not known."""
    if device.type != "cuda" or not bf16:
        return None
    try:
        return find_card(torch.cuda.get_device_name(device)).tflops
    except ConfigError:
        return None


def memory_gb(config: Training, cost: Cost, ranks: int) -> dict[str, float]:
    """GB on each of so many cards. Arithmetic, with block checkpointing as a sixth of the maps; measured is better.

    Weights of what is trained, its gradients and states are float32 (16 bytes a parameter, 10 with states in 8 bits),
    frozen networks bf16, and autocast keeps a bf16 copy of the trained weights.
    """
    cut = ranks if config.parallel == "fsdp" else 1
    micro = config.micro(ranks)
    states = 2 if config.optimizer.kind == "adamw8bit" else 8
    return {"trained weights and gradients": 8 * cost.trained / cut / 1e9,
            "optimizer": states * cost.trained / cut / 1e9,
            "running mean": (4 * cost.trained / ranks / 1e9) if config.ema else 0.0,
            "bf16 copy": 2 * cost.trained / 1e9,
            "frozen networks": 2 * cost.frozen / 1e9,
            f"maps of {micro} images": cost.maps * micro * (1 / 6 if config.checkpointing else 1) / 1e9}


def report(config: Training, card: str, ranks: int, share: float) -> list[str]:
    """Lines for `--dry-run`. share: of the card's attainable operations that are expected (MFU)."""
    cost, one = count(config), find_card(card)
    parts = ", ".join(f"{name} {size / 1e6:,.2f} M" for name, size in cost.parts.items())
    needs = memory_gb(config, cost, ranks)
    rate = share * one.tflops * 1e12 / cost.operations * ranks
    seconds = config.images / rate
    lines = [f"task {config.task.name}, crops of {config.data.crop} pixels",
             f"parameters: {cost.trained / 1e6:,.2f} million trained ({parts}), {cost.frozen / 1e6:,.2f} frozen",
             f"arithmetic: {readable(cost.operations)} per image, forward and backward, without text encoders",
             f"batch: {config.batch} = {ranks} x {config.micro(ranks)} x "
             f"{max(1, config.batch // (ranks * config.micro(ranks)))}, {config.steps:,} steps",
             f"memory on each {one.name}: about {sum(needs.values()):.1f} of {one.memory_gb:g} GB ("
             + ", ".join(f"{name} {value:.1f}" for name, value in needs.items()) + ")",
             f"time for {config.images:,} images on {ranks} x {one.name} at {share:.0%} of {one.tflops:g} TFLOP/s: "
             f"{lasting(seconds)} ({rate:,.0f} images/s)"]
    if sum(needs.values()) > one.memory_gb:
        lines.append("this does not fit: lower micro_batch, or set checkpointing: true, optimizer.kind: adamw8bit or "
                     "parallel: fsdp")
    return lines


def readable(operations: float) -> str:
    return f"{operations / 1e12:.2f} TFLOP" if operations > 1e11 else f"{operations / 1e9:.2f} GFLOP"


def lasting(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else f"{seconds / 3600:.1f} hours"

