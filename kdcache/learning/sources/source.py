"""The seam between a dataset and where its samples lie: what PyTorch asks for, and what a source may know without decoding."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

KEY_BYTES = 16

Sample = UInt8[Tensor, "channels height width"] | Float32[Tensor, "features"] | Int64[Tensor, "length"]
"""A decoded image, a row of a table, or a text as tokens."""

Rows = NDArray[np.int64]
Keys = NDArray[np.uint8]
Labels = NDArray[np.int64]


class MapDataset(Protocol):
    """What PyTorch calls a map-style dataset of (sample, label) pairs."""

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """(sample, label): a PIL image or a tensor (see `as_sample_tensor`), and a whole number."""


@runtime_checkable
class KnowsSamples(Protocol):
    """A map-style dataset that knows more of its samples than decoding them one by one would tell.

    A dataset of one's own may have these three methods too; without them, each sample is decoded once for its key and label.
    """

    def sample_keys(self, rows: Rows, /) -> Keys | None:
        """The keys of some samples, [rows, 16]; None where they have to be decoded for it."""

    def sample_labels(self, rows: Rows, /) -> Labels | None:
        """The labels of some samples, [rows], the same as the samples come with; None where they have to be decoded for it."""

    def sample_name(self, row: int, /) -> str | None:
        """How messages call a sample, such as its file; None for its row."""


class Selection:
    """Some samples of a source, in an order of one's own.

    Args:
        source: All samples.
        rows: Which of them, [samples].
    """

    def __init__(self, source: MapDataset, rows: Rows) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.rows[index])]

    def sample_keys(self, rows: Rows) -> Keys | None:
        """The keys of some of these samples; None where the source does not know them."""
        return self.source.sample_keys(self.rows[rows]) if isinstance(self.source, KnowsSamples) else None

    def sample_labels(self, rows: Rows) -> Labels | None:
        """The labels of some of these samples; None where the source does not know them."""
        return self.source.sample_labels(self.rows[rows]) if isinstance(self.source, KnowsSamples) else None

    def sample_name(self, row: int) -> str:
        """What the source calls a sample: a row is one of the whole source."""
        row = int(self.rows[row])
        name = self.source.sample_name(row) if isinstance(self.source, KnowsSamples) else None
        return f"row {row}" if name is None else name


def sample_key(sample: Sample) -> bytes:
    """The 16-byte key of a decoded sample: BLAKE2b over its shape and its values in row-major order.

    What is no image has its type before the shape, so that equal bytes of another kind have another key.
    """
    shape = tuple(sample.shape) if sample.dtype == torch.uint8 else (str(sample.dtype), *sample.shape)
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=KEY_BYTES)
    digest.update(sample.contiguous().numpy().tobytes())
    return digest.digest()


def bytes_key(data: bytes) -> bytes:
    """The 16-byte key of an encoded sample: BLAKE2b over its bytes."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def as_keys(keys: Sequence[bytes]) -> Keys:
    """Keys as an array, [keys, 16]."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)
