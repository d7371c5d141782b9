"""`parquet:PATH` and `csv:PATH`: a row is a sample, of numeric columns as features or of an image; the table is kept in memory."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32
from torch import Tensor

from kdcache.learning.sources.encoded import EncodedImages
from kdcache.learning.sources.images import unreadable
from kdcache.learning.sources.labels import LABEL_OPTIONS, listed, read_labels
from kdcache.learning.sources.source import Keys, Labels, Rows, as_keys, sample_key
from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec


class FeatureTable:
    """Numeric columns as float32 features.

    Args:
        features: One row a sample.
        labels: Their labels, [rows].
        classes: Names or numbers of the classes.
    """

    def __init__(self, features: Float32[np.ndarray, "rows features"], labels: Labels, classes: object) -> None:
        self._features, self._labels, self.classes = features, labels, classes

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._features[index].copy()), int(self._labels[index])

    def sample_keys(self, rows: Rows) -> Keys:
        """Keys of the features, as of any decoded sample."""
        return as_keys([sample_key(self[row][0]) for row in rows.tolist()])

    def sample_labels(self, rows: Rows) -> Labels:
        """The labels of some rows."""
        labels: Labels = self._labels[rows]
        return labels

    def sample_name(self, row: int) -> None:  # noqa: ARG002
        """None: a sample is known by its row."""
        return


def open_table(spec: Spec) -> FeatureTable | EncodedImages:
    """Opens a table.

    Args:
        spec: `csv:FILE` or `parquet:FILE` (also a folder of Parquet files, sorted by name), with `label=COLUMN` (by default
            `label`) and either `columns=a;b;c` (by default all other numeric ones) or `image=COLUMN`; for the classes see
            `read_labels`.

    Raises:
        SpecError: No such file or column, or values that cannot be features.
    """
    spec.reject_unknown_options(*LABEL_OPTIONS, "columns", "image")
    if "columns" in spec.options and "image" in spec.options:
        raise SpecError(f"{spec}: expected columns=… or image=…, not both")
    table = _read_csv(spec) if spec.source == "csv" else _read_parquet(spec)
    label = str(spec.options.get("label", "label"))
    labels, classes = read_labels(spec, _column(spec, table, label, option="label"), name=label)
    if "image" in spec.options:
        return EncodedImages(partial(_encoded, _image_bytes(spec, table)), labels, classes)
    return FeatureTable(_features(spec, table, label), labels, classes)


def _read_csv(spec: Spec) -> pa.Table:
    path = Path(spec.name).expanduser()
    if not path.is_file():
        raise SpecError(f"{spec}: there is no file {path.absolute()}")
    try:
        return pacsv.read_csv(path)
    except (pa.ArrowException, OSError) as error:
        raise SpecError(f"{spec}: {path} is not a readable CSV file with a header: {error}") from error


def _read_parquet(spec: Spec) -> pa.Table:
    path = Path(spec.name).expanduser()
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SpecError(f"{spec}: there is no Parquet file at {path.absolute()}")
    try:
        return pa.concat_tables(pq.ParquetFile(file, page_checksum_verification=True).read() for file in files)
    except (pa.ArrowException, OSError) as error:
        raise SpecError(f"{spec}: {path} cannot be read as Parquet: {error}") from error


def _column(spec: Spec, table: pa.Table, name: str, *, option: str) -> pa.ChunkedArray:
    if table.column_names.count(name) != 1:
        raise SpecError(
            f"{spec}: expected one column {name!r}, found the columns {', '.join(table.column_names)}; say which: {option}=COLUMN"
        )
    return table.column(name)


def _features(spec: Spec, table: pa.Table, label: str) -> Float32[np.ndarray, "rows features"]:
    """The feature columns side by side."""
    names = listed(spec, "columns") or [field.name for field in table.schema if field.name != label and _is_numeric(field.type)]
    if not names:
        types = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise SpecError(f"{spec}: no numeric columns to make features of, found {types}; for a column of encoded images: image=COLUMN")
    return np.stack([_feature(spec, _column(spec, table, name, option="columns"), name) for name in names], axis=1)


def _is_numeric(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean))


def _feature(spec: Spec, column: pa.ChunkedArray, name: str) -> Float32[np.ndarray, "rows"]:
    if not _is_numeric(column.type):
        raise SpecError(f"{spec}: expected numbers in the column {name!r}, found {column.type}")
    values = column.cast(pa.float64()) if pa.types.is_decimal(column.type) else column
    with np.errstate(over="ignore"):
        feature: Float32[np.ndarray, "rows"] = values.to_numpy().astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(feature))
    if len(bad):
        raise SpecError(
            f"{spec}: row {bad[0]} has no finite number in the column {name!r} ({len(bad)} rows in all); fill or leave them out"
        )
    return feature


def _encoded(images: pa.ChunkedArray, row: int) -> bytes:
    data: bytes | None = images[row].as_py()
    if data is None:
        raise unreadable(f"row {row}", "it has no bytes")
    return data


def _image_bytes(spec: Spec, table: pa.Table) -> pa.ChunkedArray:
    """A column of bytes, or of (bytes, path) as Hugging Face writes it; what a path names is not read."""
    name = str(spec.options["image"])
    column = _column(spec, table, name, option="image")
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise SpecError(f"{spec}: expected encoded images (bytes) in the column {name!r}, found {column.type}")
    return column
