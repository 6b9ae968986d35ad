"""Colour: any mode and any profile to 8-bit sRGB without alpha."""

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

DEEP_GREY = {"I;16", "I;16B", "I;16L", "I;16N"}
ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}


def converted(pixels: np.ndarray, profile: bytes | None, mode: str) -> np.ndarray:
    """(h, w, 3) uint8 in `profile` as sRGB, same shape; mode L: a grey picture, with three equal channels."""
    transform = to_srgb(profile, mode) if profile else None
    if transform is None:
        return pixels
    source = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if mode == "L" else pixels))
    return np.asarray(ImageCms.applyTransform(source, transform))


def flattened(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Any mode to sRGB without alpha: transparent parts show white."""
    alpha = None
    if image.mode in DEEP_GREY or image.mode == "I":
        deep = np.asarray(image).astype(np.int64)
        if isinstance(image.info.get("transparency"), int):
            alpha = Image.fromarray(np.where(deep == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray(((deep.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ALPHA_MODES or "transparency" in image.info:
        # after loading: a GIF shows its transparent colour only now
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode not in {"L", "CMYK"}:
        image = image.convert("RGB")
    transform = to_srgb(profile, image.mode) if profile else None
    image = ImageCms.applyTransform(image, transform) if transform else image.convert("RGB")
    if alpha is None:
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=alpha)
    return white


@lru_cache(maxsize=64)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From `mode` (RGB, L or CMYK) in `profile` to sRGB; None where the numbers may stay as they are."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if mode == "L" and source.profile.xcolor_space != "GRAY":
            return None
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return transform
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(*[levels] * 3), -1).reshape(1, -1, 3)
        grid = Image.fromarray(colours if mode == "RGB" else levels[None])
        moved = np.asarray(ImageCms.applyTransform(grid, transform)).astype(int)
        change = np.abs(moved - np.asarray(grid.convert("RGB"))).max()
        return transform if change > 2 else None  # sRGB under one of its many names: by deed, not by title
    except Exception:
        return None
