"""The directory that a new cache is made in from other caches: free, or holding an unfinished work of the same kind."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.records.errors import ExistsError
from kdcache.records.hashing import canonical_json
from kdcache.store.files import exclusive_lock, write_atomically

PLAN = "plan.json"
"""In the folder of the work: what is being made of what."""


@contextmanager
def claimed(root: Path, plan: dict[str, Any], *, folder: str, work: str, other: str) -> Iterator[None]:
    """Marks a directory as an unfinished work, which nobody else can go on with while the body runs; it is whole when that ends.

    Args:
        root: The directory; it does not exist, is empty, or holds an unfinished work with the same plan.
        plan: What is being made of what.
        folder: Name of the folder in it that holds plan and lock until the work is done.
        work: What it is, for messages: `conversion`.
        other: What another one would be, for messages: `of another cache`.

    Raises:
        ExistsError: Something else is there.
        CacheBusyError: Another process is at it.
    """
    _require_free(root, plan, folder, f"{work} {other}")
    with exclusive_lock(root / folder / "lock", holder=f"a {work}"):
        _require_free(root, plan, folder, f"{work} {other}")  # somebody may have been quicker
        write_atomically(root / folder / PLAN, canonical_json(plan))
        yield
        shutil.rmtree(root / folder)


def _require_free(root: Path, plan: dict[str, Any], folder: str, other: str) -> None:
    path = root / folder / PLAN
    if path.exists():
        if json.loads(path.read_bytes()) != plan:
            raise ExistsError(f"{root} holds an unfinished {other}; remove it, or choose another directory")
    elif root.exists() and any(child.name != folder for child in root.iterdir()):
        raise ExistsError(f"{root} is not empty; choose another directory, or remove it")
