"""A drawn degradation in words, for people who look at a sample and ask what happened to it."""

from __future__ import annotations

import math
from typing import Any

Step = dict[str, Any]


def words(parameters: dict[str, Any]) -> list[str]:
    """What was done to a sample, one phrase per step that was applied: `["blur iso 13 px sigma 2.1", "×0.43 area"]`.

    `parameters` are those that the degrader returns. Rounding, and a resize to the size that the image has already,
    change nothing that can be seen and have no phrase.
    """
    phrases, size = [], (parameters["height"], parameters["width"])
    for step in parameters["steps"]:
        if step is None or step["op"] == "round":
            continue
        if step["op"] == "resize":
            new = step["height"], step["width"]
            if new != size:
                phrases.append(f"×{new[0] / size[0]:.2f} {step['mode'].replace('_', ' ')}")
            size = new
        else:
            phrases.append(_PHRASES[step["op"]](step))
    return phrases


def _blur(step: Step) -> str:
    kernel = step["kernel"]
    start = f"blur {kernel['kind'].replace('_', ' ')} {kernel['size']} px"
    if kernel["kind"] == "sinc":
        return f"sinc {kernel['size']} px cutoff {kernel['cutoff'] / math.pi:.2f}π"
    if kernel["kind"] == "motion":
        return f"motion {kernel['length']:.1f} px at {_degrees(kernel)}"
    sigma = f" sigma {kernel['sigma_x']:.1f}"
    if "sigma_y" in kernel:
        sigma += f"/{kernel['sigma_y']:.1f} at {_degrees(kernel)}"
    return start + sigma + (f" beta {kernel['beta']:.1f}" if "beta" in kernel else "")


def _degrees(kernel: dict[str, Any]) -> str:
    """The angle of a point-symmetric kernel, which half a turn leaves as it is."""
    return f"{math.degrees(kernel['theta']) % 180:.0f}°"


def _noise(step: Step) -> str:
    amount = f"gaussian {step['sigma']:.0f}" if step["family"] == "gaussian" else f"shot noise {step['scale']:.2f}"
    return amount + (" grey" if step["grey"] else "")


def _jpeg(step: Step) -> str:
    layout = step["subsampling"]
    return f"JPEG {step['quality']:.0f}" + ("" if layout == "4:2:0" else f" {layout}")


_PHRASES = {
    "blur": _blur, "noise": _noise, "jpeg": _jpeg,
    "webp": lambda step: f"WebP {step['quality']}",
    "camera": lambda step: f"camera shot {step['shot']:.4f} read {step['read']:.3f}",
    "usm": lambda step: f"USM {step['weight']:g}",
    "sharpen": lambda step: f"sharpen {step['amount']:.1f} sigma {step['sigma']:.1f}",
}
