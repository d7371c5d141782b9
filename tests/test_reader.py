"""The reader of the mapped layout: opens what is asked for, in any process, in any order."""

import gc
import multiprocessing
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stored import BLOCK_SAMPLES, NUM_SAMPLES, NUM_VIEWS, Noise, dump_noise

from kdcache.learning.cache import Cache
from kdcache.learning.datasets import wrap_dataset
from kdcache.learning.loader import ViewLoader
from kdcache.learning.schedule import window_order
from kdcache.records.errors import MismatchError
from kdcache.store.reader import CacheReader
from kdcache.workflows.convert import convert

FIELDS = ("logits/index", "logits/gap", "logits/tail")


@pytest.fixture(scope="module", params=["topk,k=5", "adaptive,mean_k=4,max_k=16"], ids=["fixed", "ragged"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests must not change."""
    return dump_noise(tmp_path_factory.mktemp("cache"), codec=request.param, num_classes=300).path


def some_records(seed: int = 0, count: int = 64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random rows and views."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, NUM_SAMPLES, count), rng.integers(0, NUM_VIEWS, count)


def mapped_files(root: Path) -> set[str]:
    """The store's files that this process has mapped, all of them shared and read-only."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if f"{root.resolve()}/" in line]
    assert all(permissions == "r--s" for _, permissions, *_ in lines)
    return {Path(line[5]).relative_to(root.resolve()).as_posix() for line in lines}


def gather_bytes(reader: CacheReader) -> dict[str, bytes]:
    """What a process reads."""
    return {name: array.tobytes() for name, array in reader.gather(FIELDS, *some_records()).items()}


def _child(reader: CacheReader, connection: "multiprocessing.connection.Connection") -> None:
    connection.send(gather_bytes(reader))


def test_only_what_is_asked_for_is_opened(cache: Path) -> None:
    """Other fields, views and ranges of samples stay closed; what is opened is mapped, so that processes share the page cache."""
    reader = CacheReader(cache)
    assert not mapped_files(cache)
    reader.gather(["logits/tail"], np.array([0, 3]), np.array([2, 2]))
    assert mapped_files(cache) == {"logits/tail/c/2/0/0"}
    reader.gather(["logits/tail"], np.array([NUM_SAMPLES - 1]), np.array([4]))
    assert mapped_files(cache) == {"logits/tail/c/2/0/0", f"logits/tail/c/4/{(NUM_SAMPLES - 1) // 17}/0"}
    del reader
    gc.collect()
    assert not mapped_files(cache)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_any_process_may_use_a_reader(cache: Path, method: str, used: bool) -> None:
    """A reader handed to a forked, spawned or fork-served process reads the same there, whether it was used before or not."""
    reader = CacheReader(cache)
    if used:
        gather_bytes(reader)
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(reader, send))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        process.start()
    assert receive.poll(60), "the child hangs"
    assert receive.recv() == gather_bytes(CacheReader(cache))
    process.join(10)
    assert process.exitcode == 0


def test_a_pickled_reader_opens_the_cache_anew(cache: Path) -> None:
    """What is pickled is the place, not the content."""
    reader = CacheReader(cache)
    assert len(pickle.dumps(reader)) < 1000
    assert gather_bytes(pickle.loads(pickle.dumps(reader))) == gather_bytes(reader)


def test_rows_and_views_outside_are_refused(cache: Path) -> None:
    """A negative or too large row or view is an error and never another record."""
    reader = CacheReader(cache)
    for rows, views in (([-1], [0]), ([NUM_SAMPLES], [0]), ([0], [-1]), ([0], [NUM_VIEWS])):
        with pytest.raises(MismatchError, match="expected"):
            reader.gather(FIELDS, np.array(rows), np.array(views))
    assert len(reader.gather(FIELDS, np.empty(0, np.int64), np.empty(0, np.int64))["logits/index"]) == 0


@pytest.mark.parametrize("layout", ["parquet", "compact"])
def test_layouts_without_random_access_give_the_same_soft_targets(cache: Path, layout: str, tmp_path: Path) -> None:
    """Decoding whole ranges gives, for any records in any order, what the mapped layout gives."""
    other = convert(cache, tmp_path / layout, layout=layout).path
    for seed in range(3):
        expected, found = (Cache(root).soft_targets(*some_records(seed)) for root in (cache, other))
        assert torch.equal(found.log_probs, expected.log_probs)
        assert found.index is not None
        assert expected.index is not None
        assert torch.equal(found.index, expected.index)


def make_loader(cache: Cache, *, order: str, batch_size: int = 8, seed: int = 0) -> ViewLoader:
    """A loader over the cached dataset in reverse order."""
    noise = Noise(300)
    dataset = wrap_dataset([noise[i] for i in reversed(range(len(noise)))], num_classes=300)
    return cache.join(dataset).loader(batch_size=batch_size, seed=seed, order=order)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["random", "windows"])
def test_an_epoch_can_be_taken_up_at_any_batch(cache: Path, order: str) -> None:
    """Seed, epoch and position are the whole state: what is left of an epoch is the same as if it had never stopped."""
    loader = make_loader(Cache(cache), order=order)
    whole = list(loader.epoch(3))
    assert sorted(int(label) for batch in whole for label in batch.labels) == list(range(NUM_SAMPLES))
    rest = list(make_loader(Cache(cache), order=order).epoch(3, position=4))
    assert len(rest) == len(whole) - 4
    for found, expected in zip(rest, whole[4:], strict=True):
        assert torch.equal(found.images, expected.images)
        assert found.soft is not None
        assert expected.soft is not None
        assert torch.equal(found.soft.log_probs, expected.soft.log_probs)
    other = list(make_loader(Cache(cache), order=order).epoch(4))
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(whole, other, strict=True))


def test_windows_read_few_ranges_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In window order the rows of a window come from its own blocks only, and every row comes once."""
    monkeypatch.setattr("kdcache.learning.schedule.ROWS_IN_A_WINDOW", 150)
    blocks = [np.arange(start, start + 50) for start in range(0, 1000, 50)]
    order = window_order(blocks, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(1000))
    windows = [set((order[start : start + 150] // 50).tolist()) for start in range(0, 1000, 150)]
    assert [len(window) for window in windows] == [3] * 6 + [2]
    assert len(set.union(*windows)) == 20
    assert order[:150].tolist() != sorted(order[:150].tolist())


def test_the_order_follows_from_the_layout(cache: Path, tmp_path: Path) -> None:
    """`auto` is random access where that is quick and windows where it is not."""
    mapped = Cache(cache)
    noise = Noise(300)
    dataset = wrap_dataset([noise[i] for i in range(len(noise))], num_classes=300)
    assert mapped.join(dataset).blocks("auto") is None
    parquet = Cache(convert(cache, tmp_path / "parquet", layout="parquet").path)
    blocks = parquet.join(dataset).blocks("auto")
    assert blocks is not None
    assert [len(block) for block in blocks] == [17, 17, 16]
    assert BLOCK_SAMPLES == 20
