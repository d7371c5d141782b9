"""The Zarr v3 backend, mapped layout: codecs `bytes` + `crc32c`, one chunk file for each (field, view, sample range).

A chunk file is the rows in C order, little endian, padded to a whole chunk with the fill value, then four bytes of
CRC-32C: any Zarr v3 reader opens it, and the reader of this package maps it into memory as it is.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import IntegrityError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import Block, BlockGrid, FieldRecord, FileRecord
from kdcache.store.files import write_atomically

CRC_BYTES = 4


def array_shape(field: FieldRecord, grid: BlockGrid) -> tuple[int, ...]:
    """The array's shape: (view, sample, *inner), or (sample, *inner) for a field that has no view axis."""
    views = (grid.num_views,) if field.per_view else ()
    return (*views, grid.num_samples, *field.inner)


def chunk_shape(field: FieldRecord, grid: BlockGrid) -> tuple[int, ...]:
    """The shape of one chunk file."""
    views = (1,) if field.per_view else ()
    return (*views, grid.block_samples, *field.inner)


def chunk_path(field: FieldRecord, *, sample_block: int, view: int | None) -> str:
    """The chunk file's path in the store, by Zarr's default chunk key encoding."""
    views = [] if view is None else [view]
    indices = [*views, sample_block, *(0 for _ in field.inner)]
    return "/".join([field.name, "c", *map(str, indices)])


def encode_chunk(rows: NDArray[Any], field: FieldRecord, grid: BlockGrid) -> bytes:
    """The chunk file's content for the rows of one view, [at most block_samples, *inner]."""
    padded = np.full((grid.block_samples, *field.inner), field.fill_value, dtype=stored_dtype(field))
    padded[: len(rows)] = rows
    data: bytes = padded.tobytes()
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(CRC_BYTES, "little")


def write_chunks(
    root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block, arrays: Mapping[str, NDArray[Any]]
) -> tuple[FileRecord, ...]:
    """Writes a block's chunk files, each one atomically.

    Args:
        root: The store's directory.
        fields: The fields that the block holds.
        grid: How the arrays are cut.
        block: Which block.
        arrays: By field name, [views of the block, samples of the block, *inner].

    Returns:
        The files that were written.
    """
    records = []
    for field in fields:
        for offset, view in enumerate(range(*block.views)):
            path = chunk_path(field, sample_block=block.sample_block, view=view)
            records.append(_write(root, path, encode_chunk(arrays[field.name][offset], field, grid)))
    return tuple(records)


def write_sample_field(root: Path, field: FieldRecord, grid: BlockGrid, rows: NDArray[Any]) -> tuple[FileRecord, ...]:
    """Writes a whole field that has no view axis, [samples, *inner]."""
    return tuple(
        _write(
            root,
            chunk_path(field, sample_block=index, view=None),
            encode_chunk(rows[index * grid.block_samples : (index + 1) * grid.block_samples], field, grid),
        )
        for index in range(grid.num_sample_blocks)
    )


def write_metadata(root: Path, fields: Sequence[FieldRecord], grid: BlockGrid) -> tuple[FileRecord, ...]:
    """Writes the `zarr.json` of every group and array."""
    return tuple(_write(root, path, data) for path, data in sorted(_metadata(fields, grid).items()))


def map_chunk(root: Path, record: FileRecord, field: FieldRecord, grid: BlockGrid) -> NDArray[Any]:
    """Maps a chunk file into memory, [block_samples, *inner], read-only. Nothing is read until it is indexed.

    Raises:
        IntegrityError: The file is missing or has another length.
    """
    path = root / record.path
    shape = (grid.block_samples, *field.inner)
    dtype = stored_dtype(field)
    expected = int(np.prod(shape)) * dtype.itemsize + CRC_BYTES
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing; `kdcache verify` lists all damage") from error
    if size != expected:
        raise IntegrityError(f"{path} has {size} bytes, expected {expected}; `kdcache verify` lists all damage")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def stored_dtype(field: FieldRecord) -> np.dtype[Any]:
    """The field's type in memory and on the disk: little endian."""
    return np.dtype(field.dtype).newbyteorder("<")


def _write(root: Path, path: str, data: bytes) -> FileRecord:
    write_atomically(root / path, data)
    return FileRecord(path=path, size_bytes=len(data), sha256=sha256(data))


def _metadata(fields: Sequence[FieldRecord], grid: BlockGrid) -> dict[str, bytes]:
    """Zarr's own metadata documents by path, made by Zarr in memory: it never fsyncs what it writes itself."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    store = MemoryStore()
    root = zarr.create_group(store=store, zarr_format=3, attributes={"kdcache": "see manifest.json"})
    for group in sorted({field.name.rpartition("/")[0] for field in fields} - {""}):
        root.create_group(group)
    for field in fields:
        axes = ("view", "sample") if field.per_view else ("sample",)
        root.create_array(
            field.name,
            shape=array_shape(field, grid),
            chunks=chunk_shape(field, grid),
            dtype=field.dtype,
            fill_value=float("nan") if field.fill_value == "NaN" else field.fill_value,
            compressors=Crc32cCodec(),
            dimension_names=(*axes, *field.inner_names),
            attributes=field.attributes,
        )

    async def documents() -> dict[str, bytes]:
        found = {}
        async for key in store.list():
            buffer = await store.get(key, default_buffer_prototype())
            assert buffer is not None
            found[key] = buffer.to_bytes()
        return found

    return asyncio.run(documents())
