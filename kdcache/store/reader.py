"""Reads a cache: each file is verified once and mapped into memory, a batch is one gather."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.records.consistency import check_manifest
from kdcache.records.errors import CacheNotFoundError, FormatError, IncompleteCacheError, IntegrityError, KdcacheError, MismatchError
from kdcache.records.hashing import sha256_file
from kdcache.records.manifest import MANIFEST_NAME, FieldRecord, FileRecord, Manifest
from kdcache.store.backends import make_backend
from kdcache.store.ledger import CONVERT_FOLDER, MERGE_FOLDER, STAGED, read_plan
from kdcache.store.mapped import MappedCounts, MappedField, MappedRagged, gather_ragged
from kdcache.store.ragged import record_lengths
from kdcache.store.windows import Window
from kdcache.store.zarr_backend import ZARR_METADATA, chunk_bytes, chunk_path

Rows = NDArray[np.int64]

KEPT_BYTES = 2**30
"""Decoded records that a reader of a layout without random access keeps in memory."""


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
        _check_files_listed(manifest, where=str(path))
        return manifest
    begun = read_plan(root)
    if begun is not None:
        plan, done = begun
        raise IncompleteCacheError(
            f"the dump into {root} is not finished: {done} of {plan.grid.num_blocks} blocks are done;"
            f" run the same `kdcache dump … --out {root}` again to go on"
        )
    if (root / CONVERT_FOLDER).exists():
        raise IncompleteCacheError(f"the conversion into {root} is not finished; run the same `kdcache convert … {root}` again")
    if (root / MERGE_FOLDER).exists():
        raise IncompleteCacheError(f"the merge into {root} is not finished; run the same `kdcache merge … --out {root}` again")
    raise CacheNotFoundError(f"no cache at {root}: expected {path}; `kdcache dump --teacher FILE --data SPEC --out {root}` makes one")


class CacheReader:
    """The arrays of a complete cache.

    A file is verified, and opened, when a record of it is asked for first. The mapped layout is gathered where it lies; records of
    other layouts are decoded a view and range at a time, and the last ones used are kept.

    A reader may be used in a forked process, and pickled into a new one, which opens and verifies for itself.

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
        self.backend = make_backend(self.manifest.layout, self.manifest.fields)
        self._fields = {field.name: field for field in self.manifest.fields}
        self._files = {file.path: file for file in self.manifest.files}
        self._verified: set[str] = set()
        self._wanted: dict[tuple[str, ...], list[FieldRecord]] = {}
        self._source = _Mapped(self) if self.is_mapped else _Decoded(self)

    def __reduce__(self) -> tuple[type["CacheReader"], tuple[Path]]:
        return (CacheReader, (self.root,))

    @property
    def is_mapped(self) -> bool:
        """Whether random records cost no more than neighbouring ones."""
        return self.manifest.layout == "zarr"

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
            names: Fields to read; only these, and the counts of ragged ones, are opened.
            rows: Rows in the cache, [records].
            views: View numbers, those of `grid.views`, [records].

        Returns:
            By field name, [records, *inner]; for ragged fields [records, *positions, most entries], padded with the fill value.

        Raises:
            IntegrityError: A file that is needed is damaged.
            MismatchError: A row, a view or a field is outside the cache.
        """
        grid = self.manifest.grid
        _require_within(rows, range(grid.num_samples), "row")
        _require_within(views, grid.views, "view")
        blocks, offsets = np.divmod(rows, grid.block_samples)
        return self._source.gather(self._with_counts(names), (views - grid.first_view) * grid.num_sample_blocks + blocks, offsets)

    def records(self, names: Sequence[str], *, sample_block: int, view: int) -> dict[str, NDArray[Any]]:
        """All records of one view and range of samples, as they are stored: [samples, *inner], flat [entries] for ragged fields.

        Raises:
            IntegrityError: A file that is needed is damaged.
        """
        fields = self._with_counts(names)
        for field in fields:
            for path in self.backend.paths_of(field, self.manifest.grid, sample_block=sample_block, view=view):
                self.require(path)
        return self.backend.read_records(self.root, fields, self.manifest.grid, sample_block=sample_block, view=view)

    def shared(self, name: str) -> NDArray[Any]:
        """A field that has no view axis, whole: `key` or `label` as [samples, *inner], a table as [*inner].

        Raises:
            IntegrityError: A file that is needed is damaged.
        """
        field = self.field(name)
        for path in self.backend.shared_paths([field], self.manifest.grid):
            self.require(path)
        return self.backend.read_shared(self.root, field, self.manifest.grid)

    def view_and_range(self, place: int) -> tuple[int, int]:
        """The view and the range of samples whose records have this place among those of all views and ranges."""
        view, sample_block = divmod(place, self.manifest.grid.num_sample_blocks)
        return self.manifest.grid.first_view + view, sample_block

    def require(self, path: str) -> FileRecord:
        """Verifies a file, once.

        Raises:
            IntegrityError: It is missing or damaged.
        """
        record = self._files.get(path)
        if record is None:
            raise IntegrityError(f"{self.root}: the manifest lists no file {path}")
        problem = self._problem(record)
        if problem:
            raise IntegrityError(f"{self.root / path}: {problem}; `kdcache verify {self.root}` lists all damage")
        return record

    def _with_counts(self, names: Sequence[str]) -> list[FieldRecord]:
        """Records of these fields and of the counts of ragged ones; what is not ragged comes first."""
        wanted = tuple(names)
        if wanted not in self._wanted:
            fields = [self.field(name) for name in wanted]
            counts = [self.field(field.lengths.field) for field in fields if field.lengths]
            unique = {field.name: field for field in (*counts, *fields)}.values()
            self._wanted[wanted] = sorted(unique, key=lambda field: field.lengths is not None)
        return self._wanted[wanted]

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
        problem = file_problem(self.root, file)
        if problem and self._has_grown(file):
            problem = None
        if problem is None:
            self._verified.add(file.path)
        return problem

    def _has_grown(self, file: FileRecord) -> bool:
        """Whether this is Zarr's own metadata, which nothing here reads, of a cache that is getting, or has got, more views by now."""
        if PurePosixPath(file.path).name != ZARR_METADATA:
            return False
        for path in (self.root / STAGED / MANIFEST_NAME, self.root / MANIFEST_NAME):  # in the order in which one becomes the other
            try:
                newer = Manifest.from_bytes(path.read_bytes(), where=str(path))
            except (OSError, KdcacheError):
                continue
            found = [other for other in newer.metadata_files if other.path == file.path]
            if newer.recipe_key == self.manifest.recipe_key and found and file_problem(self.root, found[0]) is None:
                return True
        return False


