"""Whole numbers packed into as few bits as they need: `bits` an entry, the least significant first, rows on whole bytes.

Entry i of a row lies in bits i · bits to (i + 1) · bits - 1 of the row's bytes; bit j of a row is bit j mod 8 of byte j div 8.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLACK = 8
"""Bytes that must be readable behind packed rows, as entries are read as whole words."""


def packed_bytes(length: int, bits: int) -> int:
    """Bytes of a row of `length` entries."""
    return -(-length * bits // 8)


def pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Packs the last axis: unsigned [..., length] to bytes [..., packed_bytes(length)]."""
    length = values.shape[-1]
    groups = -(-length // 8)  # eight entries fill whole bytes, so only eight different shifts occur
    padded = np.zeros((*values.shape[:-1], groups * 8), np.uint64)
    padded[..., :length] = values
    columns = padded.reshape(*values.shape[:-1], groups, 8)
    packed = np.zeros((*values.shape[:-1], groups, bits + 8), np.uint8)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        shifted = columns[..., i] << np.uint64(shift)
        for byte in range((shift + bits + 7) // 8):
            packed[..., first + byte] |= (shifted >> np.uint64(8 * byte)).astype(np.uint8)
    return packed[..., :bits].reshape(*values.shape[:-1], groups * bits)[..., : packed_bytes(length, bits)]


def unpack(packed: NDArray[np.uint8], length: int, bits: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Unpacks the last axis: bytes [..., packed_bytes(length)] to `dtype` [..., length]."""
    width = packed.shape[-1]
    padded = np.zeros(packed.size + SLACK, np.uint8)
    padded[: packed.size] = packed.ravel()
    rows = unpack_rows(padded, packed.size // width, width, length, bits)
    return rows.astype(dtype, copy=False).reshape(*packed.shape[:-1], length)


def unpack_rows(data: NDArray[np.uint8], num_rows: int, stride: int, length: int, bits: int) -> NDArray[Any]:
    """Unpacks rows where they lie: [num_rows, length] from bytes in which a row begins every `stride`.

    Behind the last row there must be `SLACK` bytes, whatever they hold: entries are read as whole words.
    """
    first, shift, word = _places(length, bits)
    words = np.ndarray((num_rows, packed_bytes(length, bits)), word, data, strides=(stride, 1))
    entries: NDArray[Any] = words[:, first]
    entries >>= shift
    entries &= word.type(2**bits - 1)
    return entries


@lru_cache
def _places(length: int, bits: int) -> tuple[NDArray[np.int64], NDArray[Any], np.dtype[Any]]:
    """The byte in which each entry begins, the bits before it in there, and the type that holds any entry with those bits."""
    starts, word = np.arange(length) * bits, word_type(length, bits)
    return starts // 8, (starts % 8).astype(word), word


def word_type(length: int, bits: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds any of `length` entries together with the bits before it in its first byte."""
    widest = max(i * bits % 8 for i in range(min(length, 8))) + bits
    return np.dtype("<u2" if widest <= 16 else "<u4" if widest <= 32 else "<u8")
