"""Operations of torchvision.transforms.v2 from plain data, and the proof that each of them can be made again.

A view is repeatable when all of its chance comes from PyTorch's default CPU generator, which is seeded for every view. Nothing in
Python keeps an operation from drawing elsewhere, so operations are tried before they are used.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import v2

from kdcache.learning.augmentations import Operation
from kdcache.records.errors import SpecError

CONTAINERS = ("Compose", "RandomApply", "RandomChoice", "RandomOrder")
"""Operations that hold operations: `transforms` is a list of them, as plain data."""

MAX_DEPTH = 8
"""How deep containers may lie in containers."""

DETERMINISTIC = frozenset({"CenterCrop", "Grayscale", "Identity", "Pad", "RGB", "Resize"})
"""Operations that draw nothing."""

_FLOATS = "it makes floats: kdcache scales, networks normalise"
_TENSOR = "samples are uint8 tensors already; leave it out"
_OTHER_INPUT = "it needs boxes, key points or videos, and a sample is an image"
_BATCH = "it mixes within a batch; kdcache mixes sample by sample: add mixup= or cutmix= to the augmentation, or a [mix] table to its file"
REFUSED = {
    "Lambda": "it holds code, and an augmentation is plain data",
    **dict.fromkeys(("MixUp", "CutMix"), _BATCH),
    **dict.fromkeys(("ConvertImageDtype", "LinearTransformation", "Normalize", "ToDtype", "ToTensor"), _FLOATS),
    **dict.fromkeys(("PILToTensor", "ToImage", "ToPILImage", "ToPureTensor"), _TENSOR),
    **dict.fromkeys(("FiveCrop", "TenCrop"), "it makes several images of one; ask for several views instead"),
    **dict.fromkeys(("ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "RandomIoUCrop"), _OTHER_INPUT),
    **dict.fromkeys(("SanitizeBoundingBoxes", "SanitizeKeyPoints", "SetClampingMode", "UniformTemporalSubsample"), _OTHER_INPUT),
}
"""Operations that are refused by name, and why."""

_ENUMS: dict[str, type[Enum]] = {"interpolation": v2.InterpolationMode, "policy": v2.AutoAugmentPolicy}
_SEEDS, _REPLAYS = 4, 2


class End:
    """What one network's images go through after the shared views: operations without chance, such as a Resize to its size.

    Args:
        operations: Plain data, in order; none for images as they are.

    Raises:
        SpecError: An operation draws, or cannot be built.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.operations = tuple(operations)
        for operation in self.operations:
            if operation.get("op") not in DETERMINISTIC:
                raise SpecError(
                    f"{operation.get('op')!r} is not among the operations that one network may have for itself:"
                    f" {', '.join(sorted(DETERMINISTIC))}; what draws belongs to [[ops]], which teacher and students share"
                )
        self._transforms = build_operations(self.operations)

    def __call__(self, image: UInt8[Tensor, "channels height width"]) -> Tensor:
        """The image as the network gets it, uint8 [channels, height, width]."""
        for transform in self._transforms:
            image = transform(image)
        return image

    def output_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Channels, height and width of what it makes of an image of this shape."""
        channels, height, width = self(torch.zeros(image_shape, dtype=torch.uint8)).shape
        return channels, height, width


def build_operations(operations: Sequence[Operation]) -> list[v2.Transform]:
    """Operations in order.

    Raises:
        SpecError: One is not of torchvision.transforms.v2, is refused, or does not take these arguments.
    """
    return [_build(operation, depth=0) for operation in operations]


def try_operations(operations: Sequence[Operation], image: UInt8[Tensor, "channels height width"]) -> Tensor:
    """Tries each operation alone, on what the ones before it make of an image. All random states stay as they were.

    Args:
        operations: Plain data.
        image: An image of noise, so that hardly an operation leaves it as it is.

    Returns:
        What all of them make of it.

    Raises:
        SpecError: An operation cannot be built, fails, makes something else than an image, writes into its input, or draws from
            elsewhere than PyTorch's default generator.
    """
    build_operations(operations)
    with _random_states_kept():
        return _try_in_order(operations, image)


def try_end(end: End, image: UInt8[Tensor, "channels height width"]) -> None:
    """Tries a network's own end on an image.

    Raises:
        SpecError: As for `try_operations`, or it draws: an operation's name alone is no proof.
    """
    try_operations(end.operations, image)
    with _random_states_kept():
        before = torch.get_rng_state()
        end(image)
        if not torch.equal(torch.get_rng_state(), before):
            names = ", ".join(str(operation["op"]) for operation in end.operations)
            raise SpecError(f"what a network has for itself must not draw, and one of {names} does; move it to [[ops]]")


def _try_in_order(operations: Sequence[Operation], image: Tensor) -> Tensor:
    for operation in operations:
        image = _try(operation, image)
    return image


def _try(operation: Operation, image: Tensor) -> Tensor:
    if operation["op"] == "RandomChoice":
        made = [_try(choice, image) for choice in operation["transforms"]]
        return made[0]
    if operation["op"] in CONTAINERS:
        return _try_in_order(operation["transforms"], image)
    for seed in range(_SEEDS):
        replays = [made for replay in range(_REPLAYS) for made in _run_watched(operation, image, seed=seed, replay=replay)]
        if not all(torch.equal(replays[0], other) for other in replays[1:]):
            raise SpecError(
                f"{operation['op']} gives other pixels when it runs again from the same seed: it draws from elsewhere than"
                " PyTorch's default generator, so a student could not see what the teacher saw; take it out"
            )
    return replays[0]


def _run_watched(operation: Operation, image: Tensor, *, seed: int, replay: int) -> list[Tensor]:
    """Builds an operation anew and runs it twice with p = 1, in a state of foreign generators that no other replay has."""
    number = _REPLAYS * seed + replay
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number + _SEEDS)
    before = _foreign_states()
    transform = _build(operation, depth=0)
    if isinstance(getattr(transform, "p", None), float | int):
        transform.p = 1.0
    made = [_run_seeded(transform, operation["op"], image, seed=seed) for _ in range(2)]
    if _foreign_states() != before:
        raise SpecError(
            f"{operation['op']} draws from the global generator of Python or NumPy, which has no seed of its own for each view, so a"
            " student could not see what the teacher saw; take it out"
        )
    return made


def _run_seeded(transform: v2.Transform, name: str, image: Tensor, *, seed: int) -> Tensor:
    given = image.clone()
    torch.default_generator.manual_seed(seed)
    try:
        made = transform(given)
    except Exception as error:  # whatever an operation raises, the user's arguments are the cause
        raise SpecError(f"{name} fails on an image of {list(image.shape)}: {type(error).__name__}: {error}") from error
    if not torch.equal(given, image):
        raise SpecError(f"{name} writes into its input, which is the sample itself, so later views would differ; leave out inplace")
    require_image(made, name)
    return made  # type: ignore[no-any-return]


def require_image(made: object, name: str) -> None:
    """Checks that an operation or a whole augmentation made one uint8 image.

    Raises:
        SpecError: It made something else.
    """
    if not isinstance(made, Tensor) or made.dtype != torch.uint8 or made.ndim != 3:
        found = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise SpecError(f"{name}: expected one uint8 image [channels, height, width], found {found}; kdcache scales, networks normalise")


def _foreign_states() -> tuple[object, ...]:
    """The states of Python's and NumPy's global generators, comparable."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(keys).tobytes(), *rest


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


