"""Makes `fashion-mini.npz`: the first 1000 training and 200 test images of each class of Fashion-MNIST, in original order.

Run: python data/make_fashion_mini.py /usr/share/datasets/fashion-mnist
"""

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_idx(path: Path, *, header_bytes: int) -> NDArray[np.uint8]:
    """The bytes of a gzipped IDX file after its header, [items]."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header_bytes)


def first_of_each_class(labels: NDArray[np.uint8], count: int) -> NDArray[np.intp]:
    """Rows of the first `count` samples of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def main(folder: Path) -> None:
    """Writes `fashion-mini.npz` beside this script."""
    arrays: dict[str, Any] = {}
    for split, prefix, count in (("train", "train", 1000), ("test", "t10k", 200)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", header_bytes=16).reshape(-1, 28, 28)
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", header_bytes=8)
        rows = first_of_each_class(labels, count)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[rows], labels[rows]
    np.savez_compressed(Path(__file__).with_name("fashion-mini.npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
