"""The classes of a record as their places among the classes that go with its top class: small numbers, most of them near 0.

An order says, for each top class, which classes go with it best. The top class of a record stays as it is. Each further
class becomes how many classes are before it in the order of the record's top class, without those that the record has already.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.records.errors import FormatError

Classes = NDArray[np.int64]
Columns = list[NDArray[Any]]
"""Entries by rank: for each rank those of the records that have so many, records with more entries first."""


class ClassOrder:
    """Classes in order of how well they go with a top class.

    Args:
        order: [rows, classes]: one row for each top class, or a single one for all.
    """

    def __init__(self, order: Classes) -> None:
        self._order, self._rows = order, len(order) > 1
        self._place = np.empty_like(order)
        np.put_along_axis(self._place, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)

    @classmethod
    def from_profile(cls, profile: NDArray[np.float16]) -> "ClassOrder":
        """By the teacher's mean answer to each top class, [classes, classes]; of equal ones the lower class first."""
        return cls(np.argsort(-profile.astype(np.float32), axis=1, kind="stable"))

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64]) -> "ClassOrder":
        """By how often each class comes, [classes], whatever the top class; of equal ones the lower class first."""
        return cls(np.argsort(-counts, kind="stable")[None])

    @property
    def order(self) -> Classes:
        """As it was given."""
        return self._order

    def to_places(self, columns: Sequence[NDArray[Any]]) -> Columns:
        """Classes by rank to places by rank."""
        if not columns:
            return []
        top = columns[0].astype(np.int64)
        used, places = [self._places_of(top, top)], [columns[0]]
        for column in columns[1:]:
            place = self._places_of(top[: len(column)], column.astype(np.int64))
            places.append((place - sum((before[: len(column)] < place).astype(np.int64) for before in used)).astype(column.dtype))
            used.append(place)
        return places

    def to_classes(self, columns: Sequence[NDArray[Any]]) -> Columns:
        """Places by rank to classes by rank.

        Raises:
            FormatError: A place is outside the order.
        """
        if not columns:
            return []
        top = self._checked(columns[0].astype(np.int64))
        used, classes = [self._places_of(top, top)], [columns[0]]  # the places of what a record has, ascending
        for column in columns[1:]:
            place = column.astype(np.int64)
            for before in used:
                place += before[: len(place)] <= place
            classes.append(self._classes_at(top[: len(place)], self._checked(place)).astype(column.dtype))
            used = _insert(used, place)
        return classes

    def _checked(self, places: Classes) -> Classes:
        if len(places) and not int(places.view(np.uint64).max()) < self._order.shape[1]:
            raise FormatError(f"expected classes below {self._order.shape[1]}, found {places.max()}")
        return places

    def _places_of(self, top: Classes, classes: Classes) -> Classes:
        places: Classes = self._place[top if self._rows else 0, classes]
        return places

    def _classes_at(self, top: Classes, places: Classes) -> Classes:
        classes: Classes = self._order[top if self._rows else 0, places]
        return classes


def _insert(used: Iterable[Classes], place: Classes) -> list[Classes]:
    """Ascending columns with one more place in each record; records without one drop out."""
    inserted = []
    for before in used:
        before = before[: len(place)]
        inserted.append(np.minimum(before, place))
        place = np.maximum(before, place)
    return [*inserted, place]


def to_columns(entries: NDArray[Any], lengths: NDArray[np.int64]) -> Columns:
    """Flat entries of records with these lengths, by rank."""
    starts = np.cumsum(lengths) - lengths
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[longest_first], lengths[longest_first]
    return [entries[starts[: _longer(lengths, rank)] + rank] for rank in range(int(lengths.max(initial=0)))]


def from_columns(columns: Sequence[NDArray[Any]], lengths: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """What `to_columns` was given."""
    starts = np.cumsum(lengths) - lengths
    starts = starts[np.argsort(-lengths, kind="stable")]
    entries = np.empty(int(lengths.sum()), dtype)
    for rank, column in enumerate(columns):
        entries[starts[: len(column)] + rank] = column
    return entries


def column_lengths(lengths: NDArray[np.int64]) -> list[int]:
    """How many records have an entry of each rank."""
    descending = -np.sort(-lengths)
    return [_longer(descending, rank) for rank in range(int(lengths.max(initial=0)))]


def _longer(descending: NDArray[np.int64], rank: int) -> int:
    return int(np.searchsorted(-descending, -rank, side="left"))
