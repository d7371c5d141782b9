"""A manifest with right digests that asks for what the format forbids. Copy beside tests/ (uses test_format's make_cache)."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_format import make_cache

from kdcache.records.hashing import canonical_json, sha256

OUTSIDE = {"path": "../outside", "size_bytes": 1, "sha256": sha256(b"x")}
OPEN = "import sys; from kdcache.learning.cache import Cache; c = Cache(sys.argv[1]); c.reader.verify_all(); c.reader.sample_field('key')"


def set_in(path: str, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        for part in parents:
            document = document[part]
        document[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda document: document["fields"][3].update(dtype="object", inner=[2]), id="key as 2 objects of 8 bytes instead of 16 bytes"
        ),
        pytest.param(set_in("fields.3.dtype", "nonsense"), id="no such dtype"),
        pytest.param(set_in("fields.1.inner", [4]), id="other k in a field than in the codec"),
        pytest.param(set_in("fields.1.attributes.gap_range", 1.0), id="other range in a field than in the codec"),
        pytest.param(set_in("recipe.codec", "topk,k=5,temperatures=(1.0,2.0)"), id="fewer temperatures in the codec"),
        pytest.param(lambda document: document["metadata_files"].append(OUTSIDE), id="path out of the cache"),
        pytest.param(set_in("grid.block_samples", 0), id="no samples in a block"),
        pytest.param(lambda document: document["blocks"].pop(), id="a block is missing"),
    ],
)
def test_hostile_manifest_is_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    """A well-signed manifest that breaks the format exits with kdcache's own error, never a crash, never silence."""
    root = make_cache(tmp_path, num_classes=300, codec="topk,k=5")
    (tmp_path / "outside").write_bytes(b"x")
    document = json.loads((root / "manifest.json").read_bytes())
    document.pop("digest")
    change(document)
    document["recipe_key"] = sha256(canonical_json(document["recipe"]))
    document["digest"] = sha256(canonical_json(document))
    (root / "manifest.json").write_text(json.dumps(document))
    done = subprocess.run([sys.executable, "-c", OPEN, root], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert "kdcache.records.errors." in done.stderr.splitlines()[-1] or "kdcache.records.errors." in done.stderr
