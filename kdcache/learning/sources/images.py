"""Encoded images to pixels: always uint8 [3, height, width]."""

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from kdcache.records.errors import UnreadableSampleError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Files of a folder that are images, by their name's end, in any case; others are passed over."""


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122


def decode_rgb(data: bytes, *, name: str) -> UInt8[Tensor, "3 height width"]:
    """Decodes an image.

    Grey values become three equal channels, palettes their colours, and CMYK the colours that the decoder makes of it; an alpha
    channel is dropped, 16-bit values keep their upper byte, and of an animation the first picture is taken. Pixels come as they
    are stored: the orientation in EXIF data is not applied, as torchvision's own folders do not apply it (but in TIFF, where it
    is a part of the format, and Pillow does).

    Args:
        data: The encoded file.
        name: Where it comes from, for messages.

    Raises:
        UnreadableSampleError: It is empty, cut short, damaged, or no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels: Tensor = functional.pil_to_tensor(_as_rgb(image))
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise unreadable(name, error if data else "the file is empty") from error
    return pixels


def unreadable(name: str, reason: object) -> UnreadableSampleError:
    """The error for a sample that cannot be read."""
    cause = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
    return UnreadableSampleError(
        f"{name} cannot be read ({cause}). Mend or remove it, or leave out what cannot be read: kdcache dump --skip-unreadable"
    )


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no range")
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
