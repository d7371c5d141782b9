"""Operations: each one of torchvision.transforms.v2 is either made again to the bit, or refused with a reason."""

import os
import random
import time
from collections.abc import Iterator
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
import pytest
import torch
from replaying import SHAPE, another_process, digests, keeps_random_states, noise_image, views_from
from torchvision.transforms import v2

from kdcache.learning.operations import DETERMINISTIC, MAX_DEPTH, REFUSED, End, Operation, build_operations, try_operations
from kdcache.records.errors import SpecError

NUM_VIEWS = 12
FIXED: Operation = {"op": "CenterCrop", "size": [8, 8]}
"""Ends a pipeline whose images have several sizes."""
FLIP: Operation = {"op": "RandomHorizontalFlip", "p": 0.5}
INVERT: Operation = {"op": "RandomInvert", "p": 0.5}

EXAMPLES: dict[str, tuple[Operation, ...]] = {
    "AugMix": ({"op": "AugMix", "severity": 5, "interpolation": "nearest"},),
    "AutoAugment": ({"op": "AutoAugment", "policy": "cifar10", "interpolation": "bilinear", "fill": [1, 2, 3]},),
    "CenterCrop": ({"op": "CenterCrop", "size": [10, 30]},),
    "ColorJitter": ({"op": "ColorJitter", "brightness": 0.4, "contrast": [0.6, 1.4], "saturation": 0.4, "hue": 0.1},),
    "Compose": ({"op": "Compose", "transforms": [FLIP, INVERT]},),
    "ElasticTransform": ({"op": "ElasticTransform", "alpha": 20.0, "sigma": 1.5, "fill": 7},),
    "GaussianBlur": ({"op": "GaussianBlur", "kernel_size": [3, 5], "sigma": [0.5, 2.0]},),
    "GaussianNoise": ({"op": "GaussianNoise", "mean": 0.1, "sigma": 0.2},),
    "Grayscale": ({"op": "Grayscale", "num_output_channels": 3},),
    "Identity": ({"op": "Identity"},),
    "JPEG": ({"op": "JPEG", "quality": [10, 90]},),
    "Pad": ({"op": "Pad", "padding": [1, 2, 3, 4], "padding_mode": "reflect"},),
    "RGB": ({"op": "Grayscale"}, {"op": "RGB"}),
    "RandAugment": ({"op": "RandAugment", "num_ops": 3, "magnitude": 12, "fill": 128},),
    "RandomAdjustSharpness": ({"op": "RandomAdjustSharpness", "sharpness_factor": 2.0},),
    "RandomAffine": ({"op": "RandomAffine", "degrees": 20, "translate": [0.1, 0.2], "scale": [0.8, 1.2], "shear": [-5, 5, -5, 5]},),
    "RandomApply": ({"op": "RandomApply", "p": 0.5, "transforms": [{"op": "ColorJitter", "hue": 0.3}, FLIP]},),
    "RandomAutocontrast": ({"op": "GaussianNoise", "sigma": 0.05}, {"op": "RandomAutocontrast"}),
    "RandomChannelPermutation": ({"op": "RandomChannelPermutation"},),
    "RandomChoice": ({"op": "RandomChoice", "p": [1, 2], "transforms": [FLIP, {"op": "Compose", "transforms": [INVERT, FLIP]}]},),
    "RandomCrop": ({"op": "RandomCrop", "size": [20, 24], "padding": [1, 2], "padding_mode": "edge"},),
    "RandomEqualize": ({"op": "RandomEqualize"},),
    "RandomErasing": ({"op": "RandomErasing", "p": 0.7, "value": [1, 2, 3]},),
    "RandomGrayscale": ({"op": "RandomGrayscale", "p": 0.5},),
    "RandomHorizontalFlip": (FLIP,),
    "RandomInvert": (INVERT,),
    "RandomOrder": ({"op": "RandomOrder", "transforms": [{"op": "RandomRotation", "degrees": 45}, FLIP, INVERT]},),
    "RandomPerspective": ({"op": "RandomPerspective", "distortion_scale": 0.4, "p": 0.7, "interpolation": "nearest"},),
    "RandomPhotometricDistort": ({"op": "RandomPhotometricDistort", "p": 0.5},),
    "RandomPosterize": ({"op": "RandomPosterize", "bits": 3},),
    "RandomResize": ({"op": "RandomResize", "min_size": 10, "max_size": 30}, FIXED),
    "RandomResizedCrop": ({"op": "RandomResizedCrop", "size": [9, 11], "interpolation": "bicubic"},),
    "RandomRotation": ({"op": "RandomRotation", "degrees": [-30, 30], "interpolation": "bilinear", "fill": 9},),
    "RandomShortestSize": ({"op": "RandomShortestSize", "min_size": [9, 12, 15], "max_size": 20}, FIXED),
    "RandomSolarize": ({"op": "RandomSolarize", "threshold": 100},),
    "RandomVerticalFlip": ({"op": "RandomVerticalFlip"},),
    "RandomZoomOut": ({"op": "RandomZoomOut", "fill": 3, "side_range": [1.0, 1.5]}, {"op": "Resize", "size": [12, 12]}),
    "Resize": ({"op": "Resize", "size": [13, 7], "interpolation": "bicubic", "antialias": True},),
    "ScaleJitter": ({"op": "ScaleJitter", "target_size": [20, 20], "scale_range": [0.5, 1.5]}, FIXED),
    "TrivialAugmentWide": ({"op": "TrivialAugmentWide", "num_magnitude_bins": 11},),
}
"""A pipeline for each operation that is supported: its arguments are plain data."""

