"""The Parquet backend, for other tools: one file a block, one row group a view, one row a record, one column a field.

`records/BLOCK.parquet` has the columns `view`, `sample` and the fields by their own names: a number, a list of fixed length
(positions and rank in one), or a list of the record's own length for a ragged field. `samples/RANGE.parquet` has what belongs to a
sample, `tables/NAME.parquet` a table's rows. No value is null; every page has a CRC-32.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.records.errors import FormatError
from kdcache.records.hashing import canonical_json
from kdcache.records.jsonrecord import to_json
from kdcache.records.manifest import FORMAT_VERSION, Block, BlockGrid, FieldRecord, FileRecord
from kdcache.store.content import BlockArrays
from kdcache.store.files import write_record
from kdcache.store.ragged import record_lengths

DICTIONARY = "DICTIONARY"
ENCODINGS = {"uint32": "BYTE_STREAM_SPLIT", "uint64": "BYTE_STREAM_SPLIT", "float32": "BYTE_STREAM_SPLIT", "float16": "PLAIN"}
"""Of fields, by type; smaller integers have a dictionary.

Bytes a record, measured with zstd, as a dictionary, split and plain: 16 of 1000 classes 20.1, 21.1, 25.7; their falls 11.3, 11.2, 16.5; 16 of
128,000 classes 38.4, 29.4, 35.8. Float16 would gain a fifth by splitting, but DuckDB 2.0 does not read it then.
"""

Rows = Mapping[str, NDArray[Any]]


class ParquetBackend:
    """Reads and writes stores of Parquet files. See `kdcache.store.backends.Backend`."""

    layout = "parquet"

    def record_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block) -> list[str]:
        """The one file of a block."""
        return [f"records/{block.id}.parquet"]

    def shared_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid) -> list[str]:
        """The files of all fields that belong to no block: those of samples by range, then one for each table."""
        ranges = range(grid.num_sample_blocks if any(field.axes for field in fields if not field.per_view) else 0)
        return [*map(_samples_path, ranges), *(_table_path(field) for field in fields if not field.axes)]

    def paths_of(self, field: FieldRecord, grid: BlockGrid, *, sample_block: int, view: int) -> list[str]:
        """The block's file."""
        return self.record_paths([field], grid, _block_of(grid, sample_block, view))

    def learn(self, tables: Mapping[str, NDArray[Any]], records: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Nothing: each record is written as it is."""

    def write_block(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block, arrays: BlockArrays
    ) -> tuple[FileRecord, ...]:
        """Writes a block's file, atomically."""
        (path,) = self.record_paths(fields, grid, block)
        tables = []
        for number, view in enumerate(range(*block.views)):
            rows = {field.name: arrays[field.name][number] for field in fields}
            tables.append(_table(_record_places(block, view), fields, rows))
        return (write_record(root, path, _encode(tables, fields, holds=f"block {block.id}")),)

    def write_shared(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[FileRecord, ...]:
        """Writes the fields that belong to no block."""
        of_samples = [field for field in fields if field.axes and not field.per_view]
        files = []
        for sample_block in range(grid.num_sample_blocks):
            start, stop = grid.sample_range(sample_block)
            table = _table(_sample_places(start, stop), of_samples, {field.name: arrays[field.name][start:stop] for field in of_samples})
            data = _encode([table], of_samples, holds=f"samples {start} to {stop - 1}")
            files.append(write_record(root, _samples_path(sample_block), data))
        for field in (field for field in fields if not field.axes):
            data = _encode([_table(_table_places(field), [field], arrays)], [field], holds=f"table {field.name}")
            files.append(write_record(root, _table_path(field), data))
        return tuple(files)

    def read_records(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, *, sample_block: int, view: int
    ) -> dict[str, NDArray[Any]]:
        """The records of one view and range, [samples, *inner], flat for ragged fields: the asked columns of one row group."""
        block = _block_of(grid, sample_block, view)
        (path,) = self.record_paths(fields, grid, block)
        first, stop = block.views
        return _decode(root / path, _record_places(block, view), fields, group=view - first, num_groups=stop - first)

    def read_shared(self, root: Path, field: FieldRecord, grid: BlockGrid) -> NDArray[Any]:
        """A field that belongs to no block: [samples, *inner], or [*inner] for a table."""
        if not field.axes:
            return _decode(root / _table_path(field), _table_places(field), [field])[field.name]
        ranges = [(index, _sample_places(*grid.sample_range(index))) for index in range(grid.num_sample_blocks)]
        return np.concatenate([_decode(root / _samples_path(index), places, [field])[field.name] for index, places in ranges])


def _samples_path(sample_block: int) -> str:
    return f"samples/s{sample_block:05d}.parquet"


def _table_path(field: FieldRecord) -> str:
    return f"tables/{field.name}.parquet"


def _block_of(grid: BlockGrid, sample_block: int, view: int) -> Block:
    return Block(sample_block=sample_block, samples=grid.sample_range(sample_block), views=grid.group_of(view))


def _record_places(block: Block, view: int) -> Rows:
    samples = _sample_places(*block.samples)
    return {"view": np.full(len(samples["sample"]), view, np.int32), **samples}


def _sample_places(start: int, stop: int) -> Rows:
    return {"sample": np.arange(start, stop, dtype=np.int64)}


def _table_places(field: FieldRecord) -> Rows:
    return {"row": np.arange(field.inner[0] if field.inner else 1, dtype=np.int64)}


def _schema(places: Rows, fields: Sequence[FieldRecord]) -> pa.Schema:
    """The columns that say where a row belongs, then those of the fields."""
    of_places = [pa.field(name, pa.from_numpy_dtype(rows.dtype), nullable=False) for name, rows in places.items()]
    return pa.schema([*of_places, *(pa.field(field.name, _column_type(field), nullable=False) for field in fields)])


def _column_type(field: FieldRecord) -> pa.DataType:
    entry = pa.field("element", pa.from_numpy_dtype(np.dtype(field.dtype)), nullable=False)
    shape = field.inner if field.axes else field.inner[1:]  # a table's first axis are the rows of its file
    if field.name == "key":
        return pa.binary(math.prod(shape))
    if field.lengths:
        return pa.list_(entry)
    return pa.list_(entry, math.prod(shape)) if shape else entry.type


def _table(places: Rows, fields: Sequence[FieldRecord], rows: Rows) -> pa.Table:
    columns = [_to_arrow(rows[field.name], field, _lengths(field, rows)) for field in fields]
    return pa.table([*map(pa.array, places.values()), *columns], schema=_schema(places, fields))


def _encode(tables: Sequence[pa.Table], fields: Sequence[FieldRecord], *, holds: str) -> bytes:
    """A file with a row group for each table.

    Args:
        tables: The rows.
        fields: What they hold.
        holds: What is in the file, for people.
    """
    about = {"format_version": FORMAT_VERSION, "holds": holds, "fields": {field.name: to_json(field) for field in fields}}
    schema = tables[0].schema.with_metadata({"kdcache": canonical_json(about)})
    encodings = _encodings(schema, fields)
    file = pa.BufferOutputStream()
    with pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=[leaf for leaf, encoding in encodings.items() if encoding == DICTIONARY],
        column_encoding={leaf: encoding for leaf, encoding in encodings.items() if encoding != DICTIONARY},
        write_page_checksum=True,
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
    data: bytes = file.getvalue().to_pybytes()
    return data


def _encodings(schema: pa.Schema, fields: Sequence[FieldRecord]) -> dict[str, str]:
    """By the path of a column's leaf. What says where a row belongs counts up or stands still."""
    encodings = dict.fromkeys(schema.names, "DELTA_BINARY_PACKED")
    for field in fields:
        del encodings[field.name]
        leaf = f"{field.name}.list.element" if pa.types.is_nested(_column_type(field)) else field.name
        encodings[leaf] = "PLAIN" if field.name == "key" else ENCODINGS.get(field.dtype, DICTIONARY)
    return encodings


def _decode(path: Path, places: Rows, fields: Sequence[FieldRecord], *, group: int = 0, num_groups: int = 1) -> dict[str, NDArray[Any]]:
    """The rows of fields in one of a file's row groups.

    Args:
        path: The file.
        places: Where these rows must belong.
        fields: Which.
        group: Which of the row groups.
        num_groups: How many the file must have.

    Raises:
        FormatError: It holds something else.
    """
    schema = _schema(places, fields)
    with pa.OSFile(str(path)) as source:
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            _check_columns(file.schema_arrow, schema)
            _check_rows(file.metadata, group, num_groups, num_rows=len(next(iter(places.values()))))
            table = file.read_row_group(group, columns=schema.names)
            for name, expected in places.items():
                if not np.array_equal(table.column(name).to_numpy(), expected):
                    raise FormatError(f"expected row group {group} to be of {name} {expected[0]} to {expected[-1]}, found others")
            rows: dict[str, NDArray[Any]] = {}
            for field in sorted(fields, key=lambda field: field.lengths is not None):
                rows[field.name] = _from_arrow(table.column(field.name).combine_chunks(), field, _lengths(field, rows))
        except (FormatError, pa.ArrowException, OSError) as error:
            raise FormatError(f"{path}: {error}; this cache was not written by kdcache, or was edited") from error
    return rows


def _check_columns(found: pa.Schema, expected: pa.Schema) -> None:
    for column in expected:
        named = [found.field(index) for index in found.get_all_field_indices(column.name)]
        if named != [column]:
            raise FormatError(f"expected one column {column}, found {named}")


def _check_rows(metadata: pq.FileMetaData, group: int, num_groups: int, *, num_rows: int) -> None:
    if metadata.num_row_groups != num_groups:
        raise FormatError(f"expected {num_groups} row groups, found {metadata.num_row_groups}")
    found = metadata.row_group(group).num_rows
    if found != num_rows:
        raise FormatError(f"expected {num_rows} rows in row group {group}, found {found}")


def _lengths(field: FieldRecord, rows: Rows) -> NDArray[np.int64] | None:
    """Entries of each record of a ragged field, by the counts among `rows`; None for a field that is not ragged."""
    return record_lengths(field, rows[field.lengths.field]) if field.lengths else None


def _to_arrow(rows: NDArray[Any], field: FieldRecord, lengths: NDArray[np.int64] | None) -> pa.Array:
    """Rows as a column: [rows, *inner], or flat with the lengths of the rows for a ragged field."""
    entries = pa.array(np.ascontiguousarray(rows, field.dtype).reshape(-1))
    kind = _column_type(field)
    if lengths is not None:
        return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), entries, type=kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.Array.from_buffers(kind, len(rows), [None, entries.buffers()[1]])
    return pa.FixedSizeListArray.from_arrays(entries, type=kind) if pa.types.is_nested(kind) else entries


def _from_arrow(column: pa.Array, field: FieldRecord, lengths: NDArray[np.int64] | None) -> NDArray[Any]:
    """What `_to_arrow` was given."""
    if lengths is not None and not np.array_equal(column.value_lengths().to_numpy(), lengths):
        raise FormatError(f"the lists of {field.name} are not as long as the counts say")
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        entries = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    else:
        entries = (column.flatten() if pa.types.is_nested(column.type) else column).to_numpy()
    if lengths is None:
        return entries.reshape(-1, *field.inner) if field.axes else entries.reshape(field.inner)
    return entries
