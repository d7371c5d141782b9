"""Datasets by spec: embedded ones, `torchvision:NAME`, `py:module:function`; and any map-style dataset of one's own.

A dataset gives decoded uint8 images, integer labels and content-derived sample keys. It knows nothing of caches.
"""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
import torchvision
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional

from kdcache.data import EMBEDDED_DATASETS, load_embedded
from kdcache.learning.models import load_python_object
from kdcache.records.errors import MismatchError, SpecError
from kdcache.records.hashing import sha256
from kdcache.records.manifest import DatasetRecord
from kdcache.records.specs import Spec

KEY_BYTES = 16
LOCATION_OPTIONS = ("root", "download")
"""Options that say where a dataset lies on this machine, not which dataset it is: no part of a recipe."""


UNSAFE_DATASETS = ("LSUN", "LSUNClass")
"""Torchvision datasets that unpickle a file without comparing its digest first."""


class MapDataset(Protocol):
    """What PyTorch calls a map-style dataset of (image, label) pairs."""

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """(image, label): a PIL image or a uint8 tensor [channels, height, width], and an integer."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A classification set with stable sample keys."""

    source: MapDataset
    """Where the samples come from."""

    spec: Spec
    """How it was named; `memory` for a dataset that was handed over as an object."""

    num_classes: int
    """How many classes it tells apart."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "channels height width"], int]:
        image, label = self.source[index]
        return as_image_tensor(image), int(label)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the first sample."""
        channels, height, width = self[0][0].shape
        return channels, height, width

    @property
    def keys(self) -> NDArray[np.uint8]:
        """The sample keys, [samples, 16]: a digest of the decoded pixels, so a copied or re-sorted set has the same ones.

        Samples with equal pixels have equal keys, and so equal views and soft labels.
        """
        return self._scan[0]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The dataset's own labels, [samples]."""
        return self._scan[1]

    @cached_property
    def _scan(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Keys and labels of all samples: each is read once."""
        keys, labels = np.empty((len(self), KEY_BYTES), np.uint8), np.empty(len(self), np.int64)
        for row in range(len(self)):
            image, labels[row] = self[row]
            keys[row] = np.frombuffer(image_key(image), np.uint8)
        return keys, labels

    def record(self) -> DatasetRecord:
        """What a recipe says of this dataset: nothing about where it lies."""
        spec = str(self.spec.without_options(*LOCATION_OPTIONS))
        return DatasetRecord(spec=spec, num_samples=len(self), sha256=sha256(self.keys.tobytes()))


def image_key(image: UInt8[Tensor, "channels height width"]) -> bytes:
    """The 16-byte key of a decoded image: BLAKE2b over its shape and its pixels in row-major order."""
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=KEY_BYTES)
    digest.update(image.contiguous().numpy().tobytes())
    return digest.digest()


def as_image_tensor(image: Any) -> UInt8[Tensor, "channels height width"]:
    """A decoded sample as a uint8 tensor [channels, height, width].

    Raises:
        MismatchError: It is neither a PIL image nor such a tensor.
    """
    if not isinstance(image, Tensor):
        if getattr(image, "mode", None) in ("P", "PA"):
            image = image.convert("RGB")  # the numbers of a palette are no pixels
        try:
            image = functional.pil_to_tensor(image)
        except TypeError as error:
            raise MismatchError(f"expected a PIL image or a uint8 tensor as a sample, found {type(image).__name__}") from error
    if image.dtype != torch.uint8 or image.ndim != 3:
        raise MismatchError(
            f"expected samples as uint8 [channels, height, width], found {image.dtype} {list(image.shape)};"
            " give the dataset without transforms: kdcache augments and scales"
        )
    tensor: Tensor = image.as_subclass(Tensor)
    return tensor


def wrap_dataset(source: MapDataset, *, num_classes: int | None = None) -> Dataset:
    """A map-style dataset object of one's own.

    Args:
        source: Gives (image, label) pairs, before any random transform.
        num_classes: Taken from `source.classes`, else from the labels, when None.
    """
    dataset = Dataset(source=source, spec=Spec(source="", name="memory"), num_classes=num_classes or 0)
    _require_samples(dataset)
    return dataset if num_classes else replace(dataset, num_classes=_count_classes(dataset))


def open_dataset(spec: Spec, *, trusted: bool) -> Dataset:
    """Opens the dataset that a spec names.

    Args:
        spec: `fashion-mini[,split=test]`, `torchvision:NAME,root=DIR[,train=False][,download=True]` or `py:MODULE:FUNCTION`.
        trusted: Whether the user typed the spec; `py:` runs code, so one that was read from a file is refused.

    Raises:
        SpecError: No such dataset, or its files are not there.
    """
    if spec.source == "" and spec.name in EMBEDDED_DATASETS:
        spec.reject_unknown_options("split")
        source: object = _Embedded(spec)
    elif spec.source == "torchvision":
        source = _open_torchvision(spec if trusted else _only_reading(spec))
    elif spec.source == "py":
        source = load_python_object(spec, trusted=trusted, option="--data")
    else:
        known = ", ".join([*EMBEDDED_DATASETS, "torchvision:NAME,root=DIR", "py:MODULE:FUNCTION"])
        raise SpecError(f"unknown dataset {str(spec)!r}; expected one of: {known}")
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise SpecError(f"{spec}: expected a map-style dataset (with a length and an index), found {type(source).__name__}")
    dataset = Dataset(source=cast(MapDataset, source), spec=spec, num_classes=0)
    _require_samples(dataset)
    return replace(dataset, num_classes=_count_classes(dataset))


def held_out_split(spec: Spec) -> Spec | None:
    """The spec of the held-out split that belongs to a training set, or None where there is no convention for it."""
    if spec.source == "" and spec.name in EMBEDDED_DATASETS:
        return spec.with_options(split="test")
    if spec.source == "torchvision":
        dataset = _torchvision_class(spec)
        parameters = inspect.signature(dataset).parameters
        if "train" in parameters:
            return spec.with_options(train=False)
        if "split" in parameters:
            return spec.with_options(split="val" if spec.name in ("ImageNet", "Places365", "Imagenette") else "test")
    return None


class _Embedded:
    """One split of an embedded dataset, in memory."""

    def __init__(self, spec: Spec) -> None:
        split = str(spec.options.get("split", "train"))
        images, labels, self.classes = load_embedded(spec.name, split)
        self._images = torch.from_numpy(images)
        self.targets = labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], int(self.targets[index])


def _only_reading(spec: Spec) -> Spec:
    """A spec that came from a cache may look at files that are there, and do nothing else.

    Raises:
        SpecError: Opening this dataset unpickles files or fetches them from a network.
    """
    if spec.name in UNSAFE_DATASETS:
        raise SpecError(f"{spec} was read from a file and opening it may run code; if you trust it, type it yourself: --data {spec}")
    return spec.without_options("download")


def _torchvision_class(spec: Spec) -> Any:
    dataset = getattr(torchvision.datasets, spec.name, None)
    if not isinstance(dataset, type) or spec.name not in torchvision.datasets.__all__:
        raise SpecError(f"{spec}: torchvision has no dataset {spec.name!r}")
    return dataset


def _open_torchvision(spec: Spec) -> object:
    dataset = _torchvision_class(spec)
    if "root" not in spec.options:
        raise SpecError(f"{spec}: say where the files are: {spec},root=DIR")
    try:
        return dataset(**spec.options)
    except (RuntimeError, OSError) as error:
        offered = "download" in inspect.signature(dataset).parameters and not spec.options.get("download")
        advice = f". On a machine with a network: {spec.with_options(download=True)}" if offered else ""
        raise SpecError(f"{spec}: {str(error).rstrip('.')}{advice}") from error
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise SpecError(f"{spec}: {error}") from error


def _require_samples(dataset: Dataset) -> None:
    if len(dataset) == 0:
        raise SpecError(f"{dataset.spec}: the dataset is empty")


def _count_classes(dataset: Dataset) -> int:
    classes: Sequence[object] | None = getattr(dataset.source, "classes", None)
    return len(classes) if classes is not None else int(dataset.labels.max()) + 1