EVERY = sorted(
    name for name, kind in vars(v2).items() if isinstance(kind, type) and issubclass(kind, v2.Transform) and kind is not v2.Transform
)
"""Every operation that this torchvision has."""


@pytest.fixture(scope="module")
def process() -> Iterator[Pool]:
    """A process of its own."""
    with another_process() as pool:
        yield pool


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # of JPEG; it still works
@pytest.mark.parametrize("name", EVERY)
def test_every_operation_is_repeated_to_the_bit_or_refused(name: str, process: Pool) -> None:
    """Whatever torchvision has: the same pixels twice, in any order, between other draws, in another process; or a reason why not."""
    if name in REFUSED:
        with pytest.raises(SpecError, match="is not supported: "):
            build_operations([{"op": name}])
        return
    assert name in EXAMPLES, f"torchvision has a new operation {name}: give it an example here, or a reason in REFUSED"
    try_operations(EXAMPLES[name], noise_image())
    views = views_from(*EXAMPLES[name])
    made = [views(noise_image(), b"k" * 16, view) for view in range(NUM_VIEWS)]
    assert all(torch.equal(views(noise_image(), b"k" * 16, view), made[view]) for view in (7, 3, 3))
    elsewhere = process.apply(digests, (EXAMPLES[name], NUM_VIEWS))
    assert digests(EXAMPLES[name], NUM_VIEWS) == elsewhere
    operations = {str(operation["op"]) for operation in EXAMPLES[name]}
    assert (len(set(elsewhere)) == 1) == (operations <= DETERMINISTIC)
    assert all(image.dtype == torch.uint8 and image.shape == made[0].shape for image in made)


def test_what_is_refused_says_what_to_do() -> None:
    """MixUp and CutMix point to the augmentation's own options, what makes floats to the network, several images to views."""
    for name, words in {
        "MixUp": "add mixup= or cutmix=", "CutMix": "add mixup= or cutmix=", "Lambda": "holds code", "FiveCrop": "several views",
        "Normalize": "kdcache scales, networks normalise", "ToDtype": "kdcache scales", "RandomIoUCrop": "needs boxes",
    }.items():  # fmt: skip
        with pytest.raises(SpecError, match=words):
            build_operations([{"op": name}])


class DrawsFromPython(v2.Transform):
    """Flips by Python's global generator."""

    def transform(self, inpt: Any, _: dict[str, Any]) -> Any:
        return inpt.flip(-1) if random.random() < 0.5 else inpt


class DrawsFromNumpy(v2.Transform):
    """Inverts by NumPy's global generator, but seldom."""

    def transform(self, inpt: Any, _: dict[str, Any]) -> Any:
        return 255 - inpt if np.random.random() < 0.001 else inpt


class DrawsWhenBuilt(v2.Transform):
    """Draws once, when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.value = random.randrange(256)

    def transform(self, inpt: Any, _: dict[str, Any]) -> Any:
        return inpt


class DrawsFromTime(v2.Transform):
    """A generator of its own, seeded by the clock, behind a probability."""

    def __init__(self, p: float = 0.001) -> None:
        super().__init__()
        self.p = p

    def transform(self, inpt: Any, _: dict[str, Any]) -> Any:
        if torch.rand(1) >= self.p:
            return inpt
        generator = torch.Generator().manual_seed(time.time_ns())
        return torch.randint(0, 256, inpt.shape, dtype=torch.uint8, generator=generator)


class DrawsFromSystem(v2.Transform):
    """The operating system's randomness."""

    def transform(self, inpt: Any, _: dict[str, Any]) -> Any:
        return inpt + os.urandom(1)[0]


class Alternates(v2.Transform):
    """Flips every other image that it is given."""

    calls = 0

    def transform(self, inpt: Any, _: dict[str, Any]) -> Any:
        self.calls += 1
        return inpt.flip(-1) if self.calls % 2 else inpt


FOREIGN = {
    DrawsFromPython: "DrawsFromPython draws from the global generator of Python or NumPy",
    DrawsFromNumpy: "DrawsFromNumpy draws from the global generator of Python or NumPy",
    DrawsWhenBuilt: "DrawsWhenBuilt draws from the global generator of Python or NumPy",
    DrawsFromTime: "DrawsFromTime gives other pixels",
    DrawsFromSystem: "DrawsFromSystem gives other pixels",
    Alternates: "Alternates gives other pixels",
}


