"""The Zarr v3 backend, mapped layout: codecs `bytes` + `crc32c`, one chunk file for each (field, view, sample range).

A chunk file is the rows in C order, little endian, entries packed into the field's bits, padded to a whole chunk with the
fill value, then four bytes of CRC-32C: any Zarr v3 reader opens it, and the reader of this package maps it into memory as
it is. The chunk file of a ragged field is a Zarr shard: pieces of equal length, each with its CRC-32C, as many as
the records fill, and the shard's index.
"""

import asyncio
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import FormatError
from kdcache.records.manifest import Block, BlockGrid, FieldRecord, FileRecord
from kdcache.store.content import BlockArrays
from kdcache.store.files import write_record
from kdcache.store.packing import pack, packed_bytes, unpack
from kdcache.store.ragged import record_lengths

CRC_BYTES = 4
ZARR_METADATA = "zarr.json"
"""Name of the files that say to Zarr what the manifest says of groups and arrays."""
MOST_PIECES = 512
"""Pieces that a shard has room for: its index takes 16 bytes for each, and half a piece is lost to padding."""
SMALLEST_PIECE = 256
ABSENT = 2**64 - 1
"""Offset and length of a piece that a shard does not hold."""


class ZarrBackend:
    """Reads and writes stores in the mapped layout. See `kdcache.store.backends.Backend`."""

    layout = "zarr"

    def record_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block) -> list[str]:
        """The files of a block."""
        return [
            chunk_path(field, sample_block=block.sample_block, view=view)
            for field in fields
            if field.per_view
            for view in range(*block.views)
        ]

    def shared_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid) -> list[str]:
        """The files of all fields that belong to no block."""
        return [path for field in fields if not field.per_view for path in _shared_chunks(field, grid)]

    def paths_of(self, field: FieldRecord, grid: BlockGrid, *, sample_block: int, view: int) -> list[str]:
        """The files that hold the field's records of one view and range."""
        return [chunk_path(field, sample_block=sample_block, view=view)]

    def learn(self, tables: Mapping[str, NDArray[Any]], records: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Nothing: each record is written as it is."""

    def write_block(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block, arrays: BlockArrays
    ) -> tuple[FileRecord, ...]:
        """Writes a block's chunk files, each one atomically."""
        return tuple(
            write_record(
                root,
                chunk_path(field, sample_block=block.sample_block, view=view),
                encode_shard(rows, field, grid) if field.lengths else encode_chunk(rows, field, grid),
            )
            for field in fields
            for view, rows in zip(range(*block.views), arrays[field.name], strict=True)
        )

    def write_shared(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[FileRecord, ...]:
        """Writes the fields that belong to no block, and the `zarr.json` of every group and array."""
        metadata = [write_record(root, path, data) for path, data in sorted(_metadata(fields, grid).items())]
        chunks = []
        for field in (field for field in fields if not field.per_view):
            rows = arrays[field.name] if field.axes else arrays[field.name][None]
            step = grid.block_samples if field.axes else 1
            parts = [rows[start : start + step] for start in range(0, len(rows), step)]
            for path, part in zip(_shared_chunks(field, grid), parts, strict=True):
                chunks.append(write_record(root, path, encode_chunk(part, field, grid)))
        return (*metadata, *chunks)

    def read_records(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, *, sample_block: int, view: int
    ) -> dict[str, NDArray[Any]]:
        """The records of one view and range, [samples, *inner], flat for ragged fields."""
        num_rows = min(grid.block_samples, grid.num_samples - sample_block * grid.block_samples)
        records: dict[str, NDArray[Any]] = {}
        for field in sorted(fields, key=lambda field: field.lengths is not None):
            path = root / chunk_path(field, sample_block=sample_block, view=view)
            if field.lengths is None:
                records[field.name] = _decode_chunk(path, field, grid)[:num_rows]
            else:
                lengths = record_lengths(field, records[field.lengths.field])
                records[field.name] = _decode_shard(path, field, grid, int(lengths.sum()))
        return records

    def read_shared(self, root: Path, field: FieldRecord, grid: BlockGrid) -> NDArray[Any]:
        """A field that belongs to no block: [samples, *inner], or [*inner] for a table."""
        rows = np.concatenate([_decode_chunk(root / path, field, grid) for path in _shared_chunks(field, grid)])
        return rows[: grid.num_samples] if field.axes else rows[0]


def stored_form(field: FieldRecord) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and inner axes of a field as they lie in its files: little endian, the last axis packed where the field says so."""
    if field.bits is None:
        return np.dtype(field.dtype).newbyteorder("<"), field.inner
    return np.dtype(np.uint8), (*field.inner[:-1], packed_bytes(field.inner[-1], field.bits))


def row_bytes(field: FieldRecord) -> int:
    """Bytes of one row of a field that is not ragged."""
    dtype, inner = stored_form(field)
    return dtype.itemsize * int(np.prod(inner))


def piece_entries(field: FieldRecord, grid: BlockGrid) -> int:
    """Entries of a ragged field in a piece: the smallest power of two for which no shard needs more than `MOST_PIECES`."""
    needed = -(-grid.block_samples * field.inner[0] // MOST_PIECES)
    return max(SMALLEST_PIECE, 1 << (needed - 1).bit_length())


def piece_bytes(field: FieldRecord, grid: BlockGrid) -> int:
    """Bytes of a whole piece of a ragged field, without its checksum."""
    entries = piece_entries(field, grid)
    return packed_bytes(entries, field.bits) if field.bits else entries * np.dtype(field.dtype).itemsize


def num_pieces(field: FieldRecord, grid: BlockGrid) -> int:
    """Pieces that a shard has room for."""
    return -(-grid.block_samples * field.inner[0] // piece_entries(field, grid))


def shard_bytes(field: FieldRecord, grid: BlockGrid, num_entries: int) -> int:
    """The length of a shard file that holds so many entries."""
    used = -(-num_entries // piece_entries(field, grid))
    return used * (piece_bytes(field, grid) + CRC_BYTES) + 16 * num_pieces(field, grid) + CRC_BYTES


def chunk_bytes(field: FieldRecord, grid: BlockGrid) -> int:
    """The length of a field's chunk file; for a ragged field the greatest."""
    if field.lengths:
        return shard_bytes(field, grid, grid.block_samples * field.inner[0])
    return (grid.block_samples if field.axes else 1) * row_bytes(field) + CRC_BYTES


def chunk_path(field: FieldRecord, *, sample_block: int, view: int | None) -> str:
    """The chunk file's path in the store, by Zarr's default chunk key encoding."""
    leading = [*([] if view is None else [view]), *([sample_block] if field.axes else [])]
    return "/".join([field.name, "c", *map(str, [*leading, *(0 for _ in field.inner)])])


def encode_chunk(rows: NDArray[Any], field: FieldRecord, grid: BlockGrid) -> bytes:
    """The chunk file's content for the rows of one view and range, [at most block_samples, *inner]."""
    dtype, inner = stored_form(field)
    fill = 2**8 - 1 if field.bits else field.fill_value
    padded = np.full((grid.block_samples if field.axes else 1, *inner), fill, dtype)
    padded[: len(rows)] = pack(rows, field.bits) if field.bits else rows
    return _checked(padded.tobytes())


def encode_shard(entries: NDArray[Any], field: FieldRecord, grid: BlockGrid) -> bytes:
    """The shard file's content for the entries of one view and range, [at most block_samples · inner]."""
    piece = piece_entries(field, grid)
    count = -(-len(entries) // piece)
    padded = np.full(count * piece, field.fill_value, field.dtype)
    padded[: len(entries)] = entries
    pieces = padded.reshape(count, piece)
    stored = pack(pieces, field.bits) if field.bits else pieces.astype(pieces.dtype.newbyteorder("<"))
    length = piece_bytes(field, grid) + CRC_BYTES
    places = [(i * length, length) if i < count else (ABSENT, ABSENT) for i in range(num_pieces(field, grid))]
    index = b"".join(struct.pack("<QQ", *place) for place in places)
    return b"".join(_checked(row.tobytes()) for row in stored) + _checked(index)


def _decode_chunk(path: Path, field: FieldRecord, grid: BlockGrid) -> NDArray[Any]:
    dtype, inner = stored_form(field)
    _require_size(path, chunk_bytes(field, grid))
    rows = np.memmap(path, dtype, mode="r", shape=(grid.block_samples if field.axes else 1, *inner))
    return unpack(rows, field.inner[-1], field.bits, np.dtype(field.dtype)) if field.bits else np.asarray(rows)


def _decode_shard(path: Path, field: FieldRecord, grid: BlockGrid, num_entries: int) -> NDArray[Any]:
    _require_size(path, shard_bytes(field, grid, num_entries))
    piece, length = piece_entries(field, grid), piece_bytes(field, grid)
    count = -(-num_entries // piece)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    pieces = data[: count * (length + CRC_BYTES)].reshape(count, length + CRC_BYTES)[:, :length]
    if field.bits:
        return unpack(np.ascontiguousarray(pieces), piece, field.bits, np.dtype(field.dtype)).ravel()[:num_entries]
    dtype, _ = stored_form(field)
    return np.ascontiguousarray(pieces).view(dtype).ravel()[:num_entries]


def _require_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size != expected:
        raise FormatError(f"{path}: the fields of the manifest make {expected} bytes, found {size}")


def _checked(data: bytes) -> bytes:
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(CRC_BYTES, "little")


def _shared_chunks(field: FieldRecord, grid: BlockGrid) -> list[str]:
    return [chunk_path(field, sample_block=index, view=None) for index in range(grid.num_sample_blocks if field.axes else 1)]


def _metadata(fields: Sequence[FieldRecord], grid: BlockGrid) -> dict[str, bytes]:
    """Zarr's own metadata documents by path, made by Zarr in memory: it never fsyncs what it writes itself."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    store = MemoryStore()
    root = zarr.create_group(store=store, zarr_format=3, attributes={"kdcache": "see manifest.json"})
    for group in sorted({field.name.rpartition("/")[0] for field in fields} - {""}):
        root.create_group(group)
    for field in fields:
        root.create_array(field.name, **_array_options(field, grid))

    async def documents() -> dict[str, bytes]:
        found = {}
        async for key in store.list():
            buffer = await store.get(key, default_buffer_prototype())
            assert buffer is not None
            found[key] = buffer.to_bytes()
        return found

    return asyncio.run(documents())


def _array_options(field: FieldRecord, grid: BlockGrid) -> dict[str, Any]:
    from zarr.codecs import Crc32cCodec

    dtype, inner = stored_form(field)
    packing: dict[str, Any] = {"bits": field.bits, "packed_axis": field.inner_names[-1]} if field.bits else {}
    packing |= {"packed_length": field.inner[-1]} if field.bits and not field.lengths else {}
    names = field.inner_names if not field.bits else (*field.inner_names[:-1], f"{field.inner_names[-1]}_byte")
    options: dict[str, Any] = {
        "dtype": dtype.name,
        "fill_value": 255 if field.bits else float("nan") if field.fill_value == "NaN" else field.fill_value,
        "compressors": Crc32cCodec(),
        "attributes": field.attributes | packing,
    }
    if field.lengths:
        piece = piece_bytes(field, grid) if field.bits else piece_entries(field, grid)
        shard = num_pieces(field, grid) * piece
        attributes = {"lengths": field.lengths.field, "lengths_minus": field.lengths.minus}
        return options | {
            "shape": (grid.views.stop, grid.num_sample_blocks, shard),
            "chunks": (1, 1, piece),
            "shards": (1, 1, shard),
            "dimension_names": ("view", "block", *names),
            "attributes": options["attributes"] | attributes,
        }
    lengths = {"view": grid.views.stop, "sample": grid.num_samples}
    cut = {"view": 1, "sample": grid.block_samples}
    return options | {
        "shape": (*(lengths[axis] for axis in field.axes), *inner),
        "chunks": (*(cut[axis] for axis in field.axes), *inner),
        "dimension_names": (*field.axes, *names),
    }
