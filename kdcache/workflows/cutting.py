"""How a dump's work is cut: which views, and into which blocks."""

import re
from collections.abc import Sequence

from kdcache.records.consistency import LARGEST_BLOCK_BYTES, MOST_VIEWS, entries_bytes
from kdcache.records.errors import ConfigError
from kdcache.records.manifest import BlockGrid, FieldRecord
from kdcache.store.zarr_backend import row_bytes

ROWS_IN_A_BLOCK = 65_536
"""Most rows of a chunk file, where opening costs nothing against reading …"""
BYTES_IN_A_BLOCK = 8 * 2**20
"""… unless it would be larger than this."""
SMALLEST_BLOCKS = 4
"""A small set is cut into at least this many sample ranges, so that a killed dump does not begin from nothing …"""
FEWEST_ROWS = 4096
"""… unless they would be smaller than this."""
VIEWS_IN_A_BLOCK = 4
"""Views made from one decoded sample."""


ALL_VIEWS = "all"
"""Asks for every view that a finite augmentation can make."""


def views_of(views: int | str, *, num_all: int | None = None) -> range:
    """The views that are asked for: `16` for the first 16, `8:16` for 8 to 15, `all` for as many as there are.

    Args:
        views: What was typed.
        num_all: How many there are, where they are enumerated.

    Raises:
        ConfigError: It is none of these, or no view at all.
    """
    if views == ALL_VIEWS and num_all is not None and num_all <= MOST_VIEWS:
        return range(num_all)
    found = re.fullmatch(r"(?:(\d{1,9}):)?(\d{1,9})", str(views))
    numbers = range(int(found[1] or 0), int(found[2])) if found else range(0)
    if not numbers or numbers.stop > MOST_VIEWS:
        raise ConfigError(
            f"expected a number of views, or FIRST:STOP such as 8:16 for views 8 to 15, or all, up to {MOST_VIEWS}, found {views!r}"
        )
    return numbers


def cut_into_blocks(num_samples: int, fields: Sequence[FieldRecord], *, views: range, block_samples: int | None) -> BlockGrid:
    """Cuts the work so that chunk files are of equal length, not too long and not padded by more than a few rows."""
    if not views or (block_samples is not None and block_samples < 1):
        raise ConfigError(f"expected at least one view and one sample in a block, found {len(views)} and {block_samples}")
    most = LARGEST_BLOCK_BYTES // max(entries_bytes(field) for field in fields)
    if most < (block_samples or 1):
        raise ConfigError(f"records of this size allow at most {most} samples in a block, found --block-samples {block_samples}")
    by_size = BYTES_IN_A_BLOCK // max(row_bytes(field) for field in fields if field.lengths is None)
    by_number = max(FEWEST_ROWS, -(-num_samples // SMALLEST_BLOCKS))
    largest = block_samples or max(1, min(ROWS_IN_A_BLOCK, most, by_size, by_number))
    num_blocks = -(-num_samples // largest)
    return BlockGrid(
        num_samples=num_samples,
        num_views=len(views),
        first_view=views.start,
        block_samples=-(-num_samples // num_blocks),
        block_views=VIEWS_IN_A_BLOCK,
    )
