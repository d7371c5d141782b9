"""The store as FORMAT.md specifies it, read by programs that know nothing of kdcache: Zarr, NumPy, the standard library."""

import dataclasses
import inspect
import json
import math
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from kdcache.learning.cache import Cache
from kdcache.learning.checkpoints import save_model
from kdcache.learning.datasets import image_key
from kdcache.learning.models import build_model
from kdcache.records import manifest as records
from kdcache.records.hashing import canonical_json, stable_integer
from kdcache.records.manifest import FieldRecord, Manifest
from kdcache.records.specs import Spec
from kdcache.store.ledger import DumpPlan
from kdcache.targets.codecs import make_codec
from kdcache.workflows.dump import dump

FORMAT = Path(records.__file__).parents[1] / "store" / "FORMAT.md"
CODECS = {"topk": (300, "topk,k=5"), "topk-all": (6, "topk,k=6"), "dense": (12, "dense")}
"""By name: class count and codec spec."""
NUM_SAMPLES, NUM_VIEWS = 50, 5


class Noise:
    """Small coloured images of noise."""

    def __init__(self, num_classes: int) -> None:
        self.classes = range(num_classes)
        self._images = torch.randint(0, 256, (NUM_SAMPLES, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], index % len(self.classes)


def make_cache(folder: Path, *, num_classes: int, codec: str) -> Path:
    """A cache of three ranges of rows, the last one padded, and two groups of views."""
    spec = Spec.parse(f"tiny,num_classes={num_classes},channels=3,image_size=8")
    torch.manual_seed(2)
    model = build_model(spec, trusted=True)
    with torch.no_grad():
        model.get_parameter("body.head.weight").mul_(300)  # answers as decided as a trained teacher's
    teacher = folder / "teacher.safetensors"
    save_model(teacher, model, spec=spec, metadata={})
    data = f"py:{__name__}:Noise,num_classes={num_classes}"
    result = dump(teacher, data, folder / "cache", views=NUM_VIEWS, codec=codec, block_samples=20, batch_size=16, device="cpu")
    assert [(block.block.samples, block.block.views) for block in result.manifest.blocks][-1] == ((34, 50), (4, 5))
    return result.path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache for each codec; tests must not change them."""
    return {
        name: make_cache(tmp_path_factory.mktemp(name), num_classes=num_classes, codec=codec)
        for name, (num_classes, codec) in CODECS.items()
    }


@pytest.fixture(params=CODECS)
def cache(request: pytest.FixtureRequest, caches: dict[str, Path]) -> Cache:
    """Each of the caches in turn."""
    return Cache(caches[request.param])


def python_blocks() -> list[str]:
    """The Python examples of FORMAT.md."""
    return re.findall(r"^```python\n(.*?)^```", FORMAT.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run_example(name: str, folder: Path, *, cache: Path) -> dict[str, Any]:
    """Runs the example that has `name` in it on a cache; gives its variables."""
    (block,) = (block for block in python_blocks() if name in block)
    script = folder / "example.py"
    script.write_text(block.replace("path/to/cache", str(cache)), "utf-8")
    return runpy.run_path(str(script))


def copied(root: Path, folder: Path) -> Path:
    """A copy of a cache that a test may damage."""
    return Path(shutil.copytree(root, folder / "copy"))


def plain_array(root: Path, name: str) -> zarr.Array[Any]:
    """An array as Zarr alone opens it."""
    array = zarr.open_group(root, mode="r")[name]
    assert isinstance(array, zarr.Array)
    return array


def fills(values: NDArray[Any], field: FieldRecord) -> NDArray[np.bool_]:
    """Where an array has the field's fill value."""
    return np.isnan(values) if field.fill_value == "NaN" else values == field.fill_value


def first_chunk(root: Path, field: FieldRecord) -> Path:
    """The chunk file of the first view and the first rows."""
    indices = ["0"] * (field.per_view + 1 + len(field.inner))
    return root.joinpath(*field.name.split("/"), "c", *indices)


def test_plain_zarr_sees_what_the_manifest_says(cache: Cache) -> None:
    """Plain Zarr opens every array with the shape, type, names, fill value and attributes of the manifest; codecs: bytes, crc32c."""
    grid = cache.manifest.grid
    for field in cache.manifest.fields:
        array = plain_array(cache.reader.root, field.name)
        views, names = ((NUM_VIEWS,), ("view", "sample")) if field.per_view else ((), ("sample",))
        assert array.shape == (*views, NUM_SAMPLES, *field.inner)
        assert array.chunks == (*(1 for _ in views), grid.block_samples, *field.inner)
        assert array.dtype == np.dtype(field.dtype)
        assert array.metadata.dimension_names == (*names, *field.inner_names)
        assert fills(np.asarray(array.fill_value), field).all()
        assert array.attrs.asdict() == field.attributes
        metadata = json.loads((cache.reader.root / field.name / "zarr.json").read_bytes())
        assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "crc32c"]
        assert metadata["codecs"][0].get("configuration", {"endian": "little"}) == {"endian": "little"}
        assert not metadata["storage_transformers"]


