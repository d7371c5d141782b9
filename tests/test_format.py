"""The store as FORMAT.md specifies it, read by programs that know nothing of kdcache: Zarr, NumPy, PyArrow, the standard library."""

import dataclasses
import hashlib
import json
import math
import re
import runpy
import shutil
import struct
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from numcodecs import Zstd
from numpy.typing import NDArray
from pcodec import standalone
from stored import NUM_SAMPLES, NUM_VIEWS, codec, dump_noise
from torch import Tensor

from kdcache.learning.cache import Cache
from kdcache.learning.sources.source import sample_key
from kdcache.records import manifest as records
from kdcache.records.hashing import canonical_json, sha256, stable_integer
from kdcache.records.manifest import Block, BlockGrid, FieldRecord, FileRecord, Manifest, Probe, Provenance, Recipe, Statistics
from kdcache.store.compact_backend import encode_records
from kdcache.store.content import content_digest
from kdcache.store.ledger import DumpPlan
from kdcache.store.packing import pack
from kdcache.targets.profile import ProfileSum, profile_field, profile_table
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.convert import convert

Array = NDArray[Any]

FORMAT = Path(records.__file__).parents[1] / "store" / "FORMAT.md"
CACHES: dict[str, dict[str, Any]] = {
    "topk": {"codec": "topk,k=5", "num_classes": 300},
    "topk of whole bytes": {"codec": "topk,k=5,values=float16,profile=False", "num_classes": 200},
    "topk of all": {"codec": "topk,k=6", "num_classes": 6},
    "adaptive": {"codec": "adaptive,mean_k=4,max_k=20", "num_classes": 300},
    "adaptive with positions": {"codec": "adaptive,kl=0.3,max_k=9", "num_classes": 40, "positions": (2, 3)},
    "sampled": {"codec": "sampled,draws=20", "num_classes": 300},
    "dense": {"codec": "dense", "num_classes": 12},
    "dense in bytes": {"codec": "dense,dtype=uint8", "num_classes": 12},
}
BYTES_AND_CHECKSUM = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes each cache when it is asked for first; tests must not change them."""
    folder = tmp_path_factory.mktemp("caches")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = dump_noise(folder, name, **CACHES[name]).path
        return made[name]

    return make


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, caches: Callable[[str], Path]) -> Cache:
    """Each of the caches in turn."""
    return Cache(caches(request.param))


# What the page says, worked without kdcache.


def plain_array(root: Path, name: str) -> zarr.Array[Any]:
    """An array as Zarr alone opens it."""
    array = zarr.open_group(root, mode="r")[name]
    assert isinstance(array, zarr.Array)
    return array


def packed(values: Array, bits: int) -> NDArray[np.uint8]:
    """Section 5.3, by NumPy alone: the last axis in `bits` an entry."""
    ones = (values[..., None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(ones.reshape(*values.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def unpacked(stored: Array, length: int, bits: int) -> Array:
    """What `packed` was given."""
    ones = np.unpackbits(stored, axis=-1, count=length * bits, bitorder="little").reshape(*stored.shape[:-1], length, bits)
    values: Array = (ones.astype(np.uint64) << np.arange(bits, dtype=np.uint64)).sum(axis=-1, dtype=np.uint64)
    return values


def plain_records(root: Path, field: FieldRecord, *, block: Block, view: int) -> Array:
    """The records of one view of a block as plain Zarr reads them, unpacked: [rows, *inner], or flat for a ragged field."""
    array, rows = plain_array(root, field.name), slice(*block.samples)
    if field.lengths is None:
        stored = np.asarray(array[view, rows])
        return unpacked(stored, field.inner[-1], field.bits) if field.bits else stored
    counts = np.asarray(plain_array(root, field.lengths.field)[view, rows]).astype(int) - field.lengths.minus
    stored, total = np.asarray(array[view, block.sample_block]), int(counts.sum())
    return unpacked(stored, total, field.bits) if field.bits else stored[:total]


def specified_file(field: FieldRecord, entries: Array, grid: BlockGrid) -> bytes:
    """The file of the layout `zarr` that section 5 specifies for the entries of one view and range, or of a whole table."""
    dtype, fill = np.dtype(field.dtype).newbyteorder("<"), float("nan") if field.fill_value == "NaN" else field.fill_value
    if field.lengths is None:
        stored, padding = (packed(entries, field.bits), 255) if field.bits else (entries.astype(dtype), fill)
        padded = np.full((grid.block_samples if field.axes else 1, *stored.shape[1:]), padding, stored.dtype)
        padded[: len(stored)] = stored
        return checked(padded.tobytes())
    room = grid.block_samples * field.inner[0]
    length = next(2**i for i in range(8, 64) if 2**i * 512 >= room)
    pieces = []
    for start in range(0, len(entries), length):
        piece = np.full(length, fill, dtype)
        piece[: len(entries) - start] = entries[start : start + length]
        pieces.append(checked((packed(piece, field.bits) if field.bits else piece).tobytes()))
    index = [struct.pack("<QQ", i * len(piece), len(piece)) for i, piece in enumerate(pieces)]
    absent = [b"\xff" * 16] * (math.ceil(room / length) - len(pieces))
    return b"".join(pieces) + checked(b"".join(index + absent))


def checked(data: bytes) -> bytes:
    """With a CRC-32C behind it."""
    return data + google_crc32c.value(data).to_bytes(4, "little")


def zarr_path(field: FieldRecord, place: tuple[int, ...]) -> str:
    """The file of (view, range), of a range, or of a table."""
    return "/".join([field.name, "c", *map(str, place), *("0" for _ in field.inner)])


def specified_files(cache: Cache) -> Iterator[tuple[str, bytes]]:
    """Every chunk file of a cache, from what plain Zarr reads."""
    root, manifest = cache.reader.root, cache.manifest
    for field in manifest.fields:
        if field.per_view:
            for record in manifest.blocks:
                for view in range(*record.block.views):
                    entries = plain_records(root, field, block=record.block, view=view)
                    yield zarr_path(field, (view, record.block.sample_block)), specified_file(field, entries, manifest.grid)
        else:
            whole, rows = np.asarray(plain_array(root, field.name)[...]), manifest.grid.block_samples
            for s in range(manifest.grid.num_sample_blocks if field.axes else 1):
                part = whole[s * rows : (s + 1) * rows] if field.axes else whole[None]
                yield zarr_path(field, (s,) if field.axes else ()), specified_file(field, part, manifest.grid)


def fills(values: Array, fill_value: object) -> NDArray[np.bool_]:
    """Where an array has a fill value."""
    filled: NDArray[np.bool_] = np.isnan(values) if fill_value == "NaN" else values == fill_value
    return filled


# The page itself.


def python_blocks() -> list[str]:
    """The Python examples of FORMAT.md."""
    return re.findall(r"^```python\n(.*?)^```", FORMAT.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run_example(name: str, folder: Path, *, cache: Path) -> dict[str, Any]:
    """Runs the example that has `name` in it on a cache; gives its variables."""
    (block,) = (block for block in python_blocks() if name in block)
    script = folder / "example.py"
    script.write_text(block.replace("path/to/cache", str(cache)), "utf-8")
    return runpy.run_path(str(script))


def section(number: str) -> str:
    """A section of FORMAT.md without those below it."""
    (found,) = re.findall(rf"^#+ {re.escape(number)} .*?(?=^#|\Z)", FORMAT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return str(found)


def table_rows(text: str, *heads: str) -> list[list[str]]:
    """The cells of the tables that begin with these columns."""
    head = re.escape(" | ".join(heads))
    tables = re.findall(rf"^\| {head}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def quoted(cell: str) -> list[str]:
    """What a cell has between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def copied(root: Path, folder: Path) -> Path:
    """A copy of a cache that a test may damage."""
    return Path(shutil.copytree(root, folder / "copy"))


