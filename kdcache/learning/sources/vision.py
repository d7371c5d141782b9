"""`torchvision:NAME,root=DIR`: any map-style classification set of torchvision.datasets."""

import inspect
import operator
from typing import Any

import numpy as np
import torchvision

from kdcache.learning.sources.source import Keys, Labels, Rows
from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec

UNSAFE_DATASETS = ("LSUN", "LSUNClass")
"""Torchvision datasets that unpickle a file without comparing its digest first."""

LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
"""Where torchvision's datasets keep the labels of all samples …"""

FILE_ATTRIBUTES = ("samples", "_samples", "_image_files", "_images")
"""… and their files, some with the label beside."""

HELD_OUT = {"CLEVRClassification": "val", "ImageNet": "val", "Imagenette": "val", "Places365": "val", "Country211": "valid"}
"""Splits that stand in for `test` where there is none, or none with labels."""

CHECKED_LABELS = 8
"""Samples whose own label is compared with the one that the dataset keeps."""


class VisionSource:
    """A dataset of torchvision: keys come from decoded pixels, labels from where it keeps them."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        classes = getattr(dataset, "classes", None)
        if classes is not None:
            self.classes = classes
        self._labels = _kept_labels(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def sample_keys(self, rows: Rows) -> Keys | None:  # noqa: ARG002
        """None: keys come from the decoded pixels."""
        return None

    def sample_labels(self, rows: Rows) -> Labels | None:
        """The labels of some samples; None where the dataset does not keep them by themselves."""
        return None if self._labels is None else self._labels[rows]

    def sample_name(self, row: int) -> str | None:
        """The sample's file, where the dataset knows it."""
        for attribute in FILE_ATTRIBUTES:
            files = getattr(self._dataset, attribute, None)
            if isinstance(files, list) and len(files) == len(self):
                return str(files[row][0] if isinstance(files[row], tuple) else files[row])
        return None


def open_vision(spec: Spec, *, trusted: bool) -> VisionSource:
    """Opens a dataset of torchvision.

    Args:
        spec: `root` and the options of the class. Nothing is downloaded unless `download=True` says so.
        trusted: Whether the user typed the spec; one that was read from a file only looks at files that are there.

    Raises:
        SpecError: No such dataset, or its files are not there.
    """
    if not trusted and spec.name in UNSAFE_DATASETS:
        raise SpecError(f"{spec} was read from a file and opening it may run code; if you trust it, type it yourself: --data {spec}")
    dataset, can_download = _class(spec), _can_download(_class(spec))
    if "root" not in spec.options:
        raise SpecError(f"{spec}: say where the files are: {spec},root=DIR")
    asked = spec if trusted else spec.without_options("download")
    options = asked.with_defaults(download=False).options if can_download else asked.options
    try:
        return VisionSource(dataset(**options))
    except (RuntimeError, OSError) as error:
        offered = can_download and not options["download"]
        advice = f". On a machine with a network: {spec.with_options(download=True)}" if offered else ""
        raise SpecError(f"{spec}: {str(error).rstrip('.')}{advice}") from error
    except (TypeError, ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise SpecError(f"{spec}: {error}") from error


def held_out_vision(spec: Spec) -> Spec | None:
    """The held-out split by the conventions of torchvision's classes; None where there is none."""
    parameters = inspect.signature(_class(spec)).parameters
    if "train" in parameters or spec.name == "EMNIST":
        return spec.with_options(train=False)
    return spec.with_options(split=HELD_OUT.get(spec.name, "test")) if "split" in parameters else None


def _class(spec: Spec) -> Any:
    dataset = getattr(torchvision.datasets, spec.name, None)
    if not isinstance(dataset, type) or spec.name not in torchvision.datasets.__all__:
        raise SpecError(f"{spec}: torchvision has no dataset {spec.name!r}")
    return dataset


def _can_download(dataset: Any) -> bool:
    """Whether it takes `download`, also where it hands it on to the class that it is made from."""
    parameters = inspect.signature(dataset.__init__).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return "download" in parameters or (passes_on and _can_download(dataset.__mro__[1]))


def _kept_labels(dataset: Any) -> Labels | None:
    """The labels that a dataset keeps, if they are those that its samples come with."""
    for attribute in LABEL_ATTRIBUTES:
        labels = _whole_numbers(getattr(dataset, attribute, None), len(dataset))
        if labels is not None:
            return labels if _agree(dataset, labels) else None
    for attribute in FILE_ATTRIBUTES:
        files = getattr(dataset, attribute, None)
        if isinstance(files, list) and len(files) == len(dataset) and all(isinstance(item, tuple) and len(item) == 2 for item in files):
            labels = _whole_numbers([item[1] for item in files], len(dataset))
            return labels if labels is not None and _agree(dataset, labels) else None
    return None


def _whole_numbers(values: Any, count: int) -> Labels | None:
    if not hasattr(values, "__len__") or len(values) != count or not count:
        return None
    try:
        labels = np.asarray(values)
    except ValueError:  # rows of different lengths
        return None
    return labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iu" else None


def _agree(dataset: Any, labels: Labels) -> bool:
    """Whether a few samples come with these labels; one that cannot be read says nothing."""
    for row in np.linspace(0, len(labels) - 1, CHECKED_LABELS).astype(int).tolist():
        try:
            if operator.index(dataset[row][1]) != labels[row]:
                return False
        except (OSError, SyntaxError):
            continue
        except (TypeError, ValueError, IndexError, ImportError):
            return False
    return True