def test_plain_zarr_reads_what_the_reader_gathers(cache: Cache) -> None:
    """Every record is the same through plain Zarr and through kdcache's memory map."""
    views, rows = (axis.ravel() for axis in np.meshgrid(np.arange(NUM_VIEWS), np.arange(NUM_SAMPLES), indexing="ij"))
    for field in cache.manifest.fields:
        whole = plain_array(cache.reader.root, field.name)[...]
        gathered = cache.reader.gather([field.name], rows, views)[field.name]
        expected = whole.reshape(-1, *field.inner) if field.per_view else whole[rows]
        np.testing.assert_array_equal(gathered, expected)


def test_no_record_holds_a_fill_value(cache: Cache) -> None:
    """No stored number is its field's fill value, and no key is all fill."""
    for field in cache.manifest.fields:
        filled = fills(plain_array(cache.reader.root, field.name)[...], field)
        assert not (filled.all(axis=-1) if field.name == "key" else filled).any()


def test_missing_chunk_reads_as_fill(cache: Cache, tmp_path: Path) -> None:
    """A lost chunk file is all fill value to plain Zarr, so it cannot be taken for data."""
    root = copied(cache.reader.root, tmp_path)
    for field in cache.manifest.fields:
        first_chunk(root, field).unlink()
        array = plain_array(root, field.name)
        rows = cache.manifest.grid.block_samples
        lost, kept = (array[0, :rows], array[0, rows:]) if field.per_view else (array[:rows], array[rows:])
        assert fills(lost, field).all()
        assert not fills(kept, field).all()


def test_flipped_bit_makes_plain_zarr_raise(cache: Cache, tmp_path: Path) -> None:
    """One changed bit anywhere in a chunk file, its checksum included, is an error to plain Zarr."""
    root = copied(cache.reader.root, tmp_path)
    for field in cache.manifest.fields:
        path = first_chunk(root, field)
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 5, len(whole) - 1):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
            with pytest.raises(ValueError, match=r"(?i)checksum"):
                plain_array(root, field.name)[0]
        path.write_bytes(whole)


def test_chunk_file_is_rows_padding_and_checksum(cache: Cache) -> None:
    """Each file is the rows in C order, little endian, padded with the fill value, then CRC-32C; and nothing else is there."""
    root, grid = cache.reader.root, cache.manifest.grid
    for field in cache.manifest.fields:
        whole = plain_array(root, field.name)[...]
        for view in range(NUM_VIEWS) if field.per_view else (None,):
            for index in range(grid.num_sample_blocks):
                rows = (whole if view is None else whole[view])[index * grid.block_samples : (index + 1) * grid.block_samples]
                padded = np.full((grid.block_samples, *field.inner), field.fill_value, np.dtype(field.dtype).newbyteorder("<"))
                padded[: len(rows)] = rows
                place = [str(i) for i in (view, index) if i is not None]
                data = root.joinpath(*field.name.split("/"), "c", *place, *("0" for _ in field.inner)).read_bytes()
                assert data == padded.tobytes() + google_crc32c.value(padded.tobytes()).to_bytes(4, "little")
    on_disk = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert on_disk == {"manifest.json", *(file.path for file in cache.manifest.files)}


def test_example_reads_a_record(caches: dict[str, Path], tmp_path: Path) -> None:
    """The example of FORMAT.md, with Zarr and NumPy alone, gives what kdcache decodes."""
    found = run_example("zarr.open_group", tmp_path, cache=caches["topk"])
    soft = Cache(caches["topk"]).soft_targets(np.array([found["row"]]), np.array([found["view"]]))
    probs, tail = soft.probs_at(found["temperature"])
    assert soft.index is not None
    np.testing.assert_array_equal(found["classes"], soft.index[0])
    np.testing.assert_allclose(found["log_probs"], soft.log_probs[0], rtol=1e-5)
    np.testing.assert_allclose(found["probs"], probs[0], rtol=1e-5)
    np.testing.assert_allclose(found["tail_mass"], tail[0], rtol=1e-5)
    assert 0.1 < float(tail[0]) < 0.9, "too plain a record to tell anything"


