"""Views as pure functions: `view(image, key, v)` gives the same pixels in any process, order and batch, on any day.

A torchvision v2 pipeline runs under a random stream that is keyed by (seed, sample key, view number) and by nothing else. An
enumerated one draws nothing: its view `v` is the v-th of all that the pipeline can make.
"""

import torch
import torchvision
from jaxtyping import Float64
from numpy import ndarray
from torch import Tensor

from kdcache.learning.augmentations import read_augmentation
from kdcache.learning.enumeration import Enumeration, enumerate_views
from kdcache.learning.operations import End, build_operations, require_image, try_end, try_operations
from kdcache.learning.sources.source import Sample
from kdcache.records.errors import ConfigError, SpecError
from kdcache.records.hashing import stable_integer
from kdcache.records.manifest import ViewsRecord

TRIALS = 8
"""Views of one image on which an augmentation is tried out."""


class SeededViews:
    """Makes view `v` of a sample, the same one for ever: the part that teacher and students share.

    Args:
        record: Operations (resolved, as `make_views` gives them) and seed.
        image_shape: Channels, height and width of every sample. Only enumerated views depend on it; None for that of the first
            sample that comes.

    Raises:
        SpecError: An operation is not one of torchvision.transforms.v2, does not take these arguments, or cannot be enumerated.
    """

    def __init__(self, record: ViewsRecord, *, image_shape: tuple[int, int, int] | None = None) -> None:
        self.record = record
        self._transforms = build_operations(record.pipeline)
        self._all: Enumeration | None = None
        if record.enumerated and image_shape is not None:
            self._all = enumerate_views(self._transforms, image_shape)

    def __call__(self, image: Sample, key: bytes, view: int) -> Tensor:
        """One view of one image.

        Args:
            image: The decoded sample. One that is no image has no operations, and is its own only view.
            key: The sample's key.
            view: The view's number, from 0.

        Returns:
            uint8 [channels, height, width], at the size that the pipeline gives. The caller's random state is as before.

        Raises:
            MismatchError: The views are enumerated, and the image has another shape than those before.
            ConfigError: The views are enumerated, and there is none of this number.
        """
        if self.record.enumerated:
            return self._enumeration(image).make(image, view)
        if not self._transforms:
            return image
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(stable_integer(self.record.seed, key, view))
            for transform in self._transforms:
                image = transform(image)
            return image
        finally:
            torch.set_rng_state(state)

    @property
    def num_all(self) -> int | None:
        """How many views there are; None for random ones, of which there is no end.

        Raises:
            ConfigError: The views are enumerated, and no image's shape is known yet.
        """
        return len(self._known.outcomes) if self.record.enumerated else None

    @property
    def weights(self) -> Float64[ndarray, "views"] | None:
        """How probable each of all views is, [views]; None for random ones.

        Raises:
            ConfigError: The views are enumerated, and no image's shape is known yet.
        """
        return self._known.weights if self.record.enumerated else None

    def output_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the views of an image of this shape, before any network's own end."""
        channels, height, width = self(torch.zeros(image_shape, dtype=torch.uint8), b"", 0).shape
        return channels, height, width

    @property
    def _known(self) -> Enumeration:
        if self._all is None:
            raise ConfigError("how many views there are depends on the images' shape; expected image_shape, found none")
        return self._all

    def _enumeration(self, image: Tensor) -> Enumeration:
        if self._all is None:
            channels, height, width = image.shape
            self._all = enumerate_views(self._transforms, (channels, height, width))
        return self._all


def library_versions() -> dict[str, str]:
    """The libraries that decide about pixels and about random streams."""
    return {"torch": _release(torch.__version__), "torchvision": _release(torchvision.__version__)}


def make_views(augment: str, *, seed: int, image_shape: tuple[int, ...], enumerated: bool = False) -> SeededViews:
    """Views by an augmentation's spec. Its operations are tried on an image of noise; all random states stay as they were.

    Args:
        augment: `NAME_OR_FILE[,size=N|HxW][,mixup=A][,cutmix=A][,probability=P]`; see `read_augmentation`.
        seed: Seed of all random choices.
        image_shape: Channels, height and width of a decoded sample; `size = "input"` means this height and width. The shape of
            other samples, which only `none` is for.
        enumerated: Whether view `v` is the v-th of all that there are, instead of a random one.

    Raises:
        SpecError: No such augmentation; an operation is unknown, fails, makes something else than an image, or draws from elsewhere
            than PyTorch's default generator; the views have several sizes, or cannot be enumerated.
    """
    if len(image_shape) != 3:
        return _views_of_others(augment, image_shape, seed=seed, enumerated=enumerated)
    channels, height, width = image_shape
    read = read_augmentation(augment, image_shape=(channels, height, width))
    if enumerated and read.mixing is not None:
        raise SpecError(f"{augment}: mixed views cannot be enumerated: give a number of views, or leave out mixup and cutmix")
    record = ViewsRecord(
        pipeline=read.operations, seed=seed, versions=library_versions(),
        mixing=read.mixing, teacher_end=read.teacher_end, enumerated=enumerated,
    )  # fmt: skip
    return _try_out(augment, record, (channels, height, width))


def _views_of_others(augment: str, shape: tuple[int, ...], *, seed: int, enumerated: bool) -> SeededViews:
    """The only view of a row of a table or of a text: itself."""
    if augment != "none" or enumerated:
        asked = "--views all" if enumerated else f"the augmentation {augment}"
        raise SpecError(f"{asked} is for images, found samples of shape {list(shape)}; add --augment none --views 1")
    return SeededViews(ViewsRecord(pipeline=(), seed=seed, versions=library_versions()))


def _try_out(augment: str, record: ViewsRecord, image_shape: tuple[int, int, int]) -> SeededViews:
    """Refuses now, and not in the middle of a dump, what does not make one repeatable image of an image."""
    noise = torch.randint(0, 256, image_shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        end = End(record.teacher_end)
        try_operations(record.pipeline, noise)
        views = SeededViews(record, image_shape=image_shape)
        made = [views(noise, b"", view) for view in range(min(TRIALS, views.num_all or TRIALS))]
        try_end(end, made[0])
    except SpecError as error:
        raise SpecError(f"{augment}: {error}") from error
    except Exception as error:  # whatever an operation raises, the user's arguments are the cause
        raise SpecError(f"{augment} fails on an image of {list(image_shape)}: {type(error).__name__}: {error}") from error
    for image in made:
        require_image(image, augment)
    if len({image.shape for image in made}) > 1:
        raise SpecError(
            f"{augment}: expected views of one size, found {sorted({tuple(image.shape) for image in made})}; end with an operation that"
            " gives a fixed size, such as Resize with two numbers"
        )
    return views


def _release(version: str) -> str:
    """`2.15.0+cpu` and `2.15.0+cu130` give the same pixels: the build tag is left out."""
    return version.partition("+")[0]
