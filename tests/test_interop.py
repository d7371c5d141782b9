"""Stores as other programs read them: DuckDB, pandas and Polars the Parquet one, Zarr and xarray the mapped one; and conversions."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr
from commands import environment, kdcache, kdcache_json
from numpy.typing import NDArray
from stored import NUM_SAMPLES, NUM_VIEWS, dump_noise, tree

from kdcache.learning.cache import Cache
from kdcache.records.errors import CacheBusyError, ConfigError, ExistsError, IncompleteCacheError, IntegrityError
from kdcache.records.manifest import MANIFEST_NAME
from kdcache.store.files import exclusive_lock
from kdcache.store.reader import CacheReader
from kdcache.workflows.convert import convert

CODECS = {"topk": "topk,k=5", "adaptive": "adaptive,max_k=8", "sampled": "sampled,draws=30", "dense": "dense"}
NUM_CLASSES = 20
"""Five bits a class, so that a packed class may lie in two bytes."""
NO_ARRAY = "ignore:Object at manifest.json is not recognized"
"""What Zarr says of a file that is not its own when it is asked for all arrays of a group."""

Array = NDArray[Any]


@pytest.fixture(scope="module", autouse=True)
def fixed_date() -> Iterator[None]:
    """Two dumps of the same day, as far as they know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for each codec in the mapped layout, and one dumped as Parquet; tests must not change them."""
    folder = tmp_path_factory.mktemp("caches")
    for name, codec in CODECS.items():
        dump_noise(folder, name, codec=codec, num_classes=NUM_CLASSES)
    dump_noise(folder, "parquet", codec=CODECS["topk"], num_classes=NUM_CLASSES, layout="parquet")
    dump_noise(folder, "ragged-parquet", codec=CODECS["adaptive"], num_classes=NUM_CLASSES, layout="parquet")
    return folder


def all_records(root: Path, *names: str) -> dict[str, Array]:
    """Fields of every record as kdcache gives them, view by view."""
    views, rows = (axis.ravel() for axis in np.meshgrid(np.arange(NUM_VIEWS), np.arange(NUM_SAMPLES), indexing="ij"))
    return CacheReader(root).gather(names, rows, views)


def unpack(stored: Array, attributes: dict[str, Any]) -> Array:
    """Packed entries by NumPy alone, from what their array's attributes say: `bits` each, the least significant first."""
    bits = np.unpackbits(stored, axis=-1, bitorder="little")[..., : attributes["packed_length"] * attributes["bits"]]
    entries = bits.reshape(*stored.shape[:-1], attributes["packed_length"], attributes["bits"]).astype(np.int64)
    return np.asarray(entries @ (1 << np.arange(attributes["bits"])))


def test_duckdb_measures_the_teacher(folder: Path) -> None:
    """One SQL query over records and samples gives the teacher's accuracy of the manifest: top classes that are the label."""
    query = """
        SELECT avg(CAST("logits/index"[1] = label AS DOUBLE)), count(*)
        FROM read_parquet($records) JOIN read_parquet($samples) USING (sample)
    """
    root = folder / "parquet"
    found = duckdb.execute(query, {"records": f"{root}/records/*.parquet", "samples": f"{root}/samples/*.parquet"}).fetchone()
    accuracy = CacheReader(root).manifest.statistics.teacher_accuracy
    assert found == (accuracy, NUM_SAMPLES * NUM_VIEWS)
    assert accuracy


def test_duckdb_decodes_probabilities(folder: Path) -> None:
    """SQL gives kdcache's log-probabilities of the last kept class from the stored falls, with the range that the file's metadata has."""
    root = folder / "parquet"
    path = f"{root}/records/*.parquet"
    ((value,),) = duckdb.execute(
        "SELECT DISTINCT value FROM parquet_kv_metadata($path) WHERE key = 'kdcache' LIMIT 1", {"path": path}
    ).fetchall()
    gap_range = json.loads(value)["fields"]["logits/gap"]["attributes"]["gap_range"]
    query = """
        SELECT -$gap_range * list_sum(list_transform("logits/gap", lambda code: (code / 254.0) ** 2))
        FROM read_parquet($path) ORDER BY view, sample
    """
    found = np.array(duckdb.execute(query, {"path": path, "gap_range": gap_range}).fetchall())[:, 0]
    views, rows = (axis.ravel() for axis in np.meshgrid(np.arange(NUM_VIEWS), np.arange(NUM_SAMPLES), indexing="ij"))
    log_probs = Cache(root).soft_targets(rows, views).log_probs
    np.testing.assert_allclose(found, (log_probs[:, -1] - log_probs[:, 0]).numpy(), rtol=1e-5)


