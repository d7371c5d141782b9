"""A column of labels as classes: whole numbers from 0, or strings sorted by code point."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdcache.learning.sources.source import Labels
from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec

LABEL_OPTIONS = ("label", "classes", "num_classes")


def read_labels(spec: Spec, column: pa.ChunkedArray, *, name: str) -> tuple[Labels, Sequence[object]]:
    """A column's labels, [rows], and its classes.

    Args:
        spec: Its options `classes=a;b;c` (for strings, where a table may lack some) and `num_classes=N` (for numbers).
        column: Whole numbers, also as floats, booleans or strings.
        name: The column's name, for messages.

    Raises:
        SpecError: A row has no label, or one that is no class.
    """
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise SpecError(f"{spec}: row {row} has no label in the column {name!r} ({column.null_count} rows in all)")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        return _strings(spec, column, name)
    return _numbers(spec, column, name)


def listed(spec: Spec, option: str) -> list[str] | None:
    """An option that is a list: `a;b;c`, a single one, or a tuple; None where it is not given."""
    value = spec.options.get(option)
    if value is None:
        return None
    return [str(item) for item in value] if isinstance(value, tuple) else str(value).split(";")


def _strings(spec: Spec, column: pa.ChunkedArray, name: str) -> tuple[Labels, Sequence[object]]:
    if "num_classes" in spec.options:
        raise SpecError(f"{spec}: the column {name!r} holds strings; say which classes there are: classes='a;b;c', not num_classes")
    found = sorted(column.unique().to_pylist())
    classes = listed(spec, "classes") or found
    strange = sorted(set(found) - set(classes))
    if strange or len(set(classes)) != len(classes):
        raise SpecError(f"{spec}: expected each of the classes {classes} once, found {strange or classes} in the column {name!r}")
    labels: Labels = pc.index_in(column, pa.array(classes, column.type)).to_numpy().astype(np.int64)
    return labels, classes


def _numbers(spec: Spec, column: pa.ChunkedArray, name: str) -> tuple[Labels, Sequence[object]]:
    if "classes" in spec.options:
        raise SpecError(f"{spec}: the column {name!r} holds {column.type}; say how many classes there are: num_classes=N, not classes")
    try:
        labels: Labels = column.cast(pa.int64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SpecError(
            f"{spec}: expected whole numbers or strings as labels in the column {name!r}, found {column.type}: {error}"
        ) from error
    num_classes = spec.options.get("num_classes", int(labels.max(initial=0)) + 1)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise SpecError(f"{spec}: expected num_classes to be a positive whole number, found {num_classes!r}")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise SpecError(
            f"{spec}: expected labels from 0 to {num_classes - 1} in the column {name!r}, found {labels[bad[0]]} at row {bad[0]}"
            f" ({len(bad)} rows in all)"
        )
    return labels, range(num_classes)
