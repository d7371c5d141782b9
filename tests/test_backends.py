"""What every layout of a store promises: the same records in, the same records out, and nothing that was damaged or contradicts itself."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from kdcache.records.errors import FormatError, IntegrityError, MismatchError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    RECORD_AXES,
    SAMPLE_AXES,
    TABLE_AXES,
    Block,
    BlockGrid,
    BlockRecord,
    DatasetRecord,
    FieldRecord,
    FileRecord,
    Lengths,
    Manifest,
    Provenance,
    Recipe,
    Statistics,
    TeacherRecord,
    ViewsRecord,
)
from kdcache.store.backends import make_backend
from kdcache.store.content import content_digest
from kdcache.store.reader import CacheReader

LAYOUTS = ("zarr", "parquet", "compact")
GRID = BlockGrid(num_samples=50, num_views=5, block_samples=20, block_views=2)
"""Three ranges of rows, the last one shorter; three groups of views, the last one smaller."""
SHORT = (3, 1)
"""View and range in which every record has the fewest entries that it may have."""

Array = NDArray[Any]


def field(name: str, dtype: str, *inner: int, bits: int | None = None, counts: str = "", minus: int = 0, **more: Any) -> FieldRecord:
    """A field with made-up axis names and attributes."""
    fill = "NaN" if dtype.startswith("float") else 2 ** (bits or int(dtype[4:])) - 1
    return FieldRecord(
        name=name, dtype=dtype, inner=inner, inner_names=tuple(f"axis{i}" for i in range(len(inner))), bits=bits, fill_value=fill,
        lengths=Lengths(field=counts, minus=minus) if counts else None, attributes={"decode": "as is", "steps": [1, 2.5]}, **more,
    )  # fmt: skip


RECORD_FIELDS = (
    field("fixed/uint8", "uint8", 15),
    field("fixed/uint32", "uint32", 1),
    field("fixed/uint64", "uint64", 3),
    field("fixed/float16", "float16", 9),
    field("fixed/float32", "float32", 4),
    field("packed/uint8", "uint8", 5, bits=3),
    field("packed/uint16", "uint16", 16, bits=10),
    field("packed/uint32", "uint32", 7, bits=17),
    field("packed/uint64", "uint64", 5, bits=33),
    field("scalar/uint8", "uint8"),
    field("scalar/uint32", "uint32"),
    field("scalar/float16", "float16"),
    field("positions/packed", "uint16", 3, 4, 6, bits=10),
    field("positions/float32", "float32", 3, 2),
    field("ragged/count", "uint8"),
    field("ragged/packed", "uint16", 8, bits=10, counts="ragged/count"),
    field("ragged/fall", "uint8", 7, counts="ragged/count", minus=1),
    field("ragged/float16", "float16", 8, counts="ragged/count"),
    field("dense/count", "uint16", 2, 3),
    field("dense/packed", "uint32", 24, bits=17, counts="dense/count"),
    field("dense/fall", "uint64", 18, bits=33, counts="dense/count", minus=1),
    field("dense/whole", "uint32", 18, counts="dense/count", minus=1),
)
SHARED_FIELDS = (
    field("key", "uint8", 16, axes=SAMPLE_AXES),
    field("label", "uint16", axes=SAMPLE_AXES),
    field("weight/float32", "float32", 2, axes=SAMPLE_AXES),
    field("weight/packed", "uint32", 3, bits=17, axes=SAMPLE_AXES),
    field("table/square", "float16", 6, 4, axes=TABLE_AXES),
    field("table/packed", "uint16", 2, 3, 5, bits=10, axes=TABLE_AXES),
    field("table/vector", "uint64", 7, axes=TABLE_AXES),
    field("table/scalar", "float32", axes=TABLE_AXES),
)
FIELDS = {item.name: item for item in (*RECORD_FIELDS, *SHARED_FIELDS)}
RECORD_NAMES = [item.name for item in RECORD_FIELDS]


def draw(item: FieldRecord, *shape: int, generator: np.random.Generator) -> Array:
    """Any entries that the field may hold; of floats any bits: infinities, subnormal numbers, NaN of any payload."""
    dtype = np.dtype(item.dtype)
    if dtype.kind == "f":
        return np.frombuffer(generator.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
    assert isinstance(item.fill_value, int)
    return generator.integers(0, item.fill_value, shape, dtype=np.uint64).astype(dtype)


def draw_records() -> dict[str, list[list[Array]]]:
    """Every record by field, view and row: [*inner], flat for a ragged field."""
    generator = np.random.default_rng(20260214)
    records: dict[str, list[list[Array]]] = {}
    counted = {item.lengths.field: item for item in RECORD_FIELDS if item.lengths and not item.lengths.minus}
    for item in RECORD_FIELDS:
        records[item.name] = [
            [draw(item, *item.inner, generator=generator) for _ in range(GRID.num_samples)] for _ in range(GRID.num_views)
        ]
        for view in range(GRID.num_views):
            for row in range(GRID.num_samples):
                if item.name in counted:
                    most = counted[item.name].inner[0] // math.prod(item.inner)
                    counts = generator.integers(1, most + 1, item.inner).astype(item.dtype)
                    short = (view, row // GRID.block_samples) == SHORT
                    records[item.name][view][row] = np.asarray(np.ones_like(counts) if short else counts)
                if item.lengths:
                    total = int((records[item.lengths.field][view][row].astype(int) - item.lengths.minus).sum())
                    records[item.name][view][row] = draw(item, total, generator=generator)
    return records


RECORDS = draw_records()
SHARED = {
    item.name: draw(item, *([GRID.num_samples] if item.axes else []), *item.inner, generator=np.random.default_rng(1))
    for item in SHARED_FIELDS
}


def stored(name: str, block: Block, view: int) -> Array:
    """What a backend is given for one view of a block."""
    join = np.concatenate if FIELDS[name].lengths else np.stack
    return join(RECORDS[name][view][slice(*block.samples)])


def block_arrays(block: Block) -> dict[str, list[Array]]:
    """What a backend is given for a block."""
    return {name: [stored(name, block, view) for view in range(*block.views)] for name in RECORD_NAMES}


def gathered(name: str, rows: Sequence[int], views: Sequence[int]) -> Array:
    """What a reader owes for (row, view) pairs, laid out entry by entry."""
    item = FIELDS[name]
    records = [RECORDS[name][view][row] for row, view in zip(rows, views, strict=True)]
    if item.lengths is None:
        return np.stack(records) if records else np.empty((0, *item.inner), item.dtype)
    counts = gathered(item.lengths.field, rows, views).astype(int) - item.lengths.minus
    padded = np.full((*counts.shape, counts.max(initial=0)), item.fill_value, item.dtype)
    for number, entries in enumerate(records):
        left = list(entries)
        for position in np.ndindex(counts.shape[1:]):
            for rank in range(counts[number][position]):
                padded[(number, *position, rank)] = left.pop(0)
        assert not left
    return padded


def make_cache(root: Path, layout: str) -> Path:
    """A complete cache of all fields."""
    backend = make_backend(layout, (*RECORD_FIELDS, *SHARED_FIELDS))
    backend.learn({}, [])
    recipe = Recipe(
        teacher=TeacherRecord(spec="large", sha256="sha256:aa", num_classes=10, precision="float32"),
        dataset=DatasetRecord(spec="noise", num_samples=GRID.num_samples, sha256="sha256:bb"),
        views=ViewsRecord(pipeline=(), seed=0, versions={}),
        codec="all",
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION, recipe=recipe, recipe_key=recipe.key, layout=layout, grid=GRID, fields=(*RECORD_FIELDS, *SHARED_FIELDS),
        calibration={}, contents={name: content_digest({name: [array]}) for name, array in SHARED.items()},
        statistics=Statistics(teacher_accuracy=None, retained_mass={}, entries=1.0, class_counts=()), probes=(),
        provenance=Provenance(created="", created_by="", command="", device="", batch_size=1, versions={}, teacher_file="", dataset_spec=""),
        license=None, extra={"later": 1},
        blocks=tuple(
            BlockRecord(block=block, files=backend.write_block(root, RECORD_FIELDS, GRID, block, block_arrays(block)),
                        content=content_digest(block_arrays(block)), totals={})
            for block in GRID.blocks()
        ),
        metadata_files=backend.write_shared(root, (*RECORD_FIELDS, *SHARED_FIELDS), GRID, SHARED),
    )  # fmt: skip
    (root / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return root


def assert_same(found: Array, expected: Array) -> None:
    """Equal in type, shape and every bit."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def files(root: Path) -> set[str]:
    """Every file below a folder."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def rewrite(root: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Changes a manifest, and signs it again together with all files as they are."""
    manifest = change(CacheReader(root).manifest)

    def signed(file: FileRecord) -> FileRecord:
        data = (root / file.path).read_bytes()
        return FileRecord(path=file.path, size_bytes=len(data), sha256=sha256(data))

    blocks = tuple(replace(block, files=tuple(map(signed, block.files))) for block in manifest.blocks)
    manifest = replace(manifest, blocks=blocks, metadata_files=tuple(map(signed, manifest.metadata_files)))
    (root / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def with_field(name: str, **changes: Any) -> Callable[[Manifest], Manifest]:
    """Changes what a manifest says of one field."""
    return lambda manifest: replace(
        manifest, fields=tuple(replace(item, **changes) if item.name == name else item for item in manifest.fields)
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache of each layout; tests must not change them."""
    return {layout: make_cache(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def root(request: pytest.FixtureRequest, caches: dict[str, Path]) -> Path:
    """The cache of each layout in turn."""
    return caches[request.param]


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "copy"))


@pytest.mark.parametrize("name", RECORD_NAMES)
def test_records_are_read_as_they_were_written(root: Path, name: str) -> None:
    """Each view of each block is read in the type, shape and bits in which it was written, whatever kind of field it is."""
    reader = CacheReader(root)
    for block in GRID.blocks():
        for view in range(*block.views):
            assert_same(reader.records([name], sample_block=block.sample_block, view=view)[name], stored(name, block, view))


@pytest.mark.parametrize("name", SHARED)
def test_shared_fields_are_read_as_they_were_written(root: Path, name: str) -> None:
    """Keys, labels and tables are read whole, in the type, shape and bits in which they were written."""
    assert_same(CacheReader(root).shared(name), SHARED[name])


@pytest.mark.parametrize("name", RECORD_NAMES)
def test_any_records_are_gathered(root: Path, name: str) -> None:
    """Random (row, view) pairs, some of them twice, come in the order in which they are asked for; ragged ones padded with the fill value."""
    generator = np.random.default_rng(0)
    reader = CacheReader(root)
    for number in (300, 1, 7):
        rows, views = generator.integers(0, GRID.num_samples, number), generator.integers(0, GRID.num_views, number)
        assert_same(reader.gather([name], rows, views)[name], gathered(name, rows.tolist(), views.tolist()))
    rows, views = np.full(3, 25), np.full(3, SHORT[0])
    assert_same(reader.gather([name], rows, views)[name], gathered(name, rows.tolist(), views.tolist()))


def test_all_fields_are_gathered_at_once(root: Path) -> None:
    """A request for many fields gives each of them as a request for it alone."""
    rows, views = np.array([49, 0, 20, 49]), np.array([4, 0, 3, 4])
    found = CacheReader(root).gather(RECORD_NAMES, rows, views)
    assert found.keys() == set(RECORD_NAMES)
    for name, array in found.items():
        assert_same(array, gathered(name, rows.tolist(), views.tolist()))


@pytest.mark.parametrize("name", RECORD_NAMES)
def test_nothing_is_gathered_from_no_pairs(root: Path, name: str) -> None:
    """No pairs give no records, with the axes that records would have."""
    none = np.empty(0, np.int64)
    assert_same(CacheReader(root).gather([name], none, none)[name], gathered(name, [], []))


def test_what_is_outside_is_refused(root: Path) -> None:
    """Rows, views and fields that the cache does not have are a MismatchError."""
    reader = CacheReader(root)
    for name, row, view in (("scalar/uint8", 50, 0), ("scalar/uint8", 0, 5), ("scalar/uint8", -1, 0), ("scalar/uint9", 0, 0)):
        with pytest.raises(MismatchError):
            reader.gather([name], np.array([0, row]), np.array([0, view]))


def test_layouts_hold_the_same_records(caches: dict[str, Path]) -> None:
    """The content digest of records that are read is the manifest's, and the logical hash is the same for every layout."""
    for root in caches.values():
        reader = CacheReader(root)
        for record in reader.manifest.blocks:
            views = [reader.records(RECORD_NAMES, sample_block=record.block.sample_block, view=v) for v in range(*record.block.views)]
            assert content_digest({name: [arrays[name] for arrays in views] for name in RECORD_NAMES}) == record.content
        for name, digest in reader.manifest.contents.items():
            assert content_digest({name: [reader.shared(name)]}) == digest
    assert len({CacheReader(root).manifest.content for root in caches.values()}) == 1


def test_every_file_is_listed(root: Path) -> None:
    """A cache's directory holds the files that its manifest lists, and nothing else."""
    manifest = CacheReader(root).manifest
    assert files(root) == {MANIFEST_NAME, *(file.path for file in manifest.files)}
    assert sum((root / file.path).stat().st_size for file in manifest.files) == manifest.size_bytes


def test_backend_names_the_files_it_writes(root: Path) -> None:
    """The paths that a backend gives for a block and for what is shared are the files that it has written."""
    reader = CacheReader(root)
    for record in reader.manifest.blocks:
        assert sorted(reader.backend.record_paths(RECORD_FIELDS, GRID, record.block)) == sorted(file.path for file in record.files)
    shared = reader.backend.shared_paths(SHARED_FIELDS, GRID)
    assert len(set(shared)) == len(shared)
    assert set(shared) <= {file.path for file in reader.manifest.metadata_files}
    assert reader.backend.shared_paths([], GRID) == []


@pytest.mark.parametrize("name", ["packed/uint16", "dense/fall"])
def test_only_what_is_asked_for_is_opened(own: Path, name: str) -> None:
    """A read of some records needs the files of their fields, views and ranges; all others may be missing."""
    backend, fields = make_backend(CacheReader(own).manifest.layout, CacheReader(own).manifest.fields), [FIELDS[name]]
    lengths = FIELDS[name].lengths
    if lengths:
        fields.append(FIELDS[lengths.field])
    needed = {path for item in fields for path in backend.paths_of(item, GRID, sample_block=1, view=2)}
    for path in files(own) - needed - {MANIFEST_NAME}:
        (own / path).unlink()
    reader = CacheReader(own)
    block = next(block for block in GRID.blocks() if block.sample_block == 1 and block.views == (2, 4))
    assert_same(reader.records([name], sample_block=1, view=2)[name], stored(name, block, 2))
    assert_same(reader.gather([name], np.array([39, 20]), np.array([2, 2]))[name], gathered(name, [39, 20], [2, 2]))
    with pytest.raises(IntegrityError, match="missing"):
        reader.gather([name], np.array([0]), np.array([2]))


def test_mapped_layout_has_a_file_for_each_field_and_view(caches: dict[str, Path]) -> None:
    """In the mapped layout a read of one field in one view needs one file."""
    backend = make_backend("zarr", ())
    paths = [backend.paths_of(item, GRID, sample_block=1, view=view) for item in RECORD_FIELDS for view in range(GRID.num_views)]
    assert {len(of_field) for of_field in paths} == {1}
    assert len({path for (path,) in paths}) == len(paths)


def test_a_damaged_file_is_refused(own: Path) -> None:
    """One changed bit in any file is an IntegrityError that names the file, before a number of it is used."""
    manifest = CacheReader(own).manifest
    for record in (manifest.blocks[0], manifest.blocks[-1]):
        file = record.files[0]
        data = (own / file.path).read_bytes()
        (own / file.path).write_bytes(bytes([data[0] ^ 4]) + data[1:])
        block = record.block
        with pytest.raises(IntegrityError, match=file.path):
            CacheReader(own).records(RECORD_NAMES, sample_block=block.sample_block, view=block.views[0])
        (own / file.path).write_bytes(data)


def test_equal_records_make_equal_bytes(root: Path, tmp_path: Path) -> None:
    """The same records give the same files, byte for byte."""
    again = make_cache(tmp_path, CacheReader(root).manifest.layout)
    assert files(again) == files(root)
    assert all((again / path).read_bytes() == (root / path).read_bytes() for path in files(root))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("fixed/uint8", {"inner": (14,)}, id="other length"),
        pytest.param("fixed/uint8", {"dtype": "uint16"}, id="wider type"),
        pytest.param("fixed/uint32", {"dtype": "uint64"}, id="widest type"),
        pytest.param("scalar/uint8", {"inner": (2,), "inner_names": ("axis",)}, id="an axis too many"),
        pytest.param("ragged/fall", {"dtype": "uint32"}, id="wider ragged type"),
        pytest.param("ragged/packed", {"inner": (4,)}, id="fewer entries than there are"),
        pytest.param("ragged/packed", {"lengths": Lengths(field="ragged/count", minus=3)}, id="no entries for the least count"),
        pytest.param("positions/float32", {"inner": (3, 2, 2), "inner_names": ("a", "b", "c")}, id="positions too many"),
    ],
)
def test_a_manifest_that_contradicts_its_files_is_refused(own: Path, name: str, changes: dict[str, Any]) -> None:
    """A signed manifest whose field has another type or shape than its files is a FormatError for every way of reading."""
    rewrite(own, with_field(name, **changes))
    with pytest.raises(FormatError):
        CacheReader(own).records([name], sample_block=0, view=0)
    with pytest.raises(FormatError):
        CacheReader(own).gather([name], np.array([1]), np.array([0]))


