"""Streams of whole numbers, each coded by what makes it smaller: pcodec, which knows their distribution, or Zstandard."""

from typing import Any

import numpy as np
from numcodecs import PCodec, Zstd
from numpy.typing import NDArray
from pcodec import standalone

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
    whole = np.zeros(count, f"<u{dtype.itemsize}")
    try:
        if not count:
            if data:
                raise ValueError(f"found {len(data)} bytes")
        elif coder == ZSTD:
            if _zstd_size(data) != whole.nbytes:
                raise ValueError("it has another length")
            Zstd().decode(data, whole.view(np.uint8))
        elif coder == PCODEC:
            wide = _widened(whole)
            progress = standalone.simple_decompress_into(data, wide)  # numcodecs would not say how many numbers there were
            if progress.n_processed != count or not progress.finished:
                raise ValueError("it has another length")
            if wide.max() > np.iinfo(whole.dtype).max:
                raise ValueError("a number is too large")
            whole = wide.astype(whole.dtype)
        else:
            raise ValueError(f"unknown coder {coder!r}")
    except (ValueError, RuntimeError, TypeError) as error:
        raise FormatError(f"expected a stream of {count} numbers as {dtype}: {error}") from error
    return whole.view(dtype.newbyteorder("<"))


def _zstd_size(data: bytes) -> int | None:
    """The length that a Zstandard frame says its content has; None where it says none. numcodecs takes any that is not too long.

    Source: RFC 8878, section 3.1.1.1.
    """
    flags = int.from_bytes(data[4:5], "little")
    is_single = flags >> 5 & 1
    start = 6 - is_single + (0, 1, 2, 4)[flags & 3]
    width = (is_single, 2, 4, 8)[flags >> 6]
    size = int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)
    return size if width else None


def _widened(whole: NDArray[Any]) -> NDArray[Any]:
    return whole.astype(f"<u{SMALLEST_PCODEC}") if whole.dtype.itemsize < SMALLEST_PCODEC else whole
