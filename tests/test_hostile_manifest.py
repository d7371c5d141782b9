"""A manifest with right digests that asks for what the format forbids: refused with one of kdcache's own errors, and at once."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import Noise, dump_noise, signed

from kdcache.learning.cache import Cache
from kdcache.learning.datasets import wrap_dataset
from kdcache.records.errors import FormatError, KdcacheError
from kdcache.records.hashing import sha256
from kdcache.store.reader import read_manifest

Change = Callable[[Any], Any]
CODECS = {"topk": "topk,k=5", "adaptive": "adaptive,mean_k=4,max_k=10", "sampled": "sampled,draws=10"}
OUTSIDE = {"path": "../outside", "size_bytes": 1, "sha256": sha256(b"x")}
ABSURD = 10**15


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache for each codec; tests must not change them."""
    return {name: dump_noise(tmp_path_factory.mktemp(name), codec=codec, num_classes=300).path for name, codec in CODECS.items()}


def forged(root: Path, folder: Path, change: Change) -> Path:
    """A copy of a cache whose manifest was changed and signed again; one with views beyond all measure in it, too."""
    copy = Path(shutil.copytree(root, folder / "copy"))
    document = json.loads((copy / "manifest.json").read_bytes())
    change(document)
    (copy / "manifest.json").write_bytes(signed(document))
    return copy


def put(path: str, value: Any) -> Change:
    """Sets the value at `a.b.0.c`; fields of the store go by their names, as `fields.logits/gap.bits`."""

    def change(document: Any) -> None:
        *parents, last = path.split(".")
        for part in parents:
            if isinstance(document, list):
                document = document[int(part)] if part.isdigit() else next(item for item in document if item["name"] == part)
            else:
                document = document[part]
        document[int(last) if isinstance(document, list) else last] = value

    return change


def both(*changes: Change) -> Change:
    """All of these, one after another."""
    return lambda document: [change(document) for change in changes]


def remove(path: str, key: str | int) -> Change:
    """Takes an entry away."""
    return lambda document: document[path].pop(key)


