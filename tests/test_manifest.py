"""The manifest: what is written is what is read, and what was damaged, edited or made by another version is refused."""

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import signed

from kdcache.records.errors import FormatError, IntegrityError, KdcacheError
from kdcache.records.hashing import sha256
from kdcache.records.jsonrecord import from_json, to_json
from kdcache.records.manifest import (
    NO_DIGEST,
    SAMPLE_AXES,
    Block,
    BlockGrid,
    BlockRecord,
    DatasetRecord,
    FieldRecord,
    FileRecord,
    Lengths,
    Manifest,
    Probe,
    Provenance,
    Recipe,
    Statistics,
    TeacherRecord,
    ViewsRecord,
    recipe_differences,
)

RECIPE = Recipe(
    teacher=TeacherRecord(spec="large,channels=1", sha256="sha256:aa", num_classes=10, precision="float32"),
    dataset=DatasetRecord(spec="fashion-mini", num_samples=5, sha256="sha256:bb"),
    views=ViewsRecord(
        pipeline=({"op": "RandomCrop", "size": [28, 28], "padding": 4}, {"op": "RandomHorizontalFlip", "p": 0.5}),
        seed=3,
        versions={"torch": "2.7.0", "torchvision": "0.22.0"},
    ),
    codec="dense,dtype=float16",
)
BLOCKS = BlockGrid(num_samples=5, num_views=2, block_samples=3, block_views=1).blocks()
MANIFEST = Manifest(
    format_version="1.0",
    recipe=RECIPE,
    recipe_key=RECIPE.key,
    layout="zarr",
    grid=BlockGrid(num_samples=5, num_views=2, block_samples=3, block_views=1),
    fields=(
        FieldRecord(name="logits/value", dtype="float16", inner=(10,), inner_names=("class",), fill_value="NaN", attributes={"a": [1]}),
        FieldRecord(
            name="logits/index", dtype="uint8", inner=(9,), inner_names=("entry",), bits=4, lengths=Lengths(field="logits/count", minus=0)
        ),
        FieldRecord(name="label", dtype="uint8", inner=(), inner_names=(), axes=SAMPLE_AXES, fill_value=255),
    ),
    calibration={"slope": 0.015625},
    contents={"label": "sha256:ff"},
    statistics=Statistics(teacher_accuracy=0.5, retained_mass={"1.0": 1.0}, entries=10.0, class_counts=(2, 3)),
    probes=(Probe(row=0, view=1, sha256="sha256:cc"),),
    provenance=Provenance(
        created="2026-01-02T03:04:05Z",
        created_by="Ålfons",
        command="kdcache dump …",
        device="cpu",
        batch_size=4,
        versions={"python": "3.11"},
        teacher_file="teacher.safetensors",
        dataset_spec="fashion-mini,root=/data",
    ),
    license=None,
    metadata_files=(FileRecord(path="zarr.json", size_bytes=9, sha256="sha256:dd"),),
    blocks=tuple(
        BlockRecord(
            block=block,
            files=(FileRecord(path=f"c/{block.id}", size_bytes=7, sha256="sha256:ee"),),
            content=f"sha256:{i}",
            totals={"records": 3.0, "hits": 1e-9},
        )
        for i, block in enumerate(BLOCKS)
    ),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
Path = tuple[str | int, ...]


def leaves(document: Any, path: Path = ()) -> list[Path]:
    """The paths of all values in a JSON document that are neither objects nor arrays."""
    children = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else None
    return [path] if children is None else [leaf for key, value in children for leaf in leaves(value, (*path, key))]


def with_value(document: Any, path: Path, value: object) -> Any:
    """A copy of a JSON document with another value at one place."""
    copy = json.loads(json.dumps(document))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def at(document: Any, path: Path) -> Any:
    """The value at one place of a JSON document."""
    for key in path:
        document = document[key]
    return document


def document_of(manifest: Manifest) -> dict[str, Any]:
    """The parsed file of a manifest."""
    document = json.loads(manifest.to_bytes())
    assert isinstance(document, dict)
    return document


def test_round_trip() -> None:
    """A manifest that is written and read is equal in every field, and writes the same bytes again."""
    again = Manifest.from_bytes(MANIFEST.to_bytes(), where="m")
    assert again == MANIFEST
    assert again.to_bytes() == MANIFEST.to_bytes()
    assert again.size_bytes == 9 + 4 * 7
    assert [file.path for file in again.files] == ["zarr.json", *(f"c/{block.id}" for block in BLOCKS)]


NEW_KEYS = st.text(min_size=1, max_size=8).filter(lambda key: key != "digest" and not hasattr(MANIFEST, key))


@given(extra=st.dictionaries(NEW_KEYS, JSON_VALUES, max_size=3))
def test_unknown_top_level_keys_are_kept(extra: dict[str, Any]) -> None:
    """What a later minor version adds at the top is read, kept and written again, and the digest covers it."""
    manifest = dataclasses.replace(MANIFEST, format_version="1.9", extra=extra)
    again = Manifest.from_bytes(manifest.to_bytes(), where="m")
    assert again.extra == extra
    assert again == manifest
    for key in extra:
        with pytest.raises(IntegrityError, match="damaged or was edited"):
            Manifest.from_bytes(as_kdcache_writes(with_value(document_of(manifest), (key,), "edited")), where="m")


def test_unknown_nested_keys_are_tolerated() -> None:
    """What a later minor version adds inside a record does not stop this version from reading the rest."""
    document = document_of(MANIFEST)
    document["provenance"]["mood"] = "good"
    assert Manifest.from_bytes(signed(document), where="m") == MANIFEST


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "", 1, None])
def test_another_major_version_is_refused(version: object) -> None:
    """A manifest of another major version, or of none, is a FormatError that names what was expected and found."""
    with pytest.raises(FormatError, match=re.escape(f"expected format 1.x, found {version!r}")):
        Manifest.from_bytes(signed({**document_of(MANIFEST), "format_version": version}), where="m")


