"""Views as pure functions: `view(image, key, v)` gives the same pixels in any process, order and batch, on any day.

A torchvision v2 pipeline runs under a random stream that is keyed by (seed, sample key, view number) and by nothing else.
"""

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torchvision
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import v2

from kdcache.records.errors import SpecError
from kdcache.records.hashing import stable_integer
from kdcache.records.manifest import ViewsRecord

PIPELINES = ("none", "crop-flip", "rrc-flip")
"""The pipelines that are known by name; each is a TOML file beside this module."""

NOT_PLAIN = ("Compose", "Lambda", "RandomApply", "RandomChoice", "RandomOrder")
"""Operations whose arguments are operations or functions."""

TRIALS = 8
"""Views of a black image on which a pipeline is tried out."""

Operation = dict[str, Any]


class SeededViews:
    """Makes view `v` of a sample, the same one for ever.

    Args:
        record: Operations (resolved, as `resolve_pipeline` gives them) and seed.

    Raises:
        SpecError: An operation is not one of torchvision.transforms.v2, or does not take these arguments.
    """

    def __init__(self, record: ViewsRecord) -> None:
        self.record = record
        self._transform = v2.Compose([_build_operation(op) for op in record.pipeline]) if record.pipeline else None

    def __call__(self, image: UInt8[Tensor, "channels height width"], key: bytes, view: int) -> Tensor:
        """One view of one image.

        Args:
            image: The decoded sample.
            key: The sample's key.
            view: The view's number, from 0.

        Returns:
            uint8 [channels, height, width], at the size that the pipeline gives. The caller's random state is as before.
        """
        if self._transform is None:
            return image
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(stable_integer(self.record.seed, key, view))
            transformed: Tensor = self._transform(image)
            return transformed
        finally:
            torch.set_rng_state(state)


def library_versions() -> dict[str, str]:
    """The libraries that decide about pixels and about random streams."""
    return {"torch": _release(torch.__version__), "torchvision": _release(torchvision.__version__)}


def make_views(augment: str, *, seed: int, image_shape: tuple[int, int, int]) -> SeededViews:
    """Views by a pipeline's name or TOML file.

    Args:
        augment: One of `PIPELINES`, or the path of a TOML file with `[[ops]]` tables.
        seed: Seed of all random choices.
        image_shape: Channels, height and width of a decoded sample; `size = "input"` means this height and width.
    """
    pipeline = resolve_pipeline(augment, image_shape=image_shape)
    return SeededViews(ViewsRecord(pipeline=pipeline, seed=seed, versions=library_versions()))


def resolve_pipeline(augment: str, *, image_shape: tuple[int, int, int]) -> tuple[Operation, ...]:
    """The operations of a pipeline, as plain data that a manifest can hold.

    Raises:
        SpecError: No such pipeline or file, or the file is not a list of operations.
    """
    if augment in PIPELINES:
        text = resources.files("kdcache.learning").joinpath("pipelines", f"{augment}.toml").read_text("utf-8")
    elif Path(augment).suffix == ".toml" and Path(augment).is_file():
        text = Path(augment).read_text("utf-8")
    else:
        raise SpecError(f"no augmentation {augment!r}; expected one of {', '.join(PIPELINES)}, or an existing .toml file")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{augment} is not valid TOML: {error}") from error
    operations = document.get("ops")
    if set(document) != {"ops"} or not isinstance(operations, list) or not all(isinstance(op, dict) for op in operations):
        raise SpecError(f"{augment}: expected only [[ops]] tables, each with op = NAME, found the keys {sorted(document)}")
    size = list(image_shape[1:])
    resolved = tuple({key: size if value == "input" else value for key, value in op.items()} for op in operations)
    _try_out(augment, resolved, image_shape)
    return resolved


def _try_out(augment: str, pipeline: tuple[Operation, ...], image_shape: tuple[int, int, int]) -> None:
    """Runs a few views of a black image: what does not make an image of an image is refused now, not in the middle of a dump."""
    views = SeededViews(ViewsRecord(pipeline=pipeline, seed=0, versions={}))
    black = torch.zeros(image_shape, dtype=torch.uint8)
    for view in range(TRIALS):
        try:
            made = views(black, b"", view)
        except Exception as error:  # whatever an operation raises, the user's arguments are the cause
            raise SpecError(f"{augment} fails on an image of {list(image_shape)}: {type(error).__name__}: {error}") from error
        if not isinstance(made, Tensor) or made.dtype != torch.uint8 or made.ndim != 3:
            found = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise SpecError(
                f"{augment}: expected one uint8 image [channels, height, width], found {found}; kdcache scales, networks normalise"
            )


def _build_operation(operation: Mapping[str, Any]) -> v2.Transform:
    """One v2 operation. Only Transform classes of torchvision.transforms.v2 are ever built, with plain data."""
    arguments = dict(operation)
    name = arguments.pop("op", None)
    kind = getattr(v2, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, v2.Transform) or kind is v2.Transform:
        raise SpecError(f"unknown operation {name!r}; expected the name of a transform in torchvision.transforms.v2")
    if name in NOT_PLAIN:
        raise SpecError(f"the operation {name!r} is not supported: it holds other operations or code, and a recipe is plain data")
    if "interpolation" in arguments:
        arguments["interpolation"] = _interpolation(arguments["interpolation"])
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise SpecError(f"{name}: {error}; given were {arguments}") from error


def _interpolation(name: object) -> v2.InterpolationMode:
    try:
        return v2.InterpolationMode(name)
    except ValueError as error:
        raise SpecError(f"unknown interpolation {name!r}; expected one of {[mode.value for mode in v2.InterpolationMode]}") from error


def _release(version: str) -> str:
    """`2.15.0+cpu` and `2.15.0+cu130` give the same pixels: the build tag is left out."""
    return version.partition("+")[0]
