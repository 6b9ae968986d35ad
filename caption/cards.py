"""Graphics cards as data: what their makers print, and how much of it matrix multiplications reach."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from degrade.strict import ConfigError

ATTAINABLE = 0.8        # of the printed TFLOP/s, for cards of which no figure is known; the H200's share


@dataclass(frozen=True)
class Card:
    """One kind of GPU. Figures are per card: gigabytes are 10^9 bytes, operations are bf16 without sparsity."""

    name: str
    memory_gb: float
    printed_tflops: float
    bandwidth_tb_s: float
    source: str
    attained_tflops: float | None = None    # by large matrix multiplications, where a figure is known
    also: tuple[str, ...] = ()              # what drivers and Ray call it

    @property
    def tflops(self) -> float:
        """What ideal times are computed with: TFLOP/s that large matrix multiplications reach."""
        return self.attained_tflops or ATTAINABLE * self.printed_tflops

    @property
    def tflops_source(self) -> str:
        """Where `tflops` comes from, in words."""
        if self.attained_tflops:
            return f"the project's planning figure; {self.source} says {self.printed_tflops:g}"
        return f"{ATTAINABLE:.0%} of the {self.printed_tflops:g} in {self.source}, as for the H200"


# Data sheets print twice these TFLOP/s, with structured sparsity; those of the GeForce are with FP32 accumulation.
CARDS = {card.name: card for card in (
    Card("H200", 141, 989.5, 4.8, "NVIDIA's H200 data sheet", 790.0),
    Card("H100", 80, 989.5, 3.35, "NVIDIA's H100 data sheet (SXM)", also=("H100 80GB HBM3", "H100 SXM")),
    Card("H100-NVL", 94, 835.5, 3.9, "NVIDIA's H100 data sheet (NVL)"),
    Card("H100-PCIe", 80, 756.5, 2.0, "NVIDIA's H100 data sheet (PCIe)"),
    Card("A100-80", 80, 312, 2.039, "NVIDIA's A100 data sheet (SXM)", also=("A100-SXM4-80GB", "A100-80G", "A100")),
    Card("A100-80-PCIe", 80, 312, 1.935, "NVIDIA's A100 data sheet (PCIe)", also=("A100 80GB PCIe",)),
    Card("A100-40", 40, 312, 1.555, "NVIDIA's A100 data sheet (40 GB)",
         also=("A100-SXM4-40GB", "A100-PCIE-40GB", "A100-40G")),
    Card("L40S", 48, 362.05, 0.864, "NVIDIA's L40S data sheet"),
    Card("A40", 48, 149.7, 0.696, "NVIDIA's A40 data sheet"),
    Card("A6000", 48, 154.8, 0.768, "NVIDIA's GA102 white paper", also=("RTX A6000",)),
    Card("L4", 24, 121, 0.3, "NVIDIA's L4 data sheet"),
    Card("RTX 4090", 24, 165.2, 1.008, "NVIDIA's Ada white paper", also=("4090", "GeForce RTX 4090")),
)}


def find_card(name: str) -> Card:
    """The card of a name, as in CARDS or as a driver says it ("NVIDIA A100-SXM4-80GB"); case does not matter.

    Raises:
        ConfigError: no such card; names the nearest and all of them.
    """
    known = {_plain(each): card for card in CARDS.values() for each in (card.name, *card.also)}
    if _plain(name) in known:
        return known[_plain(name)]
    near = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {known[near[0]].name!r}? " if near else ""
    raise ConfigError(f"--card {name!r} is not known; {hint}There are: {', '.join(CARDS)}")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]|nvidia", "", name.lower())