class _Mapped:
    """Gathers from mapped chunk files; a chunk's place in each window is (view − first view) · ranges + range."""

    def __init__(self, reader: CacheReader) -> None:
        self._reader, self._grid = reader, reader.manifest.grid
        self._fixed: dict[str, MappedField] = {}
        self._ragged: dict[str, MappedRagged] = {}

    def gather(self, fields: Sequence[FieldRecord], places: Rows, rows: Rows) -> dict[str, NDArray[Any]]:
        gathered: dict[str, NDArray[Any]] = {}
        for field in fields:
            if field.lengths is None:
                fixed = self._open_fixed(field)
                self._open_chunks(fixed.window, field, places)
                gathered[field.name] = fixed.gather(places, rows)
            else:
                ragged = self._open_ragged(field)
                self._open_chunks(ragged.window, field, places)
                gathered[field.name] = ragged.gather(places, rows, gathered[field.lengths.field])
        return gathered

    def _open_fixed(self, field: FieldRecord) -> MappedField:
        if field.name not in self._fixed:
            counted = {other.lengths.field for other in self._reader.manifest.fields if other.lengths}
            self._fixed[field.name] = (MappedCounts if field.name in counted else MappedField)(field, self._grid)
        return self._fixed[field.name]

    def _open_ragged(self, field: FieldRecord) -> MappedRagged:
        assert field.lengths is not None
        if field.name not in self._ragged:
            counts = self._fixed[field.lengths.field]
            assert isinstance(counts, MappedCounts)
            self._ragged[field.name] = MappedRagged(field, self._grid, counts)
        return self._ragged[field.name]

    def _open_chunks(self, window: Window, field: FieldRecord, places: Rows) -> None:
        for place in window.missing(places):
            view, sample_block = self._reader.view_and_range(place)
            path = chunk_path(field, sample_block=sample_block, view=view)
            size = self._reader.require(path).size_bytes
            try:
                if field.lengths:
                    num_rows = min(self._grid.block_samples, self._grid.num_samples - sample_block * self._grid.block_samples)
                    self._ragged[field.name].expect_size(place, size, num_rows=num_rows)
                elif size != chunk_bytes(field, self._grid):
                    raise FormatError(f"the fields of the manifest make {chunk_bytes(field, self._grid)} bytes, found {size}")
            except FormatError as error:
                raise FormatError(f"{self._reader.root / path}: {error}; this cache was not written by kdcache, or was edited") from error
            window.map(place, self._reader.root / path)