def test_plain_zarr_sees_what_the_manifest_says(cache: Cache) -> None:
    """Plain Zarr opens every array with the shape, type, names, fill value and attributes of section 5.2."""
    grid, lengths = cache.manifest.grid, {"view": NUM_VIEWS, "sample": NUM_SAMPLES}
    for field in cache.manifest.fields:
        array = plain_array(cache.reader.root, field.name)
        document = json.loads((cache.reader.root / field.name / "zarr.json").read_bytes())
        inner, names, attributes = list(field.inner), list(field.inner_names), dict(field.attributes)
        if field.bits:
            attributes |= {"bits": field.bits, "packed_axis": names[-1]} | ({} if field.lengths else {"packed_length": inner[-1]})
            inner[-1], names[-1] = math.ceil(inner[-1] * field.bits / 8), f"{names[-1]}_byte"
        if field.lengths:
            attributes |= {"lengths": field.lengths.field, "lengths_minus": field.lengths.minus}
            room = grid.block_samples * field.inner[0]
            piece = next(2**i for i in range(8, 64) if 2**i * 512 >= room)
            elements = piece * field.bits // 8 if field.bits else piece
            assert array.shape == (NUM_VIEWS, grid.num_sample_blocks, math.ceil(room / piece) * elements)
            assert array.chunks == (1, 1, elements)
            assert array.shards == (1, 1, array.shape[-1])
            assert array.metadata.dimension_names == ("view", "block", *names)
            (sharding,) = document["codecs"]
            assert (sharding["name"], sharding["configuration"]["index_location"]) == ("sharding_indexed", "end")
            assert sharding["configuration"]["index_codecs"] == BYTES_AND_CHECKSUM
            codecs = sharding["configuration"]["codecs"]
        else:
            assert array.shape == (*(lengths[axis] for axis in field.axes), *inner)
            assert array.chunks == (*({"view": 1, "sample": grid.block_samples}[axis] for axis in field.axes), *inner)
            assert array.metadata.dimension_names == (*field.axes, *names)
            codecs = document["codecs"]
        assert array.dtype == np.dtype("uint8" if field.bits else field.dtype)
        assert fills(np.asarray(array.fill_value), 255 if field.bits else field.fill_value).all()
        assert array.attrs.asdict() == attributes
        assert [
            {"configuration": {"endian": "little"}, **item} if item["name"] == "bytes" else item for item in codecs
        ] == BYTES_AND_CHECKSUM
        assert not document["storage_transformers"]


def test_files_are_what_is_specified(cache: Cache) -> None:
    """Every chunk file is, byte for byte, rows or pieces, padding, index and checksums as section 5 says; and no other file is there."""
    root = cache.reader.root
    specified = dict(specified_files(cache))
    for path, data in specified.items():
        assert (root / path).read_bytes() == data, path
    on_disk = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert on_disk == {"manifest.json", *(file.path for file in cache.manifest.files)}
    assert {path for path in on_disk if not path.endswith(".json")} == specified.keys()


def test_plain_zarr_reads_what_the_reader_gathers(cache: Cache) -> None:
    """Every record is the same through plain Zarr and through kdcache's memory map."""
    for record in cache.manifest.blocks:
        rows = np.arange(*record.block.samples)
        for field in (field for field in cache.manifest.fields if field.per_view):
            for view in range(*record.block.views):
                gathered = cache.reader.gather([field.name], rows, np.full(len(rows), view))[field.name]
                plain = plain_records(cache.reader.root, field, block=record.block, view=view)
                np.testing.assert_array_equal(gathered[~fills(gathered, field.fill_value)], plain.ravel())


def test_no_entry_is_a_fill_value(cache: Cache) -> None:
    """No stored number is its field's fill value, no packed row is all 255, and no key is all fill."""
    for field in cache.manifest.fields:
        if not field.per_view:
            filled = fills(np.asarray(plain_array(cache.reader.root, field.name)[...]), field.fill_value)
            assert not (filled.all(axis=-1) if field.name == "key" else filled).any()
        for record in cache.manifest.blocks if field.per_view else ():
            for view in range(*record.block.views):
                assert not fills(plain_records(cache.reader.root, field, block=record.block, view=view), field.fill_value).any()
        if field.bits and not field.lengths:
            assert not (np.asarray(plain_array(cache.reader.root, field.name)[...]) == 255).all(axis=-1).any()


def test_missing_file_reads_as_fill(cache: Cache, tmp_path: Path) -> None:
    """A lost chunk file is all fill value to plain Zarr, so it cannot be taken for data."""
    root, block = copied(cache.reader.root, tmp_path), cache.manifest.blocks[0].block
    for field in sorted(cache.manifest.fields, key=lambda field: field.lengths is None):
        (root / zarr_path(field, tuple(0 for _ in field.axes))).unlink()
        array, rows = plain_array(root, field.name), slice(*block.samples)
        lost = array[0, 0] if field.lengths else array[0, rows] if field.per_view else array[rows] if field.axes else array[...]
        assert fills(np.asarray(lost), 255 if field.bits else field.fill_value).all()
        if field.per_view:
            assert not fills(plain_records(root, field, block=block, view=1), field.fill_value).any()


