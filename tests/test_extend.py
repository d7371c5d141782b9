"""Views that are added to a cache: only they are computed, and the cache can be read at any moment."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from commands import KDCACHE, environment, kdcache, kdcache_json
from hypothesis import given
from hypothesis import strategies as st
from stored import BLOCK_SAMPLES, NUM_SAMPLES, Noise, dump_noise, signed, tree

from kdcache.learning.cache import Cache
from kdcache.learning.checkpoints import save_model
from kdcache.learning.models import build_model
from kdcache.records.errors import CacheExistsError, ConfigError, FormatError, MismatchError
from kdcache.records.manifest import BlockGrid, Manifest
from kdcache.records.progress import Silent
from kdcache.records.specs import Spec
from kdcache.store.reader import CacheReader, read_manifest
from kdcache.workflows.convert import convert
from kdcache.workflows.cutting import views_of
from kdcache.workflows.dump import DumpResult
from kdcache.workflows.verify import info, verify

RANGES = -(-NUM_SAMPLES // BLOCK_SAMPLES)


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests of two dumps differ in what was dumped only."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose teacher is always the same."""
    return tmp_path_factory.mktemp("extend")


@pytest.fixture(scope="module")
def kept(folder: Path) -> Callable[[int | str], Path]:
    """Makes a cache of these views when it is asked for first; tests must not change it."""
    made: dict[int | str, Path] = {}

    def make(views: int | str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
            return made.setdefault(views, made.get(views) or dump_views(folder, f"kept-{views}".replace(":", "-"), views).path)

    return make


def dump_views(folder: Path, out: str | Path, views: int | str, *, codec: str = "topk,k=4", **options: Any) -> DumpResult:
    """Dumps these views into `folder / out`."""
    return dump_noise(folder, str(out), codec=codec, num_classes=12, views=views, **options)


def records_of(root: Path) -> dict[tuple[int, int], dict[str, bytes]]:
    """Every field of every record by (view, range)."""
    reader = CacheReader(root)
    names = [field.name for field in reader.manifest.fields if field.per_view]
    return {
        (view, index): {name: array.tobytes() for name, array in reader.records(names, sample_block=index, view=view).items()}
        for view in reader.manifest.grid.views
        for index in range(reader.manifest.grid.num_sample_blocks)
    }


def written(root: Path, manifest: Manifest) -> dict[str, tuple[int, int]]:
    """When, and as which file, each file of records was written."""
    stats = {file.path: (root / file.path).stat() for block in manifest.blocks for file in block.files}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


def but_for_history(manifest: Manifest) -> Manifest:
    """A manifest without what depends on who dumped which views when."""
    tables = {field.name for field in manifest.fields if not field.axes}
    return dataclasses.replace(
        manifest,
        provenance=dataclasses.replace(manifest.provenance, teacher_file=""),
        history=(),
        contents={name: content for name, content in manifest.contents.items() if name not in tables},
        metadata_files=tuple(file for file in manifest.metadata_files if "profile/log_prob" not in file.path),
    )


@pytest.mark.parametrize(("layout", "steps"), [("zarr", (8, 16)), ("zarr", (4, 8, 16)), ("parquet", (8, 16))])
def test_a_grown_cache_is_the_one_of_a_single_dump(layout: str, steps: tuple[int, ...], tmp_path: Path) -> None:
    """8 views and then 16, in one step or two: the new blocks alone are computed, and all files are those of a dump of 16 at once."""
    once = dump_views(tmp_path, "once", 16, layout=layout).manifest
    computed = [dump_views(tmp_path, "grown", views, layout=layout).blocks_computed for views in steps]
    assert computed == [RANGES * (views - before) // 4 for before, views in zip((0, *steps), steps, strict=False)]
    grown = read_manifest(tmp_path / "grown")
    assert but_for_history(grown) == but_for_history(once)
    differing = {path for path, data in tree(tmp_path / "grown").items() if data != tree(tmp_path / "once").get(path)}
    assert {path for path in differing if "profile/log_prob" not in path} == {"manifest.json"}
    assert [entry.views for entry in grown.history] == list(itertools.pairwise(steps))
    assert not verify(tmp_path / "grown").problems


def test_without_a_profile_the_content_is_the_same(tmp_path: Path) -> None:
    """A cache that keeps no profile grows to the very content, labels and tables included, of a single dump."""
    once = dump_views(tmp_path, "once", 8, codec="dense").manifest
    dump_views(tmp_path, "grown", 4, codec="dense")
    assert dump_views(tmp_path, "grown", 8, codec="dense").manifest.content == once.content


def test_calibration_is_kept(tmp_path: Path) -> None:
    """What a codec measured when a cache was begun holds for the views that are added."""
    dump_views(tmp_path, "once", 8, codec="adaptive,mean_k=4,max_k=9")
    begun = dump_views(tmp_path, "grown", 4, codec="adaptive,mean_k=4,max_k=9").manifest
    grown = dump_views(tmp_path, "grown", 8, codec="adaptive,mean_k=4,max_k=9").manifest
    assert begun.calibration == grown.calibration != {}
    assert records_of(tmp_path / "grown") == records_of(tmp_path / "once")


def test_a_student_sees_the_same(kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """Training batches of a grown cache, pixels and soft targets, are those of a single dump."""
    shutil.copytree(kept(8), tmp_path / "grown")
    dump_views(kept(8).parent, tmp_path / "grown", 16)
    batches = [list(Cache(root).batches(Noise(12), batch_size=25, epochs=16)) for root in (tmp_path / "grown", kept(16))]
    for (images, labels, soft), (other_images, other_labels, other_soft) in zip(*batches, strict=True):
        assert images.equal(other_images)
        assert labels.equal(other_labels)
        assert soft.log_probs.equal(other_soft.log_probs)
        assert soft.index is not None
        assert other_soft.index is not None
        assert soft.index.equal(other_soft.index)


@pytest.mark.parametrize("layout", ["zarr", "parquet"])
def test_groups_that_were_not_full_stay(layout: str, tmp_path: Path) -> None:
    """From 6 views to 16: no file of the six is written again, the groups begin anew at the seventh, and the records are right."""
    begun = dump_views(tmp_path, "grown", 6, layout=layout).manifest
    before = written(tmp_path / "grown", begun)
    grown = dump_views(tmp_path, "grown", 16, layout=layout)
    assert grown.manifest.grid.added_views == (6,)
    assert grown.manifest.grid.view_groups == ((0, 4), (4, 6), (6, 10), (10, 14), (14, 16))
    assert grown.blocks_computed == 3 * RANGES
    after = written(tmp_path / "grown", grown.manifest)
    assert {path: after[path] for path in before} == before
    dump_views(tmp_path, "once", 16, layout=layout)
    assert records_of(tmp_path / "grown") == records_of(tmp_path / "once")
    assert not verify(tmp_path / "grown").problems
    convert(tmp_path / "grown", tmp_path / "packed", layout="compact")
    assert records_of(tmp_path / "packed") == records_of(tmp_path / "once")


def test_a_reader_of_the_old_cache_goes_on(kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """A reader that was opened before the cache grew still finds every file right, and reads views that it had not opened yet."""
    shutil.copytree(kept(8), tmp_path / "grown")
    reader = CacheReader(tmp_path / "grown")
    rows, views = np.arange(NUM_SAMPLES), np.full(NUM_SAMPLES, 7)
    dump_views(kept(8).parent, tmp_path / "grown", 16)
    expected = CacheReader(kept(16)).gather(["logits/index", "logits/tail"], rows, views)
    for name, array in reader.gather(["logits/index", "logits/tail"], rows, views).items():
        np.testing.assert_array_equal(array, expected[name])
    reader.verify_all()
    with pytest.raises(MismatchError, match="expected views from 0 to 7"):
        reader.gather(["logits/index"], rows, views + 1)
    assert CacheReader(tmp_path / "grown").manifest.grid.num_views == 16


def count_steps(before_step: Callable[[int, Path], None]) -> None:
    """Calls a function before each rename or removal of a file or folder in this process, with its number, from 1, and its path."""
    steps = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            before_step(next(steps), Path(arguments[-1]))
            return function(*arguments, **options)

        return run

    os.replace, os.unlink, os.rmdir = counted(os.replace), counted(os.unlink), counted(os.rmdir)  # type: ignore[assignment]


def kill_at(step: int, work: Callable[[], object]) -> bool:
    """Runs work in a forked process that kills itself (SIGKILL) before the step-th rename or removal; whether it came so far."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    try:
        count_steps(lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == step else None)
        work()
    finally:
        os._exit(0)


def test_killed_at_any_step_it_can_be_read_and_finished(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A growing cache that is killed at any step is whole for readers, and the same command ends as an undisturbed one."""

    def grow(root: Path, views: int = 6) -> None:
        dump_views(folder, root, views, block_samples=NUM_SAMPLES)

    begun, undisturbed, paths = tmp_path / "begun", tmp_path / "undisturbed", []
    grow(begun, views=2)
    shutil.copytree(begun, undisturbed)
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, getattr(os, name))
        count_steps(lambda _, path: paths.append(path))
        grow(undisturbed)
    expected, known = tree(undisturbed), records_of(undisturbed)
    metadata = [f"logits/{name}/zarr.json" for name in ("gap", "index", "tail")]
    first, manifest = (paths.index(undisturbed / name) + 1 for name in (metadata[0], "manifest.json"))
    assert manifest == first + 3  # three arrays have got longer, and nothing else has
    seen = []
    for step in (2, first - 9, first, first + 1, first + 2, manifest, manifest + 1, len(paths)):
        root = tmp_path / str(step)
        shutil.copytree(begun, root)
        assert kill_at(step, lambda root=root: grow(root))  # type: ignore[misc]
        reader = CacheReader(root)
        reader.verify_all()
        assert records_of(root).items() <= known.items()
        seen.append((reader.manifest.grid.num_views, sum(tree(root)[path] == expected[path] for path in metadata)))
        grow(root)
        assert tree(root) == expected
    assert seen == [(2, 0), (2, 0), (2, 0), (2, 1), (2, 2), (2, 3), (6, 3), (6, 3)]


def test_it_goes_on_where_it_was_killed(kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """Blocks of new views that are marked are not computed again; meanwhile `info` tells of the cache and of what is being added."""
    shutil.copytree(kept(8), tmp_path / "grown")
    assert kill_at(2 * 13 + 5, lambda: dump_views(kept(8).parent, tmp_path / "grown", 16))
    told = info(tmp_path / "grown")
    assert (told.num_views, told.blocks_done, told.blocks_total) == (8, 2 * RANGES, 2 * RANGES)
    assert told.growth is not None
    assert (told.growth.num_views, told.growth.blocks_done, told.growth.blocks_total) == (16, 2, 2 * RANGES)
    assert "growing" in kdcache("info", tmp_path / "grown", cwd=tmp_path).stdout
    with pytest.raises(CacheExistsError, match=r"or remove \S+/grown/\.dump\. Differing(.|\n)*grid.num_views: 16 → 12"):
        dump_views(kept(8).parent, tmp_path / "grown", 12)
    assert dump_views(kept(8).parent, tmp_path / "grown", 8).blocks_computed == 0
    assert dump_views(kept(8).parent, tmp_path / "grown", 16).blocks_computed == 2 * RANGES - 2
    assert info(tmp_path / "grown").growth is None


@pytest.mark.parametrize("views", [16, 9, 3, "4:12"])
def test_fewer_views_are_there_already(views: int | str, kept: Callable[[int | str], Path]) -> None:
    """Asked for views that are all there, a dump says how many the cache holds, computes nothing and changes no byte."""
    before, notes = tree(kept(16)), []

    class Listening(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    assert dump_views(kept(16).parent, kept(16), views, progress=Listening()).blocks_computed == 0
    assert notes == [f"{kept(16)} is complete already; it holds 16 views"]
    assert tree(kept(16)) == before


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"batch_size": 5}, "batch_size: 8 → 5"),
        ({"block_samples": 10}, "grid.block_samples: 17 → 10"),
        ({"codec": "topk,k=3"}, "recipe.codec"),
        ({"seed": 1}, "recipe.views.seed: 0 → 1"),
        ({"layout": "parquet"}, 'layout: "zarr" → "parquet"'),
        ({"license": "MIT"}, "under the licence 'CC0-1.0', asked for was 'MIT'"),
        ({"views": "9:16"}, "holds views 0 to 7, asked for were 9 to 15"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], differing: str, tmp_path: Path, folder: Path) -> None:
    """Views are added with the batch size, blocks and recipe of the cache or not at all; what differs is named, nothing is changed."""
    dump_views(folder, tmp_path / "cache", 8, license="CC0-1.0")
    before = tree(tmp_path / "cache")
    with pytest.raises(CacheExistsError) as refused:
        dump_views(folder, tmp_path / "cache", **({"views": 16} | options))
    assert differing in str(refused.value)
    assert tree(tmp_path / "cache") == before


def test_blocks_are_cut_as_they_were(kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """Whoever adds views need not know how many samples the cache has in a chunk file."""
    shutil.copytree(kept(8), tmp_path / "grown")
    grown = dump_views(kept(8).parent, tmp_path / "grown", 12, block_samples=None).manifest
    assert grown.grid.block_samples == read_manifest(kept(8)).grid.block_samples != NUM_SAMPLES


def test_changed_labels_are_refused(kept: Callable[[int | str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are not added for a dataset whose labels have changed since: half of the statistics would be of other labels."""
    shutil.copytree(kept(8), tmp_path / "grown")
    item = Noise.__getitem__
    monkeypatch.setattr(Noise, "__getitem__", lambda self, index: (item(self, index)[0], 0))
    with pytest.raises(MismatchError, match="labels have changed"):
        dump_views(kept(8).parent, tmp_path / "grown", 16)


def test_a_packed_cache_says_unpack(kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """The compact layout is learned from all records, so views are added after `kdcache unpack`, which the error names."""
    convert(kept(8), tmp_path / "packed", layout="compact")
    with pytest.raises(CacheExistsError, match=r"cannot get more views; `kdcache unpack .*packed DIR`"):
        dump_views(kept(8).parent, tmp_path / "packed", 16)
    convert(tmp_path / "packed", tmp_path / "unpacked", layout="zarr")
    assert dump_views(kept(8).parent, tmp_path / "unpacked", 16).blocks_computed == 2 * RANGES


@pytest.mark.parametrize("layout", ["zarr", "parquet", "compact"])
def test_a_part_has_its_own_view_numbers(layout: str, kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """A dump of views 8 to 15 is a cache of these in every layout: the same records under the same numbers, and no others."""
    part = kept("8:16")
    if layout != "zarr":
        convert(part, tmp_path / "part", layout=layout)
        part = tmp_path / "part"
    cache, known = Cache(part), records_of(kept(16))
    assert (cache.manifest.grid.views, cache.num_views) == (range(8, 16), 8)
    assert records_of(part) == {place: records for place, records in known.items() if place[0] >= 8}
    rows = np.arange(NUM_SAMPLES)
    whole = Cache(kept(16)).soft_targets(rows, np.full(NUM_SAMPLES, 13))
    assert cache.soft_targets(rows, np.full(NUM_SAMPLES, 13)).log_probs.equal(whole.log_probs)
    for view in (7, 16):
        with pytest.raises(MismatchError, match="expected views from 8 to 15"):
            cache.soft_targets(rows, np.full(NUM_SAMPLES, view))
    assert not verify(part).problems
    assert info(part).first_view == 8


def test_a_part_can_be_trained_from(kept: Callable[[int | str], Path]) -> None:
    """Students see the part's own views: epoch 0 shows view 8, with the pixels and the answers that a whole cache has for it."""
    batches = Cache(kept("8:16")).batches(Noise(12), batch_size=NUM_SAMPLES, epochs=1)
    whole = Cache(kept(16)).batches(Noise(12), batch_size=NUM_SAMPLES, epochs=9)
    ((images, _, soft),), *_, (expected, _, expected_soft) = list(batches), *whole
    order = [int(np.flatnonzero((expected == image).flatten(1).all(1).numpy())[0]) for image in images]
    assert sorted(order) == list(range(NUM_SAMPLES))
    assert soft.log_probs.equal(expected_soft.log_probs[order])


def test_plain_zarr_has_a_part_at_its_place(kept: Callable[[int | str], Path]) -> None:
    """Zarr's view axis counts from view 0, so a part is where it is in the whole, and what it does not have reads as fill."""
    part, whole = (zarr.open_group(kept(views), mode="r")["logits/tail"] for views in ("8:16", 16))
    assert part.shape == whole.shape
    np.testing.assert_array_equal(part[8:], whole[8:])
    assert (np.asarray(part[:8]) == part.fill_value).all()


def test_a_part_can_grow(kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """A part gets the views that follow, but not those before: the error names `merge`."""
    shutil.copytree(kept("8:16"), tmp_path / "part")
    assert dump_views(kept(8).parent, tmp_path / "part", "8:20").manifest.grid.views == range(8, 20)
    with pytest.raises(CacheExistsError, match=r"holds views 8 to 19, asked for were 0 to 15(.|\n)*kdcache merge"):
        dump_views(kept(8).parent, tmp_path / "part", 16)


@pytest.mark.parametrize("views", ["", "0", "4:4", "8:4", "-1:4", "1:2:3", "x", f"{2**20}:{2**20 + 1}", "9" * 40])
def test_views_that_make_no_sense_are_refused(views: str) -> None:
    """Anything but a positive number or an ascending FIRST:STOP is a ConfigError that shows both forms."""
    with pytest.raises(ConfigError, match="expected a number of views, or FIRST:STOP such as 8:16"):
        views_of(views)


@given(
    first=st.integers(0, 9),
    steps=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    block_views=st.integers(1, 6),
    samples=st.integers(1, 9),
)
def test_grown_grids_keep_their_blocks(first: int, steps: list[int], block_views: int, samples: int) -> None:
    """However a grid grows: its views are covered once, in order, by groups that are not too large, and no old group is cut anew."""
    grid = BlockGrid(num_samples=samples, num_views=steps[0], block_samples=4, block_views=block_views, first_view=first)
    for step in steps[1:]:
        grown = grid.grown(grid.views.stop + step)
        assert grown.view_groups[: len(grid.view_groups)] == grid.view_groups
        assert set(grid.blocks()) <= set(grown.blocks())
        grid = grown
    assert [view for group in grid.view_groups for view in range(*group)] == list(grid.views)
    assert all(view in range(*grid.group_of(view)) and grid.group_of(view) in grid.view_groups for view in grid.views)
    assert grid.num_blocks == len(grid.blocks())
    assert grid == grid.with_groups(grid.view_groups)
    once = BlockGrid(num_samples=samples, num_views=sum(steps), block_samples=4, block_views=block_views, first_view=first)
    assert (grid == once) == all(sum(steps[:i]) % block_views == 0 for i in range(1, len(steps)))


@pytest.mark.parametrize(
    "grid",
    [
        {"added_views": [4]},
        {"added_views": [0]},
        {"added_views": [-3]},
        {"added_views": [6]},
        {"added_views": [10**15]},
        {"added_views": [3, 2]},
        {"added_views": [3, 3]},
        {"added_views": list(range(1, 10**5))},
        {"added_views": ["2"]},
        {"first_view": -1},
        {"first_view": 1},
        {"first_view": 2**20},
        {"first_view": 10**30},
    ],
    ids=str,
)
def test_hostile_grids_are_refused(grid: dict[str, Any], kept: Callable[[int | str], Path], tmp_path: Path) -> None:
    """A manifest whose added views are not ascending, not inside or not needed, or whose first view is not there, is refused at once."""
    shutil.copytree(kept(6), tmp_path / "copy")
    document = json.loads((tmp_path / "copy" / "manifest.json").read_bytes())
    document["grid"] |= grid
    (tmp_path / "copy" / "manifest.json").write_bytes(signed(document))
    with pytest.raises(FormatError):
        read_manifest(tmp_path / "copy")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small teacher of random weights and its cache of two views; tests must not change it."""
    root = tmp_path_factory.mktemp("fashion")
    spec = Spec.parse("tiny,channels=1,image_size=28,num_classes=10")
    save_model(root / "teacher.safetensors", build_model(spec, trusted=True), spec=spec, metadata={})
    kdcache(*COMMAND, "--views", "2", "--block-samples", "500", cwd=root)
    return root


COMMAND = ("dump", "--teacher", "teacher.safetensors", "--data", "fashion-mini,split=test", "--out", "cache", "--codec", "topk,k=3")


def test_the_command_is_killed_and_goes_on(fashion: Path, tmp_path: Path) -> None:
    """`dump --views 6` on two views, killed by SIGKILL: `info` shows both, and the same command adds the rest."""
    shutil.copytree(fashion, tmp_path, dirs_exist_ok=True)
    grow = (*COMMAND, "--views", "6")
    process = subprocess.Popen([KDCACHE, *grow], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.readline() == "cache holds views 0 to 1; adding 2 to 5\n"
        while " is on the disk" not in process.stderr.readline():
            assert process.poll() is None
        process.kill()
    process.wait()
    told = kdcache_json("info", "cache", cwd=tmp_path)
    assert (told["num_views"], told["growth"]["num_views"], told["growth"]["blocks_total"]) == (2, 6, 4)
    assert 0 < told["growth"]["blocks_done"] < 4
    done = kdcache_json(*grow, cwd=tmp_path)
    assert (done["num_views"], done["blocks"], done["blocks_computed"]) == (6, 8, 4 - told["growth"]["blocks_done"])
    assert "added            views 2 to 5 by" in kdcache("info", "cache", cwd=tmp_path).stdout
