"""Random batches of 256 from a million realistic records, k=16 of 1000 classes, against other ways to keep the same bytes.

Run: python tests/benchmarks/gather.py            (about three minutes on two cores; prints Markdown)
"""

import statistics
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
from measuring import ROWS, encode_all, machine, make_store, realistic_blocks, seconds, table
from numpy.typing import NDArray

from kdcache.learning.cache import Cache
from kdcache.learning.loader import BATCHES_A_GATHER
from kdcache.records.specs import Spec
from kdcache.targets.codecs import make_codec

BLOCKS = 16
RECORDS = BLOCKS * ROWS
SMALL = 16_384
"""Records of the ways that need a file or a seek each."""

Work = Callable[[NDArray[np.int64]], object]


def rate(work: Work, *, batches: int, records: int = RECORDS) -> float:
    """Records a second over random batches, the median of seven runs."""
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, records, 256) for _ in range(batches)]

    def epoch() -> None:  # each batch is dropped before the next one comes, as in training
        for rows in chosen:
            work(rows)

    epoch()
    return 256 * batches / statistics.median(seconds(epoch) for _ in range(7))


def rate_in_training(cache: Cache, *, batches: int) -> float:
    """As `rate`, for what a loader does: the order is known, so several batches are read by one gather, and dealt out."""
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, RECORDS, 256 * BATCHES_A_GATHER) for _ in range(batches // BATCHES_A_GATHER)]
    views = np.zeros(256 * BATCHES_A_GATHER, np.int64)

    def epoch() -> None:
        for rows in chosen:
            for _ in cache.soft_targets(rows, views).split(256):
                pass

    epoch()
    return 256 * BATCHES_A_GATHER * len(chosen) / statistics.median(seconds(epoch) for _ in range(7))


def ways(folder: Path, cache: Cache, arrays: dict[str, NDArray[Any]]) -> Iterator[tuple[str, float]]:
    """(what, records a second) for ours and each other way."""
    names = [field.name for field in cache.codec.fields(())]
    view = np.zeros(256, np.int64)
    in_training = rate_in_training(cache, batches=400)
    yield f"kdcache: gather and decode to soft targets, {BATCHES_A_GATHER} batches at once as in training", in_training
    yield "kdcache: gather and decode to soft targets, batch by batch", rate(lambda rows: cache.soft_targets(rows, view), batches=400)
    yield "kdcache: gather alone", rate(lambda rows: cache.reader.gather(names, rows, view), batches=400)

    width = 38
    np.random.default_rng(0).integers(0, 255, RECORDS * width, np.uint8).tofile(folder / "flat")
    flat = np.memmap(folder / "flat", np.uint8, "r", shape=(RECORDS, width))
    yield "bare memory map of 38-byte rows, `rows[batch]`", rate(lambda rows: flat[rows], batches=400)
    yield "bare memory map, `rows.take(batch, 0)`", rate(lambda rows: flat.take(rows, axis=0), batches=400)

    store = zarr.open_group(cache.reader.root, mode="r")
    fields = [store[name] for name in names]
    yield "the same store through Zarr's `oindex`", rate(lambda rows: [field.oindex[0, np.unique(rows)] for field in fields], batches=2)

    table = pa.table({name: pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1]) for name, rows in arrays.items()})
    pq.write_table(table, folder / "rows.parquet", row_group_size=4096, compression="zstd")
    file = pq.ParquetFile(folder / "rows.parquet")
    groups = file.num_row_groups

    def from_parquet(rows: NDArray[np.int64]) -> list[Any]:
        return [file.read_row_group(int(group)).take(rows[rows // 4096 == group] % 4096) for group in np.unique(rows // 4096)]

    yield f"Parquet, row groups of 4096 ({groups} of them)", rate(from_parquet, batches=2, records=ROWS)

    for row in range(SMALL):
        torch.save({name: torch.from_numpy(array[row]) for name, array in arrays.items()}, folder / f"{row}.pt")
    yield (
        f"one `torch.save` file a sample ({SMALL:,} of them)",
        rate(lambda rows: [torch.load(folder / f"{row}.pt", weights_only=True) for row in rows], batches=4, records=SMALL),
    )

    record = struct.Struct("<16h16ei")  # int16 classes, float16 values, the seed of the view
    (folder / "tinyvit.bin").write_bytes(bytes(record.size * ROWS))
    with (folder / "tinyvit.bin").open("rb") as tinyvit:

        def from_tinyvit(rows: NDArray[np.int64]) -> list[Any]:
            found = []
            for row in rows:
                tinyvit.seek(int(row) * record.size)
                found.append(np.frombuffer(tinyvit.read(record.size), np.uint8))
            return found

        yield "TinyViT's record file: seek and read a sample", rate(from_tinyvit, batches=40, records=ROWS)


def main() -> None:
    """Prints the tables."""
    torch.set_num_threads(1)
    print(machine())
    codec = make_codec(Spec.parse("topk,k=16"), num_classes=1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logits = next(realistic_blocks(1))
        encode_s = statistics.median(seconds(lambda: encode_all(codec, logits[:8192])) for _ in range(5))
        make_store(folder / "store", codec, realistic_blocks(BLOCKS), num_blocks=BLOCKS)
        cache = Cache(folder / "store")
        arrays = encode_all(codec, logits)
        found = list(ways(folder, cache, arrays))
        bare = dict(found)["bare memory map of 38-byte rows, `rows[batch]`"]
        table("what|records a second|beside the bare map", (f"{what} | {each:,.0f} | {each / bare:.4f}" for what, each in found))
        block, grid = cache.manifest.grid.blocks()[0], cache.manifest.grid
        views = {name: [array] for name, array in arrays.items()}
        write = lambda: cache.reader.backend.write_block(folder / "written", codec.fields(()), grid, block, views)  # noqa: E731
        write_s = statistics.median(seconds(write) for _ in range(5))
        print(
            f"\nEncoder, one core: {8192 / encode_s:,.0f} records/s. Writer (pack, checksum, sha256, fsync): {ROWS / write_s:,.0f} records/s."
        )


if __name__ == "__main__":
    main()
