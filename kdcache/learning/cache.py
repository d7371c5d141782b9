"""A cache as training sees it: soft targets for a dataset's samples, joined on their keys, and the views that belong to them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from kdcache.learning.datasets import Dataset, MapDataset, wrap_dataset
from kdcache.learning.loader import ViewLoader
from kdcache.learning.views import SeededViews, library_versions
from kdcache.records.errors import ConfigError, FormatError, MismatchError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import Manifest, Probe
from kdcache.records.specs import Spec
from kdcache.store.reader import CacheReader
from kdcache.targets.codecs import make_codec
from kdcache.targets.profile import PROFILE, Profile, profile_field
from kdcache.targets.soft_targets import SoftTargets

NUM_PROBES = 8

Order = Literal["auto", "random", "windows"]
ORDERS: tuple[Order, ...] = get_args(Order)


class Cache:
    """A complete cache, opened for training. The teacher is not needed.

    Args:
        path: The cache's directory.

    Raises:
        CacheNotFoundError: There is no cache.
        IncompleteCacheError: A dump was begun there and is not finished.
        FormatError: Unknown version or codec.
        IntegrityError: The manifest is damaged; other files are verified when they are first used.
    """

    def __init__(self, path: str | Path) -> None:
        self.reader = CacheReader(Path(path))
        recipe = self.manifest.recipe
        self.codec = make_codec(Spec.parse(recipe.codec), num_classes=recipe.teacher.num_classes, calibration=self.manifest.calibration)
        fields = self.codec.fields(recipe.teacher.positions)
        self._fields = [field.name for field in fields]
        for expected in (*fields, *((profile_field(self.codec.num_classes),) if self.codec.keeps_profile else ())):
            found = self.reader.field(expected.name)
            if found != expected:
                raise FormatError(f"{path}: the codec {recipe.codec} stores {expected}, found {found}")
        self.views = SeededViews(recipe.views)

    @property
    def manifest(self) -> Manifest:
        """What the cache says of itself."""
        return self.reader.manifest

    @property
    def num_views(self) -> int:
        """Views of each sample."""
        return self.manifest.grid.num_views

    def soft_targets(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> SoftTargets:
        """The teacher's answers to (row, view) pairs, by the rows of the cache; both arrays are [records]."""
        arrays = self.reader.gather(self._fields, rows, views)
        soft = self.codec.decode({name: torch.from_numpy(array) for name, array in arrays.items()})
        return replace(soft, profile=self.profile) if self.codec.keeps_profile else soft

    @cached_property
    def profile(self) -> Profile | None:
        """The teacher's mean answer to each top class; None where the cache does not keep it."""
        return Profile.from_numpy(self.reader.shared(PROFILE)) if self.codec.keeps_profile else None

    def join(self, dataset: Dataset) -> "Joined":
        """Soft targets by the dataset's own rows, whatever its order and however small a part of the cached set it is.

        Raises:
            MismatchError: Samples are not in the cache (changed or added; the first are named), or the class counts differ.
        """
        teacher_classes = self.manifest.recipe.teacher.num_classes
        if dataset.num_classes > teacher_classes:
            raise MismatchError(f"the dataset has {dataset.num_classes} classes, the cached teacher {teacher_classes}")
        return Joined(self, self._rows_of(dataset))

    def batches(
        self,
        dataset: Dataset | MapDataset,
        *,
        batch_size: int = 128,
        epochs: int = 1,
        seed: int = 0,
        order: Order = "auto",
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Int64[Tensor, "batch"], SoftTargets]]:
        """Shuffled `(x, y, soft)` batches: the views that the teacher saw, the labels, the teacher's answers to these views.

        Args:
            dataset: The samples that were dumped, in any order, or some of them: (image, label) pairs before any random
                transform.
            batch_size: Samples in a batch; the last one of an epoch may be smaller.
            epochs: Passes over the samples; epoch `e` shows view `e mod num_views`.
            seed: Seed of the order.
            order: `random`, or `windows` where random access is dear; `auto` by the cache's layout.
            num_workers: Processes that decode and augment; 0 for none but this one.
            device: Where batches go; None for the CPU.

        Raises:
            MismatchError: Samples are not in the cache, or their views would not be the ones that the teacher saw.
        """
        data = dataset if isinstance(dataset, Dataset) else wrap_dataset(dataset, num_classes=self.manifest.recipe.teacher.num_classes)
        gather = self.join(data)
        self.check_probes(data)
        loader = ViewLoader(
            data, self.views, batch_size=batch_size, seed=seed, num_views=self.num_views, gather=gather,
            blocks=gather.blocks(order), num_workers=num_workers, device=device,
        )  # fmt: skip
        for epoch in range(epochs):
            for batch in loader.epoch(epoch):
                assert batch.soft is not None
                yield batch.images, batch.labels, batch.soft

    def check_probes(self, dataset: Dataset) -> None:
        """Recomputes a few views and compares their pixels with those that the teacher saw.

        Samples that are not in the dataset are passed over.

        Raises:
            MismatchError: Pixels differ: another library version or another decoder.
        """
        row_of_key = {key.tobytes(): row for row, key in enumerate(dataset.keys)}
        keys = self.reader.shared("key")
        for probe in self.manifest.probes:
            row = row_of_key.get(keys[probe.row].tobytes())
            if row is not None and probe_view(dataset, self.views, row, probe.view) != probe.sha256:
                raise MismatchError(
                    f"view {probe.view} of sample {row} has other pixels than the teacher saw. The cache was made with"
                    f" {self.manifest.recipe.views.versions}, here are {library_versions()}; install those versions, dump"
                    " again, or accept labels that belong to other pixels: --allow-changed-pixels"
                )

    def _rows_of(self, dataset: Dataset) -> NDArray[np.int64]:
        """The cache's row of each of the dataset's samples, [samples]."""
        cached = _sortable(self.reader.shared("key"))
        wanted = _sortable(dataset.keys)
        order = np.argsort(cached, kind="stable")
        places = np.searchsorted(cached, wanted, sorter=order).clip(max=len(cached) - 1)
        rows = order[places]
        absent = np.flatnonzero(cached[rows] != wanted)
        if len(absent):
            first = ", ".join(f"row {row} (key {dataset.keys[row].tobytes().hex()})" for row in absent[:3])
            raise MismatchError(
                f"{len(absent)} of {len(dataset)} samples are not in the cache: {first}{', …' if len(absent) > 3 else ''}."
                f" It was made from {self.manifest.recipe.dataset.spec} with {self.manifest.recipe.dataset.num_samples} samples;"
                " give that dataset with --data, or dump this one"
            )
        return np.asarray(rows, np.int64)


