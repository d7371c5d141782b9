"""`kdcache info` and `kdcache verify`: what a cache holds and whether every byte is what was written. No torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from kdcache.records.errors import IncompleteCacheError
from kdcache.records.manifest import Manifest, Recipe
from kdcache.records.progress import Progress, Silent
from kdcache.store.ledger import read_plan
from kdcache.store.reader import CacheReader, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Views that are being added to a complete cache, which can be read all the while."""

    num_views: int
    """Views of each sample when it is done."""
    blocks_done: int
    """Blocks of the new views on the disk."""
    blocks_total: int
    """Blocks of the new views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInfo:
    """A cache at a glance."""

    path: Path
    """Its directory."""
    recipe_key: str
    """What determines its numbers, as one digest."""
    recipe: Recipe
    """What determines its numbers."""
    first_view: int
    """Number of the first view; more than 0 for a part."""
    num_views: int
    """Views of each sample."""
    blocks_done: int
    """Blocks on the disk."""
    blocks_total: int
    """Blocks of the whole cache; more than `blocks_done` while a dump is not finished."""
    manifest: Manifest | None
    """The manifest; None while a dump is not finished."""
    size_bytes: int
    """Bytes of a complete cache; 0 while a dump is not finished."""
    float32_bytes: int
    """What the full logits of the same views take as float32."""
    record_bytes: float
    """Bytes of a record, one (sample, view), on average; 0 while a dump is not finished."""
    growth: Growth | None
    """Views that are being added; None where there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """The outcome of a verification."""

    path: Path
    """The cache's directory."""
    num_files: int
    """Files looked at."""
    size_bytes: int
    """Their bytes."""
    problems: tuple[str, ...]
    """One line for every bad file, with its block; empty when all is well."""


def info(cache: Path) -> CacheInfo:
    """What a cache, or an unfinished dump, holds. Reads the manifest only.

    Raises:
        CacheNotFoundError: There is neither.
        IncompleteCacheError: It is a conversion that is not finished.
        FormatError: Not a manifest of a known version.
        IntegrityError: The manifest is damaged.
    """
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(cache)
    except IncompleteCacheError:
        begun = read_plan(cache)
        if begun is None:  # a conversion, which has no blocks to tell of
            raise
        plan, done = begun
        recipe, grid = plan.recipe, plan.grid
    else:
        recipe, grid, done = manifest.recipe, manifest.grid, len(manifest.blocks)
    return CacheInfo(
        path=cache,
        recipe_key=manifest.recipe_key if manifest else recipe.key,
        recipe=recipe,
        first_view=grid.first_view,
        num_views=grid.num_views,
        blocks_done=done,
        blocks_total=grid.num_blocks,
        manifest=manifest,
        size_bytes=manifest.size_bytes if manifest else 0,
        float32_bytes=4 * grid.num_samples * grid.num_views * math.prod((*recipe.teacher.positions, recipe.teacher.num_classes)),
        record_bytes=_record_bytes(manifest) if manifest else 0.0,
        growth=_growth(cache, manifest) if manifest else None,
    )


def _growth(cache: Path, manifest: Manifest) -> Growth | None:
    begun = read_plan(cache)
    if begun is None or begun[0].grid.views.stop <= manifest.grid.views.stop:
        return None
    plan, done = begun
    return Growth(num_views=plan.grid.num_views, blocks_done=done, blocks_total=plan.grid.num_blocks - manifest.grid.num_blocks)


def _record_bytes(manifest: Manifest) -> float:
    size = sum(file.size_bytes for block in manifest.blocks for file in block.files)
    return size / (manifest.grid.num_samples * manifest.grid.num_views)


def verify(cache: Path, *, progress: Progress | None = None) -> VerifyResult:
    """Compares every file of a cache with its manifest: presence, length, sha256.

    Args:
        cache: The cache's directory.
        progress: Told how far it is.

    Raises:
        CacheNotFoundError: There is no cache.
        IncompleteCacheError: Its dump is not finished.
        FormatError: Not a manifest of a known version.
        IntegrityError: The manifest itself is damaged.
    """
    reader = CacheReader(cache)
    manifest = reader.manifest
    with (progress or Silent()).stage("verify", total=manifest.size_bytes, unit="B") as advance:
        problems = tuple(reader.problems(lambda file: advance(file.size_bytes)))
    return VerifyResult(path=cache, num_files=len(manifest.files), size_bytes=manifest.size_bytes, problems=problems)
