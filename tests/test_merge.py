"""Merging caches of one recipe: parts that fit become the cache of a single dump, parts that do not are told why."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import kdcache, kdcache_json
from stored import NUM_SAMPLES, Noise, signed, tree
from test_extend import RANGES, but_for_history, count_steps, dump_views, kill_at, records_of

from kdcache.learning.cache import Cache
from kdcache.records.errors import CacheNotFoundError, ConfigError, ExistsError, IncompleteCacheError, IntegrityError, MismatchError
from kdcache.records.hashing import sha256
from kdcache.records.progress import Silent
from kdcache.store.reader import read_manifest
from kdcache.workflows.convert import convert
from kdcache.workflows.merge import merge
from kdcache.workflows.verify import verify

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the cache of some views, with some options, when it is asked for first; tests must not change it."""
    folder = tmp_path_factory.mktemp("parts")
    made: dict[str, Path] = {}

    def make(views: int | str, **options: Any) -> Path:
        name = "-".join(map(str, (views, *itertools.chain(*options.items())))).replace(":", "to").replace("/", "")
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
                made[name] = dump_views(folder, name, views, **options).path
        return made[name]

    return make


def forged(root: Path, copy: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a cache whose manifest was changed and signed again."""
    shutil.copytree(root, copy)
    document = json.loads((copy / "manifest.json").read_bytes())
    change(document)
    (copy / "manifest.json").write_bytes(signed(document))
    return copy


def differing(root: Path, other: Path) -> set[str]:
    """The files that are not in both with the same bytes."""
    ours, theirs = tree(root), tree(other)
    return {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}


@pytest.mark.parametrize("layout", ["zarr", "parquet"])
@pytest.mark.parametrize("views", [(8, "8:16"), ("8:16", 8), ("4:12", 4, "12:16"), (8, "4:12", "8:16", 16)])
def test_parts_become_the_cache_of_a_single_dump(views: tuple[int | str, ...], layout: str, part: Make, tmp_path: Path) -> None:
    """In any order, with overlaps or without: files, statistics and probes are those of a dump of all views; the sources stay."""
    sources = [part(each, layout=layout) for each in views]
    before = [tree(source) for source in sources]
    merged = merge(sources, tmp_path / "merged").manifest
    once = read_manifest(part(16, layout=layout))
    assert but_for_history(merged) == but_for_history(once)
    assert {path for path in differing(tmp_path / "merged", part(16, layout=layout)) if "profile/log_prob" not in path} <= {"manifest.json"}
    assert merged.probes == once.probes
    assert [tree(source) for source in sources] == before
    assert not verify(tmp_path / "merged").problems


def test_merging_is_growing(part: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts 0 to 7 and 8 to 15 make the very cache that grows from 8 to 16 views, profile and history included."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    merge([part("8:16"), part(8)], tmp_path / "merged")
    shutil.copytree(part(8), tmp_path / "grown")
    dump_views(part(8).parent, tmp_path / "grown", 16)
    assert differing(tmp_path / "merged", tmp_path / "grown") == set()


def test_students_train_from_it(part: Make, tmp_path: Path) -> None:
    """Batches from a merged cache are those of a single dump: its probes hold and every view's answers are at its number."""
    merge([part(4), part("4:12"), part("12:16")], tmp_path / "merged")
    batches = [Cache(root).batches(Noise(12), batch_size=NUM_SAMPLES, epochs=16) for root in (tmp_path / "merged", part(16))]
    for (images, _, soft), (other_images, _, other_soft) in zip(*batches, strict=True):
        assert images.equal(other_images)
        assert soft.log_probs.equal(other_soft.log_probs)


def test_groups_of_any_size_are_joined(part: Make, tmp_path: Path) -> None:
    """Parts that begin where another's last, smaller group ends: the groups stay, and every record is at its place."""
    merged = merge([part("6:13"), part("13:16"), part(6)], tmp_path / "merged").manifest
    assert merged.grid.view_groups == ((0, 4), (4, 6), (6, 10), (10, 13), (13, 16))
    assert merged.grid.added_views == (6, 13)
    assert records_of(tmp_path / "merged") == records_of(part(16))
    assert [entry.views for entry in merged.history] == [(6, 13), (13, 16)]


def test_parts_need_not_begin_at_view_0(part: Make, tmp_path: Path) -> None:
    """Two later parts make a larger part, which can be merged with the first one."""
    middle = merge([part("4:8"), part("8:16")], tmp_path / "middle").manifest
    assert middle.grid.views == range(4, 16)
    merge([tmp_path / "middle", part(4)], tmp_path / "merged")
    merge([part(4), part("4:8"), part("8:16")], tmp_path / "at-once")
    assert differing(tmp_path / "merged", tmp_path / "at-once") == set()


def test_one_part_is_copied(part: Make, tmp_path: Path) -> None:
    """Merging a single cache copies it, byte for byte."""
    merge([part(8)], tmp_path / "merged")
    assert differing(tmp_path / "merged", part(8)) == set()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"codec": "topk,k=3"}, "recipe.codec"),
        ({"augment": "none"}, "recipe.views.pipeline"),
        ({"seed": 3}, "recipe.views.seed: 0 → 3"),
        ({"layout": "parquet"}, 'layout: "zarr" → "parquet"'),
        ({"block_samples": 10}, "grid.block_samples: 17 → 10"),
    ],
)
def test_parts_of_another_recipe_or_cut_are_refused(options: dict[str, Any], named: str, part: Make, tmp_path: Path) -> None:
    """What differs is a MismatchError that lists the fields, and nothing is written."""
    with pytest.raises(MismatchError, match="are not parts of one cache") as refused:
        merge([part(8), part("8:16", **options)], tmp_path / "merged")
    assert named in str(refused.value)
    assert not (tmp_path / "merged").exists()