def test_duckdb_reads_one_view(folder: Path) -> None:
    """A query for one view and some columns gives their records, ragged ones as lists of their own length."""
    path = str(folder / "ragged-parquet" / "records" / "*.parquet")
    query = 'SELECT "logits/count", "logits/index", len("logits/gap") FROM read_parquet($path) WHERE view = 3 ORDER BY sample'
    found = duckdb.execute(query, {"path": path}).fetchall()
    expected = all_records(folder / "adaptive", "logits/index", "logits/gap")
    counts = expected["logits/count"][3 * NUM_SAMPLES : 4 * NUM_SAMPLES]
    classes = expected["logits/index"][3 * NUM_SAMPLES : 4 * NUM_SAMPLES]
    assert found == [(n, entries[:n].tolist(), n - 1) for n, entries in zip(counts.tolist(), classes, strict=True)]
    assert counts.min() < counts.max()


def test_pandas_reads_what_kdcache_reads(folder: Path) -> None:
    """Pandas reads the folders of records and samples as data frames with kdcache's classes, falls, labels and keys."""
    root, reader = folder / "parquet", CacheReader(folder / "parquet")
    records = pd.read_parquet(root / "records").sort_values(["view", "sample"])
    expected = all_records(root, "logits/index", "logits/gap", "logits/tail")
    for name, array in expected.items():
        np.testing.assert_array_equal(np.stack(records[name].to_list()), array)
    assert records["sample"].to_list() == list(range(NUM_SAMPLES)) * NUM_VIEWS
    samples = pd.read_parquet(root / "samples")
    np.testing.assert_array_equal(samples["label"], reader.shared("label"))
    assert samples["key"].to_list() == [key.tobytes() for key in reader.shared("key")]
    assert records.merge(samples, on="sample")["label"].to_list() == [*reader.shared("label").tolist() * NUM_VIEWS]


def test_polars_reads_what_kdcache_reads(folder: Path) -> None:
    """Polars reads classes and falls as arrays of fixed length, joins them with labels, and reads the profile's table."""
    root, reader = folder / "parquet", CacheReader(folder / "parquet")
    records = pl.scan_parquet(root / "records" / "*.parquet").sort("view", "sample")
    samples = pl.scan_parquet(root / "samples" / "*.parquet")
    for name, array in all_records(root, "logits/index", "logits/gap").items():
        found = records.select(name).collect()[name].to_numpy()
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
    hits = records.join(samples, on="sample").select((pl.col("logits/index").arr.first() == pl.col("label")).mean())
    assert hits.collect().item() == pytest.approx(reader.manifest.statistics.teacher_accuracy)
    table = pl.read_parquet(root / "tables" / "profile" / "log_prob.parquet")
    np.testing.assert_array_equal(np.stack(table["profile/log_prob"].to_numpy()), reader.shared("profile/log_prob"))


def test_parquet_has_a_row_group_for_each_view(folder: Path) -> None:
    """A block's file has one row group for each of its views, so that a reader can take one view of some columns."""
    manifest = CacheReader(folder / "parquet").manifest
    for record in manifest.blocks:
        (file,) = record.files
        metadata = pq.read_metadata(folder / "parquet" / file.path)
        rows = record.block.samples[1] - record.block.samples[0]
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        assert [group.num_rows for group in groups] == [rows] * (record.block.views[1] - record.block.views[0])
        assert [group.column(0).statistics.min for group in groups] == list(range(*record.block.views))


