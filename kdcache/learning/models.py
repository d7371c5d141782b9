"""Networks by spec: presets, `torchvision:NAME`, `timm:NAME`, `py:module:function`.

A built network takes float images in [0, 1], `[batch, channels, height, width]`, whatever its own normalisation is, and
gives logits `[batch, classes]`. Normalisation belongs to the network, so that one view feeds any teacher and any student.
"""

import importlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec, Value

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation by channel."""
NORMALISATIONS: dict[str, Normalisation] = {
    "half": ((0.5,), (0.25,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0,), (1.0,)),
}
"""Mean and standard deviation by channel, for images in [0, 1]. `imagenet`: torchvision's published constants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A residual network for small images: three stages of basic blocks over a strided stem."""

    widths: tuple[int, int, int]
    """Channels of the three stages."""

    summary: str
    """One line for `kdcache models`."""


PRESETS = {
    "tiny": Preset(widths=(8, 16, 32), summary="a microcontroller's student"),
    "small": Preset(widths=(16, 32, 64), summary="the usual student"),
    "medium": Preset(widths=(32, 64, 128), summary="a strong student"),
    "large": Preset(widths=(48, 96, 192), summary="a teacher for small images"),
}


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut; the shortcut of a strided block pools first.

    Source: He et al., Deep Residual Learning, arXiv 1512.03385; pooled shortcut: He et al., arXiv 1812.01187 (ResNet-D).
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for any image size and channel count.

    The stem halves the image until its side is below 28 pixels, so that the cost hardly depends on the size.
    """

    def __init__(self, preset: Preset, *, num_classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        width = preset.widths[0]
        halvings = max(0, int(math.log2(max(image_size, 1) / 14)))
        stem: list[nn.Module] = []
        for step in range(max(1, halvings)):
            inputs = channels if step == 0 else width
            stride = 2 if halvings else 1
            stem += [nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        widths = (width, *preset.widths)
        self.stages = nn.Sequential(*(BasicBlock(widths[i], widths[i + 1], stride=1 if i == 0 else 2) for i in range(len(preset.widths))))
        self.head = nn.Linear(preset.widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to logits [batch, classes]."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


class InputEnd(nn.Module):
    """The network's own, deterministic end of the view: grey to colour where it wants colour, then normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, *, channels: int, normalisation: str | Normalisation) -> None:
        super().__init__()
        if isinstance(normalisation, str) and normalisation not in NORMALISATIONS:
            raise SpecError(f"unknown norm {normalisation!r}; expected one of: {', '.join(NORMALISATIONS)}")
        mean, std = NORMALISATIONS[normalisation] if isinstance(normalisation, str) else normalisation
        if len(mean) not in (1, channels):
            raise SpecError(f"norm={normalisation} is for {len(mean)} channels, the network takes {channels}; expected norm=none or half")
        self.channels = channels
        self.body = body
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Images in [0, 1] to logits."""
        if images.shape[1] == 1 and self.channels > 1:
            images = images.expand(-1, self.channels, -1, -1)
        logits: Tensor = self.body((images - self.mean) / self.std)
        return logits


def build_model(spec: Spec, *, trusted: bool) -> nn.Module:
    """Builds the network that a resolved spec names, with fresh weights unless the spec says otherwise.

    Args:
        spec: Presets take `num_classes`, `channels`, `image_size` and `norm`; `torchvision:` takes `norm`
            (default `imagenet`) and the builder's own arguments; `timm:` takes `norm` (default: what timm says of the network) and
            the arguments of `timm.create_model`; `py:` the function's own arguments.
        trusted: Whether the user typed the spec. `py:` runs code, so one that was read from a file is refused.

    Returns:
        A module from images in [0, 1], [batch, channels, height, width], to logits [batch, classes]. Its state dict
        has the names of the wrapped network, so that published checkpoints load as they are.

    Raises:
        SpecError: No such model, or it does not take these options.
    """
    if spec.source == "" and spec.name in PRESETS:
        return _build_preset(spec)
    if spec.source == "torchvision":
        return _build_torchvision(spec)
    if spec.source == "timm":
        return _build_timm(spec)
    if spec.source == "py":
        return _build_python(spec, trusted=trusted)
    known = ", ".join([*PRESETS, "torchvision:NAME", "timm:NAME", "py:MODULE:FUNCTION"])
    raise SpecError(f"unknown model {str(spec)!r}; expected one of: {known} (see: kdcache models)")


def resolve_model_spec(spec: Spec, *, num_classes: int, image_shape: tuple[int, ...]) -> Spec:
    """Fills in what a model spec leaves to the dataset, so that the result rebuilds the network anywhere.

    Args:
        spec: As the user typed it.
        num_classes: Classes of the dataset.
        image_shape: Shape of one view: channels, height and width of images.

    Raises:
        SpecError: The network is for images, and the views are none.
    """
    if spec.source == "" and spec.name in PRESETS:
        if len(image_shape) != 3:
            raise SpecError(f"{spec} takes images [channels, height, width], found samples of {list(image_shape)}; give a py: model")
        channels, height, width = image_shape
        return spec.with_defaults(num_classes=num_classes, channels=channels, image_size=max(height, width))
    return spec.with_defaults(num_classes=num_classes) if spec.source in ("torchvision", "timm") else spec


def load_python_object(spec: Spec, *, trusted: bool, option: str) -> object:
    """Calls the function that a `py:module:function` spec names.

    Raises:
        SpecError: The spec came from a file, or the function cannot be found or called so.
    """
    if not trusted:
        raise SpecError(f"{spec} was read from a file and would run code; if you trust it, type it yourself: {option} {spec}")
    module_name, _, function_name = spec.name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        return function(**spec.options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SpecError(f"{spec}: expected py:MODULE:FUNCTION[,key=value]*; {error}") from error


def _build_preset(spec: Spec) -> nn.Module:
    spec.reject_unknown_options("num_classes", "channels", "image_size", "norm")
    values = {key: _positive(spec, key) for key in ("num_classes", "channels", "image_size")}
    body = SmallResNet(PRESETS[spec.name], **values)
    return InputEnd(body, channels=values["channels"], normalisation=str(spec.options.get("norm", "half")))


def _build_torchvision(spec: Spec) -> nn.Module:
    options: dict[str, Value] = {"weights": None, **spec.options}
    normalisation = str(options.pop("norm", "imagenet"))
    try:
        body = torchvision.models.get_model(spec.name, **options)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise SpecError(f"{spec}: {error}; `kdcache models --all` lists the names") from error
    return InputEnd(body, channels=3, normalisation=normalisation)


def _build_timm(spec: Spec) -> nn.Module:
    """Weights are `DEFAULT`, those that timm takes for the name, or the tag of others; none unless they are asked for."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise SpecError(f"{spec} needs timm: pip install 'kdcache[timm]' ({error})") from error
    options: dict[str, Value] = dict(spec.options)
    normalisation, weights = options.pop("norm", None), options.pop("weights", None)
    name = spec.name if weights in (None, "DEFAULT") else f"{spec.name.partition('.')[0]}.{weights}"
    try:
        body = timm.create_model(name, pretrained=weights is not None, **options)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        raise SpecError(f"{spec}: {error}; timm.list_models() lists the names") from error
    published = (tuple(body.pretrained_cfg["mean"]), tuple(body.pretrained_cfg["std"]))
    channels = spec.options.get("in_chans", 3)
    if not isinstance(channels, int):
        raise SpecError(f"{spec}: expected in_chans to be a whole number, found {channels!r}")
    return InputEnd(body, channels=channels, normalisation=published if normalisation is None else str(normalisation))


def _build_python(spec: Spec, *, trusted: bool) -> nn.Module:
    model = load_python_object(spec, trusted=trusted, option="--arch")
    if not isinstance(model, nn.Module):
        raise SpecError(f"{spec}: expected the function to return a torch.nn.Module, found {type(model).__name__}")
    return model


def _positive(spec: Spec, key: str) -> int:
    value = spec.options.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(f"{spec}: expected {key} to be a positive whole number, found {value!r}")
    return value
