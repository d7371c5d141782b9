"""Batches of views: images from the dataset's workers, soft targets by one gather a batch in the main process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from kdcache.learning.datasets import Dataset
from kdcache.learning.views import SeededViews
from kdcache.records.errors import ConfigError, MismatchError
from kdcache.records.hashing import stable_integer
from kdcache.targets.soft_targets import SoftTargets

Gather = Callable[[NDArray[np.int64], NDArray[np.int64]], SoftTargets]
"""(dataset rows, view numbers) to the soft targets of these records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's input, on the training device."""

    images: Float[Tensor, "batch channels height width"]
    """Views in [0, 1]."""
    labels: Int64[Tensor, "batch"]
    """The dataset's own labels."""
    soft: SoftTargets | None
    """The teacher's answers to these very views; None without a cache."""


ROWS_IN_A_WINDOW = 262_144
"""Rows that are shuffled together where random access is dear: of a store sorted by class, enough to see many classes."""


class ViewLoader:
    """Shuffled epochs of augmented batches; epoch `e` is a pure function of (dataset, views, seed, e).

    The order is a random permutation of all rows, or, with `blocks`, one of windows: some blocks, chosen at random, are shuffled
    together, then the next ones. Then only the blocks of one window are read at a time. Either way an epoch can be taken up at any
    batch: its state is (seed, epoch, position).

    Args:
        dataset: Decoded samples and their keys.
        views: Makes the views.
        batch_size: Samples in a batch.
        seed: Seed of the order.
        num_views: In epoch `e` every sample shows view `e mod num_views`; None for a fresh view every epoch.
        gather: Where soft targets come from; None for none.
        blocks: The rows of each block of the store, for an order of windows; None for a random order.
        drop_last: Whether a last, smaller batch is left out (never the only one).
        num_workers: Processes that decode and augment; 0 for the main process.
        device: Where batches go.
    """

    def __init__(
        self,
        dataset: Dataset,
        views: SeededViews,
        *,
        batch_size: int,
        seed: int = 0,
        num_views: int | None = None,
        gather: Gather | None = None,
        blocks: Sequence[NDArray[np.int64]] | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(f"expected batch_size >= 1 and num_workers >= 0, found {batch_size} and {num_workers}")
        self.device = device or torch.device("cpu")
        self._gather, self._num_views = gather, num_views
        everything = [np.arange(len(dataset))]
        self._order = _EpochOrder(blocks or everything, batch_size=batch_size, seed=seed, drop_last=drop_last)
        self._loader = DataLoader(
            _ViewDataset(dataset, views),
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=collate_views,
            persistent_workers=num_workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # PyTorch draws a seed from it at each epoch: not from the caller's stream
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._order.num_batches

    def epoch(self, epoch: int, *, position: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from the one at `position` on."""
        self._order.epoch, self._order.position = epoch, position
        self._order.view = epoch if self._num_views is None else epoch % self._num_views
        for images, labels, rows, views in self._loader:
            soft = None if self._gather is None else self._gather(rows.numpy(), views.numpy()).to(self.device)
            yield Batch(images=to_unit_range(images, self.device), labels=labels.to(self.device), soft=soft)


def to_unit_range(images: Tensor, device: torch.device) -> Float[Tensor, "batch channels height width"]:
    """uint8 images as float32 in [0, 1] on a device: the one place where pixels move and are scaled."""
    return images.to(device, non_blocking=True).float().div_(255)


def collate_views(samples: Sequence[tuple[Tensor, int, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(image, label, row, view) samples to stacked tensors.

    Raises:
        MismatchError: The images differ in size.
    """
    images, labels, rows, views = zip(*samples, strict=True)
    if any(image.shape != images[0].shape for image in images):
        other = next(image for image in images if image.shape != images[0].shape)
        raise MismatchError(
            f"images of different sizes in one batch: {list(images[0].shape)} and {list(other.shape)}; add a Resize or"
            " RandomResizedCrop with a fixed size to the augmentation (--augment FILE.toml)"
        )
    return torch.stack(images), torch.tensor(labels), torch.tensor(rows), torch.tensor(views)


class _EpochOrder:
    """A batch sampler of (row, view) pairs in an order that is keyed by (seed, epoch)."""

    def __init__(self, blocks: Sequence[NDArray[np.int64]], *, batch_size: int, seed: int, drop_last: bool) -> None:
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        num_samples = sum(map(len, blocks))
        self.num_batches = num_samples // batch_size if drop_last and num_samples >= batch_size else -(-num_samples // batch_size)
        self.epoch = self.view = self.position = 0

    def __len__(self) -> int:
        return self.num_batches - self.position

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(stable_integer("order", self.seed, self.epoch))
        order = window_order(self.blocks, generator).tolist()
        return self._batches(order, self.view, self.position)  # the epoch is fixed now, not when the first batch is asked for

    def _batches(self, order: list[int], view: int, position: int) -> Iterator[list[tuple[int, int]]]:
        for start in range(position * self.batch_size, self.num_batches * self.batch_size, self.batch_size):
            yield [(row, view) for row in order[start : start + self.batch_size]]


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


class _ViewDataset(torch.utils.data.Dataset[Any]):
    """What a DataLoader worker runs: (row, view) to (view's image, label, row, view). It knows nothing of the cache."""

    def __init__(self, dataset: Dataset, views: SeededViews) -> None:
        self._dataset, self._views = dataset, views
        self._keys = dataset.keys

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int, int]:
        row, view = item
        image, label = self._dataset[row]
        return self._views(image, self._keys[row].tobytes(), view), label, row, view