def nested(operation: Operation) -> list[Operation]:
    """Pipelines in which an operation stands alone, last, or where it hardly ever runs."""
    return [
        operation,
        {"op": "RandomApply", "p": 0.0, "transforms": [FLIP, operation]},
        {"op": "RandomChoice", "p": [1.0, 0.0], "transforms": [FLIP, {"op": "RandomOrder", "transforms": [INVERT, operation]}]},
    ]


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)
def test_foreign_randomness_is_refused(kind: type[v2.Transform], monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that draws from Python, NumPy, the clock or the system, or that counts, is refused by name, wherever it stands."""
    monkeypatch.setattr(v2, kind.__name__, kind, raising=False)
    for pipeline in nested({"op": kind.__name__}):
        with pytest.raises(SpecError, match=FOREIGN[kind]):
            try_operations([FLIP, pipeline], noise_image())


def test_trying_leaves_all_random_states(process: Pool) -> None:
    """Trying operations, also ones that are refused in the middle, leaves the states of torch, Python and NumPy as they were."""
    assert process.apply(keeps_random_states, (EXAMPLES["RandomOrder"], [FLIP, {"op": "GaussianBlur", "kernel_size": 99}]))


def test_what_writes_into_the_sample_is_refused() -> None:
    """An operation that changes the decoded sample itself would spoil the sample's other views."""
    with pytest.raises(SpecError, match="RandomErasing writes into its input"):
        try_operations([{"op": "RandomErasing", "p": 0.1, "inplace": True}], noise_image())


def test_random_values_of_erasing_are_refused() -> None:
    """RandomErasing's random values are floats around zero: which pixels they become depends on the processor."""
    with pytest.raises(SpecError, match="no pixels from 0 to 255"):
        build_operations([{"op": "RandomErasing", "value": "random"}])


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ({"op": "RandomApply", "p": 0.5}, "RandomApply: expected transforms = "),
        ({"op": "RandomApply", "transforms": []}, "at least one, found \\[\\]"),
        ({"op": "Compose", "transforms": ["RandomInvert"]}, "found \\['RandomInvert'\\]"),
        ({"op": "Compose", "transforms": FLIP}, "Compose: expected transforms = "),
        ({"op": "Compose", "transforms": [{"op": "Nothing"}]}, "unknown operation 'Nothing'"),
        ({"op": "RandomApply", "p": 2.0, "transforms": [FLIP]}, "RandomApply: `p` should be"),
        ({"op": "RandomChoice", "p": [1.0], "transforms": [FLIP, INVERT]}, "RandomChoice: "),
        ({"op": "RandomChoice", "p": [-1.0, 2.0], "transforms": [FLIP, INVERT]}, "expected p as numbers from 0 on that are not all 0"),
        ({"op": "RandomChoice", "p": [0, 0], "transforms": [FLIP, INVERT]}, "expected p as numbers from 0 on that are not all 0"),
        ({"op": "RandomInvert", "transforms": [FLIP]}, "RandomInvert: .* unexpected keyword argument 'transforms'"),
        ({"op": "AutoAugment", "policy": "mnist"}, "unknown policy 'mnist'; expected one of \\['imagenet', 'cifar10', 'svhn'\\]"),
        ({"op": "Compose", "transforms": [{"op": "Lambda"}]}, "'Lambda' is not supported"),
    ],
)
def test_wrong_nesting_and_arguments_are_refused(operation: Operation, message: str) -> None:
    """Operations in operations are lists of tables; anything else is a SpecError that shows what was found."""
    with pytest.raises(SpecError, match=message):
        build_operations([operation])


def test_nesting_has_a_bound() -> None:
    """A pipeline from a stranger cannot lie deeper in itself than anybody needs."""
    operation = FLIP
    for _ in range(MAX_DEPTH):
        operation = {"op": "Compose", "transforms": [operation]}
    assert len(build_operations([operation])) == 1
    with pytest.raises(SpecError, match=f"at most {MAX_DEPTH} deep"):
        build_operations([{"op": "Compose", "transforms": [operation]}])


def test_end_is_a_function_of_the_image_alone() -> None:
    """A network's own end brings images to its size, draws nothing, and says the size beforehand."""
    end = End([{"op": "Resize", "size": [40, 48], "interpolation": "bicubic"}, {"op": "CenterCrop", "size": [32, 32]}])
    before = torch.get_rng_state()
    made = end(noise_image())
    assert torch.equal(made, end(noise_image()))
    assert torch.equal(torch.get_rng_state(), before)
    assert tuple(made.shape) == end.output_shape(SHAPE) == (3, 32, 32)
    image = noise_image()
    assert End([])(image) is image


@pytest.mark.parametrize(
    "operation", [FLIP, {"op": "GaussianBlur", "kernel_size": 3}, {"op": "RandomInvert", "p": 1.0}, {"op": "Nothing"}, {}]
)
def test_end_refuses_what_draws(operation: Operation) -> None:
    """Chance belongs to what teacher and students share."""
    with pytest.raises(SpecError, match="not among the operations that one network may have for itself: CenterCrop"):
        End([operation])