class _Decoded:
    """Gathers from whole decoded views and ranges, of which the last ones used are kept."""

    def __init__(self, reader: CacheReader) -> None:
        self._reader, self._grid = reader, reader.manifest.grid
        self._kept: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()

    def gather(self, fields: Sequence[FieldRecord], places: Rows, rows: Rows) -> dict[str, NDArray[Any]]:
        parts = []
        found, group = np.unique(places, return_inverse=True)
        members = [np.flatnonzero(group == i) for i in range(len(found))]
        for place, member in zip(found.tolist(), members, strict=True):
            parts.append(self._gather_place(fields, place, rows[member]))
        if not parts:
            return {field.name: self._nothing(field) for field in fields}
        order = np.argsort(np.concatenate(members), kind="stable")
        return {field.name: _concatenate([part[field.name] for part in parts], field)[order] for field in fields}

    def _nothing(self, field: FieldRecord) -> NDArray[Any]:
        inner = (*self._reader.field(field.lengths.field).inner, 0) if field.lengths else field.inner
        return np.empty((0, *inner), field.dtype)

    def _gather_place(self, fields: Sequence[FieldRecord], place: int, rows: Rows) -> dict[str, NDArray[Any]]:
        records = self._records(fields, place)
        gathered: dict[str, NDArray[Any]] = {}
        for field in fields:
            if field.lengths is None:
                gathered[field.name] = records[field.name][rows]
            else:
                entries = records[field.name]
                gathered[field.name] = gather_ragged(
                    field,
                    gathered[field.lengths.field],
                    starts=records[f"{field.name} starts"][rows],
                    read=lambda _, entry, entries=entries: entries[entry],  # type: ignore[misc]
                )
        return gathered

    def _records(self, fields: Sequence[FieldRecord], place: int) -> dict[str, NDArray[Any]]:
        kept = self._kept.setdefault(place, {})
        self._kept.move_to_end(place)
        missing = [field for field in fields if field.name not in kept]
        if missing:
            view, sample_block = self._reader.view_and_range(place)
            kept |= self._reader.records([field.name for field in missing], sample_block=sample_block, view=view)
            for field in missing:
                if field.lengths:
                    lengths = record_lengths(field, kept[field.lengths.field])
                    kept[f"{field.name} starts"] = np.cumsum(lengths) - lengths
            self._forget()
        return kept

    def _forget(self) -> None:
        """Drops what was not used for longest until the rest fits."""
        while len(self._kept) > 1 and sum(array.nbytes for kept in self._kept.values() for array in kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)


def _concatenate(parts: Sequence[NDArray[Any]], field: FieldRecord) -> NDArray[Any]:
    """Joins records along their first axis; ragged ones are padded to the longest."""
    if field.lengths is None:
        return np.concatenate(parts)
    most = max(part.shape[-1] for part in parts)
    widths = [[(0, 0)] * (part.ndim - 1) + [(0, most - part.shape[-1])] for part in parts]
    return np.concatenate([np.pad(part, width, constant_values=field.fill_value) for part, width in zip(parts, widths, strict=True)])


def _check_files_listed(manifest: Manifest, *, where: str) -> None:
    """Every file of every array is listed, and each block lists its own."""
    backend, grid = make_backend(manifest.layout, manifest.fields), manifest.grid
    of_records = [field for field in manifest.fields if field.per_view]
    expected = [set(backend.record_paths(of_records, grid, block)) for block in grid.blocks()]
    listed = [{file.path for file in record.files} for record in manifest.blocks]
    shared = set(backend.shared_paths([field for field in manifest.fields if not field.per_view], grid))
    if listed != expected or not shared <= {file.path for file in manifest.metadata_files}:
        raise FormatError(f"{where}: the files that are listed are not the files of the arrays; dump or pull the cache again")


def file_problem(root: Path, record: FileRecord) -> str | None:
    """What is wrong with a file of a store, or None."""
    path = root / record.path
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != record.size_bytes:
        return f"{size} bytes, expected {record.size_bytes}"
    found = sha256_file(path)
    return None if found == record.sha256 else f"content changed: {found}, expected {record.sha256}"


def _require_within(values: Rows, there: range, what: str) -> None:
    if len(values) and not int((values - there.start).view(np.uint64).max()) < len(there):  # a negative number is a very large one here
        raise MismatchError(f"expected {what}s from {there.start} to {there.stop - 1}, found {int(values.min())} to {int(values.max())}")
