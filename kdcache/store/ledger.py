"""The block ledger of a dump in progress: what was begun, who works on it, which blocks are done.

Everything lies in `.dump/` inside the cache's directory and is removed when the manifest has been written:
`plan.json` says what is being dumped, `lock` is held by the writer, `blocks/ID.json` marks a finished block, and `commit/` holds
what belongs to no block until it is put in its place. A complete cache that gets more views has such a folder, too.
"""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import CacheBusyError, CacheExistsError, FormatError, IntegrityError
from kdcache.records.hashing import canonical_json
from kdcache.records.jsonrecord import from_json, to_json
from kdcache.records.manifest import MANIFEST_NAME, Block, BlockGrid, BlockRecord, Manifest, Recipe, recipe_differences
from kdcache.store.files import exclusive_lock, put_in_place, write_atomically

FOLDER = ".dump"
STAGED = f"{FOLDER}/commit"
"""Where the files that belong to no block, and the manifest, wait for each other."""
CONVERT_FOLDER = ".convert"
"""Stands in the destination of a conversion that is not finished."""
MERGE_FOLDER = ".merge"
"""Stands in the destination of a merge that is not finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpPlan:
    """What a dump is going to write; fixed when it begins."""

    recipe: Recipe
    """What determines the numbers."""
    layout: str
    """How the records lie in files."""
    grid: BlockGrid
    """How the work is cut."""
    batch_size: int
    """Samples in a forward pass; batches are cut inside a block, so the worker's choice cannot matter."""
    calibration: dict[str, float]
    """Constants of the codec, measured when the dump began."""

    def beside(self, complete: Manifest, *, root: Path) -> "DumpPlan":
        """The same plan where there is a cache already: on its grid, which gets the views that are asked for and not there yet.

        Args:
            complete: What the cache says of itself.
            root: Its directory, for messages.

        Raises:
            CacheExistsError: It is another recipe's cache, is cut in another way, or cannot get more views.
        """
        grid, stop = complete.grid, self.grid.views.stop
        if complete.recipe == self.recipe and complete.layout == "compact":
            raise CacheExistsError(
                f"{root} is packed, and a packed cache cannot get more views; `kdcache unpack {root} DIR` it, then dump with --out DIR"
            )
        wanted = {"recipe": self.recipe, "layout": self.layout, "grid": {"block_samples": self.grid.block_samples}}
        found = {"recipe": complete.recipe, "layout": complete.layout, "grid": {"block_samples": grid.block_samples}}
        if stop > grid.views.stop:
            wanted, found = wanted | {"batch_size": self.batch_size}, found | {"batch_size": complete.provenance.batch_size}
        _require_equal(found, wanted, f"{root} holds another cache; choose another --out, or remove it")
        if self.grid.first_view < grid.first_view or self.grid.first_view > grid.views.stop:
            raise CacheExistsError(
                f"{root} holds views {shown_views(grid.views)}, asked for were {shown_views(self.grid.views)}: between or before them"
                " nothing can be added; choose another --out, and join the two with `kdcache merge`"
            )
        return replace(self, grid=grid.grown(stop) if stop > grid.views.stop else grid)


