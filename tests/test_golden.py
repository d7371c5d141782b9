"""Caches of every released format version stay readable, and say what they said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.learning.cache import Cache
from kdcache.workflows.convert import convert
from kdcache.workflows.verify import verify

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CACHES = sorted(path.parent for path in GOLDEN.glob("*/*/manifest.json"))


def expected(root: Path) -> dict[str, Any]:
    """What was written down of a cache when it was made."""
    said: dict[str, Any] = json.loads((root.parent / "expected.json").read_text())
    found: dict[str, Any] = said[root.name.split("-")[0]]
    return found


def test_there_are_golden_caches_in_every_layout() -> None:
    """Each layout of format 1.0 has one, of records of fixed and of varying length."""
    assert {root.name for root in CACHES} >= {
        f"{codec}-{layout}" for codec in ("topk", "adaptive") for layout in ("zarr", "parquet", "compact")
    }


@pytest.mark.parametrize("root", CACHES, ids=lambda root: f"{root.parent.name}-{root.name}")
def test_golden_caches_say_what_they_said(root: Path) -> None:
    """They verify, have the content that was written down, and give the same classes and probabilities."""
    said, cache = expected(root), Cache(root)
    assert not verify(root).problems
    assert cache.manifest.content == said["content"]
    soft = cache.soft_targets(np.array(said["rows"]), np.array(said["views"]))
    assert (None if soft.index is None else soft.index.tolist()) == said["classes"]
    for temperature, (kept, tail) in said["probs"].items():
        found_kept, found_tail = soft.probs_at(float(temperature))
        torch.testing.assert_close(found_kept.double(), torch.tensor(kept, dtype=torch.float64), atol=2e-5, rtol=0)
        torch.testing.assert_close(found_tail.double(), torch.tensor(tail, dtype=torch.float64), atol=2e-5, rtol=0)


@pytest.mark.parametrize("root", [root for root in CACHES if not root.name.endswith("zarr")], ids=lambda root: root.name)
def test_golden_caches_unpack_to_the_mapped_ones(root: Path, tmp_path: Path) -> None:
    """From Parquet and compact, unpacking gives the golden mapped cache, byte for byte but for Zarr's own metadata."""
    mapped = root.with_name(f"{root.name.split('-')[0]}-zarr")
    convert(root, tmp_path / "zarr", layout="zarr")
    chunks = [path.relative_to(mapped) for path in mapped.rglob("c/**/*") if path.is_file()]
    assert len(chunks) > 10
    for chunk in chunks:
        assert (tmp_path / "zarr" / chunk).read_bytes() == (mapped / chunk).read_bytes()
