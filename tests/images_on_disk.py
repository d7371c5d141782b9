"""Folders of small images for tests."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdcache.learning.datasets import Dataset, open_dataset
from kdcache.records.specs import Spec


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A small colour image of noise; `size` is width and height."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_folder(root: Path, classes: dict[str, int], *, seed: int = 0) -> Path:
    """A folder of images for each class: its name and how many it has."""
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(encoded(picture(1000 * seed + 100 * label + number)))
    return root


def opened(spec: str, *, trusted: bool = True, **options: Any) -> Dataset:
    """The dataset that a spec string names."""
    return open_dataset(Spec.parse(spec), trusted=trusted, **options)