def test_other_labels_are_refused(part: Make, tmp_path: Path) -> None:
    """Parts of a dataset whose labels were changed in between are no parts of one cache."""
    other = forged(part("8:16"), tmp_path / "other", lambda document: document["contents"].update(label=sha256(b"others")))
    with pytest.raises(MismatchError, match=r"contents\.label"):
        merge([part(8), other], tmp_path / "merged")


def test_missing_views_are_named(part: Make, tmp_path: Path) -> None:
    """Views that no part has are all named, with the command that makes them."""
    with pytest.raises(MismatchError, match=r"views 4 to 7, 12 are in none of the caches; `kdcache dump --views FIRST:STOP`"):
        merge([part(4), part("8:12"), part("13:16")], tmp_path / "merged")


def test_overlaps_that_are_cut_differently_are_refused(part: Make, tmp_path: Path) -> None:
    """Parts that overlap in half a block name both groups and caches."""
    with pytest.raises(MismatchError, match=r"views 4 to 5 of the one were dumped together, and 4 to 7 of the other") as refused:
        merge([part(6), part("4:8")], tmp_path / "merged")
    assert str(part(6)) in str(refused.value)
    assert str(part("4:8")) in str(refused.value)


def test_overlaps_with_other_records_are_refused(part: Make, tmp_path: Path) -> None:
    """A block of which two parts say different things is named with both digests and both caches."""
    block = read_manifest(part("4:12")).blocks[1].block
    other = forged(part("4:12"), tmp_path / "other", lambda document: document["blocks"][0].update(content=sha256(b"others")))
    kept = read_manifest(part(8)).blocks[1]
    with pytest.raises(MismatchError, match="hold different records of the same views") as refused:
        merge([part(8), other], tmp_path / "merged")
    assert f"block {kept.block.id}: {kept.content} in {part(8)}, {sha256(b'others')} in {other}" in str(refused.value)
    assert block.id not in str(refused.value)


def test_packed_parts_say_unpack(part: Make, tmp_path: Path) -> None:
    """Packed files are coded by what their own cache holds, so they cannot be joined."""
    convert(part("8:16"), tmp_path / "packed", layout="compact")
    with pytest.raises(ConfigError, match=r"is packed.*kdcache unpack"):
        merge([part(8), tmp_path / "packed"], tmp_path / "merged")


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_part_is_named(damage: str, part: Make, tmp_path: Path) -> None:
    """A file of a source that is not what its manifest says stops the merge, is named, and leaves no cache."""
    shutil.copytree(part("8:16"), tmp_path / "other")
    file = tmp_path / "other" / read_manifest(tmp_path / "other").blocks[-1].files[-1].path
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.unlink()
    if damage == "flip":
        file.write_bytes(data)
    with pytest.raises(IntegrityError) as refused:
        merge([part(8), tmp_path / "other"], tmp_path / "merged")
    assert str(file) in str(refused.value)
    with pytest.raises(IncompleteCacheError, match=r"the merge into .* is not finished; run the same `kdcache merge"):
        read_manifest(tmp_path / "merged")