def test_plain_zarr_reads_packed_classes(folder: Path) -> None:
    """Zarr alone opens the mapped layout; the classes come out of their bits by the array's attributes and NumPy."""
    group = zarr.open_group(folder / "topk", mode="r")
    expected = all_records(folder / "topk", "logits/index", "logits/gap", "logits/tail")
    stored = {name: group[name] for name in expected}
    index = stored.pop("logits/index")
    assert isinstance(index, zarr.Array)
    np.testing.assert_array_equal(unpack(np.asarray(index[...]), index.attrs.asdict()).reshape(-1, 5), expected["logits/index"])
    for name, array in stored.items():
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(np.asarray(array[...]).reshape(-1, array.shape[-1]), expected[name])


def test_plain_zarr_reads_ragged_fields(folder: Path) -> None:
    """A ragged field is one array of entries for each view and range: the counts say whose they are."""
    root = folder / "adaptive"
    group, grid = zarr.open_group(root, mode="r"), CacheReader(root).manifest.grid
    index, gap, count = (group[f"logits/{name}"] for name in ("index", "gap", "count"))
    assert isinstance(index, zarr.Array)
    assert isinstance(gap, zarr.Array)
    assert isinstance(count, zarr.Array)
    bits = index.attrs.asdict()["bits"]
    for view in range(NUM_VIEWS):
        for block in range(grid.num_sample_blocks):
            rows = slice(block * grid.block_samples, (block + 1) * grid.block_samples)
            counts = np.asarray(count[view, rows]).astype(int)
            records = CacheReader(root).records(["logits/index", "logits/gap"], sample_block=block, view=view)
            entries = unpack(np.asarray(index[view, block]), {"bits": bits, "packed_length": counts.sum()})
            np.testing.assert_array_equal(entries, records["logits/index"])
            np.testing.assert_array_equal(np.asarray(gap[view, block])[: (counts - 1).sum()], records["logits/gap"])


def test_xarray_opens_a_group(folder: Path) -> None:
    """Xarray opens the group of logits as a dataset with named axes, which unpacks and selects as kdcache does."""
    dataset = xr.open_zarr(folder / "topk", group="logits", consolidated=False)
    assert dataset["gap"].dims == ("view", "sample", "fall")
    classes = unpack(dataset["index"].to_numpy(), dataset["index"].attrs)
    expected = all_records(folder / "topk", "logits/index", "logits/gap")
    np.testing.assert_array_equal(classes.reshape(-1, 5), expected["logits/index"])
    of_view = dataset["gap"].sel(view=2).to_numpy()
    np.testing.assert_array_equal(of_view, expected["logits/gap"][2 * NUM_SAMPLES : 3 * NUM_SAMPLES])


@pytest.mark.filterwarnings(NO_ARRAY)
@pytest.mark.parametrize("codec", CODECS)
def test_xarray_opens_the_whole_store(folder: Path, codec: str) -> None:
    """Xarray opens the store of any codec as a tree of all fields, each with the axes that the manifest names."""
    whole = xr.open_datatree(folder / codec, engine="zarr", consolidated=False)
    reader = CacheReader(folder / codec)
    for item in reader.manifest.fields:
        assert whole[item.name].dims[: len(item.axes)] == item.axes or item.lengths
    np.testing.assert_array_equal(whole["label"].to_numpy(), reader.shared("label"))


@pytest.mark.parametrize("codec", CODECS)
def test_there_and_back_is_the_same(folder: Path, tmp_path: Path, codec: str) -> None:
    """Zarr to Parquet and back gives the same files byte for byte, manifest and all; the Parquet cache holds the same records."""
    source = folder / codec
    first = kdcache_json("convert", source, "parquet", "--format", "parquet", cwd=tmp_path)
    back = kdcache_json("unpack", "parquet", "zarr", cwd=tmp_path)
    assert tree(tmp_path / "zarr") == tree(source)
    manifests = [CacheReader(root).manifest for root in (source, tmp_path / "parquet")]
    assert len({manifest.content for manifest in manifests} | {first["content"], back["content"]}) == 1
    for name in ("recipe_key", "fields", "statistics", "probes", "provenance", "calibration", "contents", "license"):
        assert getattr(manifests[0], name) == getattr(manifests[1], name)
    assert first["size_bytes"] == manifests[1].size_bytes == back["source_size_bytes"]
    kdcache("verify", "parquet", cwd=tmp_path)


