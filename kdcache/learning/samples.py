"""A dataset's samples as a network sees them: view, mix, and the network's own end, from (row, view number) alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from kdcache.learning.datasets import Dataset
from kdcache.learning.mixing import Mixing, mix_images
from kdcache.learning.operations import End
from kdcache.learning.views import SeededViews
from kdcache.records.errors import KdcacheError, MismatchError, SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One view of one sample."""

    image: Tensor
    """uint8 [channels, height, width]; other samples as the dataset gives them."""
    label: int
    """The sample's own label."""
    partner_label: int
    """The label of the sample that it is mixed with; its own where it is not mixed."""
    share: float
    """Share of the sample itself; 1 where it is not mixed."""

    @property
    def main_label(self) -> int:
        """The label of the larger share."""
        return self.label if self.share >= 0.5 else self.partner_label


SHOWN = 0.875
"""Share of an image's shorter side that is shown in evaluation, as published for ImageNet by nearly everyone."""


def resize_end(size: tuple[int, int]) -> End:
    """A student's own end: the shared view at another size, height and width."""
    return End([{"op": "Resize", "size": list(size), "antialias": True}])


class EvaluationEnd:
    """Brings whole images of any size to a network's, without chance and without squashing them.

    An image of that size already is left as it is. Of others the middle is shown: of an image with more pixels after its shorter
    side was resized to the size / 0.875, of one with fewer after that was resized to the size.

    Args:
        size: Height and width.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._larger, self._smaller = (
            End([{"op": "Resize", "size": [side], "antialias": True}, {"op": "CenterCrop", "size": list(size)}])
            for side in (round(max(size) / SHOWN), max(size))
        )

    def __call__(self, image: Tensor) -> Tensor:
        """A uint8 image [channels, height, width] at the network's size; other samples as they are."""
        if image.ndim != 3 or tuple(image.shape[1:]) == self.size:
            return image
        has_more = all(side >= wanted for side, wanted in zip(image.shape[1:], self.size, strict=True))
        return self._larger(image) if has_more else self._smaller(image)


class ViewedSamples:
    """Makes the views of a dataset's samples. Teacher and student use the same ones, each with an end of its own.

    Args:
        dataset: Decoded samples and their keys.
        views: Makes the shared views.
        end: Brings a view to one network's size; None for as it is.
        partners: Keys of the samples that others are mixed with, [samples, 16]: those of the dumped set; the dataset's own when None.

    Raises:
        MismatchError: A sample that others are mixed with is not in the dataset.
    """

    def __init__(self, dataset: Dataset, views: SeededViews, *, end: End | None = None, partners: NDArray[np.uint8] | None = None) -> None:
        self.dataset, self.views = dataset, views
        self.end = end if end and end.operations else None  # samples that are no images have none
        record = views.record
        self.mixing = record.mixing and Mixing(record.mixing, seed=record.seed, keys=dataset.keys if partners is None else partners)
        if self.mixing:
            self._require_partners(self.mixing.partners)

    def __len__(self) -> int:
        return len(self.dataset)

    def view(self, sample: tuple[Tensor, int], row: int, view: int) -> View:
        """One view of a decoded sample, `dataset[row]`: all views of a sample come from decoding it once."""
        made = self.shared_view(sample, row, view)
        if self.end is None:
            return made
        with self._named(row, view):
            return View(image=self.end(made.image), label=made.label, partner_label=made.partner_label, share=made.share)

    def shared_view(self, sample: tuple[Tensor, int], row: int, view: int) -> View:
        """A view before any network's own end.

        Raises:
            SpecError: The augmentation fails on the sample, or on the one that it is mixed with.
        """
        image, label = sample
        key = self._keys[row].tobytes()
        with self._named(row, view):
            own = self.views(image, key, view)
        mix = self.mixing.choose(key, view) if self.mixing else None
        if mix is None:
            return View(image=own, label=label, partner_label=label, share=1.0)
        other = self._rows[mix.partner]
        partner, partner_label = self.dataset[other]
        with self._named(other, view):
            mixed, share = mix_images(own, self.views(partner, mix.partner, view), mix)
        return View(image=mixed, label=label, partner_label=partner_label, share=share)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first sample's first view."""
        return tuple(self.view(self.dataset[0], 0, 0).image.shape)

    def metadata(self) -> dict[str, str]:
        """What a network that was trained on these views should say of its input: the images' size."""
        return {"input_size": "x".join(map(str, self.shape[1:]))} if len(self.shape) == 3 else {}

    @property
    def _keys(self) -> UInt8[np.ndarray, "samples bytes"]:
        return self.dataset.keys

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        """The first row of each key."""
        return {key.tobytes(): row for row, key in reversed(list(enumerate(self._keys)))}

    @contextmanager
    def _named(self, row: int, view: int) -> Iterator[None]:
        """Says which sample and view it was that operations cannot do: they were tried on another image, or come from a manifest."""
        try:
            yield
        except KdcacheError as error:
            raise type(error)(f"view {view} of {self.dataset.name_of(row)}: {error}") from error
        except Exception as error:  # operations raise almost anything
            raise SpecError(
                f"view {view} of {self.dataset.name_of(row)}: the augmentation fails: {type(error).__name__}: {error}; leave the sample"
                " out, or dump with an augmentation that takes it, such as rrc-flip,size=N"
            ) from error

    def _require_partners(self, partners: NDArray[np.uint8]) -> None:
        absent = sum(partner.tobytes() not in self._rows for partner in partners)
        if absent:
            raise MismatchError(
                f"the views are mixed with any of {len(partners)} samples, of which {absent} are not in the dataset; give the whole"
                " dataset that was dumped with --data"
            )