def test_flipped_bit_makes_plain_zarr_raise(cache: Cache, tmp_path: Path) -> None:
    """One changed bit anywhere in a chunk file, its checksums and index included, is an error to plain Zarr."""
    root = copied(cache.reader.root, tmp_path)
    for field in cache.manifest.fields:
        path = root / zarr_path(field, tuple(0 for _ in field.axes))
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 5, len(whole) - 1):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
            with pytest.raises(ValueError, match=r"(?i)checksum"):
                plain_array(root, field.name)[0]
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["topk", "adaptive with positions", "topk of all", "dense in bytes"])
def test_parquet_holds_the_same_records(name: str, caches: Callable[[str], Path], tmp_path: Path) -> None:
    """The files of the layout `parquet` are those of section 6: PyArrow alone reads the records that Zarr alone reads."""
    original = Cache(caches(name)).manifest
    result = dump_noise(tmp_path, **CACHES[name], layout="parquet")
    root, manifest = result.path, result.manifest
    assert manifest.content == original.content
    assert (manifest.recipe, manifest.grid, manifest.fields) == (original.recipe, original.grid, original.fields)
    of_records = [field for field in manifest.fields if field.per_view]
    for record in manifest.blocks:
        assert [file.path for file in record.files] == [f"records/{record.block.id}.parquet"]
        file = pq.ParquetFile(root / record.files[0].path, page_checksum_verification=True)
        assert file.schema_arrow.names == ["view", "sample", *(field.name for field in of_records)]
        assert file.num_row_groups == len(range(*record.block.views))
        assert not any(column.nullable for column in file.schema_arrow)
        for group, view in enumerate(range(*record.block.views)):
            table = file.read_row_group(group)
            assert set(table["view"].to_pylist()) == {view}
            assert table["sample"].to_pylist() == list(range(*record.block.samples))
            for field in of_records:
                column = table[field.name].combine_chunks()
                entries = column.flatten() if field.inner else column
                plain = plain_records(caches(name), field, block=record.block, view=view)
                np.testing.assert_array_equal(entries.to_numpy(), plain.ravel())
                if field.lengths:
                    counts = plain_records(caches(name), field_named(manifest, field.lengths.field), block=record.block, view=view)
                    lengths = (counts.astype(int) - field.lengths.minus).reshape(len(counts), -1).sum(axis=1)
                    np.testing.assert_array_equal(column.value_lengths().to_numpy(), lengths)
    samples = [pq.read_table(root / f"samples/s{s:05d}.parquet") for s in range(manifest.grid.num_sample_blocks)]
    assert b"".join(key for table in samples for key in table["key"].to_pylist()) == plain_array(caches(name), "key")[...].tobytes()
    assert [label for table in samples for label in table["label"].to_pylist()] == plain_array(caches(name), "label")[...].tolist()
    tables = [field for field in manifest.fields if not field.axes]
    for field in tables:
        table = pq.read_table(root / f"tables/{field.name}.parquet")
        np.testing.assert_array_equal(np.stack(table[field.name].to_numpy()), plain_array(caches(name), field.name)[...])
    shared = [*(f"samples/s{s:05d}.parquet" for s in range(3)), *(f"tables/{field.name}.parquet" for field in tables)]
    assert [file.path for file in manifest.metadata_files] == shared


def compact_file(data: bytes) -> tuple[dict[str, Any], dict[str, list[tuple[str, bytes]]]]:
    """Section 7.1: the header, and by field its columns' coders and bytes."""
    assert (data[:4], data) == (b"KDC1", checked(data[:-4]))
    start = 8 + int.from_bytes(data[4:8], "little")
    header, streams = json.loads(data[8:start]), {}
    assert canonical_json(header) == data[8:start]
    for name in sorted(header):
        streams[name] = []
        for coder, size in header[name]["streams"]:
            streams[name].append((coder, data[start : start + size]))
            start += size
    assert start == len(data) - 4
    return header, streams


def compact_column(coder: str, data: bytes, dtype: str) -> Array:
    """Section 7.3: a column's numbers."""
    unsigned = f"<u{np.dtype(dtype).itemsize}"
    numbers = np.frombuffer(Zstd().decode(data), unsigned) if coder == "zstd" else standalone.simple_decompress(data)
    return np.asarray(numbers).astype(unsigned).view(dtype)


def specified_classes(columns: list[Array], orders: Callable[[int], list[int]]) -> list[Array]:
    """Section 7.4: places to classes, item by item."""
    classes = [column.copy() for column in columns]
    for item, top in enumerate(columns[0].tolist()):
        left = [c for c in orders(top) if c != top]
        for column in classes[1:]:
            if item < len(column):
                column[item] = left.pop(int(column[item]))
    return classes


