"""Data that travels with kdcache: a small dataset, its teacher. See README.md beside this file for provenance and licence."""

from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import SpecError

EMBEDDED_DATASETS = ("fashion-mini",)
"""Names of the embedded datasets."""

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def load_embedded(name: str, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Reads one split of an embedded dataset.

    Args:
        name: One of `EMBEDDED_DATASETS`.
        split: `train` or `test`.

    Returns:
        Images [samples, 1, 28, 28], labels [samples], names of the classes.

    Raises:
        SpecError: There is no such split.
    """
    if name not in EMBEDDED_DATASETS or split not in ("train", "test"):
        raise SpecError(f"no split {split!r} of {name!r}; expected train or test of {', '.join(EMBEDDED_DATASETS)}")
    with np.load(_here() / f"{name}.npz", allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return images[:, None], labels.astype(np.int64), FASHION_CLASSES


def embedded_teacher() -> Path:
    """The teacher for `fashion-mini`: a `large` network trained on the full Fashion-MNIST training set."""
    return _here() / "fashion-teacher.safetensors"


def _here() -> Path:
    return Path(str(resources.files(__name__)))
