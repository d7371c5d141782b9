"""Every view there is: all that a pipeline can make of an image, in order, each with its probability.

An operation becomes a list of outcomes, each a few steps that draw nothing; a pipeline's outcomes are all combinations, the last
operation varying fastest. Steps go through v2's own `transform(image, params)`, so their pixels are those of the random operation.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor
from torchvision.transforms import v2

from kdcache.learning.operations import DETERMINISTIC, require_image
from kdcache.records.errors import ConfigError, MismatchError, SpecError

MAX_VIEWS = 2**16
"""Most views that are enumerated."""

COINS = (
    v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.RandomInvert, v2.RandomEqualize, v2.RandomGrayscale, v2.RandomAutocontrast,
    v2.RandomPosterize, v2.RandomSolarize, v2.RandomAdjustSharpness,
)  # fmt: skip
"""Operations whose one choice is whether they act at all, with probability p."""

Shape = tuple[int, int, int]
Step = tuple[v2.Transform, dict[str, Any] | None]
"""An operation and the choice it made; None for one that has no choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One thing that operations may do."""

    weight: float
    """Its probability."""
    steps: tuple[Step, ...]
    """What is done."""
    shape: Shape
    """Shape of what it makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Enumeration:
    """All views of images of one shape."""

    image_shape: Shape
    """Shape of the images."""
    outcomes: tuple[Outcome, ...]
    """View by view, what is done."""

    @property
    def weights(self) -> Float64[np.ndarray, "views"]:
        """How probable each view is."""
        return np.array([outcome.weight for outcome in self.outcomes])

    def make(self, image: UInt8[Tensor, "channels height width"], view: int) -> Tensor:
        """A view of an image, uint8 [channels, height, width]; draws nothing.

        Raises:
            MismatchError: The image has another shape.
            ConfigError: There is no such view.
        """
        if tuple(image.shape) != self.image_shape:
            raise MismatchError(
                f"every view there is was counted for images of {list(self.image_shape)}, found one of {list(image.shape)}; give images"
                " of one size, or a number of views instead of all"
            )
        if not 0 <= view < len(self.outcomes):
            raise ConfigError(f"there are {len(self.outcomes)} views, numbered from 0; asked for was view {view}")
        return _run(self.outcomes[view].steps, image)


def enumerate_views(transforms: Sequence[v2.Transform], image_shape: Shape) -> Enumeration:
    """All that operations can make of images of one shape.

    Raises:
        SpecError: An operation's choices cannot be enumerated (the first one is named), there are more than `MAX_VIEWS` views, or
            not all have one size.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            outcomes = _in_order(transforms, image_shape)
    except SpecError:
        raise
    except Exception as error:  # whatever an operation raises, its arguments are the cause
        raise SpecError(f"the views of images of {list(image_shape)} cannot be counted: {type(error).__name__}: {error}") from error
    shapes = {outcome.shape for outcome in outcomes}
    if len(shapes) > 1:
        raise SpecError(f"expected views of one size, found {sorted(map(list, shapes))}; end with an operation that gives a fixed size")
    return Enumeration(image_shape=image_shape, outcomes=tuple(outcomes))


def _in_order(transforms: Sequence[v2.Transform], shape: Shape) -> list[Outcome]:
    """All combinations of the outcomes of one operation after another."""
    made = [Outcome(weight=1.0, steps=(), shape=shape)]
    for transform in transforms:
        following = {shape: _possible(_outcomes(transform, shape)) for shape in {outcome.shape for outcome in made}}
        _require_few(sum(len(following[outcome.shape]) for outcome in made))
        made = [_then(before, after) for before in made for after in following[before.shape]]
    return made


def _then(before: Outcome, after: Outcome) -> Outcome:
    return Outcome(weight=before.weight * after.weight, steps=before.steps + after.steps, shape=after.shape)


def _collected(parts: Iterable[list[Outcome]]) -> list[Outcome]:
    """All outcomes of several lists, counted as they come: a few lines of a manifest can ask for billions."""
    made: list[Outcome] = []
    for part in parts:
        made += _possible(part)
        _require_few(len(made))
    return made


def _possible(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.weight > 0]


def _scaled(outcomes: list[Outcome], probability: float) -> list[Outcome]:
    return [replace(outcome, weight=outcome.weight * probability) for outcome in outcomes]


def _outcomes(transform: v2.Transform, shape: Shape) -> list[Outcome]:
    """What one operation may do to images of a shape."""
    nothing = Outcome(weight=1.0, steps=(), shape=shape)
    if isinstance(transform, v2.Compose):
        return _in_order(transform.transforms, shape)
    if isinstance(transform, v2.RandomApply):
        return _scaled([nothing], 1 - transform.p) + _scaled(_in_order(transform.transforms, shape), transform.p)
    if isinstance(transform, v2.RandomChoice):
        choices = zip(transform.transforms, transform.p, strict=True)
        return _collected(_scaled(_outcomes(choice, shape), share) for choice, share in choices)
    if isinstance(transform, v2.RandomOrder):
        return _orders(transform, shape)
    if isinstance(transform, v2.RandomCrop):
        return _crops(transform, shape)
    if isinstance(transform, COINS):
        done = _done((transform, transform.make_params([_black(shape)])), shape)
        return _scaled([nothing], 1 - transform.p) + _scaled([done], transform.p)
    if type(transform).__name__ in DETERMINISTIC:
        return [_done((transform, None), shape)]
    raise SpecError(
        f"the views of {type(transform).__name__} cannot be enumerated, so there is no such thing as all of them; give a number of views"
    )


def _orders(transform: v2.RandomOrder, shape: Shape) -> list[Outcome]:
    count = math.factorial(len(transform.transforms))
    _require_few(count)
    return _collected(_scaled(_in_order(order, shape), 1 / count) for order in permutations(transform.transforms))


def _crops(transform: v2.RandomCrop, shape: Shape) -> list[Outcome]:
    """One outcome for each place of the window, row by row, all equally probable."""
    params = transform.make_params([_black(shape)])
    left, top, right, bottom = params["padding"]
    rows, columns = shape[1] + top + bottom - params["height"] + 1, shape[2] + left + right - params["width"] + 1
    _require_few(rows * columns)
    one = _done((transform, params), shape)
    places = [{**params, "top": row, "left": column} for row in range(rows) for column in range(columns)]
    return [replace(one, weight=1 / len(places), steps=((transform, place),)) for place in places]


def _done(step: Step, shape: Shape) -> Outcome:
    """What certainly happens."""
    name = type(step[0]).__name__
    try:
        made = _run((step,), _black(shape))
    except Exception as error:  # whatever an operation raises, the user's arguments are the cause
        raise SpecError(f"{name} fails on an image of {list(shape)}: {type(error).__name__}: {error}") from error
    require_image(made, name)
    channels, height, width = made.shape
    return Outcome(weight=1.0, steps=(step,), shape=(channels, height, width))


def _run(steps: Sequence[Step], image: Tensor) -> Tensor:
    for transform, params in steps:
        image = transform(image) if params is None else transform.transform(image, params)
    return image


def _black(shape: Shape) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def _require_few(count: int) -> None:
    if count > MAX_VIEWS:
        raise SpecError(f"there are {count:,} views or more, and at most {MAX_VIEWS:,} are enumerated; give a number of views")
