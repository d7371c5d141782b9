"""No damage to a store passes: hundreds of random ones, in every layout, for every reader."""

import random
import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.typing import NDArray
from stored import dump_noise, tree

from kdcache.records.errors import KdcacheError
from kdcache.store.reader import CacheReader
from kdcache.workflows.convert import convert
from kdcache.workflows.verify import verify

CODECS = {"topk": ("topk,k=5", 300), "adaptive": ("adaptive,mean_k=4,max_k=16", 300), "dense": ("dense,dtype=uint8", 12)}
LAYOUTS = ("zarr", "parquet", "compact")
DAMAGES_A_STORE = 60

Content = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A store for each codec and layout; a test that damages one mends it again."""
    made = {}
    for name, (codec, num_classes) in CODECS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name, "zarr"] = dump_noise(folder, codec=codec, num_classes=num_classes).path
        for layout in LAYOUTS[1:]:
            made[name, layout] = convert(made[name, "zarr"], folder / layout, layout=layout).path
    return made


@pytest.fixture(params=[(codec, layout) for codec in CODECS for layout in LAYOUTS], ids=lambda pair: "-".join(pair))
def store(request: pytest.FixtureRequest, stores: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    """Each store in turn, as a copy."""
    return Path(shutil.copytree(stores[request.param], tmp_path / "store"))


def content(root: Path) -> Content:
    """Everything that a reader can get out of a store."""
    reader = CacheReader(root)
    grid = reader.manifest.grid
    rows, views = (axis.ravel() for axis in np.meshgrid(np.arange(grid.num_samples), np.arange(grid.num_views)))
    records = reader.gather([field.name for field in reader.manifest.fields if field.per_view], rows, views)
    return records | {field.name: reader.shared(field.name) for field in reader.manifest.fields if not field.per_view}


def is_same(found: Content, expected: Content) -> bool:
    """Whether two contents are equal bit by bit."""
    return found.keys() == expected.keys() and all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def damages(root: Path, dice: random.Random) -> Iterator[str]:
    """Damages a store in one way after the other, each time from the whole store; gives what was done."""
    whole = tree(root)
    kinds = ("flip", "flip", "flip", "truncate", "append", "remove", "swap", "zero")
    while True:
        kind, path = dice.choice(kinds), dice.choice([path for path, data in whole.items() if data])
        data = bytearray(whole[path])
        place = dice.randrange(len(data))
        touched = [path]
        if kind == "flip":
            data[place] ^= 1 << dice.randrange(8)
        elif kind == "truncate":
            del data[place:]
        elif kind == "append":
            data += bytes(dice.randrange(1, 9))
        elif kind == "zero":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        elif kind == "swap":
            other = dice.choice([name for name in whole if name != path])
            touched.append(other)
            (root / other).write_bytes(whole[path])
            data = bytearray(whole[other])
        (root / path).write_bytes(data)
        if kind == "remove":
            (root / path).unlink()
        if kind == "remove" or any((root / name).read_bytes() != whole[name] for name in touched):
            try:
                yield f"{kind} {' and '.join(touched)} at {place}"
            finally:
                for name in touched:
                    (root / name).write_bytes(whole[name])


def test_every_damage_is_found_and_never_read(store: Path) -> None:
    """Flipped bits, truncation, missing, longer, zeroed and swapped files: verify names them, a reader gives no wrong number."""
    expected = content(store)
    with closing(damages(store, random.Random(0))) as done:
        for what in islice(done, DAMAGES_A_STORE):
            try:
                problems = verify(store).problems
            except KdcacheError:
                problems = ("refused",)
            assert problems, f"verify passes: {what}"
            try:
                found = content(store)
            except KdcacheError:
                continue
            assert is_same(found, expected), f"a reader gives other numbers: {what}"
    assert is_same(content(store), expected)


@pytest.mark.parametrize("codec", CODECS)
def test_plain_zarr_finds_every_flipped_bit_of_a_chunk(stores: dict[tuple[str, str], Path], codec: str, tmp_path: Path) -> None:
    """Whoever reads the mapped layout with Zarr alone is warned by the checksum of each chunk, ragged ones too."""
    root = Path(shutil.copytree(stores[codec, "zarr"], tmp_path / "store"))
    dice = random.Random(1)
    chunks = [path for path in sorted(root.rglob("*")) if path.is_file() and "/c/" in path.as_posix() and path.stat().st_size]
    for _ in range(60):
        path = dice.choice(chunks)
        whole = path.read_bytes()
        data = bytearray(whole)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        name = path.relative_to(root).as_posix().split("/c/")[0]
        array = zarr.open_array(root / name, mode="r")
        with pytest.raises(Exception, match=r"(?i)checksum|crc"):
            array[...]
        path.write_bytes(whole)


@pytest.mark.parametrize("codec", CODECS)
def test_plain_pyarrow_finds_every_flipped_bit_of_a_page(stores: dict[tuple[str, str], Path], codec: str, tmp_path: Path) -> None:
    """Whoever reads the Parquet layout with pyarrow and page checksums gets an error or the same table, never another one."""
    root = Path(shutil.copytree(stores[codec, "parquet"], tmp_path / "store"))
    dice = random.Random(2)
    path = next(iter(sorted((root / "records").glob("*.parquet"))))
    whole = path.read_bytes()
    expected = pq.read_table(path, page_checksum_verification=True)
    end_of_pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    caught = 0
    for _ in range(60):
        data = bytearray(whole)
        data[dice.randrange(4, end_of_pages)] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            found = pq.read_table(path, page_checksum_verification=True)
        except (OSError, ValueError):
            caught += 1
        else:
            assert found.equals(expected)
    assert caught > 50
