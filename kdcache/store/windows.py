"""Many files in one range of addresses, so that random rows of all of them are one NumPy gather."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAP_FIXED = 0x10
_SLACK = mmap.PAGESIZE


class Window:
    """Equal places in a reserved range of addresses; files are mapped into them when they are first needed.

    Nothing is read or copied before it is gathered, and processes that map the same files share the page cache. What no
    file was mapped to reads as zeros.

    Args:
        num_places: How many files there may be.
        place_bytes: The longest that one of them may be.

    Raises:
        OSError: There is no such range of addresses.
    """

    def __init__(self, num_places: int, place_bytes: int) -> None:
        self.stride = -(-(place_bytes + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        size = num_places * self.stride + _SLACK
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self.bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ), np.uint8)
        self._mapped: NDArray[np.bool_] = np.zeros(num_places, np.bool_)
        self._num_missing = num_places

    def map(self, place: int, path: Path) -> None:
        """Maps a file into a place, read-only.

        Raises:
            OSError: The file cannot be opened or mapped.
            ValueError: It is longer than a place.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if not 0 < size < self.stride:
                raise ValueError(f"{path} has {size} bytes, expected 1 to {self.stride - 1}")
            self._map_fixed(self.bytes.ctypes.data + place * self.stride, size, descriptor)
        finally:
            os.close(descriptor)
        self._mapped[place] = True
        self._num_missing = int(np.count_nonzero(~self._mapped))

    def missing(self, places: NDArray[np.int64]) -> list[int]:
        """Those of these places to which no file is mapped yet."""
        if not self._num_missing:
            return []
        found: list[int] = np.unique(places[~self._mapped[places]]).tolist()
        return found

    def items(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """What begins at each address, as `dtype`: an array that overlaps itself, to be indexed by addresses."""
        return np.ndarray((len(self.bytes) - dtype.itemsize + 1,), dtype, self.bytes, strides=(1,))

    @staticmethod
    def _map_fixed(address: int, size: int, descriptor: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        found = libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        if found != address:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
