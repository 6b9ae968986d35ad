"""Named sets of sampling figures, each with where it comes from."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from degrade.strict import ConfigError, Strict, check

from . import sigmas
from .guidance import Alone, Both, Churn, Control, Denoise, Guidance, Restore, guided
from .noise import KeyedNoise
from .samplers import OnStep, dpmpp_2m_sde, edm, euler, start

SPACINGS = {"released": sigmas.released, "karras": sigmas.karras, "trailing": sigmas.trailing,
            "leading": sigmas.leading}


class Preset(Strict):
    """Everything about sampling that is not an image, a prompt, a seed or a machine."""

    name: str
    sampler: Literal["edm", "dpmpp_2m_sde", "euler"] = "edm"
    spacing: Literal["released", "karras", "trailing", "leading"] = "released"
    steps: int = Field(50, ge=1, le=sigmas.LEVELS)
    guidance: Guidance = Guidance(low=4.0, high=1.0)
    control: Control = Control(low=1.0, high=1.0)
    churn: Churn = Field(Churn(), description="of the edm sampler")
    eta: float = Field(1.0, ge=0, description="of dpmpp_2m_sde: share of the noise that is renewed")
    renewed: float = Field(1.0, gt=0, description="of dpmpp_2m_sde: standard deviation of the renewed noise")
    tau: float | None = Field(None, gt=0, description="strength of the pull, weaker when larger; null: no pull")
    centre: Literal["stage1", "lq"] = Field("stage1", description="towards the plain encoder's latent of the first "
                                            "stage's image, or towards the low-quality latent")
    gate: float = Field(0.05, ge=0, description="no pull in steps that end at a sigma up to this")
    source: dict[str, str] = Field(default_factory=dict, description="where each figure comes from")

    @model_validator(mode="after")
    def fits(self) -> Preset:
        if self.churn.amount and self.sampler != "edm":
            raise ValueError(f"churn is of the edm sampler; {self.sampler} has none")
        unknown = set(self.source) - set(FIGURES)
        if unknown:
            raise ValueError(f"source names {', '.join(sorted(unknown))}, which is no figure of a preset")
        return self

    def sigmas(self) -> torch.Tensor:
        """(steps + 1,) float32, descending to 0."""
        return SPACINGS[self.spacing](self.steps)


FIGURES = sorted(set(Preset.model_fields) - {"name", "source"})
PAPER, CODE, PAGE, README = ("SUPIR, section 4.1", "released code", "released web page's defaults",
                             "released README, May 2025")
UNUSED = "not used"
RELEASED = {"sampler": CODE, "spacing": CODE, "steps": PAGE, "centre": CODE, "gate": CODE, "eta": UNUSED,
            "renewed": UNUSED, "tau": f"{PAGE}: off; the author says that tuned guidance makes it unnecessary"}

PRESETS = {preset.name: preset for preset in (
    Preset(
        name="paper", steps=100, guidance=Guidance(low=7.5, high=7.5), tau=4.0, centre="lq", gate=0.0,
        churn=Churn(amount=0.0, noise=1.003),
        source={
            "sampler": "SUPIR, algorithm 1", "steps": PAPER, "tau": PAPER, "centre": "SUPIR, algorithm 1",
            "guidance": f"{PAPER}: 7.5, as the weight that the released configuration and the author give; the paper's "
                        "formula, read literally, would make it a weight of 8.5",
            "gate": "SUPIR, algorithm 1: none", "spacing": CODE, "control": "not in the paper: full",
            "churn": "named but not given in the paper; released configuration of 100 steps",
            "eta": UNUSED, "renewed": UNUSED}),
    Preset(
        name="quality", guidance=Guidance(low=6.0, high=3.0), control=Control(low=0.93, high=0.93),
        churn=Churn(amount=5.0, noise=1.02),
        source=RELEASED | {"guidance": README, "control": README, "churn": f"amount: {PAGE}; noise: {README}"}),
    Preset(
        name="fidelity", guidance=Guidance(low=4.0, high=1.0), churn=Churn(amount=5.0, noise=1.01),
        source=RELEASED | {"guidance": README, "control": PAGE, "churn": f"amount: {PAGE}; noise: {README}"}),
    Preset(
        name="lightning", sampler="dpmpp_2m_sde", spacing="karras", steps=8, guidance=Guidance(low=2.0, high=2.0),
        eta=1.0, renewed=1.003,
        source=RELEASED | {
            "steps": "released Lightning configuration, for a 4-step SDXL-Lightning model as the base",
            "guidance": "released Lightning configuration, quality; 1.5 for fidelity", "control": PAGE,
            "churn": UNUSED, "eta": CODE, "renewed": "released configuration of the other samplers",
            "tau": f"{CODE}: this sampler has no pull"}),
)}


def choose(name: str | Preset, changes: dict[str, Any] | None = None, where: str = "preset") -> Preset:
    """A preset by name, with some figures changed.

    Args:
        name: or a preset of one's own.
        changes: such as `{"steps": 30, "guidance": {"high": 2.0}}`.
        where: from where the changes come, for errors and for the `source` of what they change.

    Raises:
        ConfigError: an unknown preset or key, with the nearest name, or a value out of range.
    """
    if isinstance(name, str) and name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known presets: {', '.join(PRESETS)}"
        raise ConfigError(f"{where}: unknown preset {name!r}; {hint}")
    preset = PRESETS[name] if isinstance(name, str) else name
    if not changes:
        return preset
    base = preset.model_dump()
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = base[key] | value if both else value
    base["source"] = base["source"] | {key: where for key in changes if key in FIGURES}
    return check(Preset, base, where)


def guide(preset: Preset, both: Both, alone: Alone | None = None) -> Denoise:
    """`guidance.guided` with the preset's figures."""
    def before(raised: float) -> float:
        return preset.churn.before(raised, preset.steps)

    return guided(both, preset.guidance, preset.control, before, alone)


def run(preset: Preset, denoise: Denoise, noise: KeyedNoise, *, z_stage1: torch.Tensor, z_lq: torch.Tensor,
        on_step: OnStep | None = None) -> torch.Tensor:
    """Samples latents.

    Args:
        denoise: from `guide`, perhaps through `tiles.tiled`.
        noise: names the images of the batch.
        z_stage1: (B, C, H, W) float32, the plain encoder's latents of the first stage's images, scaled.
        z_lq: the same shape, the degradation-robust encoder's latents.
        on_step: progress, previews and cancelling; see `samplers`.

    Returns:
        (B, C, H, W) float32, scaled.
    """
    levels = preset.sigmas()
    x = start(noise.start(z_stage1), levels)
    centre = {"stage1": z_stage1, "lq": z_lq}[preset.centre]
    options: dict[str, Any] = {"on_step": on_step,
                               "restore": Restore(centre, preset.tau, preset.gate) if preset.tau else None}
    if preset.sampler == "edm":
        return edm(denoise, x, levels, churn=preset.churn, noise=noise, **options)
    if preset.sampler == "dpmpp_2m_sde":
        return dpmpp_2m_sde(denoise, x, levels, eta=preset.eta, s_noise=preset.renewed, noise=noise, **options)
    return euler(denoise, x, levels, **options)
