"""Every view there is: the pixels and the probabilities of the random views, in order and without chance."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from replaying import noise_image, views_from

from kdcache.learning.operations import Operation
from kdcache.learning.views import SeededViews, make_views
from kdcache.records.errors import ConfigError, MismatchError, SpecError
from kdcache.records.jsonrecord import from_json, to_json
from kdcache.records.manifest import ViewsRecord

SHAPE = (3, 20, 24)
CROP_FLIP: tuple[Operation, ...] = ({"op": "RandomCrop", "size": [20, 24], "padding": 4}, {"op": "RandomHorizontalFlip", "p": 0.5})
NESTED: tuple[Operation, ...] = (
    {"op": "RandomApply", "p": 0.75, "transforms": [
        {"op": "RandomChoice", "p": [1.0, 3.0], "transforms": [
            {"op": "RandomInvert", "p": 0.5},
            {"op": "Compose", "transforms": [{"op": "RandomVerticalFlip", "p": 1.0}, {"op": "RandomSolarize", "threshold": 90, "p": 0.25}]},
        ]},
    ]},
    {"op": "RandomOrder", "transforms": [{"op": "RandomPosterize", "bits": 2, "p": 0.5}, {"op": "RandomEqualize", "p": 0.5}]},
    {"op": "RandomGrayscale", "p": 0.25},
    {"op": "RandomAdjustSharpness", "sharpness_factor": 3.0, "p": 0.0},
    {"op": "RandomAutocontrast", "p": 1.0},
    {"op": "Resize", "size": [10, 12]},
    {"op": "RandomCrop", "size": [9, 10]},
)  # fmt: skip


def enumerated(*pipeline: Operation, shape: tuple[int, int, int] = SHAPE) -> SeededViews:
    """All views of a pipeline, given as a manifest has it."""
    record = views_from(*pipeline, enumerated=True).record
    return SeededViews(record, image_shape=shape)


def probabilities(views: SeededViews) -> dict[bytes, float]:
    """How probable each picture is: different choices may give equal pixels."""
    assert views.num_all is not None
    assert views.weights is not None
    found: Counter[bytes] = Counter()
    for view in range(views.num_all):
        found[views(noise_image(), b"", view).contiguous().numpy().tobytes()] += views.weights[view]  # type: ignore[assignment]
    return dict(found)


def chi_square_bound(freedom: int) -> float:
    """What chi-square exceeds in one of a thousand tries (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * float((1 - spread + 3.09 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_crop_flip_has_162_views(shape: tuple[int, int, int]) -> None:
    """Nine by nine places of the window, flipped or not, each equally probable, and all of them different."""
    views = make_views("crop-flip", seed=0, image_shape=shape, enumerated=True)
    assert views.record.enumerated
    assert views.num_all == 162
    assert views.weights is not None
    assert views.weights.dtype == np.float64
    np.testing.assert_allclose(views.weights, 1 / 162)
    assert len({views(noise_image(shape=shape), b"", view).contiguous().numpy().tobytes() for view in range(162)}) == 162


def test_order_of_the_views() -> None:
    """The last operation varies fastest, and windows go row by row: the format's numbering."""
    views, image = enumerated(*CROP_FLIP), noise_image()
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    for view in range(162):
        row, column, flipped = view // 18, view // 2 % 9, view % 2
        window = padded[:, row : row + 20, column : column + 24]
        assert torch.equal(views(image, b"", view), window.flip(-1) if flipped else window)


@pytest.mark.parametrize(("pipeline", "draws"), [(CROP_FLIP, 4860), (NESTED, 2000)], ids=["crop-flip", "nested"])
def test_random_views_are_among_them_as_often_as_their_weights_say(pipeline: tuple[Operation, ...], draws: int) -> None:
    """Every random view has the pixels of an enumerated one, and the counts fit the weights by a chi-square test."""
    expected, views = probabilities(enumerated(*pipeline)), views_from(*pipeline)
    drawn = Counter(views(noise_image(), b"k" * 16, view).contiguous().numpy().tobytes() for view in range(draws))
    assert drawn.keys() <= expected.keys()
    assert sum(expected.values()) == pytest.approx(1)
    often = {pixels: share * draws for pixels, share in expected.items() if share * draws >= 5}
    rest = [sum(found for pixels, found in drawn.items() if pixels not in often), draws - sum(often.values())]
    pairs = [(drawn[pixels], wanted) for pixels, wanted in often.items()] + ([(rest[0], rest[1])] if rest[1] >= 5 else [])
    assert len(pairs) > 20
    assert sum((found - wanted) ** 2 / wanted for found, wanted in pairs) < chi_square_bound(len(pairs) - 1)


def test_what_never_happens_is_left_out() -> None:
    """A probability of 0 or 1 is no choice, and each weight is the product of its choices."""
    assert enumerated({"op": "RandomInvert", "p": 0.0}).num_all == 1
    assert enumerated({"op": "RandomInvert", "p": 1.0}).num_all == 1
    assert enumerated().num_all == 1
    assert enumerated({"op": "RandomChoice", "p": [0.0, 1.0], "transforms": [{"op": "RandomInvert"}, {"op": "Identity"}]}).num_all == 1
    views = enumerated({"op": "RandomGrayscale", "p": 0.25}, {"op": "RandomVerticalFlip", "p": 0.5})
    assert views.weights is not None
    assert views.weights.tolist() == [0.375, 0.375, 0.125, 0.125]


def test_sizes_may_differ_on_the_way() -> None:
    """Operations are enumerated for the size that the ones before them give; only the last size must be one."""
    half = {"op": "RandomApply", "p": 0.5, "transforms": [{"op": "CenterCrop", "size": [12, 12]}]}
    views = enumerated(half, {"op": "RandomCrop", "size": [11, 12]})
    assert views.num_all == 10 * 13 + 2
    assert views.output_shape(SHAPE) == (3, 11, 12)
    with pytest.raises(SpecError, match=r"views of one size, found \[\[3, 12, 12\], \[3, 20, 24\]\]"):
        enumerated(half)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (({"op": "RandomInvert"}, {"op": "RandomResizedCrop", "size": 8}, {"op": "ColorJitter", "hue": 0.1}), "views of RandomResizedCrop"),
        (({"op": "RandomApply", "transforms": [{"op": "GaussianBlur", "kernel_size": 3}]},), "views of GaussianBlur"),
        (({"op": "RandAugment"},), "views of RandAugment cannot be enumerated.*give a number of views"),
        (({"op": "RandomCrop", "size": 1, "padding": 200},), "views or more, and at most 65,536 are enumerated; give a number of views"),
        (({"op": "RandomOrder", "transforms": [{"op": "RandomInvert"}] * 9},), "362,880 views or more"),
        (({"op": "RandomCrop", "size": [20, 24], "padding": 8},) * 2, "83,521 views or more"),
        (({"op": "RandomCrop", "size": 99},), "is larger than"),
        (({"op": "RandomOrder", "transforms": [{"op": "RandomInvert", "p": 0.5}] * 8},), "65,792 views or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_enumerated_is_refused(pipeline: tuple[Operation, ...], message: str) -> None:
    """The first operation that stands in the way is named, and a number of views is offered."""
    with pytest.raises(SpecError, match=message):
        enumerated(*pipeline)


def test_mixed_views_cannot_be_enumerated() -> None:
    """There is no end of shares and partners."""
    with pytest.raises(SpecError, match="mixed views cannot be enumerated: give a number of views, or leave out mixup and cutmix"):
        make_views("crop-flip,mixup=0.2", seed=0, image_shape=SHAPE, enumerated=True)


def test_nothing_is_drawn() -> None:
    """Neither counting nor making enumerated views touches the random state, and the key does not matter."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    views = enumerated(*NESTED)
    made = [views(noise_image(), key, 5) for key in (b"a" * 16, b"b" * 16)]
    assert torch.equal(*made)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_have_one_shape_and_views_their_numbers() -> None:
    """An image of another shape and a view that there is not are refused in words."""
    views = enumerated(*CROP_FLIP)
    with pytest.raises(MismatchError, match=r"counted for images of \[3, 20, 24\], found one of \[3, 24, 20\]"):
        views(noise_image(shape=(3, 24, 20)), b"", 0)
    for view in (-1, 162):
        with pytest.raises(ConfigError, match=f"there are 162 views, numbered from 0; asked for was view {view}"):
            views(noise_image(), b"", view)


def test_shape_may_come_with_the_first_image() -> None:
    """Views that are read from a manifest take the shape of the first image, unless it is given."""
    views = views_from(*CROP_FLIP, enumerated=True)
    for ask in (lambda: views.num_all, lambda: views.weights):
        with pytest.raises(ConfigError, match="depends on the images' shape"):
            ask()
    first = views(noise_image(), b"", 17)
    assert views.num_all == 162
    with pytest.raises(MismatchError):
        views(noise_image(shape=(3, 28, 28)), b"", 0)
    assert torch.equal(first, enumerated(*CROP_FLIP)(noise_image(), b"", 17))


def test_random_views_have_no_end() -> None:
    """Random views have no number and no weights."""
    views = make_views("crop-flip", seed=0, image_shape=SHAPE)
    assert views.num_all is None
    assert views.weights is None


def test_copies_make_the_same_views() -> None:
    """A record from JSON, and a pickled copy, enumerate the same views in the same order."""
    views = make_views("crop-flip", seed=0, image_shape=SHAPE, enumerated=True)
    record = from_json(ViewsRecord, to_json(views.record), where="test")
    for copy in (SeededViews(record, image_shape=SHAPE), pickle.loads(pickle.dumps(views))):
        assert all(torch.equal(copy(noise_image(), b"", view), views(noise_image(), b"", view)) for view in range(162))
