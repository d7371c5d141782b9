"""The compact backend, for archives and the wire: one file for each view and range, every field of it entropy-coded.

Classes become their places in an order that follows from the store's own profile (or from how often each class comes), tail
masses become what a linear prediction from the falls leaves over, and all is coded rank by rank. Nothing is lost.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import FormatError
from kdcache.records.hashing import canonical_json
from kdcache.records.manifest import Block, BlockGrid, FieldRecord, FileRecord
from kdcache.store import prediction
from kdcache.store.content import BlockArrays
from kdcache.store.files import write_record
from kdcache.store.ragged import record_lengths
from kdcache.store.ranking import ClassOrder, column_lengths, from_columns, to_columns
from kdcache.store.streams import decode_stream, encode_stream

MAGIC = b"KDC1"
INDEX, GAP, TAIL, PROFILE, ORDER = "logits/index", "logits/gap", "logits/tail", "profile/log_prob", "order"
MOST_COLUMNS = 64
"""An inner axis up to this long is coded place by place, a longer one, but for ranks, as a whole."""

Records = Mapping[str, NDArray[Any]]
Header = dict[str, dict[str, Any]]


class CompactBackend:
    """Reads and writes stores in the compact layout. See `kdcache.store.backends.Backend`.

    Args:
        fields: All fields of the store.
    """

    layout = "compact"

    def __init__(self, fields: Sequence[FieldRecord]) -> None:
        self._fields = {field.name: field for field in fields}
        self._order: ClassOrder | None = None
        self._seen: NDArray[np.uint32] | None = None

    def record_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block) -> list[str]:
        """The files of a block: one for each view."""
        return [_records_path(block.sample_block, view) for view in range(*block.views)]

    def shared_paths(self, fields: Sequence[FieldRecord], grid: BlockGrid) -> list[str]:
        """A file for each field that belongs to no block."""
        return [_shared_path(field.name) for field in fields if not field.per_view]

    def paths_of(self, field: FieldRecord, grid: BlockGrid, *, sample_block: int, view: int) -> list[str]:
        """The file of that view and range, and the one that the order of classes comes from."""
        return [_records_path(sample_block, view), *self._order_paths()]

    def learn(self, tables: Records, records: Iterable[Records]) -> None:
        """Takes the order of classes from the store's profile or, where it keeps none, from how often each class comes."""
        if PROFILE in tables:
            self._order = ClassOrder.from_profile(tables[PROFILE])
        elif INDEX in self._fields:
            counts = np.zeros(0, np.int64)
            for part in records:
                found = np.bincount(part[INDEX].ravel(), minlength=len(counts))
                found[: len(counts)] += counts
                counts = found
            self._seen = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].astype(np.uint32)
            self._order = _order_of(self._seen, self._fields[INDEX])

    def write_block(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, block: Block, arrays: BlockArrays
    ) -> tuple[FileRecord, ...]:
        """Writes a block's files, each one atomically. To be called after `learn`: readers will take the classes for places."""
        assert self._order is not None or INDEX not in self._fields, "the order of classes must be learned first"
        views = [{field.name: arrays[field.name][number] for field in fields} for number in range(block.views[1] - block.views[0])]
        return tuple(
            write_record(root, _records_path(block.sample_block, view), encode_records(records, fields, self._order))
            for view, records in zip(range(*block.views), views, strict=True)
        )

    def write_shared(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[FileRecord, ...]:
        """Writes the fields that belong to no block, and the order of classes where it was learned."""
        files = [
            write_record(root, _shared_path(field.name), encode_records(arrays, [field], None)) for field in fields if not field.per_view
        ]
        if self._seen is not None:
            files.append(write_record(root, _shared_path(ORDER), encode_order(self._seen)))
        return tuple(files)

    def read_records(
        self, root: Path, fields: Sequence[FieldRecord], grid: BlockGrid, *, sample_block: int, view: int
    ) -> dict[str, NDArray[Any]]:
        """The records of one view and range, [samples, *inner], flat for ragged fields. The whole file is decoded for them."""
        stored = [field for field in self._fields.values() if field.per_view]
        num_rows = min(grid.block_samples, grid.num_samples - sample_block * grid.block_samples)
        path = root / _records_path(sample_block, view)
        try:
            records = decode_records(path.read_bytes(), stored, self._order_in(root), num_rows)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        return {field.name: records[field.name] for field in fields}

    def read_shared(self, root: Path, field: FieldRecord, grid: BlockGrid) -> NDArray[Any]:
        """A field that belongs to no block: [samples, *inner], or [*inner] for a table."""
        return _read_shared(root, field, grid.num_samples)

    def _order_paths(self) -> list[str]:
        return [_shared_path(PROFILE if PROFILE in self._fields else ORDER)] if INDEX in self._fields else []

    def _order_in(self, root: Path) -> ClassOrder | None:
        """The order of classes of a store, read once."""
        if self._order is None and PROFILE in self._fields:
            self._order = ClassOrder.from_profile(_read_shared(root, self._fields[PROFILE], 0))
        elif self._order is None and INDEX in self._fields:
            path = root / _shared_path(ORDER)
            try:
                self._order = decode_order(path.read_bytes(), self._fields[INDEX])
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from error
        return self._order


def _read_shared(root: Path, field: FieldRecord, num_rows: int) -> NDArray[Any]:
    path = root / _shared_path(field.name)
    try:
        return decode_records(path.read_bytes(), [field], None, num_rows)[field.name]
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def encode_records(records: Records, fields: Sequence[FieldRecord], order: ClassOrder | None) -> bytes:
    """A compact file's content: the streams of these fields."""
    header: Header = {}
    streams: dict[str, list[NDArray[Any]]] = {}
    for field in fields:
        header[field.name], columns = {"dtype": field.dtype, "inner": list(field.inner)}, _columns(field, records)
        if field.name == INDEX and order is not None:
            columns = order.to_places(columns)
        if _is_predicted(field, fields):
            columns, header[field.name]["weights"] = _predict(columns, _first_falls(fields, records))
        streams[field.name] = columns
    return _file(header, streams)


def decode_records(data: bytes, fields: Sequence[FieldRecord], order: ClassOrder | None, num_rows: int) -> dict[str, NDArray[Any]]:
    """What `encode_records` was given.

    Raises:
        FormatError: The bytes are not records of these fields.
    """
    header, streams = _parsed(data)
    if header.keys() != {field.name for field in fields}:
        raise FormatError(f"expected the fields {sorted(field.name for field in fields)}, found {sorted(header)}")
    records: dict[str, NDArray[Any]] = {}
    for field in sorted(fields, key=lambda field: (field.name == TAIL, field.lengths is not None)):
        form = {"dtype": field.dtype, "inner": list(field.inner)}
        if {key: header[field.name].get(key) for key in form} != form:
            raise FormatError(f"expected {field.name} as {form}, found {header[field.name]}")
        lengths = _lengths(field, records)
        sizes = _column_sizes(field, lengths, num_rows)
        if len(sizes) != len(streams[field.name]):
            raise FormatError(f"expected {len(sizes)} streams of {field.name}, found {len(streams[field.name])}")
        dtype = np.dtype(field.dtype)
        columns = [decode_stream(*stream, dtype, size) for stream, size in zip(streams[field.name], sizes, strict=True)]
        if field.name == INDEX and order is not None:
            columns = order.to_classes(columns)
        if _is_predicted(field, fields):
            columns = _restore(columns, header[field.name].get("weights"), _first_falls(fields, records))
        records[field.name] = _rows(field, columns, lengths, num_rows)
    return records


def encode_order(seen: NDArray[np.uint32]) -> bytes:
    """A compact file's content: the classes that come at all, most frequent first."""
    return _file({ORDER: {"count": len(seen)}}, {ORDER: [seen]})


def decode_order(data: bytes, index: FieldRecord) -> ClassOrder:
    """The order that follows from what `encode_order` was given, for this field of classes.

    Raises:
        FormatError: The bytes are no such order.
    """
    header, streams = _parsed(data)
    count, num_classes = header.get(ORDER, {}).get("count"), index.attributes.get("num_classes")
    if not (type(count) is type(num_classes) is int and 0 <= count <= num_classes and len(streams[ORDER]) == 1):
        raise FormatError(f"expected one stream of at most {num_classes} classes, found {header}")
    return _order_of(decode_stream(*streams[ORDER][0], np.dtype("<u4"), count), index)


def _columns(field: FieldRecord, records: Records) -> list[NDArray[Any]]:
    """A field's entries, place by place along the last axis, or as a whole."""
    rows, lengths = records[field.name], _lengths(field, records)
    if lengths is not None:
        return to_columns(rows, lengths)
    if not _by_place(field):
        return [rows.ravel()]
    return list(rows.reshape(-1, field.inner[-1]).T)


def _rows(field: FieldRecord, columns: Sequence[NDArray[Any]], lengths: NDArray[np.int64] | None, num_rows: int) -> NDArray[Any]:
    dtype, shape = np.dtype(field.dtype), (num_rows, *field.inner)
    if lengths is not None:
        return from_columns(columns, lengths, dtype)
    joined = np.stack(columns, axis=-1) if _by_place(field) else columns[0]
    return joined.astype(dtype, copy=False).reshape(shape if field.axes else field.inner)


def _column_sizes(field: FieldRecord, lengths: NDArray[np.int64] | None, num_rows: int) -> list[int]:
    if lengths is not None:
        return column_lengths(lengths)
    size = math.prod(field.inner) * (num_rows if field.axes else 1)
    if not _by_place(field):
        return [size]
    return [size // field.inner[-1]] * field.inner[-1]


def _by_place(field: FieldRecord) -> bool:
    """Whether the places along the last axis have streams of their own: for ranks always."""
    return field.name in (INDEX, GAP) or (bool(field.inner) and field.inner[-1] <= MOST_COLUMNS)


def _lengths(field: FieldRecord, records: Records) -> NDArray[np.int64] | None:
    """Entries of each record and position of a ragged field, [items]."""
    if field.lengths is None:
        return None
    counts = records[field.lengths.field]
    record_lengths(field, counts)
    return counts.ravel().astype(np.int64) - field.lengths.minus


def _is_predicted(field: FieldRecord, fields: Sequence[FieldRecord]) -> bool:
    by_temperature = field.name == TAIL and field.dtype == "uint8" and field.inner[-1] <= MOST_COLUMNS
    return by_temperature and any(other.name == GAP for other in fields)


def _first_falls(fields: Sequence[FieldRecord], records: Records) -> NDArray[np.uint8]:
    """The first falls of each record and position, [items, falls], 0 where there are fewer."""
    gap = next(field for field in fields if field.name == GAP)
    lengths = _lengths(gap, records)
    if lengths is None:
        falls: NDArray[np.uint8] = records[GAP].reshape(-1, gap.inner[-1])[:, : prediction.FALLS]
        return falls
    rank = np.arange(prediction.FALLS)
    present = rank < lengths[:, None]
    falls = np.zeros(present.shape, np.uint8)
    falls[present] = records[GAP][((np.cumsum(lengths) - lengths)[:, None] + rank)[present]]
    return falls


def _predict(columns: list[NDArray[Any]], falls: NDArray[np.uint8]) -> tuple[list[NDArray[Any]], list[list[int]]]:
    """Each mass less its prediction from the falls and the masses at higher temperatures, and the weights."""
    left, weights = [], []
    for i, codes in enumerate(columns):
        inputs = prediction.features(falls, columns[i + 1 :])
        weights.append(prediction.fit(inputs, codes))
        left.append(prediction.residuals(codes, inputs, weights[-1]) if weights[-1] else codes)
    return left, weights


def _restore(columns: list[NDArray[Any]], weights: object, falls: NDArray[np.uint8]) -> list[NDArray[Any]]:
    restored = list(columns)
    if not isinstance(weights, list) or len(weights) != len(columns):
        raise FormatError(f"expected weights for {len(columns)} temperatures, found {weights}")
    for i in reversed(range(len(columns))):
        inputs = prediction.features(falls, restored[i + 1 :])
        if weights[i] != []:
            if not _are_weights(weights[i], inputs.shape[1]):
                raise FormatError(f"expected {inputs.shape[1]} whole weights, found {weights[i]}")
            restored[i] = prediction.restored(columns[i], inputs, weights[i])
    return restored


def _are_weights(weights: object, count: int) -> bool:
    if not isinstance(weights, list) or len(weights) != count:
        return False
    return all(type(weight) is int and abs(weight) <= 2**31 for weight in weights)


def _file(header: Header, streams: Mapping[str, Sequence[NDArray[Any]]]) -> bytes:
    """Magic, length of the header, header, streams, CRC-32C."""
    coded = {name: [encode_stream(column) for column in columns] for name, columns in streams.items()}
    described = {name: entry | {"streams": [[coder, len(data)] for coder, data in coded[name]]} for name, entry in header.items()}
    text = canonical_json(described)
    body = b"".join([MAGIC, len(text).to_bytes(4, "little"), text, *(data for name in sorted(header) for _, data in coded[name])])
    checksum: int = google_crc32c.value(body)
    return body + checksum.to_bytes(4, "little")


def _parsed(data: bytes) -> tuple[Header, dict[str, list[tuple[str, bytes]]]]:
    """Header and streams of a file.

    Raises:
        FormatError: It is no such file.
    """
    if data[:4] != MAGIC or google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise FormatError("expected a compact file with the right checksum")
    start = 8 + int.from_bytes(data[4:8], "little")
    try:
        header: Header = json.loads(data[8:start])
        if not isinstance(header, dict):
            raise ValueError("it is no object")
        streams: dict[str, list[tuple[str, bytes]]] = {}
        for name in sorted(header):
            streams[name] = []
            for coder, size in header[name]["streams"]:
                if type(size) is not int or size < 0:
                    raise ValueError(f"expected the length of a stream of {name}, found {size}")
                streams[name].append((coder, data[start : start + size]))
                start += size
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"the header cannot be read: {error}") from error
    if start != len(data) - 4:
        raise FormatError(f"the header's streams end at byte {start}, expected {len(data) - 4}")
    return header, streams


def _order_of(seen: NDArray[Any], index: FieldRecord) -> ClassOrder:
    """Classes that were seen, most frequent first, then all others."""
    num_classes = index.attributes["num_classes"]
    if not (len(np.unique(seen)) == len(seen) and seen.max(initial=0) < num_classes):
        raise FormatError(f"expected different classes below {num_classes} in {ORDER}")
    counts = np.zeros(num_classes, np.int64)
    counts[seen] = np.arange(len(seen), 0, -1)
    return ClassOrder.from_counts(counts)


def _records_path(sample_block: int, view: int) -> str:
    return f"records/s{sample_block:05d}.v{view:04d}.kdc"


def _shared_path(name: str) -> str:
    return f"shared/{name}.kdc"
