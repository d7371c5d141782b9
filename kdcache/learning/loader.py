"""Batches of views: images from the dataset's workers, soft targets by one gather a batch in the main process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from kdcache.learning.samples import View, ViewedSamples
from kdcache.learning.schedule import EpochOrder, Item, ViewSchedule
from kdcache.records.errors import ConfigError, KdcacheError, MismatchError
from kdcache.targets.soft_targets import SoftTargets

Gather = Callable[[NDArray[np.int64], NDArray[np.int64]], SoftTargets]
"""(dataset rows, view numbers) to the soft targets of these records."""

Inputs = Float[Tensor, "batch channels height width"] | Float[Tensor, "batch features"] | Int64[Tensor, "batch length"]
"""What a network is given: images in [0, 1], rows of a table, or tokens."""

Labels = Int64[Tensor, "batch"] | Float[Tensor, "batch classes"]
"""Classes; or, where views are mixed, the share of each class."""

BATCHES_A_GATHER = 32
"""Batches whose soft targets are read together: of a single one, most of the time is the cost of the calls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's input, on the training device."""

    images: Inputs
    """Views of images in [0, 1]; other samples as they are."""
    labels: Labels
    """The dataset's own labels."""
    soft: SoftTargets | None
    """The teacher's answers to these very views; None without a cache."""


