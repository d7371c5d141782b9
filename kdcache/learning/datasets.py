"""Datasets by spec: embedded ones, `folder:`, `torchvision:`, `hf:`, `parquet:`, `csv:`, `py:`; and any map-style dataset of one's own.

A dataset gives decoded samples, integer labels and content-derived sample keys. It knows nothing of caches.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from kdcache.data import EMBEDDED_DATASETS
from kdcache.learning.models import load_python_object
from kdcache.learning.sources.checked import CheckedSource, without_skipped, without_unreadable
from kdcache.learning.sources.embedded import Embedded
from kdcache.learning.sources.folders import FolderSource, held_out_folder
from kdcache.learning.sources.huggingface import held_out_saved, is_saved, open_huggingface
from kdcache.learning.sources.source import Keys, Labels, MapDataset, Rows, Sample, Selection
from kdcache.learning.sources.tables import open_table
from kdcache.learning.sources.vision import held_out_vision, open_vision
from kdcache.records.errors import MismatchError, SpecError, UnreadableSampleError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import DatasetRecord, SkippedSample
from kdcache.records.progress import Progress, Silent
from kdcache.records.specs import Spec

IN_MEMORY = "memory"
"""The name of a dataset that was handed over as an object."""

LOCATION_OPTIONS = ("root", "download", "tokenizer")
"""Options that say where a dataset lies on this machine, not which dataset it is: no part of a recipe. (Tokens are in the keys.)"""

PLACELESS_NAMES = {"csv": "table", "folder": "images", "hf": "saved", "parquet": "table"}
"""What a recipe says in place of a path, by source."""

KINDS = (
    *EMBEDDED_DATASETS, "folder:PATH", "torchvision:NAME,root=DIR", "hf:NAME", "parquet:FILE", "csv:FILE", "py:MODULE:FUNCTION",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A classification set with stable sample keys."""

    source: CheckedSource
    """Where the samples come from."""

    spec: Spec
    """How it was named; `IN_MEMORY` for a dataset that was handed over as an object."""

    num_classes: int
    """How many classes it tells apart."""

    skipped: tuple[SkippedSample, ...] = ()
    """Samples that were left out because they cannot be read."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Sample, int]:
        return self.source[index]

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of the first sample: (channels, height, width), (features,) or (length,)."""
        return tuple(self[0][0].shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the first sample.

        Raises:
            MismatchError: The samples are no images.
        """
        if len(self.sample_shape) != 3:
            raise MismatchError(f"{self.spec}: expected images, found samples of shape {list(self.sample_shape)}")
        channels, height, width = self.sample_shape
        return channels, height, width

    @cached_property
    def keys(self) -> Keys:
        """The sample keys, [samples, 16]: a digest of the content, so a copied or re-sorted set has the same ones.

        It is a digest of the encoded file where the source knows it, else of the decoded sample. Equal samples have equal keys,
        and so equal views and soft labels.
        """
        return self.source.sample_keys(self._rows)

    @cached_property
    def labels(self) -> Labels:
        """The dataset's own labels, [samples]."""
        return self.source.sample_labels(self._rows)

    def name_of(self, row: int) -> str:
        """How messages call a sample: its file, or `row N`."""
        return self.source.sample_name(row)

    def subset(self, rows: Sequence[int] | Rows) -> "Dataset":
        """Some of the samples, in this order."""
        return replace(self, source=CheckedSource(Selection(self.source, np.asarray(rows, np.int64))))

    def without(self, rows: Sequence[int] | Rows) -> "Dataset":
        """All samples but some, in order."""
        return self.subset(np.setdiff1d(self._rows, np.asarray(rows, np.int64)))

    def record(self) -> DatasetRecord:
        """What a recipe says of this dataset: nothing about where it lies."""
        return DatasetRecord(spec=str(_placeless(self.spec)), num_samples=len(self), sha256=sha256(self.keys.tobytes()))

    @property
    def _rows(self) -> Rows:
        return np.arange(len(self))


def wrap_dataset(source: MapDataset, *, num_classes: int | None = None, skipped: Sequence[SkippedSample] = ()) -> Dataset:
    """A map-style dataset object of one's own.

    Args:
        source: Gives (sample, label) pairs, before any random transform.
        num_classes: Taken from `source.classes`, else from the labels, when None.
        skipped: Samples to leave out, as a dump left them out.
    """
    return _make_dataset(source, Spec(source="", name=IN_MEMORY), num_classes=num_classes, skipped=skipped)


def open_dataset(
    spec: Spec, *, trusted: bool, skip_unreadable: bool = False, skipped: Sequence[SkippedSample] = (), progress: Progress | None = None
) -> Dataset:
    """Opens the dataset that a spec names.

    Args:
        spec: `fashion-mini[,split=test]`, `folder:PATH[,split=NAME]`, `torchvision:NAME,root=DIR[,train=False][,download=True]`,
            `hf:NAME[,…]`, `parquet:FILE[,…]`, `csv:FILE[,…]` or `py:MODULE:FUNCTION`. A path with a comma cannot be said: link to it.
        trusted: Whether the user typed the spec. One that was read from a file opens local files only: no `py:`, which runs code,
            and nothing from a network.
        skip_unreadable: Whether to read every sample now and to leave out those that cannot be read.
        skipped: Samples to leave out, as a dump left them out.
        progress: Told how far the reading is.

    Raises:
        SpecError: No such dataset, or its files are not there.
        UnreadableSampleError: A sample had to be read and cannot be.
    """
    source = _open_source(spec, trusted=trusted)
    return _make_dataset(source, spec, skip_unreadable=skip_unreadable, skipped=skipped, progress=progress or Silent())


def held_out_split(spec: Spec) -> Spec | None:
    """The spec of the held-out split that belongs to a training set, or None where there is no convention for it."""
    if spec.source == "" and spec.name in EMBEDDED_DATASETS:
        return spec.with_options(split="test")
    if spec.source == "torchvision":
        return held_out_vision(spec)
    if spec.source == "folder":
        return held_out_folder(spec)
    return held_out_saved(spec) if spec.source == "hf" else None


def with_absolute_paths(spec: Spec) -> Spec:
    """The same dataset from any folder of this machine.

    Raises:
        SpecError: The path has a comma in it, which a spec cannot say.
    """
    for option in ("root", "tokenizer"):
        value = spec.options.get(option)
        if value is not None and (option == "root" or Path(str(value)).is_file()):
            spec = spec.with_options(**{option: str(Path(str(value)).absolute())})
    if not _names_a_path(spec):
        return spec
    path = str(Path(spec.name).expanduser().absolute())
    if "," in path:
        raise SpecError(f"{spec}: a path with a comma cannot be said in a spec; make a link to {path} that has none")
    return replace(spec, name=path)


def _names_a_path(spec: Spec) -> bool:
    return is_saved(spec) if spec.source == "hf" else spec.source in PLACELESS_NAMES


def _placeless(spec: Spec) -> Spec:
    named = replace(spec, name=PLACELESS_NAMES[spec.source]) if _names_a_path(spec) else spec
    return named.without_options(*LOCATION_OPTIONS)


def _open_source(spec: Spec, *, trusted: bool) -> Any:
    if spec.source == "" and spec.name in EMBEDDED_DATASETS:
        return Embedded(spec)
    if spec.source == "folder":
        return FolderSource(spec)
    if spec.source == "torchvision":
        return open_vision(spec, trusted=trusted)
    if spec.source == "hf":
        return open_huggingface(spec, trusted=trusted)
    if spec.source in ("csv", "parquet"):
        return open_table(spec)
    if spec.source == "py":
        return load_python_object(spec, trusted=trusted, option="--data")
    raise SpecError(f"unknown dataset {str(spec)!r}; expected one of: {', '.join(KINDS)}")


def _make_dataset(
    source: Any,
    spec: Spec,
    *,
    num_classes: int | None = None,
    skip_unreadable: bool = False,
    skipped: Sequence[SkippedSample] = (),
    progress: Progress | None = None,
) -> Dataset:
    _require_map_style(source, spec)
    checked = CheckedSource(source)
    kept, left_out = without_unreadable(checked, progress or Silent()) if skip_unreadable else without_skipped(checked, skipped)
    if len(kept) == 0:
        raise SpecError(f"{spec}: {'no sample of the dataset can be read' if left_out else 'the dataset is empty'}")
    checked = CheckedSource(kept) if left_out else checked
    with suppress(UnreadableSampleError):
        checked[0]  # a set of another kind is refused before anything else is made of it
    return Dataset(source=checked, spec=spec, num_classes=num_classes or _count_classes(source, checked), skipped=left_out)


def _require_map_style(source: Any, spec: Spec) -> None:
    found = type(source).__name__
    if isinstance(source, IterableDataset) or (hasattr(source, "__iter__") and not hasattr(source, "__getitem__")):
        raise SpecError(
            f"{spec}: expected a map-style dataset (with a length and an index), found {found}, which can only be iterated over:"
            " kdcache draws samples in any order; load it as a whole, or save it as files"
        )
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise SpecError(f"{spec}: expected a map-style dataset (with a length and an index), found {found}")


def _count_classes(source: Any, checked: CheckedSource) -> int:
    classes: Sequence[object] | None = getattr(source, "classes", None)
    return len(classes) if classes is not None else int(checked.sample_labels(np.arange(len(checked))).max()) + 1
