"""Random records out of mapped chunk files: a few NumPy calls a batch, wherever the records lie."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import FormatError
from kdcache.records.manifest import BlockGrid, FieldRecord
from kdcache.store.packing import SLACK, packed_bytes, unpack, unpack_rows, word_type
from kdcache.store.ragged import record_lengths
from kdcache.store.windows import Window
from kdcache.store.zarr_backend import CRC_BYTES, chunk_bytes, piece_bytes, piece_entries, row_bytes, shard_bytes

Indices = NDArray[np.int64]

GROUP = 16
"""Counts between two offsets that are held in memory: half a byte a record, and sixteen counts to add up for one."""


class MappedField:
    """One field with a view axis and the same number of entries in every record.

    Args:
        field: Which.
        grid: How it is cut.
    """

    def __init__(self, field: FieldRecord, grid: BlockGrid) -> None:
        self.field, self.width = field, row_bytes(field)
        self.window = _window(field, grid)
        self._dtype = np.dtype(field.dtype).newbyteorder("<")
        self._stride = self.width + (SLACK if field.bits else 0)
        self._rows = self.window.items(np.dtype(f"V{self._stride}"))

    def gather(self, places: Indices, rows: Indices) -> NDArray[Any]:
        """Records [n, *inner], by the places of their chunk files and their rows in them."""
        raw, shape = self._rows[places * self.window.stride + rows * self.width], (len(rows), *self.field.inner)
        if self.field.bits is None:
            records: NDArray[Any] = raw.view(self._dtype).reshape(shape)
            return records
        if len(shape) > 2:
            packed = raw.view(np.uint8).reshape(len(rows), self._stride)[:, : self.width]
            return unpack(packed.reshape(*shape[:-1], packed_bytes(shape[-1], self.field.bits)), shape[-1], self.field.bits, self._dtype)
        return unpack_rows(raw.view(np.uint8), shape[0], self._stride, shape[1], self.field.bits).astype(self._dtype, copy=False)


class MappedCounts(MappedField):
    """The counts of ragged fields, and where each record's entries begin."""

    def __init__(self, field: FieldRecord, grid: BlockGrid) -> None:
        super().__init__(field, grid)
        self.items_a_row = int(np.prod(field.inner))
        num_groups = -(-grid.block_samples * self.items_a_row // GROUP)
        self._starts = np.zeros((grid.num_views * grid.num_sample_blocks, num_groups + 1), np.int64)
        self._groups = self.window.items(np.dtype(f"V{GROUP * self._dtype.itemsize}"))

    def index(self, place: int, *, num_rows: int) -> Indices:
        """Adds a chunk's counts up, once it is mapped; gives the counts of its rows, [num_rows · items]."""
        address = place * self.window.stride
        size = num_rows * self.items_a_row * self._dtype.itemsize
        counts = self.window.bytes[address : address + size].view(self._dtype).astype(np.int64)
        ends = np.add.accumulate(np.add.reduceat(counts, np.arange(0, len(counts), GROUP)))
        self._starts[place, 1 : len(ends) + 1] = ends
        return counts

    def starts(self, places: Indices, rows: Indices) -> Indices:
        """How many entries stand before each record in its chunk, [n]."""
        first = rows * self.items_a_row
        group = first // GROUP
        raw = self._groups[places * self.window.stride + group * GROUP * self._dtype.itemsize]
        counts = raw.view(self._dtype).reshape(len(rows), GROUP)
        before = np.arange(GROUP) < (first % GROUP)[:, None]
        starts: Indices = self._starts[places, group] + np.where(before, counts, 0).sum(axis=1, dtype=np.int64)
        return starts


class MappedRagged:
    """One ragged field.

    Args:
        field: Which.
        grid: How it is cut.
        counts: Its counts.
    """

    def __init__(self, field: FieldRecord, grid: BlockGrid, counts: MappedCounts) -> None:
        assert field.lengths is not None
        self.field, self.grid, self.counts, self.minus = field, grid, counts, field.lengths.minus
        self.window = _window(field, grid)
        self._piece_entries, self._piece_bytes = piece_entries(field, grid), piece_bytes(field, grid)
        self._dtype = np.dtype(field.dtype).newbyteorder("<")
        self._entries = self.window.items(self._dtype if field.bits is None else word_type(8, field.bits))

    def expect_size(self, place: int, size: int, *, num_rows: int) -> None:
        """Refuses a shard that is not as long as the counts say.

        Raises:
            FormatError: They contradict each other.
        """
        counts = self.counts.index(place, num_rows=num_rows)
        lengths = record_lengths(self.field, counts.reshape(num_rows, self.counts.items_a_row))
        expected = shard_bytes(self.field, self.grid, int(lengths.sum()))
        if size != expected:
            raise FormatError(f"the counts of {self.field.name} make {expected} bytes, found {size}")

    def gather(self, places: Indices, rows: Indices, counts: NDArray[Any]) -> NDArray[Any]:
        """Records [n, *positions, most entries among them], padded with the fill value; `counts` are theirs, [n, *positions]."""
        return gather_ragged(
            self.field,
            counts,
            starts=self.counts.starts(places, rows) - self.minus * self.counts.items_a_row * rows,
            read=lambda record, entry: self._read(places[record], entry),
        )

    def _read(self, places: Indices, entries: Indices) -> NDArray[Any]:
        piece, place_in_piece = np.divmod(entries, self._piece_entries)
        addresses = places * self.window.stride + piece * (self._piece_bytes + CRC_BYTES)
        bits = self.field.bits
        if bits is None:
            read: NDArray[Any] = self._entries[addresses + place_in_piece * self._dtype.itemsize]
            return read
        byte, shift = np.divmod(place_in_piece * bits, 8)
        words = self._entries[addresses + byte]
        unpacked: NDArray[Any] = ((words >> shift.astype(words.dtype)) & words.dtype.type(2**bits - 1)).astype(self._dtype)
        return unpacked


def gather_ragged(
    field: FieldRecord, counts: NDArray[Any], *, starts: Indices, read: Callable[[Indices, Indices], NDArray[Any]]
) -> NDArray[Any]:
    """Lays the entries of ragged records side by side, [n, *positions, most], padded with the fill value.

    Args:
        field: The ragged field.
        counts: [n, *positions].
        starts: Where each record's first entry stands, [n].
        read: Entries by (number of the record, place of the entry), both [entries].
    """
    assert field.lengths is not None
    lengths = counts.reshape(len(counts), math.prod(counts.shape[1:])).astype(np.int64) - field.lengths.minus
    most = int(lengths.max(initial=0))
    first = starts[:, None] + np.cumsum(lengths, axis=1) - lengths
    rank = np.arange(most)
    present = rank < lengths[..., None]
    out = np.full(present.shape, field.fill_value, np.dtype(field.dtype).newbyteorder("<"))
    record = np.broadcast_to(np.arange(len(counts))[:, None, None], present.shape)[present]
    out[present] = read(record, (first[..., None] + rank)[present])
    return out.reshape(*counts.shape, most)


def _window(field: FieldRecord, grid: BlockGrid) -> Window:
    places = grid.num_views * grid.num_sample_blocks
    try:
        return Window(places, chunk_bytes(field, grid))
    except (OSError, OverflowError, ValueError) as error:
        raise FormatError(f"the field {field.name} has {places} chunk files of up to {chunk_bytes(field, grid)} bytes: {error}") from error