@pytest.mark.parametrize("name", ["label", "weight/float32", "table/square", "table/vector"])
def test_a_manifest_that_contradicts_its_shared_files_is_refused(own: Path, name: str) -> None:
    """A signed manifest in which a label or a table has another type than in its file is a FormatError."""
    rewrite(own, with_field(name, dtype="uint8"))
    with pytest.raises(FormatError):
        CacheReader(own).shared(name)


def edit_parquet(path: Path, change: Callable[[list[pa.Table]], list[pa.Table]], **options: Any) -> None:
    """Writes a Parquet file anew with changed row groups."""
    with pq.ParquetFile(path) as file:
        tables = change([file.read_row_group(group) for group in range(file.num_row_groups)])
    with pq.ParquetWriter(path, tables[0].schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(len(table), 1))


def replaced(name: str, array: Any, *, nullable: bool = False) -> Callable[[list[pa.Table]], list[pa.Table]]:
    """Puts another column in the place of one."""

    def change(tables: list[pa.Table]) -> list[pa.Table]:
        place = tables[0].schema.get_field_index(name)
        return [table.set_column(place, pa.field(name, array.type, nullable=nullable), array) for table in tables]

    return change


def ragged_lists(num_entries: int) -> pa.Array:
    """Twenty lists of so many numbers, in the type of `ragged/fall`."""
    kind = pa.list_(pa.field("element", pa.uint8(), nullable=False))
    return pa.array([[1] * num_entries] * 20, kind)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda tables: tables[:1], "row groups", id="a view is missing"),
        pytest.param(lambda tables: [*tables, tables[0]], "row groups", id="a view too many"),
        pytest.param(lambda tables: [tables[0].slice(1), tables[1]], "rows in row group 0", id="a row is missing"),
        pytest.param(lambda tables: tables[::-1], "view 0", id="views in another order"),
        pytest.param(lambda tables: [tables[0].take(list(range(19, -1, -1))), tables[1]], "sample 0 to 19", id="rows in another order"),
        pytest.param(lambda tables: [table.drop_columns(["ragged/fall"]) for table in tables], "ragged/fall", id="a column is missing"),
        pytest.param(
            lambda tables: [table.append_column(table.schema.field("ragged/fall"), table["ragged/fall"]) for table in tables],
            "expected one column",
            id="a column is there twice",
        ),
        pytest.param(replaced("ragged/fall", pa.array(range(20), pa.uint8())), "ragged/fall", id="numbers for lists"),
        pytest.param(replaced("ragged/fall", ragged_lists(3)), "not as long as the counts", id="lists of other lengths"),
        pytest.param(replaced("ragged/count", pa.array([0] * 20, pa.uint8())), "entries, found -1", id="counts of nothing"),
        pytest.param(replaced("ragged/count", pa.array([255] * 20, pa.uint8())), "found 254", id="counts beyond the most"),
        pytest.param(replaced("ragged/count", pa.array([1] * 20, pa.int64())), "ragged/count", id="counts with a sign"),
        pytest.param(replaced("ragged/count", pa.array([None] + [1] * 19, pa.uint8()), nullable=True), "ragged/count", id="a null"),
    ],
)
def test_parquet_that_contradicts_the_manifest_is_refused(
    caches: dict[str, Path], tmp_path: Path, change: Callable[[list[pa.Table]], list[pa.Table]], words: str
) -> None:
    """A Parquet file with a right digest and other rows, columns or lengths than the manifest says is a FormatError that names it."""
    root = Path(shutil.copytree(caches["parquet"], tmp_path / "copy"))
    path = root / "records" / f"{GRID.blocks()[0].id}.parquet"
    edit_parquet(path, change)
    rewrite(root, lambda manifest: manifest)
    with pytest.raises(FormatError, match=words) as caught:
        CacheReader(root).records(["ragged/fall"], sample_block=0, view=0)
    assert str(path) in str(caught.value)