def test_sources_and_destination_must_be_what_is_asked_for(part: Make, tmp_path: Path) -> None:
    """No sources, a source without a cache, a destination with something in it, or with another unfinished merge are refused."""
    with pytest.raises(ConfigError, match="at least one cache"):
        merge([], tmp_path / "merged")
    with pytest.raises(CacheNotFoundError):
        merge([part(8), tmp_path / "nowhere"], tmp_path / "merged")
    with pytest.raises(ExistsError, match="is not empty"):
        merge([part("8:16")], part(8))
    assert kill_at(30, lambda: merge([part(8), part("8:16")], tmp_path / "merged"))
    with pytest.raises(ExistsError, match="unfinished merge of other caches"):
        merge([part(8)], tmp_path / "merged")


def test_killed_at_any_step_it_goes_on(part: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that is killed is no cache until it is one; the same command copies what is missing and ends in the same bytes."""
    sources, paths = [part(views, block_samples=NUM_SAMPLES) for views in (4, "4:8")], []
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, getattr(os, name))
        count_steps(lambda _, path: paths.append(path))
        merge(sources, tmp_path / "undisturbed")
    manifest = paths.index(tmp_path / "undisturbed" / "manifest.json") + 1
    for step, left in ((1, 24), (2, 24), (12, 14), (manifest - 1, 0), (manifest, 0), (manifest + 1, 0)):
        out = tmp_path / str(step)
        assert kill_at(step, lambda out=out: merge(sources, out))  # type: ignore[misc]
        if step > manifest:
            assert not verify(out).problems
        else:
            with pytest.raises(IncompleteCacheError, match="the same `kdcache merge"):
                read_manifest(out)
        assert merge(sources, out).files_copied == left
        assert differing(out, tmp_path / "undisturbed") == set()


@pytest.mark.parametrize(
    ("licences", "joined"),
    [(("MIT", "MIT"), "MIT"), (("MIT", "CC0-1.0"), "CC0-1.0 AND MIT"), ((None, None), None), (("MIT", None), None)],
)
def test_licences_are_joined(licences: tuple[str | None, str | None], joined: str | None, part: Make, tmp_path: Path) -> None:
    """All licences must be kept; where a part states none, the whole has none, and the user is told."""
    notes: list[str] = []

    class Listening(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    parts = [
        forged(part(views), tmp_path / str(number), lambda document, licence=licence: document.update(license=licence))
        for number, (views, licence) in enumerate(zip((4, "4:8"), licences, strict=True))
    ]
    assert merge(parts, tmp_path / "merged", progress=Listening()).manifest.license == joined
    assert bool(notes) == (licences == ("MIT", None))


def test_other_numbers_of_views_in_a_block_are_no_obstacle(part: Make, tmp_path: Path) -> None:
    """Another writer's groups may be smaller: they are kept as they are."""

    def regroup(document: Any) -> None:
        document["grid"]["block_views"] = 2
        document["grid"]["added_views"] = []

    small = part(2)
    other = forged(small, tmp_path / "other", regroup)
    merged = merge([other, part("2:8")], tmp_path / "merged").manifest
    assert merged.grid.block_views == 4
    assert merged.grid.view_groups == ((0, 2), (2, 6), (6, 8))
    np.testing.assert_equal(records_of(tmp_path / "merged"), records_of(part(8)))


def test_history_names_every_part(part: Make, tmp_path: Path) -> None:
    """The joined cache has the provenance of its first views, and that of each other part with its views."""
    other = forged(part("4:8"), tmp_path / "other", lambda document: document["provenance"].update(created_by="eve"))
    merged = merge([other, part(4)], tmp_path / "merged").manifest
    assert merged.provenance == read_manifest(part(4)).provenance
    assert [(entry.created_by, entry.views) for entry in merged.history] == [("eve", (4, 8))]
    again = merge([part("8:16"), tmp_path / "merged"], tmp_path / "again").manifest
    assert [entry.views for entry in again.history] == [(4, 8), (8, 16)]
    assert dataclasses.replace(again.history[0], created_by="", views=None) == dataclasses.replace(merged.provenance, created_by="")


def test_the_command_merges(part: Make, tmp_path: Path) -> None:
    """`kdcache merge A B --out C` makes a cache that verify finds right and tells of it; what does not fit exits 3."""
    told = kdcache_json("merge", part("8:16"), part(8), "--out", "merged", cwd=tmp_path)
    assert (told["num_views"], told["first_view"], told["files_copied"]) == (16, 0, 16 * 3 * RANGES)
    assert not verify(tmp_path / "merged").problems
    assert "views 4 to 7 are in none" in kdcache("merge", part(4), part("8:16"), "--out", "no", cwd=tmp_path, exits=3).stderr
