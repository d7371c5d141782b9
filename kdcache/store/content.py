"""The digest of records themselves, whatever the layout of the files that hold them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BlockArrays = Mapping[str, Sequence[NDArray[Any]]]
"""A block's records: by field name, for each view of the block [samples, *inner], or flat [entries] for a ragged field."""


def content_digest(arrays: BlockArrays) -> str:
    """The digest over each field in the order of their names and each view: name, type, shape, then the entries, little endian."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        for rows in arrays[name]:
            digest.update(f"{name}\0{rows.dtype.name}\0{tuple(rows.shape)}\0".encode())
            digest.update(np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).data if rows.size else b"")
    return f"sha256:{digest.hexdigest()}"