CONTRADICTIONS = [
    ("topk", put("fields.key.dtype", "object"), "expected the field 'key' to have a type of"),
    ("topk", both(put("fields.key.dtype", "object"), put("fields.key.inner", [2])), "expected the field 'key' to have a type of"),
    ("topk", put("fields.logits/gap.dtype", "nonsense"), "expected the field 'logits/gap' to have a type of"),
    ("topk", put("fields.logits/index.dtype", "uint"), "expected the field 'logits/index' to have a type of"),
    ("topk", put("fields.key.inner", [8]), "expected 'key' as 16 uint8 a sample"),
    ("topk", put("fields.key.axes", []), "expected 'key' as 16 uint8 a sample"),
    ("topk", put("fields.key.bits", 8), "expected 'key' as 16 uint8 a sample"),
    ("topk", put("fields.label.axes", ["view", "sample"]), "expected 'label' as one unsigned integer a sample"),
    ("topk", put("fields.label.dtype", "float16"), "expected 'label' as one unsigned integer a sample"),
    ("topk", put("fields.label.bits", 8), "expected bits only for unsigned entries"),
    ("topk", put("fields.logits/index.bits", 0), "expected bits only for unsigned entries that have so many, found 0"),
    ("topk", put("fields.logits/index.bits", -9), "expected bits only for unsigned entries that have so many, found -9"),
    ("topk", put("fields.logits/index.bits", 17), "expected bits only for unsigned entries that have so many, found 17"),
    ("topk", both(put("fields.logits/index.dtype", "uint64"), put("fields.logits/index.bits", 58)), "so many, found 58"),
    ("topk", both(put("fields.logits/gap.dtype", "float16"), put("fields.logits/gap.bits", 4)), "expected bits only for unsigned"),
    ("topk", put("fields.logits/gap.axes", ["sample", "view"]), "expected the axes (view, sample), (sample) or none"),
    ("topk", put("fields.logits/gap.axes", ["view"]), "expected the axes (view, sample), (sample) or none"),
    ("topk", put("fields.logits/gap.axes", ["sample"]), "expected a digest of each field without a view axis"),
    ("topk", put("fields.logits/gap.axes", []), "expected a digest of each field without a view axis"),
    ("topk", put("fields.logits/gap.inner", [0]), "expected positive, named inner axes"),
    ("topk", put("fields.logits/gap.inner", [-4]), "expected positive, named inner axes"),
    ("topk", put("fields.logits/gap.inner", [4, 1]), "expected positive, named inner axes"),
    ("topk", put("fields.logits/gap.inner", [ABSURD]), "chunk files of 'logits/gap' would have up to"),
    ("topk", put("fields.profile/log_prob.inner", [ABSURD, ABSURD]), "chunk files of 'profile/log_prob' would have up to"),
    ("topk", put("fields.logits/gap.name", "../gap"), "expected a field's name in letters"),
    ("topk", put("fields.logits/gap.name", "/gap"), "expected a field's name in letters"),
    ("topk", put("fields.logits/gap.name", "logits/gap\n"), "expected a field's name in letters"),
    ("topk", put("fields.logits/gap.name", "logits/tail"), "expected each field once"),
    ("topk", remove("fields", 3), "expected each field once, with 'key' and 'label' among them"),
    ("topk", lambda document: document["contents"].pop("label"), "expected a digest of each field without a view axis"),
    ("topk", put("contents.more", "sha256:aa"), "expected a digest of each field without a view axis"),
    ("topk", put("layout", "nonsense"), "unknown layout 'nonsense'"),
    ("topk", lambda document: document["metadata_files"].append(OUTSIDE), "expected file paths inside the cache's directory"),
    ("topk", lambda document: document["metadata_files"].append(document["metadata_files"][0]), "a file is listed twice"),
    ("topk", lambda document: document["blocks"][0]["files"].pop(), "not the files of the arrays"),
    ("topk", put("grid.block_samples", 0), "expected positive numbers in the grid"),
    ("topk", put("grid.block_views", -1), "expected positive numbers in the grid"),
    ("topk", put("grid.num_samples", 49), "the grid has 49 samples, the recipe 50"),
    ("topk", put("grid.block_samples", ABSURD), "chunk files of 'logits/index' would have up to"),
    ("topk", put("grid.num_views", ABSURD), "expected at most 1048576 views"),
    ("topk", both(put("grid.num_views", ABSURD), put("grid.block_views", ABSURD)), "expected at most 1048576 views"),
    ("topk", both(put("grid.num_samples", ABSURD), put("recipe.dataset.num_samples", ABSURD)), "blocks of the grid in order, found 6"),
    ("topk", remove("blocks", 0), "expected the 6 blocks of the grid in order, found 5"),
    ("topk", lambda document: document["blocks"].reverse(), "expected the 6 blocks of the grid in order, found 6"),
    ("topk", put("recipe.views.mixing", {"mixup": 1e-310, "cutmix": 0.0, "probability": 1.0, "switch": 0.5}), "from 1e-06 to 1000"),
    ("topk", put("probes.0.view", 5), "a probe is outside the grid"),
    ("topk", put("probes.0.row", -1), "a probe is outside the grid"),
    ("adaptive", put("fields.logits/gap.lengths.field", "nowhere"), "expected counts of 'logits/gap'"),
    ("adaptive", put("fields.logits/gap.lengths.field", "logits/gap"), "expected counts of 'logits/gap'"),
    ("adaptive", put("fields.logits/gap.lengths.field", "logits/index"), "expected counts of 'logits/gap'"),
    ("adaptive", put("fields.logits/gap.lengths.field", "label"), "expected counts of 'logits/gap'"),
    ("adaptive", put("fields.logits/count.dtype", "float16"), "expected counts of 'logits/index'"),
    ("adaptive", put("fields.logits/count.lengths", {"field": "logits/count", "minus": 0}), "expected counts of 'logits/count'"),
    ("adaptive", put("fields.logits/count.bits", 4), "expected bits only for unsigned entries"),
    ("adaptive", both(put("fields.logits/count.inner", [7]), put("fields.logits/count.inner_names", ["position0"])), "that fits the counts (7,)"),
    ("adaptive", put("fields.logits/gap.lengths.minus", -1), "expected 'logits/gap' to have one inner axis that fits the counts"),
    ("adaptive", both(put("fields.logits/gap.inner", [3, 3]), put("fields.logits/gap.inner_names", ["a", "b"])), "to have one inner axis"),
    ("adaptive", both(put("fields.logits/gap.inner", []), put("fields.logits/gap.inner_names", [])), "to have one inner axis"),
    ("adaptive", put("fields.label.lengths", {"field": "logits/count", "minus": 0}), "expected 'label' to have one inner axis"),
    ("adaptive", put("fields.key.lengths", {"field": "logits/count", "minus": 0}), "expected 'key' to have one inner axis"),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "change", "message"), CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(
    codec: str, change: Change, message: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    """A well-signed manifest that breaks a rule of the format is a FormatError that names the rule, before any file is opened."""
    root = forged(caches[codec], tmp_path, change)
    with pytest.raises(FormatError, match=re.escape(message)):
        read_manifest(root)


def use(root: Path) -> None:
    """Does with a cache what training and `verify` do."""
    cache = Cache(root)
    cache.reader.verify_all()
    for name in ("key", "label"):
        cache.reader.shared(name)
    views, rows = (axis.ravel() for axis in np.meshgrid(np.arange(cache.num_views), np.arange(50), indexing="ij"))
    cache.soft_targets(rows, views)


OTHER_STORES = [
    ("topk", put("fields.logits/gap.inner", [5])),
    ("topk", put("fields.logits/gap.attributes.gap_range", 1.0)),
    ("topk", put("fields.logits/gap.fill_value", 254)),
    ("topk", put("fields.logits/index.bits", None)),
    ("topk", put("fields.logits/index.bits", 10)),
    ("topk", put("fields.logits/index.dtype", "uint32")),
    ("topk", put("fields.logits/tail.name", "logits/tails")),
    ("topk", put("fields.profile/log_prob.inner", [299, 299])),
    ("topk", put("fields.label.dtype", "uint64")),
    ("topk", put("recipe.codec", "topk,k=5,temperatures=(1.0,2.0)")),
    ("topk", put("recipe.codec", "topk,k=301")),
    ("topk", put("recipe.codec", "py:os:system")),
    ("topk", put("recipe.codec", "adaptive")),
    ("topk", put("recipe.teacher.num_classes", 299)),
    ("topk", put("recipe.teacher.num_classes", 0)),
    ("topk", put("recipe.teacher.num_classes", 2**70)),
    ("topk", put("recipe.teacher.positions", [5])),
    ("topk", put("recipe.teacher.positions", [-1])),
    ("adaptive", put("fields.logits/index.lengths", None)),
    ("adaptive", put("fields.logits/index.lengths.minus", 1)),
    ("adaptive", put("fields.logits/gap.lengths.minus", 0)),
    ("adaptive", put("fields.logits/gap.lengths.minus", ABSURD)),
    ("adaptive", put("fields.logits/gap.inner", [1])),
    ("adaptive", put("fields.logits/count.dtype", "uint64")),
    ("adaptive", put("recipe.codec", "adaptive,mean_k=4,max_k=11")),
    ("sampled", put("recipe.codec", "sampled,draws=11")),
    ("sampled", put("fields.logits/hits.attributes.temperature", 4.0)),
    ("sampled", put("fields.logits/hits.lengths", None)),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "change"), OTHER_STORES)