def test_parquet_with_the_files_of_two_blocks_swapped_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    """A block's file under another block's name is found out by its own columns, even if every digest is right."""
    root = Path(shutil.copytree(caches["parquet"], tmp_path / "copy"))
    first, second = ("records/s00000.v0000-0002.parquet", "records/s00001.v0000-0002.parquet")
    shutil.copy(caches["parquet"] / first, root / second)
    shutil.copy(caches["parquet"] / "samples/s00000.parquet", root / "samples/s00001.parquet")
    rewrite(root, lambda manifest: manifest)
    with pytest.raises(FormatError, match="sample 20 to 39"):
        CacheReader(root).records(["scalar/uint8"], sample_block=1, view=0)
    with pytest.raises(FormatError, match="sample 20 to 39"):
        CacheReader(root).shared("label")


def test_parquet_is_no_other_file(caches: dict[str, Path], tmp_path: Path) -> None:
    """Bytes that are no Parquet file are a FormatError, though their digest is right."""
    root = Path(shutil.copytree(caches["parquet"], tmp_path / "copy"))
    for data in (b"", b"PAR1", b"PAR1" * 100, (root / MANIFEST_NAME).read_bytes()):
        (root / "samples/s00001.parquet").write_bytes(data)
        rewrite(root, lambda manifest: manifest)
        with pytest.raises(FormatError, match=r"s00001\.parquet"):
            CacheReader(root).shared("label")


