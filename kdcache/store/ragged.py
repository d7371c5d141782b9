"""Ragged fields: how many entries each record has, by the counts that are stored beside them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import FormatError
from kdcache.records.manifest import FieldRecord


def record_lengths(field: FieldRecord, counts: NDArray[Any]) -> NDArray[np.int64]:
    """Entries of each record, [records].

    Args:
        field: The ragged field.
        counts: Its counts, [records, *positions].

    Raises:
        FormatError: A count is none that the field can have.
    """
    assert field.lengths is not None
    entries = counts.reshape(len(counts), -1).astype(np.int64) - field.lengths.minus
    least, most = max(1 - field.lengths.minus, 0), field.inner[0] // entries.shape[1]
    if not (entries.min() >= least and entries.max() <= most):
        raise FormatError(f"expected counts that give {field.name} {least} to {most} entries, found {entries.min()} to {entries.max()}")
    lengths: NDArray[np.int64] = entries.sum(axis=1)
    return lengths