@pytest.mark.parametrize(("mapped", "dumped"), [("topk", "parquet"), ("adaptive", "ragged-parquet")])
def test_converted_is_what_would_have_been_dumped(folder: Path, tmp_path: Path, mapped: str, dumped: str) -> None:
    """A mapped cache that is converted to Parquet has the files of the same dump into Parquet, byte for byte."""
    kdcache("convert", folder / mapped, "converted", "--format", "parquet", cwd=tmp_path)
    assert tree(tmp_path / "converted") == tree(folder / dumped)


def test_soft_targets_do_not_depend_on_the_layout(folder: Path) -> None:
    """Training sees the same soft targets from either layout."""
    rows, views = np.array([49, 3, 3, 20]), np.array([0, 4, 1, 2])
    mapped, parquet = (Cache(folder / name).soft_targets(rows, views) for name in ("topk", "parquet"))
    assert (mapped.log_probs == parquet.log_probs).all()
    assert mapped.index is not None
    assert (mapped.index == parquet.index).all()


def test_unknown_keys_of_the_manifest_are_kept(folder: Path, tmp_path: Path) -> None:
    """What a later minor version added at the top of a manifest is there after a conversion."""
    source = Path(shutil.copytree(folder / "topk", tmp_path / "source"))
    manifest = replace(CacheReader(source).manifest, extra={"rating": [5, None]})
    (source / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    assert convert(source, tmp_path / "parquet", layout="parquet").manifest.extra == {"rating": [5, None]}
    assert CacheReader(tmp_path / "parquet").manifest.extra == {"rating": [5, None]}


def test_conversion_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    """The command names the new cache, its layout and both sizes."""
    shown = kdcache("convert", folder / "topk", "out", "--format", "parquet", cwd=tmp_path).stdout
    for words in ("out", "parquet", "before: 8.8 kB", CacheReader(folder / "topk").manifest.content):
        assert words in shown


def test_a_destination_that_holds_something_is_refused(folder: Path, tmp_path: Path) -> None:
    """A destination with anything in it, a cache or the source itself among others, exits 3 and is left as it is."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("…")
    cache = Path(shutil.copytree(folder / "topk", tmp_path / "cache"))
    for destination in (tmp_path / "thesis", cache):
        before = tree(destination)
        refused = kdcache("convert", cache, destination, "--format", "parquet", cwd=tmp_path, exits=3)
        assert "is not empty" in refused.stderr
        assert tree(destination) == before
    (tmp_path / "empty").mkdir()
    kdcache("convert", cache, "empty", "--format", "parquet", cwd=tmp_path)


def test_a_damaged_source_is_refused(folder: Path, tmp_path: Path) -> None:
    """A flipped bit in any kind of file of the source exits 3 and names the file; what was written is no cache."""
    for number, path in enumerate(("logits/index/c/4/2/0", "logits/tail/c/0/0/0", "label/c/1", "profile/log_prob/c/0/0")):
        source = Path(shutil.copytree(folder / "topk", tmp_path / f"source{number}"))
        data = (source / path).read_bytes()
        (source / path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused = kdcache("convert", source, f"out{number}", "--format", "parquet", cwd=tmp_path, exits=3)
        assert path in refused.stderr
        assert "the conversion into" in kdcache("info", f"out{number}", cwd=tmp_path, exits=3).stderr


def test_records_that_the_manifest_does_not_mean_are_refused(folder: Path, tmp_path: Path) -> None:
    """Whole files whose records have another content digest than the manifest says are an IntegrityError that names the block."""
    source = Path(shutil.copytree(folder / "topk", tmp_path / "source"))
    manifest = CacheReader(source).manifest
    other = tuple(replace(block, content=manifest.blocks[0].content) for block in manifest.blocks)
    (source / MANIFEST_NAME).write_bytes(replace(manifest, blocks=other).to_bytes())
    with pytest.raises(IntegrityError, match=manifest.blocks[1].block.id):
        convert(source, tmp_path / "blocks", layout="parquet")
    other_labels = manifest.contents | {"label": manifest.contents["key"]}
    (source / MANIFEST_NAME).write_bytes(replace(manifest, contents=other_labels).to_bytes())
    with pytest.raises(IntegrityError, match="label"):
        convert(source, tmp_path / "labels", layout="parquet")
    for name in ("blocks", "labels"):
        with pytest.raises(IncompleteCacheError):
            CacheReader(tmp_path / name)


@pytest.mark.parametrize("layout", ["compact", "hdf5"])
def test_a_dump_refuses_layouts_that_it_cannot_write(layout: str, tmp_path: Path) -> None:
    """The compact layout needs all records to begin with, so a dump into it, or into none, is a ConfigError and leaves nothing."""
    with pytest.raises(ConfigError, match="expected a layout of zarr, parquet"):
        dump_noise(tmp_path, codec="topk,k=5", num_classes=300, layout=layout)
    assert not (tmp_path / "cache").exists()


def test_wrong_requests_are_refused(folder: Path, tmp_path: Path) -> None:
    """An unknown format and a missing source exit 2 and leave nothing behind; from Python an unknown layout is a ConfigError."""
    assert "'hdf5' is not one of" in kdcache("convert", folder / "topk", "out", "--format", "hdf5", cwd=tmp_path, exits=2).stderr
    assert "--format" in kdcache("convert", folder / "topk", "out", cwd=tmp_path, exits=2).stderr
    assert "no cache at nowhere" in kdcache("unpack", "nowhere", "out", cwd=tmp_path, exits=2).stderr
    with pytest.raises(ConfigError, match="'hdf5'; expected one of: zarr, parquet, compact"):
        convert(folder / "topk", tmp_path / "out", layout="hdf5")
    assert not list(tmp_path.iterdir())


def test_one_conversion_at_a_time(folder: Path, tmp_path: Path) -> None:
    """While one conversion writes to a directory, another one is refused."""
    with exclusive_lock(tmp_path / "out" / ".convert" / "lock", holder="a conversion"), pytest.raises(CacheBusyError):
        convert(folder / "topk", tmp_path / "out", layout="parquet")
    convert(folder / "topk", tmp_path / "out", layout="parquet")


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from kdcache.records.progress import Silent
from kdcache.workflows.convert import convert

class Deadly(Silent):
    left = int(sys.argv[3])

    @contextmanager
    def stage(self, name, *, total, unit):
        yield self.advance

    def advance(self, amount):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), layout="parquet", progress=Deadly())
"""
"""Converts, and is killed after so many blocks."""


@pytest.mark.parametrize("num_blocks", [0, 2, 5])
def test_a_killed_conversion_is_no_cache_and_ends_in_the_same_bytes(folder: Path, tmp_path: Path, num_blocks: int) -> None:
    """Killed after any block, nothing is there that reads as a cache; run again, it ends in the bytes of an undisturbed run."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, folder / "topk", out, str(num_blocks)]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    assert (out / "records").exists()
    with pytest.raises(IncompleteCacheError, match="run the same `kdcache convert"):
        CacheReader(out)
    begun = Path(shutil.copytree(out / ".convert", tmp_path / "begun"))
    kdcache("convert", folder / "topk", out, "--format", "parquet", cwd=tmp_path)
    assert tree(out) == tree(folder / "parquet")
    shutil.copytree(begun, out / ".convert")  # as if it had been killed between the manifest and the end
    kdcache("convert", folder / "topk", out, "--format", "parquet", cwd=tmp_path)
    assert tree(out) == tree(folder / "parquet")


def test_an_unfinished_conversion_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """Where another cache, or the same one in another layout, is being converted to, a conversion is refused and changes nothing."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, folder / "topk", out, "1"]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    before = tree(out)
    for source, layout in (("adaptive", "parquet"), ("topk", "zarr")):
        with pytest.raises(ExistsError, match="unfinished conversion of another cache or to another layout"):
            convert(folder / source, out, layout=layout)
    assert tree(out) == before
    (out / ".convert" / "plan.json").unlink()
    with pytest.raises(ExistsError, match="is not empty"):
        convert(folder / "topk", out, layout="parquet")


def test_conversion_loads_no_torch(folder: Path, tmp_path: Path) -> None:
    """Converting imports PyArrow and Zarr, and no torch."""
    done = kdcache("convert", folder / "topk", "out", "--format", "parquet", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pyarrow" in loaded
    assert not loaded & {"torch", "torchvision", "torchmetrics"}
