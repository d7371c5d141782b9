"""MixUp and CutMix as pure functions: partner, share and box of a view follow from (seed, sample key, view) and from nothing else.

So a mixed view does not depend on who else is in its batch, and its teacher's answer can be stored.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from kdcache.records.errors import MismatchError
from kdcache.records.hashing import stable_integer
from kdcache.records.manifest import MixingRecord

ONE = 2**16
"""Shares are whole multiples of 1/ONE, so that mixed pixels come out of whole numbers and are the same on every machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """How one view is mixed."""

    partner: bytes
    """Key of the other sample."""
    share: float
    """λ: the share of the view's own sample, before a box is cut off at the border."""
    centre: tuple[float, float] | None
    """Middle of CutMix's box, in heights and widths of the image; None for MixUp."""


class Mixing:
    """Chooses the mixes of all views.

    Args:
        record: Kinds and their strengths.
        seed: The seed of the views.
        keys: The keys of all samples that may be partners, [samples, 16], in any order.

    Source: MixUp: Zhang et al., arXiv 1710.09412, equation 1; CutMix: Yun et al., arXiv 1905.04899, equations 1 and 2.
    """

    def __init__(self, record: MixingRecord, *, seed: int, keys: NDArray[np.uint8]) -> None:
        self.record, self.seed = record, seed
        self.partners = np.unique(keys, axis=0)

    def choose(self, key: bytes, view: int) -> Mix | None:
        """The mix of a sample's view; None where it is not mixed."""
        record, root = self.record, stable_integer("mix", self.seed, key, view)
        random = np.random.RandomState([root % 2**32, root >> 32])  # its streams are fixed for ever (NumPy's NEP 19)
        mixed, kind, row, column = random.random_sample(4).tolist()
        if mixed >= record.probability:
            return None
        is_cut = record.cutmix > 0 and (record.mixup == 0 or kind < record.switch)
        alpha = record.cutmix if is_cut else record.mixup
        partner = stable_integer("partner", self.seed, key, view) % len(self.partners)
        return Mix(
            partner=self.partners[partner].tobytes(),
            share=float(random.beta(alpha, alpha)),
            centre=(row, column) if is_cut else None,
        )


def mix_images(
    own: UInt8[Tensor, "channels height width"], partner: UInt8[Tensor, "channels other_height other_width"], mix: Mix
) -> tuple[UInt8[Tensor, "channels height width"], float]:
    """Two views as one.

    Returns:
        The mixed view, and the share that the first one has in it: of its pixels for CutMix, of their values for MixUp.

    Raises:
        MismatchError: The views differ in size.
    """
    if own.shape != partner.shape:
        raise MismatchError(
            f"expected two views of one size to mix, found {list(own.shape)} and {list(partner.shape)}; give the augmentation a"
            " fixed size: --augment NAME,size=N"
        )
    if mix.centre is None:
        weight = round(mix.share * ONE)
        mixed = own.int().mul_(weight).add_(partner.int().mul_(ONE - weight)).add_(ONE // 2) >> 16
        return mixed.to(own.dtype), weight / ONE
    height, width = own.shape[-2:]
    side = math.sqrt(1 - mix.share)
    top, bottom = _span(mix.centre[0], side, height)
    left, right = _span(mix.centre[1], side, width)
    mixed = own.clone()
    mixed[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span(centre: float, side: float, length: int) -> tuple[int, int]:
    """First pixel, and the one behind the last, of a box along one axis, cut off at the border."""
    half = side * length / 2
    return max(0, round(centre * length - half)), min(length, round(centre * length + half))
