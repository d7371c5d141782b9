"""Samples as they must be: tensors of a known kind with one class each, named where they cannot be read."""

import operator
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from kdcache.learning.sources.images import unreadable
from kdcache.learning.sources.source import KEY_BYTES, Keys, KnowsSamples, Labels, MapDataset, Rows, Sample, Selection, as_keys, sample_key
from kdcache.records.errors import KdcacheError, MismatchError, SpecError, UnreadableSampleError
from kdcache.records.manifest import SkippedSample
from kdcache.records.progress import Progress

ONE_CLASS = "kdcache needs a classification set, with one class a sample"
ROWS_AT_A_TIME = 1024


class CheckedSource:
    """A source whose samples are checked, and whose keys and labels are known: what it does not know, decoding tells, once a sample.

    Args:
        source: Gives (sample, label) pairs; see `KnowsSamples` for what else.
    """

    def __init__(self, source: MapDataset) -> None:
        self.source = source
        self._knows = source if isinstance(source, KnowsSamples) else None
        self._keys, self._labels = np.empty((len(source), KEY_BYTES), np.uint8), np.empty(len(source), np.int64)
        self._decoded = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Sample, int]:
        try:
            pair = self.source[index]
        except (KdcacheError, IndexError, MemoryError):
            raise
        except ImportError as error:
            raise SpecError(f"{self.sample_name(index)} cannot be read without another package: {error}") from error
        except Exception as error:  # decoders and datasets of one's own raise almost anything
            raise unreadable(self.sample_name(index), error) from error
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise MismatchError(f"{self.sample_name(index)}: expected a (sample, label) pair, found {_described(pair)}; {ONE_CLASS}")
        return as_sample_tensor(pair[0]), self._as_label(pair[1], index)

    def sample_keys(self, rows: Rows) -> Keys:
        """The keys of some samples, [rows, 16]."""
        known = None if self._knows is None else self._knows.sample_keys(rows)
        return self._decode(rows)[0] if known is None else known

    def sample_labels(self, rows: Rows) -> Labels:
        """The labels of some samples, [rows]."""
        known = None if self._knows is None else self._knows.sample_labels(rows)
        return self._decode(rows)[1] if known is None else known

    def sample_name(self, row: int) -> str:
        """The sample's file, or `row N`."""
        name = None if self._knows is None else self._knows.sample_name(row)
        return f"row {row}" if name is None else name

    def encoded_key(self, row: int) -> str:
        """The key of a sample that cannot be decoded, in hexadecimal; empty where only decoding would give one."""
        try:
            keys = None if self._knows is None else self._knows.sample_keys(np.array([row]))
        except UnreadableSampleError:
            return ""
        return "" if keys is None else keys[0].tobytes().hex()

    def rows_with_keys(self, wanted: set[str]) -> Iterable[int]:
        """The rows that have one of these keys, in hexadecimal, as far as keys are known without decoding."""
        keys = self._knows.sample_keys(np.arange(len(self))) if wanted and self._knows is not None else None
        return () if keys is None else [row for row, key in enumerate(keys) if key.tobytes().hex() in wanted]

    def is_unreadable(self, row: int) -> bool:
        """Whether reading a sample fails."""
        try:
            self[row]
        except UnreadableSampleError:
            return True
        return False

    def _decode(self, rows: Rows) -> tuple[Keys, Labels]:
        for row in rows[~self._decoded[rows]].tolist():
            sample, self._labels[row] = self[row]
            self._keys[row] = as_keys([sample_key(sample)])[0]
            self._decoded[row] = True
        return self._keys[rows], self._labels[rows]

    def _as_label(self, label: Any, row: int) -> int:
        try:
            return operator.index(label)
        except (TypeError, ValueError) as error:
            found = _described(label)
            raise MismatchError(f"{self.sample_name(row)}: expected one whole number as the label, found {found}; {ONE_CLASS}") from error


def as_sample_tensor(sample: Any) -> Sample:
    """A decoded sample as a tensor: uint8 [channels, height, width], float32 [features] or int64 [length].

    Raises:
        MismatchError: It is neither a PIL image nor such a tensor.
    """
    if not isinstance(sample, Tensor):
        if getattr(sample, "mode", None) in ("P", "PA"):
            sample = sample.convert("RGB")  # the numbers of a palette are no pixels
        try:
            sample = functional.pil_to_tensor(sample)
        except TypeError as error:
            raise MismatchError(f"expected a PIL image or a tensor as a sample, found {type(sample).__name__}") from error
    if (sample.dtype, sample.ndim) not in ((torch.uint8, 3), (torch.float32, 1), (torch.int64, 1)):
        raise MismatchError(
            "expected samples as uint8 [channels, height, width], float32 [features] or int64 tokens [length], found"
            f" {sample.dtype} {list(sample.shape)}; give the dataset without transforms: kdcache augments and scales"
        )
    tensor: Tensor = sample.as_subclass(Tensor)
    return tensor


def without_unreadable(source: CheckedSource, progress: Progress) -> tuple[MapDataset, tuple[SkippedSample, ...]]:
    """Reads every sample; gives those that can be read, and what the others are."""
    threads = (os.cpu_count() or 1) if isinstance(source.source, KnowsSamples) else 1  # a dataset of one's own may not bear several
    bad: list[int] = []
    with progress.stage("read", total=len(source), unit="samples") as advance, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), ROWS_AT_A_TIME):
            rows = range(start, min(start + ROWS_AT_A_TIME, len(source)))
            bad += [row for row, is_bad in zip(rows, pool.map(source.is_unreadable, rows), strict=True) if is_bad]
            advance(len(rows))
    return _without(source, bad)


def without_skipped(source: CheckedSource, skipped: Sequence[SkippedSample]) -> tuple[MapDataset, tuple[SkippedSample, ...]]:
    """Leaves out what a dump left out: by their keys, and samples without one by their names if they still cannot be read."""
    names = {sample.name for sample in skipped if not sample.key}
    named = [row for row in range(len(source) if names else 0) if source.sample_name(row) in names and source.is_unreadable(row)]
    rest = CheckedSource(_without(source, named)[0])
    keyed = rest.rows_with_keys({sample.key for sample in skipped if sample.key})
    kept = np.setdiff1d(np.arange(len(source)), np.array(named, np.int64))
    return _without(source, sorted([*named, *kept[list(keyed)].tolist()]))


def _without(source: CheckedSource, rows: Sequence[int]) -> tuple[MapDataset, tuple[SkippedSample, ...]]:
    if not rows:
        return source.source, ()
    kept = np.setdiff1d(np.arange(len(source)), np.array(rows, np.int64))
    return Selection(source.source, kept), tuple(SkippedSample(name=source.sample_name(row), key=source.encoded_key(row)) for row in rows)


def _described(value: Any) -> str:
    """What something is, in a few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, float | str) else type(value).__name__
