"""A cache as training sees it: soft targets for a dataset's samples, joined on their keys, and the views that belong to them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.learning.datasets import IN_MEMORY, Dataset, open_dataset, wrap_dataset
from kdcache.learning.loader import Inputs, Labels, ViewLoader
from kdcache.learning.operations import End
from kdcache.learning.samples import ViewedSamples
from kdcache.learning.schedule import ViewOrder, ViewSchedule
from kdcache.learning.sources.source import MapDataset
from kdcache.learning.views import SeededViews, library_versions
from kdcache.records.errors import ConfigError, FormatError, MismatchError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import Manifest, Probe, probed_view
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

    def join(self, dataset: Dataset, *, end: End | None = None, skip_unknown: bool = False) -> "Joined":
        """The dataset's samples with their soft targets, whatever its order and however small a part of the cached set it is.

        Args:
            dataset: The samples.
            end: Brings the shared views to the student's size; None for as they are.
            skip_unknown: Whether to leave out samples that are not in the cache: see `Joined.num_unknown`.

        Raises:
            MismatchError: Samples, or with `skip_unknown` all, are not in the cache (changed or added; the first are named), or they
                have other labels there, or the class counts differ.
        """
        teacher_classes = self.manifest.recipe.teacher.num_classes
        if dataset.num_classes > teacher_classes:
            raise MismatchError(f"the dataset has {dataset.num_classes} classes, the cached teacher {teacher_classes}")
        rows = self._rows_of(dataset, skip_unknown=skip_unknown)
        known = np.flatnonzero(rows >= 0)
        num_unknown = len(rows) - len(known)
        if num_unknown:
            dataset, rows = dataset.subset(known), rows[known]
        self._require_labels(dataset, rows)
        record = self.manifest.recipe.views
        views = SeededViews(record, image_shape=dataset.image_shape) if record.enumerated else self.views
        return Joined(self, ViewedSamples(dataset, views, end=end, partners=self.reader.shared("key")), rows, num_unknown=num_unknown)

    def batches(
        self,
        dataset: Dataset | MapDataset | str,
        *,
        batch_size: int = 128,
        epochs: int = 1,
        seed: int = 0,
        order: Order = "auto",
        view_order: ViewOrder = "auto",
        views_per_load: int = 1,
        skip_unknown: bool = False,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> Iterator[tuple[Inputs, Labels, SoftTargets]]:
        """Shuffled `(x, y, soft)` batches: the views that the teacher saw, the labels, the teacher's answers to these views.

        Args:
            dataset: The samples that were dumped, in any order, or some of them: a spec such as `folder:PATH`, or (sample, label)
                pairs before any random transform.
            batch_size: Views in a batch; the last one of an epoch may be smaller.
            epochs: Passes over the samples; each shows one view of every sample.
            seed: Seed of the order.
            order: `random`, or `windows` where random access is dear; `auto` by the cache's layout.
            view_order: Whether a sample's views come in a `cycle` or at `random`; see `ViewSchedule`.
            views_per_load: Views that are made of a sample each time it is decoded; see `EpochOrder`.
            skip_unknown: Whether to leave out samples that are not in the cache.
            num_workers: Processes that decode and augment; 0 for none but this one.
            device: Where batches go; None for the CPU.

        Raises:
            MismatchError: Samples are not in the cache, or their views would not be the ones that the teacher saw.
        """
        data = dataset if isinstance(dataset, Dataset) else self._open(dataset)
        joined = self.join(data, skip_unknown=skip_unknown)
        joined.check_probes()
        loader = joined.loader(
            batch_size=batch_size, seed=seed, order=order, view_order=view_order, views_per_load=views_per_load,
            num_workers=num_workers, device=device,
        )  # fmt: skip
        for epoch in range(epochs):
            for batch in loader.epoch(epoch):
                assert batch.soft is not None
                yield batch.images, batch.labels, batch.soft

    def _open(self, source: MapDataset | str) -> Dataset:
        skipped = self.manifest.provenance.skipped
        if isinstance(source, str):
            return open_dataset(Spec.parse(source), trusted=True, skipped=skipped)
        return wrap_dataset(source, num_classes=self.manifest.recipe.teacher.num_classes, skipped=skipped)

    def _rows_of(self, dataset: Dataset, *, skip_unknown: bool) -> NDArray[np.int64]:
        """The cache's row of each of the dataset's samples, [samples]; -1 for one that is not there."""
        cached = _sortable(self.reader.shared("key"))
        wanted = _sortable(dataset.keys)
        order = np.argsort(cached, kind="stable")
        places = np.searchsorted(cached, wanted, sorter=order).clip(max=len(cached) - 1)
        rows = order[places]
        absent = np.flatnonzero(cached[rows] != wanted)
        if len(absent) and (not skip_unknown or len(absent) == len(dataset)):
            raise MismatchError(self._unknown(dataset, absent.tolist()))
        rows[absent] = -1
        return np.asarray(rows, np.int64)

    def _require_labels(self, dataset: Dataset, rows: NDArray[np.int64]) -> None:
        """Refuses other labels than those of the dump: a class folder that is missing or renamed gives other classes other numbers."""
        cached, none = self.reader.shared("label"), self.reader.field("label").fill_value
        other = np.flatnonzero((cached[rows] != dataset.labels) & (cached[rows] != none))
        if len(other):  # of equal samples with several labels, the cache has each
            keys = _sortable(self.reader.shared("key"))
            wanted = _sortable(dataset.keys)
            equal = np.flatnonzero(np.isin(keys, wanted[other]))
            labels = set(zip(keys[equal].tolist(), cached[equal].tolist(), strict=True))
            found = zip(wanted[other].tolist(), dataset.labels[other].tolist(), strict=True)
            other = other[[pair not in labels for pair in found]]
        if len(other):
            first = ", ".join(f"{dataset.name_of(row)} ({cached[rows[row]]}, here {dataset.labels[row]})" for row in other[:3].tolist())
            raise MismatchError(
                f"{len(other)} of {len(dataset)} samples have other labels than in the cache: {first}{', …' if len(other) > 3 else ''}."
                f" It was made from {self.manifest.provenance.dataset_spec}; give a set with the same classes in the same order (of a"
                " folder, every class has to be there, also in a part of it), or dump this one"
            )

    def _unknown(self, dataset: Dataset, rows: list[int]) -> str:
        """What to say of samples that are not in the cache."""
        first = ", ".join(f"{dataset.name_of(row)} (key {dataset.keys[row].tobytes().hex()})" for row in rows[:3])
        others = ", or train on the others: --skip-unknown" if len(rows) < len(dataset) else ""
        if not others and dataset.spec.name == IN_MEMORY:
            others = ". Keys of files and of decoded samples differ: where it was made from files, hand over its spec"
        return (
            f"{len(rows)} of {len(dataset)} samples are not in the cache, changed or added since: {first}{', …' if rows[3:] else ''}."
            f" It was made from {self.manifest.provenance.dataset_spec} with {self.manifest.recipe.dataset.num_samples} samples;"
            f" give that dataset with --data, dump this one{others}"
        )


class Joined:
    """A dataset's samples with a cache's soft targets.

    Args:
        cache: The cache.
        samples: Makes the views.
        rows: The cache's row of each of the dataset's samples, [samples].
        num_unknown: Samples that were left out because the cache has them not.
    """

    def __init__(self, cache: Cache, samples: ViewedSamples, rows: NDArray[np.int64], *, num_unknown: int = 0) -> None:
        self.samples, self.num_unknown, self._cache, self._rows = samples, num_unknown, cache, rows

    def soft_targets(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> SoftTargets:
        """Soft targets of (dataset row, view) pairs, both [records]."""
        return self._cache.soft_targets(self._rows[rows], views)

    def loader(
        self,
        *,
        batch_size: int,
        seed: int,
        order: Order = "auto",
        view_order: ViewOrder = "auto",
        views_per_load: int = 1,
        drop_last: bool = False,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> ViewLoader:
        """Batches of views with their soft targets; see `Cache.batches`.

        Raises:
            ConfigError: Unknown order, or a number is out of its range.
        """
        return ViewLoader(
            self.samples,
            batch_size=batch_size,
            seed=seed,
            schedule=ViewSchedule(views=self._cache.manifest.grid.views, order=view_order, seed=seed, weights=self._weights()),
            views_per_load=views_per_load,
            gather=self.soft_targets,
            blocks=self.blocks(order),
            num_classes=self._cache.manifest.recipe.teacher.num_classes,
            drop_last=drop_last,
            num_workers=num_workers,
            device=device,
        )

    def _weights(self) -> NDArray[np.float64] | None:
        """How probable each of the cache's views is, if they are among all that there are."""
        weights = self.samples.views.weights
        if weights is None:
            return None
        views = self._cache.manifest.grid.views
        if views.stop > len(weights):
            raise FormatError(f"the cache has views up to {views.stop - 1}, of which there are only {len(weights)}")
        return weights[views.start : views.stop]

    def check_probes(self) -> None:
        """Recomputes a few views and compares their pixels with those that the teacher saw.

        Samples that are not in the dataset are passed over; where none is left, the versions of the libraries must be the same.

        Raises:
            MismatchError: Pixels differ: another library version or another decoder.
        """
        row_of_cached = dict(zip(self._rows.tolist(), range(len(self._rows)), strict=True))
        made_with = self._cache.manifest.recipe.views.versions
        mend = (
            f"The cache was made with {made_with}, here are {library_versions()}; install those versions, dump again, or accept labels that"
            " belong to other pixels: --allow-changed-pixels"
        )
        probes = [(row_of_cached[probe.row], probe) for probe in self._cache.manifest.probes if probe.row in row_of_cached]
        for row, probe in probes:
            if probe_view(self.samples, row, probe.view) != probe.sha256:
                name = self.samples.dataset.name_of(row)
                raise MismatchError(f"view {probe.view} of {name} has other pixels than the teacher saw. {mend}")
        if not probes and made_with != library_versions():
            raise MismatchError(f"none of the samples whose pixels were recorded is in the dataset. {mend}")

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


def make_probes(samples: ViewedSamples, *, views: range) -> tuple[Probe, ...]:
    """Digests of a few shared views, spread over samples and views: in a part of the views, as many as can be of those of the whole."""
    count = min(NUM_PROBES, len(samples) * len(views))
    places = [(i * (len(samples) - 1) // max(count - 1, 1), probed_view(i, views)) for i in range(count)]
    return tuple(Probe(row=row, view=view, sha256=probe_view(samples, row, view)) for row, view in places)


def probe_view(samples: ViewedSamples, row: int, view: int) -> str:
    """The digest of one shared view's shape and pixels."""
    image = samples.shared_view(samples.dataset[row], row, view).image
    return sha256(repr((str(image.dtype), tuple(image.shape))).encode() + image.contiguous().numpy().tobytes())


def _sortable(keys: NDArray[np.uint8]) -> NDArray[np.character]:
    """[samples, 16] bytes as [samples] comparable items."""
    items: NDArray[np.character] = np.ascontiguousarray(keys).view(f"S{keys.shape[1]}").ravel()
    return items
