"""The layouts of a store, behind one protocol: the same arrays in, the same arrays out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from kdcache.records.errors import FormatError
from kdcache.records.manifest import Block, BlockGrid, FieldRecord, FileRecord
from kdcache.store.content import BlockArrays
from kdcache.store.zarr_backend import ZarrBackend


class Backend(Protocol):
    """How the arrays of a store lie in files. Every file is written atomically, once, and by one writer."""

    layout: str
    """The manifest's name for it."""

    def record_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block) -> list[str]:
        """The files of a block, relative to the store."""

    def shared_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid) -> list[str]:
        """The files of the fields that belong to no block."""

    def paths_of(self, field: FieldRecord, grid: BlockGrid, *, sample_block: int, view: int) -> list[str]:
        """The files that must be whole to read the field's records of one view and range."""

    def learn(self, tables: Mapping[str, NDArray[Any]], records: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Looks at what is going to be written, before anything is; most layouts need not.

        Args:
            tables: The store's tables, by field name.
            records: All records, view by view and range by range; only what is iterated over is read.
        """

    def write_block(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block, arrays: BlockArrays
    ) -> tuple[FileRecord, ...]:
        """Writes a block's files, each one atomically.

        Args:
            root: The store's directory.
            fields: The fields with a view axis.
            grid: How the arrays are cut.
            block: Which block.
            arrays: Its records.

        Returns:
            The files that were written.
        """

    def write_shared(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[FileRecord, ...]:
        """Writes the fields that belong to no block, by name, whole, and the layout's own metadata for all fields."""

    def read_records(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, *, sample_block: int, view: int
    ) -> dict[str, NDArray[Any]]:
        """The records of one view and range by field name: [samples, *inner], or flat [entries] for a ragged field.

        Where a ragged field is asked for, its field of counts must be, too. The files must have been verified.
        """

    def read_shared(self, root: Path, field: FieldRecord, grid: BlockGrid) -> NDArray[Any]:
        """A whole field that belongs to no block: [samples, *inner], or [*inner] for a table."""


LAYOUTS = ("zarr", "parquet", "compact")


def make_backend(layout: str, fields: Sequence[FieldRecord]) -> Backend:
    """The backend of a layout, for a store with these fields.

    Raises:
        FormatError: There is none of this name.
    """
    if layout == "zarr":
        return ZarrBackend()
    if layout == "parquet":
        from kdcache.store.parquet_backend import ParquetBackend  # PyArrow takes a quarter of a second to import

        return ParquetBackend()
    if layout == "compact":
        from kdcache.store.compact_backend import CompactBackend  # and its coders as much

        return CompactBackend(fields)
    raise FormatError(f"unknown layout {layout!r}; expected one of: {', '.join(LAYOUTS)}")
