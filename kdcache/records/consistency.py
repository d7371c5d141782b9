"""What a manifest must keep to beyond its types. A cache may come from anywhere, so nothing in it is taken on trust."""

import math
import re
from collections.abc import Iterator

from kdcache.records.errors import FormatError
from kdcache.records.manifest import RECORD_AXES, SAMPLE_AXES, TABLE_AXES, BlockGrid, FieldRecord, Manifest, MixingRecord

DTYPE_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "float16": 2, "float32": 4}
DTYPES = tuple(DTYPE_BYTES)
"""The only array types of format 1.0. Anything else could make NumPy read memory that is not data."""

KEY_BYTES = 16
LARGEST_BLOCK_BYTES = 2**31
"""No writer makes chunk files near this; a larger one is a mistake or an attack."""
MOST_VIEWS = 2**20
"""More would take memory for their names alone."""

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-6, 1000.0
"""A smaller α of MixUp or CutMix, but 0 for none, always gives one of the two samples (and in the end no number); a larger one halves."""


def check_manifest(manifest: Manifest, *, where: str) -> None:
    """Refuses a manifest that contradicts itself, leaves a block out, or names files outside its directory.

    Raises:
        FormatError: Says which rule is broken.
    """
    for problem in _problems(manifest):
        raise FormatError(f"{where}: {problem}; this cache was not written by kdcache, or was edited")


def _problems(manifest: Manifest) -> Iterator[str]:
    grid = manifest.grid
    if min(grid.num_samples, grid.num_views, grid.block_samples, grid.block_views) < 1:
        yield f"expected positive numbers in the grid, found {grid}"
    if grid.first_view < 0 or grid.views.stop > MOST_VIEWS:
        yield f"expected at most {MOST_VIEWS} views, found {grid.num_views} from {grid.first_view} on"
    yield from _added_views_problems(grid)
    yield from _mixing_problems(manifest.recipe.views.mixing)
    if grid.num_samples != manifest.recipe.dataset.num_samples:
        yield f"the grid has {grid.num_samples} samples, the recipe {manifest.recipe.dataset.num_samples}"
    yield from (problem for field in manifest.fields for problem in _field_problems(field, grid.block_samples))
    fields = {field.name: field for field in manifest.fields}
    if len(fields) != len(manifest.fields) or not {"key", "label"} <= fields.keys():
        yield f"expected each field once, with 'key' and 'label' among them, found {[field.name for field in manifest.fields]}"
    elif (fields["key"].dtype, fields["key"].inner, fields["key"].axes, fields["key"].bits) != ("uint8", (KEY_BYTES,), SAMPLE_AXES, None):
        yield f"expected 'key' as {KEY_BYTES} uint8 a sample, found {fields['key']}"
    elif fields["label"].inner or fields["label"].axes != SAMPLE_AXES or not fields["label"].dtype.startswith("uint"):
        yield f"expected 'label' as one unsigned integer a sample, found {fields['label']}"
    else:
        yield from (problem for field in manifest.fields for problem in _ragged_problems(field, fields))
    if manifest.contents.keys() != {field.name for field in manifest.fields if not field.per_view}:
        yield f"expected a digest of each field without a view axis, found {sorted(manifest.contents)}"
    yield from _file_problems(manifest)
    for probe in manifest.probes:
        if not (0 <= probe.row < grid.num_samples and probe.view in grid.views):
            yield f"a probe is outside the grid: {probe}"


def _mixing_problems(mixing: MixingRecord | None) -> Iterator[str]:
    if mixing and not (
        0 <= mixing.probability <= 1
        and 0 <= mixing.switch <= 1
        and all(alpha == 0 or SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA for alpha in (mixing.mixup, mixing.cutmix))
        and max(mixing.mixup, mixing.cutmix) > 0
    ):
        yield f"expected shares from 0 to 1 and one or two strengths from {SMALLEST_ALPHA:g} to {LARGEST_ALPHA:g}, found {mixing}"


def _added_views_problems(grid: BlockGrid) -> Iterator[str]:
    """There is one way only to write the groups of views: none begins anew where it would begin anyway."""
    before = grid.first_view
    for view in grid.added_views:
        if not before < view < grid.views.stop or (view - before) % grid.block_views == 0:
            yield f"expected ascending added views in {grid.views}, none after full groups of {grid.block_views}, found {grid.added_views}"
        before = view


def _field_problems(field: FieldRecord, block_samples: int) -> Iterator[str]:
    if field.dtype not in DTYPES:
        yield f"expected the field {field.name!r} to have a type of {', '.join(DTYPES)}, found {field.dtype!r}"
    if not re.fullmatch(r"[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*", field.name):
        yield f"expected a field's name in letters, digits and underscores, found {field.name!r}"
    if any(length < 1 for length in field.inner) or len(field.inner) != len(field.inner_names):
        yield f"expected positive, named inner axes for {field.name!r}, found {field.inner} and {field.inner_names}"
    if field.axes not in (RECORD_AXES, SAMPLE_AXES, TABLE_AXES):
        yield f"expected the axes (view, sample), (sample) or none for {field.name!r}, found {field.axes}"
    if field.bits is not None and not (field.inner and field.dtype.startswith("uint") and 1 <= field.bits <= min(int(field.dtype[4:]), 57)):
        yield f"expected bits only for unsigned entries that have so many, found {field.bits} for {field.name!r} of {field.dtype}"
    size = entries_bytes(field) * (block_samples if field.axes else 1)
    if size > LARGEST_BLOCK_BYTES:
        yield f"chunk files of {field.name!r} would have up to {size} bytes"


def entries_bytes(field: FieldRecord) -> int:
    """The most bytes that a record's entries can have, unpacked."""
    return DTYPE_BYTES.get(field.dtype, 8) * math.prod(field.inner)


def _ragged_problems(field: FieldRecord, fields: dict[str, FieldRecord]) -> Iterator[str]:
    if field.lengths is None:
        return
    counts = fields.get(field.lengths.field)
    if counts is None or not counts.per_view or counts.lengths or counts.bits or not counts.dtype.startswith("uint"):
        yield f"expected counts of {field.name!r} as a field of unsigned integers, found {counts}"
    elif not field.per_view or len(field.inner) != 1 or field.lengths.minus < 0 or field.inner[0] % math.prod(counts.inner):
        yield f"expected {field.name!r} to have one inner axis that fits the counts {counts.inner}, found {field}"


def _file_problems(manifest: Manifest) -> Iterator[str]:
    paths = [file.path for file in manifest.files]
    for path in paths:
        if path.startswith("/") or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
            yield f"expected file paths inside the cache's directory, found {path!r}"
    if len(set(paths)) != len(paths):
        yield "a file is listed twice"
    expected = manifest.grid.num_blocks
    if len(manifest.blocks) != expected or [record.block for record in manifest.blocks] != list(manifest.grid.blocks()):
        yield f"expected the {expected} blocks of the grid in order, found {len(manifest.blocks)}"
