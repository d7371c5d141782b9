"""Views made in other processes: what is pickled to them, and what they send back. Imports little, for a quick start."""

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdcache.learning.operations import try_operations
from kdcache.learning.views import SeededViews, library_versions, make_views
from kdcache.records.errors import SpecError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import ViewsRecord

SHAPE = (3, 20, 24)
Item = tuple[int, int, int]


def noise_image(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """An image in which hardly two pixels are equal."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def views_from(*pipeline: dict[str, Any], seed: int = 0, enumerated: bool = False) -> SeededViews:
    """The views of a pipeline that is given as data, as they are read from a manifest."""
    return SeededViews(ViewsRecord(pipeline=pipeline, seed=seed, versions=library_versions(), enumerated=enumerated))


def digests(pipeline: Sequence[dict[str, Any]], num_views: int) -> list[str]:
    """Digests of an image's views, last one first, with other draws between them."""
    views = views_from(*pipeline)
    made = {}
    for view in reversed(range(num_views)):
        torch.rand(view + 1)
        made[view] = sha256(views(noise_image(), b"k" * 16, view).contiguous().numpy().tobytes())
    return [made[view] for view in range(num_views)]


@contextmanager
def another_process() -> Iterator[Pool]:
    """A fresh process with other random states and another number of threads, in which no annotations are checked."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=_disturb) as pool:
        yield pool


def _disturb() -> None:
    torch.set_num_threads(3)
    torch.manual_seed(12345)


def keeps_random_states(good: Sequence[dict[str, Any]], bad: Sequence[dict[str, Any]]) -> bool:
    """Whether trying operations, good ones and ones that are refused, leaves the states of Python, NumPy and PyTorch."""
    before = _random_states()
    try_operations(good, noise_image())
    try:
        try_operations(bad, noise_image())
    except SpecError:
        return _random_states() == before
    return False


def _random_states() -> list[object]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]


class ViewsOf(Dataset[tuple[Item, bytes]]):
    """(recipe, image, view) triples as a dataset, for a DataLoader of any kind."""

    def __init__(self, views: list[SeededViews], items: list[Item]) -> None:
        self.views, self.items = views, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Item, bytes]:
        recipe, image, view = item = self.items[index]
        return item, self.views[recipe](noise_image(image), bytes([image]) * 16, view).contiguous().numpy().tobytes()


def views_by_name(names: Sequence[str], seed: int) -> dict[Item, bytes]:
    """A few views of named augmentations, made from the names."""
    views = [make_views(name, seed=seed, image_shape=SHAPE) for name in names]
    return dict(ViewsOf(views, [(recipe, image, view) for recipe in range(len(views)) for image in range(4) for view in range(6)]))


def as_list(batch: list[Any]) -> list[Any]:
    """A batch as it is."""
    return batch
