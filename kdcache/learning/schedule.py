"""Which samples and views an epoch shows, in which order: pure functions of (seed, epoch), so that any batch can be taken up again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from kdcache.records.errors import ConfigError
from kdcache.records.hashing import stable_integer

ViewOrder = Literal["auto", "cycle", "random"]
VIEW_ORDERS: tuple[ViewOrder, ...] = get_args(ViewOrder)

ROWS_IN_A_WINDOW = 262_144
"""Rows that are shuffled together where random access is dear: of a store sorted by class, enough to see many classes."""

Item = tuple[int, tuple[int, ...]]
"""A row and the views of it that one decoding gives."""


@dataclass(frozen=True, kw_only=True)
class ViewSchedule:
    """Which view each sample shows in each epoch.

    `cycle` shows every view once before any is shown again; `random` draws one anew for every sample and epoch. Random views of
    different samples have nothing in common, so a cycle may show all samples the same number. Enumerated ones do: there, a cycle
    begins at another view for each sample and goes through them in steps of its own, and `auto` is `random`, else `cycle`.
    """

    views: range | None = None
    """The views that there are; None for a fresh one every epoch."""
    order: ViewOrder = "auto"
    """How they follow each other."""
    seed: int = 0
    """Seed of the draws."""
    weights: Float64[np.ndarray, "views"] | None = None
    """How probable each view is among enumerated ones; None for views that are random themselves."""

    def __post_init__(self) -> None:
        if self.order not in VIEW_ORDERS:
            raise ConfigError(f"unknown order of views {self.order!r}; expected one of: {', '.join(VIEW_ORDERS)}")

    def views_of(self, epoch: int, num_samples: int) -> Int64[np.ndarray, "samples"]:
        """The view of each sample in an epoch."""
        if self.views is None:
            return np.full(num_samples, epoch)
        if self.order == "random" or (self.order == "auto" and self.weights is not None):
            return self.views.start + self._draw(epoch, num_samples)
        count = len(self.views)
        if self.weights is None:
            return np.full(num_samples, self.views.start + epoch % count)
        generator = _generator("cycle", self.seed, 0)
        begins = torch.randint(count, (num_samples,), generator=generator)
        steps = torch.tensor([step for step in range(1, count + 1) if np.gcd(step, count) == 1])
        chosen = steps[torch.randint(len(steps), (num_samples,), generator=generator)]
        return self.views.start + ((begins + chosen * (epoch % count)) % count).numpy()

    def _draw(self, epoch: int, num_samples: int) -> Int64[np.ndarray, "samples"]:
        generator = _generator("views", self.seed, epoch)
        assert self.views is not None
        if self.weights is None:
            return torch.randint(len(self.views), (num_samples,), generator=generator).numpy()
        return torch.multinomial(torch.from_numpy(self.weights), num_samples, replacement=True, generator=generator).numpy()


class EpochOrder:
    """A batch sampler of (row, views) items.

    With several views a load, the samples of one pass are dealt out to as many epochs, each of which shows its part of them in
    that many views: an epoch is as long as ever and decodes as many times fewer images, and a pass shows each sample the views that
    it would have shown in these epochs.

    Args:
        blocks: The rows, by the block of the store that they lie in; one block for a random order.
        batch_size: Views in a batch.
        seed: Seed of the order.
        schedule: Which views.
        views_per_load: Views of one decoded sample.
        drop_last: Whether a last, smaller batch is left out (never the only one).

    Raises:
        ConfigError: Batches cannot be made of so many views a load.
    """

    def __init__(
        self,
        blocks: Sequence[NDArray[np.int64]],
        *,
        batch_size: int,
        seed: int,
        schedule: ViewSchedule,
        views_per_load: int,
        drop_last: bool,
    ) -> None:
        if batch_size < 1 or views_per_load < 1 or batch_size % views_per_load:
            raise ConfigError(
                f"expected a batch size that is a multiple of the views per load, both at least 1, found {batch_size} and {views_per_load}"
            )
        self.blocks, self.seed, self.schedule = blocks, seed, schedule
        self.batch_size, self.views_per_load = batch_size, views_per_load
        self.num_samples, self.samples_a_batch = sum(map(len, blocks)), batch_size // views_per_load
        whole, rest = divmod(self.num_samples, self.samples_a_batch)
        self._in_pass = whole if whole and (drop_last or not rest) else whole + 1
        if drop_last and self._in_pass < views_per_load:
            raise ConfigError(
                f"{self.num_samples} samples make {self._in_pass} batches of {batch_size} with {views_per_load} views of each, expected at"
                f" least {views_per_load}, one for each epoch; take a smaller batch size or fewer views per load"
            )
        self.num_batches = self._in_pass // views_per_load if drop_last else -(-self._in_pass // views_per_load)
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return max(0, min(self.num_batches, self._in_pass - self._first()) - self.position)

    def __iter__(self) -> Iterator[list[Item]]:
        rows, views = self.records()  # the epoch is fixed now, not when the first batch is asked for
        start = self.position * self.samples_a_batch
        return self._batches(rows[start:].tolist(), views[start:].tolist())

    def records(self) -> tuple[Int64[np.ndarray, "samples"], Int64[np.ndarray, "samples views"]]:
        """All that the epoch shows, from its first batch on: rows, and the views of each."""
        number = self.epoch // self.views_per_load
        order = window_order(self.blocks, _generator("order", self.seed, number))
        start = self._first() * self.samples_a_batch
        rows = order[start : start + min(self.num_batches, self._in_pass - self._first()) * self.samples_a_batch]
        views = [self.schedule.views_of(number * self.views_per_load + i, self.num_samples)[rows] for i in range(self.views_per_load)]
        return rows, np.stack(views, axis=1)

    def _first(self) -> int:
        """The epoch's first batch in its pass."""
        return self.epoch % self.views_per_load * self.num_batches

    def _batches(self, rows: list[int], views: list[list[int]]) -> Iterator[list[Item]]:
        items = [(row, tuple(chosen)) for row, chosen in zip(rows, views, strict=True)]
        for start in range(0, len(items), self.samples_a_batch):
            yield items[start : start + self.samples_a_batch]


def window_order(blocks: Sequence[NDArray[np.int64]], generator: torch.Generator) -> NDArray[np.int64]:
    """All rows of all blocks: blocks in random order, as many at a time shuffled together as make a window."""
    if len(blocks) == 1:
        rows: NDArray[np.int64] = blocks[0][torch.randperm(len(blocks[0]), generator=generator).numpy()]
        return rows
    order: list[NDArray[np.int64]] = []
    window: list[NDArray[np.int64]] = []
    for number, block in enumerate(torch.randperm(len(blocks), generator=generator).tolist(), start=1):
        window.append(blocks[block])
        size = sum(map(len, window))
        if size >= ROWS_IN_A_WINDOW or number == len(blocks):
            order.append(np.concatenate(window)[torch.randperm(size, generator=generator).numpy()])
            window = []
    return np.concatenate(order)


def _generator(purpose: str, seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(stable_integer(purpose, seed, epoch))