def test_example_checks_a_cache(cache: Cache, tmp_path: Path) -> None:
    """The checker of FORMAT.md, with the standard library alone, passes a whole cache and refuses any change to it."""
    root = copied(cache.reader.root, tmp_path)
    run_example("read_bytes", tmp_path, cache=root)
    manifest = (root / "manifest.json").read_bytes()
    (root / "manifest.json").write_bytes(manifest.replace(b'"num_views": 5', b'"num_views": 4'))
    with pytest.raises(AssertionError):
        run_example("read_bytes", tmp_path, cache=root)
    (root / "manifest.json").write_bytes(manifest)
    path = first_chunk(root, cache.manifest.fields[0])
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(AssertionError, match="logits"):
        run_example("read_bytes", tmp_path, cache=root)


def test_example_derives_the_seed_of_a_view(caches: dict[str, Path], tmp_path: Path) -> None:
    """The example's `stable_integer` is kdcache's, for keys, seeds and views of any size."""
    found = run_example("blake2b", tmp_path, cache=caches["topk"])["stable_integer"]
    for parts in ((0, b"", 0), (-1, bytes(16), 2**70), (7, bytes(range(240, 256)), 3)):
        assert found(*parts) == stable_integer(*parts)


def test_every_example_is_tested() -> None:
    """FORMAT.md has three Python examples, the ones that are run above."""
    assert len(python_blocks()) == 3


def test_format_names_every_key() -> None:
    """FORMAT.md names every key of the manifest and of the plan of a dump."""
    text = FORMAT.read_text("utf-8")
    kinds = [kind for _, kind in inspect.getmembers(records, dataclasses.is_dataclass) if isinstance(kind, type)]
    assert Manifest in kinds
    for kind in (*kinds, DumpPlan):
        for item in dataclasses.fields(kind):
            assert re.search(rf"`(\w+\.)*{item.name}(\.\w+)*`", text), f"FORMAT.md does not mention {kind.__name__}.{item.name}"


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 3.0, 4.0, 20.0])
def test_format_gives_probabilities_at_any_temperature(caches: dict[str, Path], temperature: float) -> None:
    """Section 5.3 of FORMAT.md, worked in double precision from the stored codes, gives kdcache's probabilities."""
    rows, views = np.arange(NUM_SAMPLES), np.full(NUM_SAMPLES, 3)
    probs, tail = Cache(caches["topk"]).soft_targets(rows, views).probs_at(temperature)
    codes = plain_array(caches["topk"], "logits/gap")[3].astype(np.float64)
    weights = np.exp(-np.cumsum(32 * (codes / 254) ** 2, axis=-1) / temperature)
    masses = np.sin(np.pi / 2 * plain_array(caches["topk"], "logits/tail")[3] / 254) ** 2
    held = masses.clip(1e-6, 1 - 1e-6)
    known = {0.0: np.full(NUM_SAMPLES, math.log((300 - 5) / 5))}
    known |= {1 / t: np.log(held[:, i] / (1 - held[:, i])) for i, t in enumerate((1.0, 2.0, 4.0))}
    betas = sorted(known)
    right = min(np.searchsorted(betas, 1 / temperature), len(betas) - 1)
    low, high = betas[right - 1], betas[right]
    value = known[low] + (1 / temperature - low) / (high - low) * (known[high] - known[low])
    expected = 1 / (1 + np.exp(-value))
    if temperature in (1.0, 2.0, 4.0):
        expected = masses[:, (1.0, 2.0, 4.0).index(temperature)]
    np.testing.assert_allclose(tail, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(probs, (1 - expected)[:, None] * weights / weights.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_vectors() -> None:
    """The test vectors of FORMAT.md are what kdcache computes."""
    text = FORMAT.read_text("utf-8")
    assert f"| {stable_integer(0, bytes(range(16)), 3)} |" in text
    assert f"`{image_key(torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)).hex()}`" in text
    assert f"`{canonical_json({'b': [1, 1.0, 0.00001, 1e16, -0.0], 'Z': None}).decode()}`" in text
    assert f"`{google_crc32c.value(b'123456789'):x}`" in text
    codec = make_codec(Spec.parse("topk,k=2"), num_classes=4)
    assert f"`{codec.spec}`" in text
    arrays = codec.encode(torch.tensor([[1.0, 4.0, 2.0, -1.0]]))
    index, gap, tail = (", ".join(map(str, arrays[f"logits/{name}"][0].tolist())) for name in ("index", "gap", "tail"))
    assert f"index {index}; gap {gap}; tail {tail}" in text
    for temperature in (1.0, 3.0, 0.5):
        kept, rest = codec.decode(arrays).probs_at(temperature)
        assert f"T = {temperature:g} | | {kept[0, 0]:.4f}, {kept[0, 1]:.4f}; others {rest[0]:.4f} |" in text
