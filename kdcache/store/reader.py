"""Reads a cache: each file is verified once and mapped into memory, a batch is one gather."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.records.consistency import check_manifest
from kdcache.records.errors import CacheNotFoundError, FormatError, IncompleteCacheError, IntegrityError, MismatchError
from kdcache.records.hashing import sha256_file
from kdcache.records.manifest import MANIFEST_NAME, FieldRecord, FileRecord, Manifest
from kdcache.store.ledger import read_plan
from kdcache.store.zarr_backend import chunk_path, map_chunk

Rows = NDArray[np.int64]


def read_manifest(root: Path) -> Manifest:
    """Reads a complete cache's manifest.

    Raises:
        CacheNotFoundError: There is no cache.
        IncompleteCacheError: A dump was begun there and is not finished.
        FormatError: Not a manifest of a known version.
        IntegrityError: The manifest is damaged.
    """
    path = root / MANIFEST_NAME
    if path.is_file():
        manifest = Manifest.from_bytes(path.read_bytes(), where=str(path))
        check_manifest(manifest, where=str(path))
        _check_chunks_listed(manifest, where=str(path))
        return manifest
    begun = read_plan(root)
    if begun is not None:
        plan, done = begun
        raise IncompleteCacheError(
            f"the dump into {root} is not finished: {done} of {len(plan.grid.blocks())} blocks are done;"
            f" run the same `kdcache dump … --out {root}` again to go on"
        )
    raise CacheNotFoundError(f"no cache at {root}: expected {path}; `kdcache dump --teacher FILE --data SPEC --out {root}` makes one")


class CacheReader:
    """The arrays of a complete cache.

    A chunk file is opened, verified and mapped when a record of it is asked for first. Gathers copy nothing but the rows asked for.

    Args:
        root: The cache's directory.

    Raises:
        CacheNotFoundError: There is no cache.
        IncompleteCacheError: A dump was begun there and is not finished.
        IntegrityError: The manifest is damaged; files are checked when they are first used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = read_manifest(root)
        self._fields = {field.name: field for field in self.manifest.fields}
        self._files = {file.path: file for file in self.manifest.files}
        self._chunks: dict[str, NDArray[Any]] = {}
        self._verified: set[str] = set()

    def field(self, name: str) -> FieldRecord:
        """The record of a field.

        Raises:
            MismatchError: The cache has no such field.
        """
        if name not in self._fields:
            raise MismatchError(f"{self.root} has no field {name!r}; it has: {', '.join(sorted(self._fields))}")
        return self._fields[name]

    def gather(self, names: Sequence[str], rows: Rows, views: Rows) -> dict[str, NDArray[Any]]:
        """The records of (row, view) pairs.

        Args:
            names: Fields to read; only these are opened.
            rows: Rows in the cache, [records].
            views: View numbers, [records].

        Returns:
            By field name, [records, *inner].

        Raises:
            IntegrityError: A file that is needed is damaged.
            MismatchError: A row, a view or a field is outside the cache.
        """
        grid = self.manifest.grid
        _require_within(rows, grid.num_samples, "row")
        _require_within(views, grid.num_views, "view")
        sample_blocks, offsets = np.divmod(rows, grid.block_samples)
        places, group = np.unique(sample_blocks * grid.num_views + views, return_inverse=True)
        members = [np.flatnonzero(group == i) for i in range(len(places))]
        gathered = {}
        for name in names:
            field = self.field(name)
            out = np.empty((len(rows), *field.inner), field.dtype)
            for place, member in zip(places.tolist(), members, strict=True):
                sample_block, view = divmod(place, grid.num_views)
                chunk = self._chunk(field, sample_block=sample_block, view=view if field.per_view else None)
                out[member] = chunk[offsets[member]]
            gathered[name] = out
        return gathered

    def sample_field(self, name: str) -> NDArray[Any]:
        """All rows of a field that has no view axis, such as `key` or `label`: [samples, *inner]."""
        field = self.field(name)
        chunks = [self._chunk(field, sample_block=i, view=None) for i in range(self.manifest.grid.num_sample_blocks)]
        return np.concatenate(chunks)[: self.manifest.grid.num_samples]

    def verify_all(self) -> None:
        """Verifies every file now, so that training cannot meet damage in its middle.

        Raises:
            IntegrityError: Lists every bad file and its block.
        """
        problems = list(self.problems(lambda _: None))
        if problems:
            raise IntegrityError(f"{self.root} is damaged ({len(problems)} bad files); dump or pull it again", problems)

    def problems(self, on_file: Callable[[FileRecord], None]) -> Iterator[str]:
        """One line for every damaged or missing file, with its block; `on_file` is called after each file."""
        owners = {file.path: block.block.id for block in self.manifest.blocks for file in block.files}
        for file in self.manifest.files:
            problem = self._problem(file)
            on_file(file)
            if problem:
                owner = f" (block {owners[file.path]})" if file.path in owners else ""
                yield f"{file.path}{owner}: {problem}"

    def _problem(self, file: FileRecord) -> str | None:
        """What is wrong with a file, or None; a file is read for this once."""
        if file.path in self._verified:
            return None
        problem = _file_problem(self.root, file)
        if problem is None:
            self._verified.add(file.path)
        return problem

    def _chunk(self, field: FieldRecord, *, sample_block: int, view: int | None) -> NDArray[Any]:
        path = chunk_path(field, sample_block=sample_block, view=view)
        if path not in self._chunks:
            record = self._files.get(path)
            if record is None:
                raise IntegrityError(f"{self.root}: the manifest lists no file {path}")
            problem = self._problem(record)
            if problem:
                raise IntegrityError(f"{self.root / path}: {problem}; `kdcache verify {self.root}` lists all damage")
            self._chunks[path] = map_chunk(self.root, record, field, self.manifest.grid)
        return self._chunks[path]


def _check_chunks_listed(manifest: Manifest, *, where: str) -> None:
    """Every chunk of every array is listed, and each block lists its own."""
    grid = manifest.grid
    per_view = [field for field in manifest.fields if field.per_view]
    expected = [
        {chunk_path(field, sample_block=block.sample_block, view=view) for field in per_view for view in range(*block.views)}
        for block in grid.blocks()
    ]
    listed = [{file.path for file in record.files} for record in manifest.blocks]
    whole = {
        chunk_path(field, sample_block=index, view=None)
        for field in manifest.fields
        if not field.per_view
        for index in range(grid.num_sample_blocks)
    }
    if listed != expected or not whole <= {file.path for file in manifest.metadata_files}:
        raise FormatError(f"{where}: the files that are listed are not the chunk files of the arrays; dump or pull the cache again")


def _file_problem(root: Path, record: FileRecord) -> str | None:
    """What is wrong with a file, or None."""
    path = root / record.path
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != record.size_bytes:
        return f"{size} bytes, expected {record.size_bytes}"
    found = sha256_file(path)
    return None if found == record.sha256 else f"content changed: {found}, expected {record.sha256}"


def _require_within(values: Rows, count: int, what: str) -> None:
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < count):
        raise MismatchError(f"expected {what}s from 0 to {count - 1}, found {int(values.min())} to {int(values.max())}")