def _build(operation: Operation, *, depth: int) -> v2.Transform:
    """One operation. Only Transform classes of torchvision.transforms.v2 are ever built, with plain data."""
    arguments = dict(operation)
    name = arguments.pop("op", None)
    kind = getattr(v2, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, v2.Transform) or kind is v2.Transform:
        raise SpecError(f"unknown operation {name!r}; expected the name of a transform in torchvision.transforms.v2")
    if name in REFUSED:
        raise SpecError(f"the operation {name!r} is not supported: {REFUSED[name]}")
    for argument in _ENUMS.keys() & arguments:
        arguments[argument] = _member(argument, arguments[argument])
    if name in CONTAINERS:
        arguments["transforms"] = _build_contents(name, arguments.get("transforms"), depth=depth + 1)
    if name == "RandomErasing" and arguments.get("value") == "random":
        raise SpecError("RandomErasing: value = 'random' draws floats around 0, which are no pixels from 0 to 255; give a number")
    if name == "RandomChoice" and not _are_shares(arguments.get("p")):
        raise SpecError(f"RandomChoice: expected p as numbers from 0 on that are not all 0, found {arguments['p']!r}")
    try:
        return kind(**arguments)
    except Exception as error:  # whatever a constructor raises, the user's arguments are the cause
        raise SpecError(f"{name}: {error}; given were {operation}") from error


def _are_shares(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, list | tuple) and all(isinstance(share, int | float) and share >= 0 for share in value) and any(value)


def _build_contents(name: str, operations: object, *, depth: int) -> list[v2.Transform]:
    if depth > MAX_DEPTH:
        raise SpecError(f"{name}: expected operations at most {MAX_DEPTH} deep in each other, found more")
    if not isinstance(operations, list | tuple) or not operations or not all(isinstance(item, dict) for item in operations):
        raise SpecError(f"{name}: expected transforms = [{{op = NAME, …}}, …], at least one, found {operations!r}")
    return [_build(item, depth=depth) for item in operations]


def _member(argument: str, value: Any) -> Enum:
    kind = _ENUMS[argument]
    try:
        return kind(value)
    except ValueError as error:
        raise SpecError(f"unknown {argument} {value!r}; expected one of {[member.value for member in kind]}") from error
