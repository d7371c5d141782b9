"""`kdcache merge`: caches of one recipe that hold different views become one cache. No teacher, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from kdcache.records.errors import ConfigError, IntegrityError, MismatchError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import (
    MANIFEST_NAME,
    BlockGrid,
    BlockRecord,
    FileRecord,
    Manifest,
    Probe,
    Provenance,
    Statistics,
    probed_view,
    recipe_differences,
)
from kdcache.records.progress import Progress, Silent
from kdcache.store.destination import claimed
from kdcache.store.files import write_atomically, write_record
from kdcache.store.ledger import MERGE_FOLDER, shown_views
from kdcache.store.reader import CacheReader, file_problem, read_manifest

Group = tuple[int, int]
"""First view and view after the last of views that share blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """What a merge left behind."""

    path: Path
    """The new cache's directory."""
    manifest: Manifest
    """What it says of itself."""
    files_copied: int
    """Files that this run copied; those that an interrupted run had copied are not among them."""


def merge(sources: Sequence[Path], out: Path, *, progress: Progress | None = None) -> MergeResult:
    """Joins caches of one recipe, each with some of the views, into a new cache. The sources are only read.

    The result is the same, whatever the order of the sources, and is the one of a single dump, but for three things. A table of
    the whole cache (the profile) and the calibration are those of the part whose views begin first, of several that of the one
    with the most views. Views keep the groups in which they were dumped. The provenance tells of every part.

    Each file is checked by its digest when it is copied. The manifest is written last: killed at any moment and run again, the
    merge goes on and ends in the same bytes.

    Args:
        sources: The parts: same recipe, same layout, same ranges of samples. Together they hold consecutive views. What several
            hold must be equal.
        out: A directory that does not exist, is empty, or holds an unfinished merge of the same parts.
        progress: Told how far it is.

    Raises:
        ConfigError: There are no sources, or they are packed.
        CacheNotFoundError: There is no cache at a source.
        IncompleteCacheError: A source's dump is not finished.
        MismatchError: The parts do not fit together; the differing fields, the missing views, or the blocks are listed.
        IntegrityError: A source is damaged.
        ExistsError: Something else is at `out`.
        CacheBusyError: Another process merges there.
    """
    if not sources:
        raise ConfigError("expected the directories of at least one cache to merge")
    parts = sorted((CacheReader(source) for source in sources), key=_rank)
    for part in parts:
        _require_joinable(parts[0], part)
    owners = _owners(parts)
    _require_agreement(parts, owners)
    plan = {
        "parts": [part.manifest.content for part in parts],
        "recipe_key": parts[0].manifest.recipe_key,
        "layout": parts[0].manifest.layout,
    }
    with claimed(out, plan, folder=MERGE_FOLDER, work="merge", other="of other caches"):
        if (out / MANIFEST_NAME).exists():  # killed when all was done
            return MergeResult(path=out, manifest=read_manifest(out), files_copied=0)
        manifest, copied = _merge_files(parts, owners, out, progress or Silent())
        write_atomically(out / MANIFEST_NAME, manifest.to_bytes())
    return MergeResult(path=out, manifest=manifest, files_copied=copied)


def _rank(part: CacheReader) -> tuple[int, int, str]:
    """What decides which part goes first, by nothing but its content."""
    grid = part.manifest.grid
    return grid.first_view, -grid.num_views, part.manifest.content


def _require_joinable(first: CacheReader, other: CacheReader) -> None:
    """Refuses parts of different recipes, or that are cut or laid out in different ways."""
    ours, theirs = first.manifest, other.manifest
    if theirs.layout == "compact":
        raise ConfigError(f"{other.root} is packed: its files cannot be joined with others; `kdcache unpack {other.root} DIR` first")
    found, wanted = (
        {
            "recipe": manifest.recipe,
            "recipe_key": manifest.recipe_key,
            "layout": manifest.layout,
            "grid": {"block_samples": manifest.grid.block_samples},
            "fields": {field.name: field for field in manifest.fields},
            "contents": {name: manifest.contents[name] for name in ("key", "label")},
        }
        for manifest in (ours, theirs)
    )
    differences = recipe_differences(found, wanted)
    if differences:
        listed = "\n  ".join(differences)
        raise MismatchError(f"{first.root} and {other.root} are not parts of one cache. Differing (the one → the other):\n  {listed}")