class Joined:
    """A cache's soft targets by the rows of a dataset.

    Args:
        cache: The cache.
        rows: The cache's row of each of the dataset's samples, [samples].
    """

    def __init__(self, cache: Cache, rows: NDArray[np.int64]) -> None:
        self._cache, self._rows = cache, rows

    def __call__(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> SoftTargets:
        """Soft targets of (dataset row, view) pairs, both [records]."""
        return self._cache.soft_targets(self._rows[rows], views)

    def blocks(self, order: Order) -> list[NDArray[np.int64]] | None:
        """The dataset's rows by the cache's ranges of samples, if they are to be read range by range; else None.

        Raises:
            ConfigError: Unknown order.
        """
        if order not in ORDERS:
            raise ConfigError(f"unknown order {order!r}; expected one of: {', '.join(ORDERS)}")
        if order == "random" or (order == "auto" and self._cache.reader.is_mapped):
            return None
        ranges = self._rows // self._cache.manifest.grid.block_samples
        by_range = np.argsort(ranges, kind="stable")
        cuts = np.flatnonzero(np.diff(ranges[by_range])) + 1
        return np.split(by_range, cuts)


def make_probes(dataset: Dataset, views: SeededViews, *, num_views: int) -> tuple[Probe, ...]:
    """Digests of a few views, spread over samples and views."""
    count = min(NUM_PROBES, len(dataset) * num_views)
    places = [(i * (len(dataset) - 1) // max(count - 1, 1), i % num_views) for i in range(count)]
    return tuple(Probe(row=row, view=view, sha256=probe_view(dataset, views, row, view)) for row, view in places)


def probe_view(dataset: Dataset, views: SeededViews, row: int, view: int) -> str:
    """The digest of one view's shape and pixels."""
    image = views(dataset[row][0], dataset.keys[row].tobytes(), view)
    return sha256(repr((str(image.dtype), tuple(image.shape))).encode() + image.contiguous().numpy().tobytes())


def _sortable(keys: NDArray[np.uint8]) -> NDArray[np.character]:
    """[samples, 16] bytes as [samples] comparable items."""
    items: NDArray[np.character] = np.ascontiguousarray(keys).view(f"S{keys.shape[1]}").ravel()
    return items