def test_parquet_reads_the_asked_columns_only(caches: dict[str, Path], tmp_path: Path) -> None:
    """A page that is damaged, with right file digests, stops the read of its own column and of no other."""
    root = Path(shutil.copytree(caches["parquet"], tmp_path / "copy"))
    path = root / "records" / f"{GRID.blocks()[0].id}.parquet"
    start, stop = column_bytes(path, "fixed/float32")
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
    rewrite(root, lambda manifest: manifest)
    names = [name for name in RECORD_NAMES if name != "fixed/float32"]
    for name, array in CacheReader(root).records(names, sample_block=0, view=0).items():
        assert_same(array, stored(name, GRID.blocks()[0], 0))
    with pytest.raises(FormatError, match=path.name):
        CacheReader(root).records(["fixed/float32"], sample_block=0, view=0)


def test_parquet_checks_its_pages(caches: dict[str, Path], tmp_path: Path) -> None:
    """A bit that is flipped in a column, with right file digests, never changes a number: most are found by the page's checksum."""
    root = Path(shutil.copytree(caches["parquet"], tmp_path / "copy"))
    path = root / "records" / f"{GRID.blocks()[0].id}.parquet"
    whole = path.read_bytes()
    by_checksum, places = 0, range(*column_bytes(path, "fixed/float32"), 5)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        rewrite(root, lambda manifest: manifest)
        try:
            found = CacheReader(root).records(["fixed/float32"], sample_block=0, view=0)["fixed/float32"]
        except FormatError as error:
            by_checksum += "checksum" in str(error)
        else:  # in what the page says of itself, such as its largest number
            assert_same(found, stored("fixed/float32", GRID.blocks()[0], 0))
    assert by_checksum > 0.8 * len(places)