def test_version_is_checked_before_anything_else() -> None:
    """A manifest of another major version is refused as such, whatever form the rest of it has."""
    with pytest.raises(FormatError, match=r"found '2\.0'"):
        Manifest.from_bytes(b'{"format_version": "2.0", "shards": 5}', where="m")


def as_kdcache_writes(document: dict[str, Any]) -> bytes:
    """A document in the white space of `Manifest.to_bytes`, with whatever digest it has."""
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def test_digest_covers_every_byte() -> None:
    """With any single bit of the file flipped, in values, keys, white space or the digest itself, the manifest is refused."""
    whole = MANIFEST.to_bytes()
    assert Manifest.from_bytes(whole, where="m") == MANIFEST
    for position in range(len(whole)):
        for bit in range(8):
            flipped = whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]
            try:
                Manifest.from_bytes(flipped, where="m")
            except (FormatError, IntegrityError):
                continue
            pytest.fail(f"bit {bit} of byte {position} went unseen: {flipped[max(position - 20, 0) : position + 20]!r}")


def test_digest_covers_the_length() -> None:
    """A manifest that was cut short or added to, be it by white space, is an IntegrityError."""
    whole = MANIFEST.to_bytes()
    for data in (whole[:-1], whole + b"\n", b" " + whole, whole[:-2], whole + whole, whole.replace(b"\n", b"\r\n")):
        with pytest.raises(IntegrityError):
            Manifest.from_bytes(data, where="m")


def test_digest_is_of_the_file_with_zeros_in_its_place() -> None:
    """Any program can compute the digest: the sha256 of the file's bytes with the 64 digits of the digest as zeros."""
    whole = MANIFEST.to_bytes()
    digest = document_of(MANIFEST)["digest"]
    assert whole.count(digest.encode()) == 1
    assert sha256(whole.replace(digest.encode(), NO_DIGEST.encode())) == digest


@pytest.mark.parametrize(
    "layout", [{}, {"indent": 4}, {"separators": (",", ":")}, {"ensure_ascii": False, "indent": "\t"}, {"sort_keys": True}], ids=str
)
def test_other_programs_may_write_manifests(layout: dict[str, Any]) -> None:
    """A manifest with other white space, order and escapes is the same manifest as long as its digest is right."""
    document = dict(reversed(document_of(MANIFEST).items()))
    data = signed(document, **layout)
    assert data != MANIFEST.to_bytes()
    assert Manifest.from_bytes(data, where="m") == MANIFEST
    with pytest.raises(IntegrityError, match="damaged or was edited"):
        Manifest.from_bytes(data + b" ", where="m")


def test_a_digest_that_stands_twice_is_refused() -> None:
    """A file in which the digest's text stands a second time, so that its own place is not clear, is an IntegrityError."""
    data = signed({**document_of(MANIFEST), "copy": NO_DIGEST})
    with pytest.raises(IntegrityError, match="damaged or was edited"):
        Manifest.from_bytes(data, where="m")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "\ud800"], ids=repr)
@pytest.mark.parametrize("path", [("later",), ("statistics", "entries"), ("fields", 0, "attributes", "a"), ("provenance", "mood")])
def test_what_json_cannot_say_is_refused(path: Path, value: object) -> None:
    """NaN, infinity and lone surrogates, which other programs could not read, are a FormatError even in a file that is well signed."""
    with pytest.raises(FormatError, match="NaN, infinity and lone surrogates"):
        Manifest.from_bytes(signed(with_value(document_of(MANIFEST), path, value)), where="m")