def test_a_manifest_of_another_store_is_refused(codec: str, change: Change, caches: dict[str, Path], tmp_path: Path) -> None:
    """A well-signed manifest whose fields are not those of its codec or of its files is refused, never read as something else."""
    root = forged(caches[codec], tmp_path, change)
    with pytest.raises(KdcacheError):
        use(root)


CROP = [{"op": "RandomCrop", "size": [64, 64]}]
ORDERS = [{"op": "RandomOrder", "transforms": [{"op": "RandomInvert"}] * 8}]
UNDOABLE = [
    put("recipe.views.pipeline", CROP),
    put("recipe.views.pipeline", [{"op": "RandomRotation", "degrees": [5, -5]}]),
    both(put("recipe.views.pipeline", CROP), put("recipe.views.enumerated", True)),
    both(put("recipe.views.pipeline", ORDERS), put("recipe.views.enumerated", True)),
]


@pytest.mark.parametrize("change", UNDOABLE)
def test_views_that_cannot_be_made_are_refused(change: Change, caches: dict[str, Path], tmp_path: Path) -> None:
    """A well-signed manifest whose operations fail, or have no end of views, is refused before training, with an error of kdcache's."""
    cache = Cache(forged(caches["topk"], tmp_path, change))
    with pytest.raises(KdcacheError):
        cache.join(wrap_dataset(Noise(300), num_classes=300)).check_probes()


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_not_changed_is_accepted(codec: str, caches: dict[str, Path], tmp_path: Path) -> None:
    """A manifest that was only written anew, with other white space and with keys of a later version, is read and used."""
    root = forged(caches[codec], tmp_path, both(put("later", [1, {"a": None}]), put("grid.later", 2)))
    use(root)
    assert Cache(root).manifest.content == Cache(caches[codec]).manifest.content