def specified_codes(columns: list[Array], weights: list[list[int]], falls: list[list[int]]) -> list[Array]:
    """Section 7.5: what is left of the masses to their codes, item by item."""
    codes = [column.copy() for column in columns]
    for i in reversed(range(len(columns))):
        for item, f in enumerate(falls if weights[i] else ()):
            features = [*f, *(fall * fall // 256 for fall in f)]
            for m in (int(column[item]) for column in codes[i + 1 :]):
                features += [m, m * m // 256, *(m * fall // 256 for fall in f[:4])]
            total = sum(w * x for w, x in zip(weights[i], [*features, 1], strict=True))
            codes[i][item] = (int(columns[i][item]) - 128 + min(max((total + 2**15) // 2**16, 0), 255)) % 256
    return codes


def compact_records(
    data: bytes, fields: dict[str, FieldRecord], num_rows: int, orders: Callable[[int], list[int]] | None
) -> dict[str, Array]:
    """Section 7: the records in a file, flat; fields of counts first, `logits/tail` last."""
    (header, streams), found = compact_file(data), {}
    assert header.keys() == fields.keys()
    for name in sorted(fields, key=lambda name: (name == "logits/tail", fields[name].lengths is not None)):
        field = fields[name]
        assert (header[name]["dtype"], tuple(header[name]["inner"])) == (field.dtype, field.inner)
        columns = [compact_column(*stream, field.dtype) for stream in streams[name]]
        if name == "logits/index" and orders:
            columns = specified_classes(columns, orders)
        if "weights" in header[name]:
            gap = fields["logits/gap"]
            if gap.lengths:
                ends = np.cumsum(found["logits/count"].astype(int) - 1)
                items = [part.tolist() for part in np.split(found["logits/gap"], ends[:-1])]
                falls = [(item + [0] * 16)[:16] for item in items]
            else:
                falls = found["logits/gap"].reshape(-1, gap.inner[-1])[:, :16].tolist()
            columns = specified_codes(columns, header[name]["weights"], falls)
        if field.lengths:
            lengths = found[field.lengths.field].ravel().astype(int) - field.lengths.minus
            items = sorted(range(len(lengths)), key=lambda item: -lengths[item])
            entries: list[list[Any]] = [[] for _ in lengths]
            for column in columns:
                for item, entry in zip(items, column, strict=False):
                    entries[item].append(entry)
            assert [len(item) for item in entries] == lengths.tolist()
            found[name] = np.array([entry for item in entries for entry in item], field.dtype)
        else:
            found[name] = np.stack(columns, axis=-1).ravel()
            assert len(found[name]) == math.prod(field.inner) * (num_rows if field.axes else 1)
    return found


def compact_orders(root: Path, fields: dict[str, FieldRecord]) -> Callable[[int], list[int]] | None:
    """Section 7.4: the classes in the order of each top class."""
    if "profile/log_prob" in fields:
        profile = {"profile/log_prob": fields["profile/log_prob"]}
        table = compact_records((root / "shared/profile/log_prob.kdc").read_bytes(), profile, 0, None)["profile/log_prob"]
        rows = table.reshape(profile["profile/log_prob"].inner).tolist()
        return lambda top: sorted(range(len(rows)), key=lambda c: (-rows[top][c], c))
    if "logits/index" in fields:
        header, streams = compact_file((root / "shared/order.kdc").read_bytes())
        seen = compact_column(*streams["order"][0], "uint32").tolist()
        assert (list(header), len(streams["order"]), header["order"]["count"]) == (["order"], 1, len(seen))
        order = [*seen, *sorted(set(range(fields["logits/index"].attributes["num_classes"])) - set(seen))]
        return lambda _: order
    assert not (root / "shared/order.kdc").exists()
    return None


def test_compact_holds_the_same_records(cache: Cache, tmp_path: Path) -> None:
    """The files of the layout `compact` are those of section 7: a decoder made from the page alone reads what kdcache reads."""
    root = convert(cache.reader.root, tmp_path / "compact", layout="compact").path
    reader, fields = Cache(root).reader, {field.name: field for field in cache.manifest.fields}
    assert reader.manifest.content == cache.manifest.content
    orders = compact_orders(root, fields)
    paths = [f"shared/{name}.kdc" for name, field in fields.items() if not field.per_view]
    assert {file.path for file in reader.manifest.metadata_files} - {"shared/order.kdc"} == set(paths)
    for field in (field for field in fields.values() if not field.per_view):
        found = compact_records((root / f"shared/{field.name}.kdc").read_bytes(), {field.name: field}, NUM_SAMPLES, None)
        np.testing.assert_array_equal(found[field.name], np.asarray(plain_array(cache.reader.root, field.name)[...]).ravel())
    of_records = {name: field for name, field in fields.items() if field.per_view}
    for record in reader.manifest.blocks:
        s, views = record.block.sample_block, range(*record.block.views)
        assert [file.path for file in record.files] == [f"records/s{s:05d}.v{view:04d}.kdc" for view in views]
        for file, view in zip(record.files, views, strict=True):
            rows = record.block.samples[1] - record.block.samples[0]
            found = compact_records((root / file.path).read_bytes(), of_records, rows, orders)
            read = reader.records(list(of_records), sample_block=s, view=view)
            for name, field in of_records.items():
                np.testing.assert_array_equal(found[name], read[name].ravel())
                np.testing.assert_array_equal(found[name], plain_records(cache.reader.root, field, block=record.block, view=view).ravel())


@pytest.mark.parametrize(("spec", "classes"), [("topk,k=3", 30), ("topk,k=20", 30), ("adaptive,max_k=9", 30)])
def test_format_restores_predicted_masses(spec: str, classes: int, teacher_logits: Callable[..., Tensor]) -> None:
    """Section 7.5 gives back the masses of records that are many enough to be predicted."""
    made = codec(spec, classes, **({"slope": 0.02} if spec.startswith("adaptive") else {}))
    fields = {field.name: field for field in made.fields(())}
    arrays = {name: array.numpy() for name, array in made.encode(teacher_logits(2100, classes), [0] * 2100).items()}
    for name, field in fields.items():
        if field.lengths:
            lengths = arrays[field.lengths.field].astype(int) - field.lengths.minus
            arrays[name] = arrays[name][np.arange(arrays[name].shape[1]) < lengths[:, None]]
    data = encode_records(arrays, list(fields.values()), None)
    assert all(compact_file(data)[0]["logits/tail"]["weights"])
    for name, found in compact_records(data, fields, 2100, None).items():
        np.testing.assert_array_equal(found, arrays[name].ravel())


def field_named(manifest: Manifest, name: str) -> FieldRecord:
    """The field of this name."""
    (found,) = (field for field in manifest.fields if field.name == name)
    return found


def test_statistics_follow_from_the_records(cache: Cache) -> None:
    """Entries, retained mass and class counts of section 3.6, from what plain Zarr reads; labels are as wide as section 4.1 says."""
    root, statistics, names = cache.reader.root, cache.manifest.statistics, {field.name for field in cache.manifest.fields}
    if "logits/count" in names:
        assert statistics.entries == pytest.approx(np.asarray(plain_array(root, "logits/count")[...]).mean())
    retained = {}
    if "logits/tail" in names:
        tail = plain_array(root, "logits/tail")
        masses = specified_masses(np.asarray(tail[...])).reshape(-1, 3).mean(axis=0)
        retained = {f"{t:g}": 1 - mass for t, mass in zip(tail.attrs["temperatures"], masses, strict=True)}
    assert statistics.retained_mass == pytest.approx(retained, rel=1e-5)
    label, labels = field_named(cache.manifest, "label"), np.asarray(plain_array(root, "label")[...])
    width = next(width for width in (8, 16) if 2**width - 1 >= cache.manifest.recipe.teacher.num_classes)
    assert (label.dtype, label.fill_value) == (f"uint{width}", 2**width - 1)
    assert statistics.class_counts == tuple(np.bincount(labels, minlength=cache.manifest.recipe.teacher.num_classes))
    assert (statistics.teacher_accuracy is None) == bool(cache.manifest.recipe.teacher.positions)


def test_slope_is_what_was_asked_for(caches: Callable[[str], Path]) -> None:
    """The first view of this small set is the sample that the slope is measured on, and its mean k is at most what the spec asks."""
    counts = np.asarray(plain_array(caches("adaptive"), "logits/count")[0])
    assert 3.5 < counts.mean() <= 4


def test_example_reads_a_record(caches: Callable[[str], Path], tmp_path: Path) -> None:
    """The example of FORMAT.md, with Zarr and NumPy alone, gives what kdcache decodes."""
    found = run_example("tail_mass", tmp_path, cache=caches("topk"))
    soft = Cache(caches("topk")).soft_targets(np.array([found["row"]]), np.array([found["view"]]))
    probs, tail = soft.probs_at(found["temperature"])
    assert soft.index is not None
    np.testing.assert_array_equal(found["classes"], soft.index[0])
    np.testing.assert_allclose(found["log_probs"], soft.log_probs[0], rtol=1e-5)
    np.testing.assert_allclose(found["probs"], probs[0], rtol=1e-5)
    np.testing.assert_allclose(found["tail_mass"], tail[0], rtol=1e-5)
    assert 0.1 < float(tail[0]) < 0.9, "too plain a record to tell anything"


def test_example_reads_a_ragged_record(caches: Callable[[str], Path], tmp_path: Path) -> None:
    """The example of FORMAT.md, with Zarr and NumPy alone, finds a record's own entries."""
    found = run_example("def entries(name)", tmp_path, cache=caches("adaptive"))
    soft = Cache(caches("adaptive")).soft_targets(np.array([found["row"]]), np.array([found["view"]]))
    assert soft.index is not None
    np.testing.assert_array_equal(found["classes"], soft.index[0])
    np.testing.assert_allclose(found["log_probs"], soft.log_probs[0], rtol=1e-5)
    assert len(found["classes"]) > 1, "too short a record to tell anything"


def test_example_checks_a_cache(cache: Cache, tmp_path: Path) -> None:
    """The checker of FORMAT.md, with the standard library alone, passes a whole cache and refuses any change to it."""
    root = copied(cache.reader.root, tmp_path)
    assert run_example("digest_of_manifest", tmp_path, cache=root)["content"] == cache.manifest.content
    whole = (root / "manifest.json").read_bytes()
    for old, new in ((b'"num_views": 5', b'"num_views": 4'), (b"\n}", b" \n}"), (b'"seed": 0', b'"seed":0')):
        (root / "manifest.json").write_bytes(whole.replace(old, new))
        with pytest.raises(AssertionError):
            run_example("digest_of_manifest", tmp_path, cache=root)
    (root / "manifest.json").write_bytes(whole)
    path = root / cache.manifest.blocks[0].files[0].path
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(AssertionError, match="logits"):
        run_example("digest_of_manifest", tmp_path, cache=root)


def test_example_recomputes_contents(cache: Cache, tmp_path: Path) -> None:
    """The example of FORMAT.md passes every block and field of a cache, and refuses one that says otherwise."""
    run_example("def content_digest", tmp_path, cache=cache.reader.root)
    root = copied(cache.reader.root, tmp_path)
    document = json.loads((root / "manifest.json").read_bytes())
    document["blocks"][-1]["content"] = document["blocks"][0]["content"]
    (root / "manifest.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(AssertionError):
        run_example("def content_digest", tmp_path, cache=root)


def test_example_derives_the_seed_of_a_view(caches: Callable[[str], Path], tmp_path: Path) -> None:
    """The example's `stable_integer` is kdcache's, for keys, seeds, views of any size and texts."""
    found = run_example("blake2b", tmp_path, cache=caches("topk"))["stable_integer"]
    for parts in ((0, b"", 0), (-1, bytes(16), 2**70), (7, bytes(range(240, 256)), 3), ("codec", 7, "é", 1)):
        assert found(*parts) == stable_integer(*parts)


def test_every_example_is_tested() -> None:
    """FORMAT.md has five Python examples, the ones that are run above."""
    assert len(python_blocks()) == 5


def key_paths(kind: Any) -> set[str]:
    """The keys of a record's JSON object, those of records in it with a dot between."""
    paths: set[str] = set()
    for name, hint in typing.get_type_hints(kind).items():
        inner = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        optional = isinstance(hint, types.UnionType)
        paths |= {name} if inner is None or optional else set()
        paths |= {f"{name}.{path}" for path in key_paths(inner)} if inner and typing.get_origin(hint) is not tuple else set()
        paths |= {name} if typing.get_origin(hint) is tuple else set()
    return paths


@pytest.mark.parametrize(
    ("number", "kinds"),
    [
        ("3.2", [Recipe]),
        ("3.3", [BlockGrid]),
        ("3.4", [FieldRecord]),
        ("3.5", [FileRecord, records.BlockRecord]),
        ("3.6", [Statistics]),
        ("3.7", [Provenance]),
        ("12", [Probe]),
    ],
)
def test_format_has_the_keys_of_the_records(number: str, kinds: list[Any]) -> None:
    """The tables of FORMAT.md have every key of the records in the manifest, and no other."""
    named = [name for row in table_rows(section(number), "key", "type") for name in quoted(row[0])]
    assert sorted(named) == sorted(path for kind in kinds for path in key_paths(kind))


def test_format_has_the_keys_of_manifest_and_plan() -> None:
    """So it is for the manifest itself, whose `extra` is no key and whose `digest` is no field, and for the plan of a dump."""
    named = [name for row in table_rows(section("3.1"), "key", "type") for name in quoted(row[0])]
    assert sorted(named) == sorted({item.name for item in dataclasses.fields(Manifest)} - {"extra"} | {"digest"})
    planned = [name for row in table_rows(section("13.1"), "key", "type") for name in quoted(row[0])]
    assert sorted(planned) == sorted(item.name for item in dataclasses.fields(DumpPlan))


def test_every_record_is_specified() -> None:
    """No record of the manifest is without a table that the tests above read."""
    found = {kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)}
    parts = {
        records.TeacherRecord,
        records.MemberRecord,
        records.DatasetRecord,
        records.ViewsRecord,
        Block,
        records.Lengths,
        records.SkippedSample,
    }
    assert found == parts | {
        Recipe,
        BlockGrid,
        FieldRecord,
        FileRecord,
        records.BlockRecord,
        Statistics,
        Provenance,
        Probe,
        Manifest,
        records.MixingRecord,
    }


@pytest.mark.parametrize(
    ("number", "specs"),
    [
        ("8.2", ["dense", "dense,dtype=float32", "dense,dtype=uint8"]),
        ("8.3", ["topk", "topk,values=float16", "topk,k=1", "topk,k=1000"]),
        ("8.4", ["adaptive", "adaptive,kl=0.05", "adaptive,max_k=1"]),
        ("8.5", ["sampled"]),
    ],
)
def test_format_has_the_fields_of_the_codecs(number: str, specs: list[str]) -> None:
    """The tables of FORMAT.md have every field of a codec with its type, fill value, inner axes and attributes, and no other."""
    text = section(number)
    rows = {quoted(row[0])[0]: row[1:] for row in table_rows(text, "field", "dtype", "inner")}
    seen = set()
    for spec in specs:
        made = codec(spec, 1000)
        for field in (*made.fields(()), *([profile_field(1000)] if made.keeps_profile else [])):
            dtype, inner, fill, attributes, _ = rows[field.name]
            seen.add(field.name)
            assert set(field.inner_names) <= set(quoted(inner)) or not field.inner
            assert set(field.attributes) == set(quoted(attributes))
            assert quoted(dtype) in ([], [field.dtype])
            assert str(field.fill_value) in fill or "largest" in fill or fill == "8.1"
            assert ("ragged" in inner) == (field.lengths is not None)
    assert rows.keys() == seen
    assert f"Spec: `{codec(specs[0], 1000).spec}`" in text


@pytest.mark.parametrize(
    ("classes", "dtype", "bits"), [(1, 8, 1), (6, 8, 3), (255, 8, None), (256, 16, 9), (65_535, 16, None), (65_536, 32, 17)]
)
def test_index_is_as_wide_as_specified(classes: int, dtype: int, bits: int | None) -> None:
    """`logits/index` has as many bits as section 8.1 says."""
    field = codec("topk,k=1", classes).fields(())[0]
    assert (field.dtype, field.bits, field.fill_value) == (f"uint{dtype}", bits, 2 ** (bits or dtype) - 1)
    assert (field.fill_value + 1).bit_length() - 1 == classes.bit_length()


# Section 8 and 9, worked in double precision from the page.


def specified_order(z: Array) -> Array:
    """Classes by logit, of equal ones the lower first."""
    order: Array = np.argsort(-z, axis=-1, kind="stable")
    return order


def specified_masses(codes: Array) -> Array:
    """What the codes of `logits/tail` stand for."""
    smallest = math.sin(math.pi / 4 / 254) ** 2 / 4
    masses: Array = np.clip(np.sin(np.pi / 2 * codes / 254) ** 2, smallest, 1 - smallest)
    return masses


def softmax(z: Array) -> Array:
    """In double precision."""
    weights = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    probs: Array = weights / weights.sum(axis=-1, keepdims=True)
    return probs


def specified_gaps(z: Array, reach: float) -> Array:
    """The codes of `logits/gap` for logits that are sorted."""
    codes, decoded = [], z[..., 0].astype(np.float64)
    for rank in range(1, z.shape[-1]):
        codes.append(np.round(254 * np.sqrt(np.clip(decoded - z[..., rank], 0, reach) / reach)))
        decoded = decoded - reach * (codes[-1] / 254) ** 2
    return np.stack(codes, axis=-1)


def specified_divergence(z: Array, most: int) -> Array:
    """D_k of section 8.4 for k = 1 to `most`."""
    p = np.sort(softmax(z), axis=-1)[..., ::-1]
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    rest = np.maximum(1 - p.cumsum(axis=-1), 0)[..., :most]
    spread = np.where(rest > 0, rest * np.log(np.where(rest > 0, rest, 1) / (z.shape[-1] - np.arange(1, most + 1))), 0)
    return np.maximum(terms.sum(axis=-1, keepdims=True) - terms.cumsum(axis=-1)[..., :most] - spread, 0)


def specified_draws(z: Array, draws: int, uniform: float) -> list[tuple[int, int]]:
    """(class, hits) of section 8.5, the most often drawn first."""
    cumulative = softmax(z).cumsum()
    drawn = [min(int((cumulative <= cumulative[-1] * (i + uniform) / draws).sum()), len(z) - 1) for i in range(draws)]
    return sorted(((c, drawn.count(c)) for c in set(drawn)), key=lambda pair: (-pair[1], pair[0]))


def specified_uniforms(seed: int, count: int) -> list[float]:
    """The numbers u of section 8.5."""
    data = hashlib.shake_128(seed.to_bytes(8, "little")).digest(8 * count)
    return [(number >> 11) * 2.0**-53 for (number,) in struct.iter_unpack("<Q", data)]


def encoded(spec: str, z: Tensor, **calibration: float) -> dict[str, Array]:
    """A codec's arrays, without their `logits/`."""
    made = codec(spec, z.shape[-1], **calibration)
    return {name.removeprefix("logits/"): array.numpy() for name, array in made.encode(z, [0] * len(z)).items()}


def test_format_encodes_topk(teacher_logits: Callable[..., Tensor]) -> None:
    """Sections 8.1 and 8.3, worked in double precision, give kdcache's codes but for a last bit; ties are settled by class."""
    z = teacher_logits(400, 50).mul(2).round().div(2)
    arrays, exact = encoded("topk,k=12", z), z.numpy()
    order = specified_order(exact)
    ranked = np.take_along_axis(exact, order, axis=-1)
    np.testing.assert_array_equal(arrays["index"], order[:, :12])
    np.testing.assert_allclose(arrays["gap"], specified_gaps(ranked[:, :12], 32), atol=1)
    masses = [softmax(ranked / t)[:, 12:].sum(axis=-1) for t in (1, 2, 4)]
    codes = np.stack([np.round(254 * 2 / np.pi * np.arcsin(np.sqrt(m))) for m in masses], axis=-1)
    np.testing.assert_allclose(arrays["tail"], codes, atol=1)
    values = encoded("topk,k=12,values=float16", z)["value"]
    np.testing.assert_array_equal(values, (ranked[:, 1:12] - ranked[:, :1]).astype(np.float16))


def test_format_encodes_adaptive(teacher_logits: Callable[..., Tensor]) -> None:
    """Section 8.4 gives kdcache's k, and the tail of what is then left out."""
    z = teacher_logits(400, 50)
    arrays = encoded("adaptive,max_k=20", z, slope=0.02)
    counts = (specified_divergence(z.numpy(), 20) + 0.02 * np.arange(1, 21)).argmin(axis=-1) + 1
    assert np.mean(arrays["count"] == counts) > 0.99
    assert 1 < counts.mean() < 20
    probs = np.sort(softmax(z.numpy() / 2), axis=-1)[:, ::-1]
    masses = np.array([row[count:].sum() for row, count in zip(probs, arrays["count"], strict=True)])
    np.testing.assert_allclose(arrays["tail"][:, 1], np.round(254 * 2 / np.pi * np.arcsin(np.sqrt(masses))), atol=1)


def test_format_encodes_sampled(teacher_logits: Callable[..., Tensor]) -> None:
    """Section 8.5 gives kdcache's draws: u from SHAKE-128, then the classes at evenly spaced points."""
    z, made = teacher_logits(200, 2, 50), codec("sampled,draws=20", 50)
    arrays = made.encode(z, range(200))
    same = []
    for record in range(200):
        for position, uniform in enumerate(specified_uniforms(record, 2)):
            count = int(arrays["logits/count"][record, position])
            found = [arrays[f"logits/{name}"][record, position, :count].tolist() for name in ("index", "hits")]
            same.append(list(zip(*found, strict=True)) == specified_draws(z[record, position].numpy(), 20, uniform))
    assert np.mean(same) > 0.99


def test_format_encodes_dense(teacher_logits: Callable[..., Tensor]) -> None:
    """Section 8.2 gives kdcache's bytes and scales, and its floats."""
    z = teacher_logits(400, 12)
    arrays, exact = encoded("dense,dtype=uint8", z), z.numpy().astype(np.float64)
    falls = exact.max(axis=-1, keepdims=True) - exact
    np.testing.assert_array_equal(arrays["scale"], falls.max(axis=-1).astype(np.float32).astype(np.float16))
    codes = np.round(254 * np.sqrt(np.minimum(falls / arrays["scale"][:, None].astype(np.float64), 1)))
    np.testing.assert_allclose(arrays["value"], codes, atol=1)
    np.testing.assert_allclose(encoded("dense", z)["value"], np.log(softmax(exact)), atol=2e-7, rtol=2**-10)


def test_format_makes_the_profile(teacher_logits: Callable[..., Tensor]) -> None:
    """Section 8.6 gives kdcache's table, also for a class that is never on top."""
    z = teacher_logits(60, 3, 12)
    z[..., 5] = -20
    profile = ProfileSum(12, torch.device("cpu"))
    profile.add(z, z.argmax(dim=-1))
    exact = z.numpy().astype(np.float64).reshape(-1, 12)
    units = np.round(np.log(softmax(exact)) * 2**16)
    top = exact.argmax(axis=-1)
    table = [(units[top == c].sum(axis=0) + 16 * units.mean(axis=0)) / ((top == c).sum() + 16) / 2**16 for c in range(12)]
    np.testing.assert_allclose(profile_table(profile.numpy()), np.array(table), rtol=2**-10)


def specified_log_tail(beta: float, betas: list[float], g: list[float], least: float) -> float:
    """Section 9.1: the tail's log-sum at β."""
    chords = [(g[i] - g[i - 1]) / (betas[i] - betas[i - 1]) for i in range(1, len(g))]
    last = len(betas) - 1
    j = next((i for i in range(1, last) if beta <= betas[i]), last)
    chord = chords[j - 1]
    if j < last:
        slope = chord + (chords[j] - chord) * (betas[j] - betas[j - 1]) / (betas[j + 1] - betas[j - 1])
    else:
        slope = (chord + max(chord, least)) / 2
    if beta > betas[j]:
        return g[j] + slope * (beta - betas[j])
    width = betas[j] - betas[j - 1]
    return g[j - 1] + chord * (beta - betas[j - 1]) - (slope - chord) * (beta - betas[j - 1]) * (betas[j] - beta) / width


def specified_targets(root: Path, row: int, view: int, temperature: float) -> tuple[Array, float]:
    """Probabilities of the kept classes and the mass of the rest, by section 9, from the codes of a cache with positions or without."""
    tail, gap = plain_array(root, "logits/tail"), plain_array(root, "logits/gap")
    manifest = json.loads((root / "manifest.json").read_bytes())
    num_classes, count = manifest["recipe"]["teacher"]["num_classes"], 5
    if "lengths" in gap.attrs:
        counts = plain_array(root, "logits/count")
        block = row // counts.chunks[1]
        lengths = counts[view, block * counts.chunks[1] : row + 1].astype(int) - 1
        count, end = int(lengths[-1]) + 1, int(lengths.sum())
        codes = np.asarray(gap[view, block])[end - count + 1 : end]
    else:
        codes = np.asarray(gap[view, row])
    log_probs = np.concatenate([[0], -np.cumsum(32 * (codes.astype(np.float64) / 254) ** 2)])
    masses = specified_masses(np.asarray(tail[view, row]))
    betas = [0.0, *(1 / t for t in reversed(tail.attrs["temperatures"]))]
    kept = [float(np.log(np.exp(beta * log_probs).sum())) for beta in betas]
    odds = [float(np.log(m / (1 - m))) for m in reversed(masses)]
    g = [math.log(num_classes - count), *(odd + inside for odd, inside in zip(odds, kept[1:], strict=True))]
    inside = float(np.log(np.exp(log_probs / temperature).sum()))
    mass = 1 / (1 + math.exp(inside - specified_log_tail(1 / temperature, betas, g, float(log_probs[-1]))))
    if temperature in tail.attrs["temperatures"]:
        mass = float(masses[tail.attrs["temperatures"].index(temperature)])
    return (1 - mass) * softmax(log_probs / temperature), mass


@pytest.mark.parametrize("name", ["topk", "adaptive"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 3.0, 4.0, 20.0])
def test_format_gives_probabilities_at_any_temperature(name: str, temperature: float, caches: Callable[[str], Path]) -> None:
    """Section 9 of FORMAT.md, worked in double precision from the stored codes, gives kdcache's probabilities."""
    rows = np.arange(NUM_SAMPLES)
    probs, tail = Cache(caches(name)).soft_targets(rows, np.full(NUM_SAMPLES, 3)).probs_at(temperature)
    for row in rows.tolist():
        expected, mass = specified_targets(caches(name), row, 3, temperature)
        np.testing.assert_allclose(tail[row], mass, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(probs[row][: len(expected)], expected, rtol=1e-3, atol=1e-6)
        assert not probs[row][len(expected) :].any()


def test_format_gives_probabilities_of_draws_and_of_bytes(caches: Callable[[str], Path]) -> None:
    """Shares of draws, and falls in bytes, are decoded as the page says."""
    soft = Cache(caches("sampled")).soft_targets(np.array([0]), np.array([0]))
    count = int(plain_array(caches("sampled"), "logits/count")[0, 0])
    hits = np.asarray(plain_array(caches("sampled"), "logits/hits")[0, 0])[:count]
    np.testing.assert_allclose(soft.probs_at(1.0)[0][0], hits / 20, rtol=1e-5)
    soft = Cache(caches("dense in bytes")).soft_targets(np.array([0]), np.array([0]))
    codes, scale = (np.asarray(plain_array(caches("dense in bytes"), f"logits/{name}")[0, 0]) for name in ("value", "scale"))
    np.testing.assert_allclose(soft.probs_at(3.0)[0][0], softmax(-scale.astype(np.float64) * (codes / 254) ** 2 / 3), rtol=1e-5)


def shown(numbers: Any) -> str:
    """Numbers as the page prints them."""
    return ", ".join(f"{number:.4f}".rstrip("0").rstrip(".").replace("-", "−") for number in np.asarray(numbers, np.float64).ravel())


def test_vectors_of_digests_and_bytes(caches: Callable[[str], Path], tmp_path: Path) -> None:
    """The test vectors of FORMAT.md for digests, packing and checksums are what kdcache computes."""
    text = section("18")
    assert f"| {stable_integer(0, bytes(range(16)), 3)} |" in text
    assert f"| {stable_integer('codec', 0, bytes(range(16)), 3)} |" in text
    assert f"`{sample_key(torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)).hex()}`" in text
    assert f"`{canonical_json({'b': [1, 1.0, 0.00001, 1e16, -0.0], 'Z': None}).decode()}`" in text
    assert f"`{google_crc32c.value(b'123456789'):x}`" in text
    assert f"`{pack(np.array([1, 299, 511, 0], np.uint16), 9).tobytes().hex()}`" in text
    content = content_digest({"a/b": [np.array([[1, 2], [3, 4]], np.uint16)]})
    assert content == f"sha256:{hashlib.sha256(bytes.fromhex('612f620075696e7431360028322c203229000100020003000400')).hexdigest()}"
    assert f"`{content}`" in text
    assert f"`{sha256(canonical_json({'blocks': [content], 'fields': {'key': content}}))}`" in text
    digest_of_manifest = run_example("digest_of_manifest", tmp_path, cache=caches("dense"))["digest_of_manifest"]
    document = b'{"digest": "sha256:%s", "format_version": "1.0"}\n'
    assert f"`{digest_of_manifest(document % (b'1' * 64))}`" in text


def test_vectors_of_codecs() -> None:
    """The test vectors of FORMAT.md for codecs are what kdcache computes."""
    text, z, seed = section("18"), torch.tensor([[1.0, 4.0, 2.0, -1.0]]), 5611044848945104612
    topk = codec("topk,k=2", 4)
    arrays = topk.encode(z)
    index, gap, tail = (shown(arrays[f"logits/{name}"]) for name in ("index", "gap", "tail"))
    packed_index = pack(arrays["logits/index"].numpy(), 3).tobytes().hex()
    assert f"| `{topk.spec}` | z | index {index}, packed `{packed_index}`; gap {gap}; tail {tail} |" in text
    for temperature in (1.0, 3.0, 0.5):
        kept, rest = topk.decode(arrays).probs_at(temperature)
        assert f"T = {temperature:g} | | {kept[0, 0]:.4f}, {kept[0, 1]:.4f}; others {rest[0]:.4f} |" in text
    assert f"`values=float16` | z | value {shown(encoded('topk,k=2,values=float16', z)['value'])} |" in text
    assert f"| `{codec('adaptive,max_k=3', 4).spec}` |" in text
    for slope in (0.001, 0.05):
        ragged = encoded("adaptive,max_k=3", z, slope=slope)
        count = int(ragged["count"][0])
        gaps = f"gap {shown(ragged['gap'][0, : count - 1])}" if count > 1 else "no gap"
        assert f"λ = {slope} | count {count}; index {shown(ragged['index'][0, :count])}; {gaps}; tail {shown(ragged['tail'])} |" in text
    assert f"| u | s | {specified_uniforms(seed, 1)[0]} |" in text
    sampled = codec("sampled,draws=8", 4)
    drawn = {name: array[0].numpy() for name, array in sampled.encode(z, [seed]).items()}
    count = int(drawn["logits/count"])
    index, hits = (shown(drawn[f"logits/{name}"][:count]) for name in ("index", "hits"))
    assert f"| `{sampled.spec}` | z, s | count {count}; index {index}; hits {hits} |" in text
    dense = encoded("dense,dtype=uint8", z)
    assert f"| `dense,dtype=uint8` | z | value {shown(dense['value'])}; scale {shown(dense['scale'])} |" in text
    values = shown(SoftTargets.from_logits(z).log_probs.half())
    assert values == shown(encoded("dense", z)["value"])
    assert f"| `dense,dtype=float16` | z | value {values} |" in text
    profile = ProfileSum(4, torch.device("cpu"))
    profile.add(z, torch.tensor([1]))
    assert f"| profile | z, the only record | every row {shown(profile_table(profile.numpy())[3])} |" in text
