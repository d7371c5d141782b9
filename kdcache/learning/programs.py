"""Exported networks, `.pt2` and `.onnx`: what both kinds share. The graph is in the file, so shapes are fixed where it was exported so."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.models import InputEnd
from kdcache.records.errors import CheckpointError, MismatchError, SpecError
from kdcache.records.specs import Spec

Axis = int | None
"""A length, or None where any will do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a graph takes and gives."""

    channels: Axis
    """Channels of its images."""
    size: tuple[Axis, Axis]
    """Height and width of its images."""
    batch: tuple[int, int | None]
    """Smallest and largest batch; None for any."""
    num_classes: Axis
    """Last axis of its logits."""


class Program(nn.Module):
    """A graph in float32, whatever its own batch size: batches are cut or padded to what it takes.

    Args:
        path: Its file, for messages.
        signature: What it takes.
    """

    def __init__(self, path: Path, signature: Signature) -> None:
        super().__init__()
        self.path, self.signature = path, signature

    @abstractmethod
    def run(self, images: Tensor) -> Tensor:
        """Images [batch, channels, height, width], contiguous float32, to logits, on any device."""

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images to logits [batch, …, classes]."""
        self._check(images)
        smallest, largest = self.signature.batch
        with torch.autocast(images.device.type, enabled=False):
            parts = [self._padded(part.float().contiguous(), smallest) for part in torch.split(images, largest or len(images))]
        return torch.cat(parts).to(images.device)

    def _padded(self, images: Tensor, smallest: int) -> Tensor:
        """Answers to fewer images than the graph takes: black ones fill the batch, and their answers are left out."""
        missing = smallest - len(images)
        if missing > 0:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        logits = self.run(images)
        return logits[: len(images) - max(missing, 0)]

    def _check(self, images: Tensor) -> None:
        expected, found = (self.signature.channels, *self.signature.size), tuple(images.shape[1:])
        if any(want is not None and want != have for want, have in zip(expected, found, strict=True)):
            shape = ", ".join("any" if axis is None else str(axis) for axis in expected)
            height = self.signature.size[0]
            advice = f" Such as --augment rrc-flip,size={height}, or a size for the teacher alone," if height else " Export it so,"
            raise MismatchError(
                f"{self.path} takes images of [channels, height, width] = [{shape}], the views are {list(found)}.{advice} or export the"
                " network for images of the size that it shall see"
            )


def read_options(path: Path, arch: Spec | None, kind: str) -> Spec:
    """The spec of an exported network: its kind, and `channels` and `norm` where the user gave them.

    Raises:
        SpecError: The architecture is another kind of network.
    """
    spec = arch or Spec(source="", name=kind)
    if (spec.source, spec.name) != ("", kind):
        raise SpecError(
            f"{path} brings its own network; expected --arch {kind}[,norm=none|half|imagenet][,channels=N] or none, found {spec}"
        )
    spec.reject_unknown_options("norm", "channels")
    return spec


def loaded_program(program: Program, spec: Spec, *, sha256: str, num_classes: int, image_shape: tuple[int, ...]) -> LoadedModel:
    """A graph as a teacher: grey images become colour ones where it wants these, and are normalised as the spec says.

    Args:
        program: The graph.
        spec: As `read_options` gives it. Without `norm` the graph gets images in [0, 1] as they are, so that one that normalises by
            itself is right.
        sha256: Digest of the file.
        num_classes: Classes of the dataset.
        image_shape: Shape of one view: channels, height and width of images.

    Raises:
        MismatchError: The graph has another number of classes or channels than the dataset.
        CheckpointError: The graph says no number of channels, and neither does the spec.
    """
    path, signature = program.path, program.signature
    if signature.num_classes not in (None, num_classes):
        raise MismatchError(
            f"{path} tells {signature.num_classes} classes apart, the dataset has {num_classes}; choose one that fits the other"
        )
    channels = spec.options.get("channels", signature.channels)
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise CheckpointError(f"{path} does not say how many channels its images have; expected --arch {spec.with_options(channels=3)}")
    if signature.channels not in (None, channels):
        raise MismatchError(f"{path} takes images of {signature.channels} channels, --arch says {channels}")
    if image_shape[0] not in (1, channels):
        raise MismatchError(f"{path} takes images of {channels} channels, the dataset has {image_shape[0]}; choose one that fits the other")
    spec = spec.with_defaults(channels=channels, norm="none")
    model = InputEnd(program, channels=channels, normalisation=str(spec.options["norm"]))
    return LoadedModel(model=model.eval(), spec=spec, sha256=sha256, metadata={}, float32_only=True)