def _owners(parts: Sequence[CacheReader]) -> dict[Group, CacheReader]:
    """The groups of views of the joined cache in order, each with the first part that holds it.

    Raises:
        MismatchError: Views are missing, or are grouped differently where parts overlap.
    """
    owners: dict[Group, CacheReader] = {}
    for part in parts:
        for group in part.manifest.grid.view_groups:
            owners.setdefault(group, part)
    owners = dict(sorted(owners.items()))
    missing = [range(before[1], after[0]) for before, after in pairwise(owners) if after[0] > before[1]]
    if missing:
        listed = ", ".join(map(shown_views, missing))
        raise MismatchError(f"views {listed} are in none of the caches; `kdcache dump --views FIRST:STOP` makes them")
    for before, after in pairwise(owners):
        if after[0] < before[1]:
            raise MismatchError(
                f"{owners[before].root} and {owners[after].root} overlap, but not in whole blocks: views {shown_views(range(*before))} of the"
                f" one were dumped together, and {shown_views(range(*after))} of the other; dump one of them so that it begins where the"
                " other ends"
            )
    return owners


def _require_agreement(parts: Sequence[CacheReader], owners: Mapping[Group, CacheReader]) -> None:
    """Refuses parts that hold different records of the same samples and views."""
    records = {part.root: {record.block: record.content for record in part.manifest.blocks} for part in parts}
    conflicts = []
    for part in parts:
        for block, content in records[part.root].items():
            owner = owners[block.views]
            kept = records[owner.root][block]
            if kept != content:
                conflicts.append(f"block {block.id}: {kept} in {owner.root}, {content} in {part.root}")
    if conflicts:
        listed = "\n  ".join(conflicts)
        raise MismatchError(
            "caches that overlap hold different records of the same views: one was made on other hardware or with other libraries, or is"
            f" not what it says (`kdcache verify`); leave one out. Differing:\n  {listed}"
        )


def _merge_files(parts: Sequence[CacheReader], owners: Mapping[Group, CacheReader], out: Path, progress: Progress) -> tuple[Manifest, int]:
    """Writes every file of the joined cache but its manifest, which it gives, with the number of files that it copied."""
    first = parts[0]
    grid = replace(first.manifest.grid, block_views=max(part.manifest.grid.block_views for part in parts)).with_groups(list(owners))
    of_part = {part.root: {record.block: record for record in part.manifest.blocks} for part in parts}
    blocks = [of_part[owners[block.views].root][block] for block in grid.blocks()]
    copied = _copy_blocks(blocks, owners, out, progress)
    shared = {field.name: first.shared(field.name) for field in first.manifest.fields if not field.per_view}
    used = [part for part in parts if part is first or part in owners.values()]
    manifest = replace(
        first.manifest,
        grid=grid,
        statistics=Statistics.of_blocks(blocks, class_counts=first.manifest.statistics.class_counts),
        probes=_probes(grid, owners),
        history=(*first.manifest.history, *(entry for part in used[1:] for entry in _history(part.manifest))),
        license=_licence(used, progress),
        metadata_files=first.backend.write_shared(out, first.manifest.fields, grid, shared),
        blocks=tuple(blocks),
    )
    return manifest, copied


def _copy_blocks(blocks: Sequence[BlockRecord], owners: Mapping[Group, CacheReader], out: Path, progress: Progress) -> int:
    """Copies the files of blocks, but those that are there already; gives how many it copied."""
    copied = 0
    with progress.stage("merge", total=sum(file.size_bytes for block in blocks for file in block.files), unit="B") as advance:
        for block in blocks:
            for file in block.files:
                if file_problem(out, file):
                    _copy_file(owners[block.block.views].root, file, out)
                    copied += 1
                advance(file.size_bytes)
    return copied


def _copy_file(root: Path, file: FileRecord, out: Path) -> None:
    try:
        data = (root / file.path).read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError(f"{root / file.path}: missing; `kdcache verify {root}` lists all damage") from error
    if sha256(data) != file.sha256:
        raise IntegrityError(f"{root / file.path}: content changed, expected {file.sha256}; `kdcache verify {root}` lists all damage")
    write_record(out, file.path, data)


def _probes(grid: BlockGrid, owners: Mapping[Group, CacheReader]) -> tuple[Probe, ...]:
    """Those of the parts' probes that a single dump would have made, as far as they have them."""
    most = max(len(part.manifest.probes) for part in owners.values())
    holders = [owners[grid.group_of(probed_view(number, grid.views))].manifest.probes for number in range(most)]
    return tuple(probes[number] for number, probes in enumerate(holders) if number < len(probes))


def _history(part: Manifest) -> tuple[Provenance, ...]:
    """Where a part's views come from, each entry with its views."""
    added = [entry.views[0] for entry in part.history if entry.views]
    return replace(part.provenance, views=(part.grid.first_view, min([part.grid.views.stop, *added]))), *part.history


def _licence(parts: Sequence[CacheReader], progress: Progress) -> str | None:
    """The licence under which all parts are, or all licences that must be kept; None where a part states none."""
    stated = {part.manifest.license for part in parts}
    if None in stated and len(stated) > 1:
        progress.note("warning: not every part states a licence, so the joined cache states none")
        return None
    return " AND ".join(sorted(licence for licence in stated if licence)) or None
