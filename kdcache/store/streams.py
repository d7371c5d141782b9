"""Streams of whole numbers, each coded by what makes it smaller: pcodec, which knows their distribution, or Zstandard."""

from typing import Any

import numpy as np
from numcodecs import PCodec, Zstd
from numpy.typing import NDArray

from kdcache.records.errors import FormatError

PCODEC, ZSTD = "pcodec", "zstd"
LEVEL = {PCODEC: 8, ZSTD: 15}
SMALLEST_PCODEC = 2
"""Pcodec has numbers of 2, 4 and 8 bytes; single bytes are widened."""


def encode_stream(values: NDArray[Any]) -> tuple[str, bytes]:
    """The coder and the bytes of numbers of any type, in C order; floats go by their bits."""
    whole = np.ascontiguousarray(values).ravel().view(f"<u{values.dtype.itemsize}")
    if not len(whole):
        return ZSTD, b""
    options = [(ZSTD, Zstd(level=LEVEL[ZSTD]).encode(whole)), (PCODEC, PCodec(level=LEVEL[PCODEC]).encode(_widened(whole)))]
    coder, data = min(options, key=lambda option: len(option[1]))
    return coder, bytes(data)


def decode_stream(coder: str, data: bytes, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """The numbers, [count].

    Raises:
        FormatError: These bytes are not so many numbers of this type. No more memory is taken than they need.
    """
    if not count:
        return np.zeros(0, dtype)
    whole = np.zeros(count, f"<u{dtype.itemsize}")
    try:
        if coder == ZSTD:
            Zstd().decode(data, whole.view(np.uint8))
        elif coder == PCODEC:
            wide = _widened(whole)
            PCodec().decode(data, wide)
            if wide.max() > np.iinfo(whole.dtype).max:
                raise ValueError("a number is too large")
            whole = wide.astype(whole.dtype)
        else:
            raise ValueError(f"unknown coder {coder!r}")
    except (ValueError, RuntimeError, TypeError) as error:
        raise FormatError(f"expected a stream of {count} numbers as {dtype}: {error}") from error
    return whole.view(dtype.newbyteorder("<"))


def _widened(whole: NDArray[Any]) -> NDArray[Any]:
    return whole.astype(f"<u{SMALLEST_PCODEC}") if whole.dtype.itemsize < SMALLEST_PCODEC else whole
