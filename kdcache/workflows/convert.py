"""`kdcache convert`, `pack` and `unpack`: the same records in another layout of files, block by block. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kdcache.records.errors import ConfigError, IntegrityError
from kdcache.records.manifest import MANIFEST_NAME, BlockRecord, Manifest
from kdcache.records.progress import Progress, Silent
from kdcache.store.backends import LAYOUTS, Backend, make_backend
from kdcache.store.content import content_digest
from kdcache.store.destination import claimed
from kdcache.store.files import write_atomically
from kdcache.store.ledger import CONVERT_FOLDER
from kdcache.store.reader import CacheReader, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertResult:
    """What a conversion left behind."""

    path: Path
    """The new cache's directory."""
    manifest: Manifest
    """What it says of itself."""
    source_size_bytes: int
    """Bytes of all files of the cache that was converted, but its manifest."""
    size_bytes: int
    """The same of the new cache."""


def convert(source: Path, destination: Path, *, layout: str, progress: Progress | None = None) -> ConvertResult:
    """Copies a cache into another layout. Recipe, records, statistics and content digests stay; only the files differ.

    No more than a block is in memory. What is read is checked against the manifest's digests of files and of contents. The
    manifest is written last: killed at any moment and run again, the conversion begins again and ends in the same bytes.

    Args:
        source: The cache to convert.
        destination: A directory that does not exist, is empty, or holds an unfinished conversion of the same cache.
        layout: `zarr` (mapped, for training), `parquet` (for other tools) or `compact` (for archives).
        progress: Told how far it is.

    Raises:
        ConfigError: There is no such layout.
        CacheNotFoundError: There is no cache at the source.
        IncompleteCacheError: The source's dump is not finished.
        IntegrityError: The source is damaged, or its records are not those that its manifest names.
        ExistsError: Something else is at the destination.
        CacheBusyError: Another process converts there.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; expected one of: {', '.join(LAYOUTS)}")
    reader = CacheReader(source)
    backend = make_backend(layout, reader.manifest.fields)
    plan = {"content": reader.manifest.content, "layout": layout, "recipe_key": reader.manifest.recipe_key}
    with claimed(destination, plan, folder=CONVERT_FOLDER, work="conversion", other="of another cache or to another layout"):
        if (destination / MANIFEST_NAME).exists():  # killed when all was done
            manifest = read_manifest(destination)
        else:
            manifest = _convert_files(reader, destination, backend, progress or Silent())
            write_atomically(destination / MANIFEST_NAME, manifest.to_bytes())
    return ConvertResult(path=destination, manifest=manifest, source_size_bytes=reader.manifest.size_bytes, size_bytes=manifest.size_bytes)


def _convert_files(reader: CacheReader, destination: Path, backend: Backend, progress: Progress) -> Manifest:
    """Writes every file of the new cache, and gives its manifest."""
    manifest, grid = reader.manifest, reader.manifest.grid
    shared = {field.name: _read_shared(reader, field.name) for field in manifest.fields if not field.per_view}
    backend.learn({field.name: shared[field.name] for field in manifest.fields if not field.axes}, _classes(reader))
    blocks = []
    with progress.stage("convert", total=grid.num_samples * grid.num_views, unit="records") as advance:
        for record in manifest.blocks:
            blocks.append(_convert_block(reader, destination, backend, record))
            advance(record.block.num_rows)
    metadata_files = backend.write_shared(destination, manifest.fields, grid, shared)
    return replace(manifest, layout=backend.layout, metadata_files=metadata_files, blocks=tuple(blocks))


def _convert_block(reader: CacheReader, destination: Path, backend: Backend, record: BlockRecord) -> BlockRecord:
    fields = [field for field in reader.manifest.fields if field.per_view]
    names, block = [field.name for field in fields], record.block
    views = [reader.records(names, sample_block=block.sample_block, view=view) for view in range(*block.views)]
    arrays = {name: [records[name] for records in views] for name in names}
    _require_content(reader, f"block {block.id}", record.content, arrays)
    return replace(record, files=backend.write_block(destination, fields, reader.manifest.grid, block, arrays))


def _classes(reader: CacheReader) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The classes of all records, view by view and range by range."""
    grid = reader.manifest.grid
    for sample_block in range(grid.num_sample_blocks):
        for view in grid.views:
            yield reader.records(["logits/index"], sample_block=sample_block, view=view)


def _read_shared(reader: CacheReader, name: str) -> NDArray[Any]:
    array = reader.shared(name)
    _require_content(reader, name, reader.manifest.contents[name], {name: [array]})
    return array


def _require_content(reader: CacheReader, what: str, expected: str, arrays: dict[str, list[NDArray[Any]]]) -> None:
    found = content_digest(arrays)
    if found != expected:
        raise IntegrityError(
            f"{reader.root}: the records of {what} have the digest {found}, the manifest says {expected}; dump or pull it again"
        )