class ViewLoader:
    """Shuffled epochs of augmented batches; epoch `e` is a pure function of (samples, schedule, seed, e).

    The order is a random permutation of all rows, or, with `blocks`, one of windows: some blocks, chosen at random, are shuffled
    together, then the next ones. Then only the blocks of one window are read at a time. Either way an epoch can be taken up at any
    batch: its state is (seed, epoch, position).

    Args:
        samples: Makes the views.
        batch_size: Views in a batch.
        seed: Seed of the order.
        schedule: Which view of each sample an epoch shows; None for a fresh one every epoch.
        views_per_load: Views that are made of a sample each time it is decoded, for one batch; see `EpochOrder`.
        gather: Where soft targets come from; None for none.
        blocks: The rows of each block of the store, for an order of windows; None for a random order.
        num_classes: Length of the labels' class axis where views are mixed; the dataset's own when None.
        drop_last: Whether a last, smaller batch is left out (never the only one).
        num_workers: Processes that decode and augment; 0 for the main process.
        device: Where batches go.

    Raises:
        ConfigError: A number is out of its range.
    """

    def __init__(
        self,
        samples: ViewedSamples,
        *,
        batch_size: int,
        seed: int = 0,
        schedule: ViewSchedule | None = None,
        views_per_load: int = 1,
        gather: Gather | None = None,
        blocks: Sequence[NDArray[np.int64]] | None = None,
        num_classes: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        if num_workers < 0:
            raise ConfigError(f"expected num_workers >= 0, found {num_workers}")
        self.device = device or torch.device("cpu")
        self._samples, self._gather = samples, gather
        self._num_classes = num_classes or samples.dataset.num_classes
        self._order = EpochOrder(
            blocks or [np.arange(len(samples))], batch_size=batch_size, seed=seed, schedule=schedule or ViewSchedule(),
            views_per_load=views_per_load, drop_last=drop_last,
        )  # fmt: skip
        self._loader = DataLoader(
            _Items(samples),
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=_collate,
            persistent_workers=num_workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # PyTorch draws a seed from it at each epoch: not from the caller's stream
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._order.num_batches

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width of the images; None for other samples."""
        shape = self._samples.shape
        return (shape[1], shape[2]) if len(shape) == 3 else None

    def epoch(self, epoch: int, *, position: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from the one at `position` on."""
        self._order.epoch, self._order.position = epoch, position
        answers = None if self._gather is None else self._answers(self._gather, position)
        for images, labels, partners, shares, rows, views in self._loaded():
            soft = None
            if answers is not None:
                soft, asked = next(answers)
                assert np.array_equal(asked, torch.stack([rows, views]).numpy()), "images and soft targets have lost each other"
            target = mixed_labels(labels, partners, shares, self._num_classes) if self._samples.mixing else labels
            yield Batch(images=to_unit_range(images, self.device), labels=target.to(self.device), soft=soft)

    def _loaded(self) -> Iterator[tuple[Tensor, ...]]:
        try:
            yield from self._loader
        except KdcacheError as error:  # PyTorch puts a worker's whole traceback into the message
            name = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise type(error)(str(error).rpartition(name)[2].rstrip()) from error

    def _answers(self, gather: Gather, position: int) -> Iterator[tuple[SoftTargets, NDArray[np.int64]]]:
        """The teacher's answers to each batch, and the [rows, views] that they belong to: several batches by one gather.

        The groups begin at the same batches wherever an epoch is taken up, as ragged records are padded to the longest of a group.
        """
        samples, numbers = self._order.records()
        records = np.stack([np.repeat(samples, numbers.shape[1]), numbers.ravel()])
        size = self._order.batch_size
        first = position // BATCHES_A_GATHER * BATCHES_A_GATHER
        for start in range(first * size, records.shape[1], BATCHES_A_GATHER * size):
            group = records[:, start : start + BATCHES_A_GATHER * size]
            soft = gather(*group).to(self.device)
            skipped = max(0, position - start // size)
            batches = zip(soft.split(size), np.split(group, range(size, group.shape[1], size), axis=1), strict=True)
            yield from islice(batches, skipped, None)


def to_unit_range(images: Tensor, device: torch.device) -> Inputs:
    """uint8 images as float32 in [0, 1] on a device: the one place where pixels move and are scaled. Other samples only move."""
    moved = images.to(device, non_blocking=True)
    return moved.float().div_(255) if moved.dtype == torch.uint8 else moved


def channels_last(inputs: Inputs) -> Inputs:
    """Images in the order of memory that convolutions like best; other samples as they are."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def mixed_labels(
    labels: Int64[Tensor, "batch"], partners: Int64[Tensor, "batch"], shares: Float[Tensor, "batch"], num_classes: int
) -> Float[Tensor, "batch classes"]:
    """The share of each class: λ for the sample's own, 1 - λ for its partner's.

    Source: MixUp, Zhang et al., arXiv 1710.09412, equation 1.
    """
    own, other = F.one_hot(labels, num_classes), F.one_hot(partners, num_classes)
    return shares.unsqueeze(-1) * own + (1 - shares).unsqueeze(-1) * other


FIXED_SIZE = "give the augmentation a fixed size: --augment rrc-flip,size=224, or a file that resizes: --augment FILE.toml"


def stack_images(images: Sequence[Tensor], *, advice: str = FIXED_SIZE) -> Tensor:
    """Images of one size as a batch.

    Raises:
        MismatchError: They differ in size; the message ends with the advice.
    """
    other = next((image for image in images if image.shape != images[0].shape), None)
    if other is not None:
        kind, mend = ("images", advice) if images[0].ndim == 3 else ("samples", "make them one length in the dataset")
        raise MismatchError(f"{kind} of different sizes in one batch: {list(images[0].shape)} and {list(other.shape)}; {mend}")
    return torch.stack(list(images))


def _collate(items: Sequence[list[tuple[View, int, int]]]) -> tuple[Tensor, ...]:
    """(view, row, view number) triples, several a load, to stacked images, labels, partners' labels, shares, rows, view numbers."""
    views, rows, numbers = zip(*chain.from_iterable(items), strict=True)
    return (
        stack_images([view.image for view in views]),
        torch.tensor([view.label for view in views]),
        torch.tensor([view.partner_label for view in views]),
        torch.tensor([view.share for view in views]),
        torch.tensor(rows),
        torch.tensor(numbers),
    )


class _Items(torch.utils.data.Dataset[Any]):
    """What a DataLoader worker runs: an item to its views, each with its row and number. It knows nothing of the cache."""

    def __init__(self, samples: ViewedSamples) -> None:
        self._samples = samples

    def __getitem__(self, item: Item) -> list[tuple[View, int, int]]:
        row, numbers = item
        sample = self._samples.dataset[row]
        return [(self._samples.view(sample, row, number), row, number) for number in numbers]