def column_bytes(path: Path, name: str) -> tuple[int, int]:
    """Where the pages of a column lie in the first row group of a Parquet file."""
    group = pq.read_metadata(path).row_group(0)
    (column,) = (group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == f"{name}.list.element")
    return column.data_page_offset, column.data_page_offset + column.total_compressed_size


def test_parquet_says_what_it_is(caches: dict[str, Path]) -> None:
    """Each file's metadata has the format version, what the file is and the records of its fields; nothing may be null."""
    for path, holds, names in (
        ("records/s00002.v0004-0005.parquet", "block s00002.v0004-0005", RECORD_NAMES),
        ("samples/s00002.parquet", "samples 40 to 49", [item.name for item in SHARED_FIELDS if item.axes]),
        ("tables/table/square.parquet", "table table/square", ["table/square"]),
    ):
        schema = pq.read_schema(caches["parquet"] / path)
        about = json.loads(schema.metadata[b"kdcache"])
        assert (about["format_version"], about["holds"], sorted(about["fields"])) == (FORMAT_VERSION, holds, sorted(names))
        assert about["fields"][names[0]]["attributes"] == {"decode": "as is", "steps": [1, 2.5]}
        assert not any(schema.field(name).nullable for name in schema.names)
        assert schema.names[-len(names) :] == names


def test_unknown_layout_is_refused(own: Path) -> None:
    """A cache of a layout that is not known here is a FormatError that lists those that are."""
    manifest = replace(CacheReader(own).manifest, layout="hdf5")
    (own / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    with pytest.raises(FormatError, match="'hdf5'; expected one of: zarr, parquet"):
        CacheReader(own)


assert all(item.axes == RECORD_AXES for item in RECORD_FIELDS)