class BlockLedger:
    """The marks of finished blocks. Open it with `BlockLedger.open`, which holds the lock."""

    def __init__(self, root: Path, plan: DumpPlan, complete: Manifest | None) -> None:
        self.root, self.staged = root, root / STAGED
        self._folder = root / FOLDER
        self._plan, self._complete = plan, complete
        self._kept = {record.block.id: record for record in complete.blocks} if complete else {}

    @classmethod
    @contextmanager
    def open(cls, root: Path, plan: DumpPlan, complete: Manifest | None = None) -> Iterator["BlockLedger"]:
        """Begins a dump or goes on with the one that was begun there; nobody else can while the body runs.

        Args:
            root: The cache's directory.
            plan: What is to be there in the end.
            complete: The manifest of the cache that is there already; its blocks count as finished.

        Raises:
            CacheBusyError: Another process dumps there.
            CacheExistsError: Something else is, or is being, dumped there; the differing fields are listed.
        """
        folder = root / FOLDER
        if complete is None and root.exists() and not folder.exists() and any(root.iterdir()):
            raise CacheExistsError(f"{root} is not empty and holds no cache; choose another --out")
        with exclusive_lock(folder / "lock", holder="a dump"):
            ledger = cls(root, plan, complete)
            ledger._begin()
            yield ledger

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self._complete is not None and self._plan.grid == self._complete.grid

    def find(self, block: Block) -> BlockRecord | None:
        """The record of a finished block, or None for one that still has to be computed."""
        if block.id in self._kept:
            return self._kept[block.id]
        path = self._path(block)
        if not path.exists():
            return None
        record = from_json(BlockRecord, json.loads(path.read_bytes()), where=str(path))
        if record.block != block:
            raise FormatError(f"{path} marks the block {record.block}, expected {block}; remove {self._folder} to begin again")
        return record

    def mark(self, record: BlockRecord) -> None:
        """Marks a block as finished. Its files must be on the disk already."""
        write_atomically(self._path(record.block), canonical_json(to_json(record)))

    def keep_sums(self, block: Block, sums: NDArray[np.int64]) -> None:
        """Keeps what a block adds to a table of the whole cache, until that is written. To be called before `mark`."""
        buffer = io.BytesIO()
        np.save(buffer, sums, allow_pickle=False)
        write_atomically(self._path(block).with_suffix(".npy"), buffer.getbuffer())

    def sums(self, block: Block) -> NDArray[np.int64]:
        """What `keep_sums` was given.

        Raises:
            IntegrityError: It is not there any more.
        """
        path = self._path(block).with_suffix(".npy")
        try:
            sums: NDArray[np.int64] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            mark = self._path(block)
            raise IntegrityError(f"{path}: {error}; remove {mark} and run the same dump again to compute this block again") from error
        return sums

    def commit(self, manifest: Manifest) -> None:
        """Puts the files that belong to no block, which must be in `staged`, in their places and, last, the manifest.

        While views are added, the old manifest stays valid until the last step: only Zarr's own metadata is replaced before it, and
        whoever finds that replaced finds the new manifest here, staged.
        """
        write_atomically(self.staged / MANIFEST_NAME, manifest.to_bytes())
        unchanged = self._complete.metadata_files if self._complete else ()
        for file in manifest.metadata_files:
            if file not in unchanged:
                put_in_place(self.staged / file.path, self.root / file.path)
        put_in_place(self.staged / MANIFEST_NAME, self.root / MANIFEST_NAME)

    def close(self) -> None:
        """Removes the ledger: the manifest is the truth from now on. That of views which are still being added stays."""
        begun = read_plan(self.root)
        if begun is None or begun[0].grid == self._plan.grid:
            shutil.rmtree(self._folder)

    def _path(self, block: Block) -> Path:
        return self._folder / "blocks" / f"{block.id}.json"

    def _begin(self) -> None:
        """Writes the plan, unless all is there or the same was begun already. What a finished dump has left is removed."""
        if _complete_manifest(self.root) != self._complete:
            raise CacheBusyError(f"another dump into {self.root} has ended just now; run the same command again")
        begun = read_plan(self.root)
        if begun and self._complete and not begun[0].grid.views.stop > self._complete.grid.views.stop:
            begun = None
        if begun is None:
            self._clear()
        if self.is_complete:
            return
        if begun:
            given_up = self._folder if self._complete else self.root  # views that were being added go without those that are there
            _require_equal(
                begun[0], self._plan, f"{self.root} holds an unfinished dump; finish that, choose another --out, or remove {given_up}"
            )
        else:
            write_atomically(self._folder / "plan.json", canonical_json(to_json(self._plan)))

    def _clear(self) -> None:
        (self._folder / "plan.json").unlink(missing_ok=True)
        for folder in (self._folder / "blocks", self.staged):
            shutil.rmtree(folder, ignore_errors=True)


def read_plan(root: Path) -> tuple[DumpPlan, int] | None:
    """The plan of an unfinished dump and how many of its blocks are marked; None when none was begun there."""
    path = root / FOLDER / "plan.json"
    if not path.exists():
        return None
    plan = from_json(DumpPlan, json.loads(path.read_bytes()), where=str(path))
    return plan, len(list((root / FOLDER / "blocks").glob("*.json")))


def shown_views(views: range) -> str:
    """For people: `8 to 15`, or `8`."""
    return f"{views.start} to {views.stop - 1}" if len(views) > 1 else str(views.start)


def _complete_manifest(root: Path) -> Manifest | None:
    path = root / MANIFEST_NAME
    return Manifest.from_bytes(path.read_bytes(), where=str(path)) if path.exists() else None


def _require_equal(found: object, wanted: object, message: str) -> None:
    differences = recipe_differences(found, wanted)
    if differences:
        raise CacheExistsError("\n  ".join([f"{message}. Differing (found → asked for):", *differences]))
