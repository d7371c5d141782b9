"""The block ledger of a dump in progress: what was begun, who works on it, which blocks are done.

Everything lies in `.dump/` inside the cache's directory and is removed when the manifest has been written:
`plan.json` says what is being dumped, `lock` is held by the writer, `blocks/ID.json` marks a finished block.
"""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import CacheExistsError, FormatError, IntegrityError
from kdcache.records.hashing import canonical_json
from kdcache.records.jsonrecord import from_json, to_json
from kdcache.records.manifest import MANIFEST_NAME, Block, BlockGrid, BlockRecord, Manifest, Recipe, recipe_differences
from kdcache.store.files import exclusive_lock, write_atomically

FOLDER = ".dump"
CONVERT_FOLDER = ".convert"
"""Stands in the destination of a conversion that is not finished."""


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


class BlockLedger:
    """The marks of finished blocks. Open it with `BlockLedger.open`, which holds the lock."""

    def __init__(self, root: Path, plan: DumpPlan) -> None:
        self._folder = root / FOLDER
        self._plan = plan

    @classmethod
    @contextmanager
    def open(cls, root: Path, plan: DumpPlan) -> Iterator["BlockLedger"]:
        """Begins a dump or goes on with the one that was begun there; nobody else can while the body runs.

        Raises:
            CacheBusyError: Another process dumps there.
            CacheExistsError: Something else is, or is being, dumped there; the differing fields are listed.
        """
        folder = root / FOLDER
        if (root / MANIFEST_NAME).exists():
            _check_complete_cache(root, plan)
        elif root.exists() and not folder.exists() and any(root.iterdir()):
            raise CacheExistsError(f"{root} is not empty and holds no cache; choose another --out")
        with exclusive_lock(folder / "lock", holder="a dump"):
            ledger = cls(root, plan)
            ledger._begin(root)
            yield ledger

    def find(self, block: Block) -> BlockRecord | None:
        """The record of a finished block, or None for one that still has to be computed."""
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

    def close(self) -> None:
        """Removes the ledger: the manifest is the truth from now on."""
        shutil.rmtree(self._folder)

    def _path(self, block: Block) -> Path:
        return self._folder / "blocks" / f"{block.id}.json"

    def _begin(self, root: Path) -> None:
        if (root / MANIFEST_NAME).exists():
            _check_complete_cache(root, self._plan)
            return
        plan_path = self._folder / "plan.json"
        if plan_path.exists():
            _require_equal(root, from_json(DumpPlan, json.loads(plan_path.read_bytes()), where=str(plan_path)), self._plan)
        else:
            write_atomically(plan_path, canonical_json(to_json(self._plan)))


def read_plan(root: Path) -> tuple[DumpPlan, int] | None:
    """The plan of an unfinished dump and how many of its blocks are marked; None when none was begun there."""
    path = root / FOLDER / "plan.json"
    if not path.exists():
        return None
    plan = from_json(DumpPlan, json.loads(path.read_bytes()), where=str(path))
    return plan, len(list((root / FOLDER / "blocks").glob("*.json")))


def _check_complete_cache(root: Path, plan: DumpPlan) -> None:
    path = root / MANIFEST_NAME
    manifest = Manifest.from_bytes(path.read_bytes(), where=str(path))
    found = {"recipe": manifest.recipe, "grid": manifest.grid, "layout": manifest.layout}
    _require_equal(root, found, {"recipe": plan.recipe, "grid": plan.grid, "layout": plan.layout})


def _require_equal(root: Path, found: object, wanted: object) -> None:
    differences = recipe_differences(found, wanted)
    if differences:
        listed = "\n  ".join(differences)
        raise CacheExistsError(
            f"{root} holds another cache; choose another --out, or remove it. Differing (found → asked for):\n  {listed}"
        )