def test_digest_catches_every_edit() -> None:
    """A manifest in which any single value was edited is an IntegrityError."""
    document = document_of(MANIFEST)
    for path in leaves(document):
        if path == ("format_version",):
            continue
        with pytest.raises(IntegrityError, match="damaged or was edited"):
            Manifest.from_bytes(as_kdcache_writes(with_value(document, path, "edited")), where="m")


def test_a_key_that_is_not_the_recipes_is_refused() -> None:
    """A manifest whose recipe key belongs to another recipe is an IntegrityError, even when its digest is right."""
    stolen = dataclasses.replace(MANIFEST, recipe_key=dataclasses.replace(RECIPE, codec="dense").key)
    with pytest.raises(IntegrityError, match="the recipe's digest is"):
        Manifest.from_bytes(stolen.to_bytes(), where="m")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format_version": "1.0"}',
        pytest.param(b'{"format_version": "1.0", "x": NaN}', id="NaN"),
        pytest.param(b'{"format_version": "1.0", "x": 1e999}', id="infinity"),
        pytest.param(b'{"format_version": "1.0", "x": "\\ud800"}', id="surrogate"),
    ],
    ids=lambda data: data[:30].decode(errors="replace"),
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    """Bytes that are no manifest give one of kdcache's own errors, which names the file."""
    with pytest.raises(KdcacheError, match=r"^caches/x/manifest\.json") as caught:
        Manifest.from_bytes(data, where="caches/x/manifest.json")
    assert isinstance(caught.value, FormatError | IntegrityError)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("recipe", "teacher", "num_classes"), "10", "m.recipe.teacher.num_classes: expected int, found '10'"),
        (("recipe", "teacher", "num_classes"), True, "m.recipe.teacher.num_classes: expected int, found True"),
        (("recipe", "teacher", "num_classes"), 10.0, "m.recipe.teacher.num_classes: expected int, found 10.0"),
        (("recipe", "views", "pipeline"), {}, "m.recipe.views.pipeline: expected list, found {}"),
        (("recipe", "views", "pipeline", 1), "crop", "m.recipe.views.pipeline[1]: expected dict, found 'crop'"),
        (("recipe", "views", "versions", "torch"), 2, "m.recipe.views.versions.torch: expected str, found 2"),
        (("grid",), None, "m.grid: expected dict, found None"),
        (("fields", 0, "inner", 0), "10", "m.fields[0].inner[0]: expected int, found '10'"),
        (("fields", 0, "fill_value"), None, "m.fields[0].fill_value: expected one of"),
        (("fields", 1, "bits"), "4", "m.fields[1].bits: expected one of"),
        (("fields", 1, "lengths", "minus"), None, "m.fields[1].lengths: expected one of"),
        (("fields", 1, "axes"), "view", "m.fields[1].axes: expected list, found 'view'"),
        (("calibration", "slope"), "steep", "m.calibration.slope: expected float, found 'steep'"),
        (("contents", "label"), 5, "m.contents.label: expected str, found 5"),
        (("layout",), None, "m.layout: expected str, found None"),
        (("license",), 5, "m.license: expected one of"),
        (("blocks", 2, "block", "samples"), [1], "m.blocks[2].block.samples: expected 2 items, found 1"),
        (("blocks", 2, "totals", "hits"), "many", "m.blocks[2].totals.hits: expected float, found 'many'"),
        (("statistics", "teacher_accuracy"), 10**400, "m.statistics.teacher_accuracy"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wrong_type_is_refused_with_its_place(path: Path, value: object, message: str) -> None:
    """A value of another type than the format's is a FormatError that says where, what was expected and what was found."""
    with pytest.raises(FormatError, match=re.escape(message)):
        Manifest.from_bytes(signed(with_value(document_of(MANIFEST), path, value)), where="m")


def test_every_missing_key_is_named() -> None:
    """A manifest without one of its keys is a FormatError that names the key."""
    document = document_of(MANIFEST)
    for key in document.keys() - {"digest", "format_version", "recipe_key"}:
        with pytest.raises(FormatError, match=f"the key '{key}' is missing"):
            Manifest.from_bytes(signed({name: value for name, value in document.items() if name != key}), where="m")


@given(document=JSON_VALUES, place=st.sampled_from(leaves(document_of(MANIFEST))))
def test_hostile_values_give_format_errors_only(document: Any, place: Path) -> None:
    """Whatever stands at any place of a signed manifest, reading it gives a manifest or one of kdcache's own errors."""
    try:
        manifest = Manifest.from_bytes(signed(with_value(document_of(MANIFEST), place, document)), where="m")
    except FormatError:
        return
    except IntegrityError:
        assert place[0] in ("digest", "recipe_key", "format_version")
        return
    assert at(json.loads(manifest.to_bytes()), place) == document or place[0] in ("digest", "recipe_key")


def test_recipe_key_depends_on_every_field_and_on_nothing_else() -> None:
    """A change of any value in a recipe changes its key; the same recipe, read from JSON in any order, has the same key."""
    document = to_json(RECIPE)
    keys = {RECIPE.key}
    for path in leaves(document):
        found = at(document, path)
        changed = from_json(Recipe, with_value(document, path, found + ("x" if isinstance(found, str) else 1)), where="r")
        keys.add(changed.key)
    assert len(keys) == 1 + len(leaves(document))
    turned = {name: dict(reversed(part.items())) if isinstance(part, dict) else part for name, part in reversed(document.items())}
    assert from_json(Recipe, turned, where="r").key == RECIPE.key


def test_recipe_key_is_the_same_for_ever() -> None:
    """The key of a known recipe is the sha256 of its canonical JSON, which other languages can compute too."""
    text = (
        '{"codec":"dense,dtype=float16","dataset":{"num_samples":5,"sha256":"sha256:bb","spec":"fashion-mini"},'
        '"teacher":{"num_classes":10,"positions":[],"precision":"float32","sha256":"sha256:aa","spec":"large,channels=1"},'
        '"views":{"pipeline":[{"op":"RandomCrop","padding":4,"size":[28,28]},{"op":"RandomHorizontalFlip","p":0.5}],'
        '"seed":3,"versions":{"torch":"2.7.0","torchvision":"0.22.0"}}}'
    )
    assert RECIPE.key == sha256(text.encode())


def test_logical_hash_is_of_the_records_alone() -> None:
    """The logical hash changes with the digest of any block's records or of any shared field, and with nothing else."""
    first = MANIFEST.blocks[0]
    other_files = (dataclasses.replace(first, files=()), *MANIFEST.blocks[1:])
    same = dataclasses.replace(MANIFEST, layout="parquet", blocks=other_files, license="CC0-1.0", metadata_files=())
    assert same.content == MANIFEST.content
    other_records = (dataclasses.replace(first, content="sha256:other"), *MANIFEST.blocks[1:])
    changed = [
        dataclasses.replace(MANIFEST, blocks=other_records),
        dataclasses.replace(MANIFEST, blocks=MANIFEST.blocks[::-1]),
        dataclasses.replace(MANIFEST, contents={"label": "sha256:other"}),
        dataclasses.replace(MANIFEST, contents={"table": "sha256:ff"}),
    ]
    assert len({MANIFEST.content, *(manifest.content for manifest in changed)}) == 1 + len(changed)


def test_differences_name_the_leaves() -> None:
    """Two recipes are compared leaf by leaf: what differs, from what to what, and nothing that is equal."""
    other = dataclasses.replace(RECIPE, codec="topk", views=dataclasses.replace(RECIPE.views, pipeline=RECIPE.views.pipeline[:1]))
    assert recipe_differences(RECIPE, RECIPE) == []
    assert recipe_differences(RECIPE, other) == [
        'codec: "dense,dtype=float16" → "topk"',
        'views.pipeline.1.op: "RandomHorizontalFlip" → absent',
        "views.pipeline.1.p: 0.5 → absent",
    ]


@given(num_samples=st.integers(1, 60), num_views=st.integers(1, 12), block_samples=st.integers(1, 70), block_views=st.integers(1, 14))
def test_blocks_cover_everything_exactly_once(num_samples: int, num_views: int, block_samples: int, block_views: int) -> None:
    """Whatever the sizes, every (sample, view) is in exactly one block, no block is larger than asked, and names are unique."""
    grid = BlockGrid(num_samples=num_samples, num_views=num_views, block_samples=block_samples, block_views=block_views)
    blocks = grid.blocks()
    places = [(row, view) for block in blocks for row in range(*block.samples) for view in range(*block.views)]
    assert sorted(places) == [(row, view) for row in range(num_samples) for view in range(num_views)]
    assert len({block.id for block in blocks}) == len(blocks) == grid.num_blocks
    assert sum(block.num_rows for block in blocks) == num_samples * num_views
    for block in blocks:
        assert block.samples[0] == block.sample_block * block_samples
        assert 1 <= block.samples[1] - block.samples[0] <= block_samples
        assert 1 <= block.views[1] - block.views[0] <= block_views
    assert {block.sample_block for block in blocks} == set(range(grid.num_sample_blocks))


def test_block_names_sort_in_the_order_of_the_work() -> None:
    """Sorting marks by name gives the order in which blocks are computed."""
    names = [block.id for block in BlockGrid(num_samples=150, num_views=12, block_samples=10, block_views=5).blocks()]
    assert names == sorted(names)
    assert Block(sample_block=2, samples=(8, 12), views=(0, 4)).id == "s00002.v0000-0004"
