"""Codecs: how logits become the arrays of a store and soft targets again. The one seam for new compression."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from kdcache.records.errors import SpecError
from kdcache.records.manifest import FieldRecord
from kdcache.records.specs import Spec
from kdcache.targets.coding import LARGEST_CODE, MOST_CLASSES
from kdcache.targets.dense import Dense
from kdcache.targets.profile import UP_TO_CLASSES
from kdcache.targets.sampled import Sampled
from kdcache.targets.soft_targets import SoftTargets
from kdcache.targets.topk import Adaptive, TopK

DENSE_UP_TO = 32
"""Class counts up to which keeping everything costs no more than picking: the default codec there is `dense`."""

DEFAULT_K = 16
DEFAULT_MAX_K = 128
DEFAULT_DRAWS = 50
DEFAULT_RANGE = 32.0
DEFAULT_TEMPERATURES = (1.0, 2.0, 4.0)


class Codec(Protocol):
    """Turns logits into arrays by field name, and back."""

    spec: Spec
    """Resolved, so that it means the same for ever."""
    num_classes: int
    """Length of the class axis."""
    keeps_profile: bool
    """Whether the cache keeps a table of the teacher's mean answers, see `kdcache.targets.profile`."""

    @property
    def calibration_samples(self) -> int:
        """How many samples `calibrated` wants; 0 where nothing is measured."""

    @property
    def calibration(self) -> Mapping[str, float]:
        """Constants that were measured on the teacher; empty when there are none."""

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """The arrays that this codec stores for each record, for outputs with these position axes."""

    def calibrated(self, logits: Float[Tensor, "batch *positions classes"]) -> "Codec":
        """The codec with its constants measured on a sample of the teacher's logits; itself where there are none."""

    def encode(self, logits: Float[Tensor, "batch *positions classes"], seeds: Sequence[int] = ()) -> dict[str, Tensor]:
        """Finite float32 logits to arrays, one entry a field, on the same device; ragged ones padded with anything.

        Args:
            logits: The teacher's.
            seeds: For a codec that draws: one whole number a record, which follows from the sample's key and the view.
        """

    def decode(self, arrays: Mapping[str, Tensor]) -> SoftTargets:
        """The arrays of any rows to soft targets."""


def make_codec(spec: Spec, *, num_classes: int, calibration: Mapping[str, float] | None = None) -> Codec:
    """The codec that a spec names.

    Args:
        spec: `auto`; `topk[,k=16][,temperatures=(1,2,4)][,gap_range=32][,levels=254][,values=uint8|float16][,profile=True]`;
            `adaptive[,mean_k=12|kl=0.05][,temperature=1][,max_k=128]` and the options of `topk`; `sampled[,draws=50][,temperature=1]`;
            `dense[,dtype=float16|float32|uint8]`.
        num_classes: Length of the teacher's class axis.
        calibration: What was measured on the teacher already, as the manifest has it.

    Raises:
        SpecError: No such codec, or its options do not fit the class count.
    """
    if not 1 <= num_classes <= MOST_CLASSES:
        raise SpecError(f"expected 1 to {MOST_CLASSES} classes, found {num_classes}")
    if str(spec) == "auto":
        spec = Spec.parse("dense" if num_classes <= DENSE_UP_TO else "topk")
    options = _Options(spec, num_classes)
    if spec.source == "" and spec.name == "dense":
        return _make_dense(options)
    if spec.source == "" and spec.name == "topk":
        return _make_topk(options)
    if spec.source == "" and spec.name == "adaptive":
        return _make_adaptive(options, calibration or {})
    if spec.source == "" and spec.name == "sampled":
        return _make_sampled(options)
    raise SpecError(f"unknown codec {str(spec)!r}; expected auto, topk[,k=…], adaptive[,mean_k=…], sampled[,draws=…] or dense[,dtype=…]")


class _Options:
    """A codec's options, each checked as it is read."""

    def __init__(self, spec: Spec, num_classes: int) -> None:
        self.spec, self.num_classes = spec, num_classes

    def whole(self, name: str, default: int, *, most: int) -> int:
        value = self.spec.options.get(name, min(default, most))
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise SpecError(f"{self.spec}: expected {name} from 1 to {most} ({self.num_classes} classes), found {value!r}")
        return value

    def positive(self, name: str, default: float) -> float:
        return self._positive(name, self.spec.options.get(name, default))

    def temperatures(self) -> tuple[float, ...]:
        given = self.spec.options.get("temperatures", DEFAULT_TEMPERATURES)
        items = given if isinstance(given, tuple) else (given,)
        if not items:
            raise SpecError(f"{self.spec}: expected at least one temperature")
        temperatures = tuple(sorted({self._positive("temperatures", item) for item in items}))
        if len({f"{temperature:g}" for temperature in temperatures}) < len(temperatures):
            raise SpecError(f"{self.spec}: expected temperatures that differ in their first six digits, found {temperatures}")
        return temperatures

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.spec.options.get(name, choices[0])
        if value not in choices:
            raise SpecError(f"{self.spec}: expected {name} to be one of {', '.join(choices)}, found {value!r}")
        return str(value)

    def profile(self) -> bool:
        value = self.spec.options.get("profile", self.num_classes <= UP_TO_CLASSES)
        if not isinstance(value, bool) or (value and self.num_classes > UP_TO_CLASSES):
            raise SpecError(f"{self.spec}: expected profile=True (up to {UP_TO_CLASSES} classes) or False, found {value!r}")
        return value

    def _positive(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpecError(f"{self.spec}: expected a number for {name}, found {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"{self.spec}: expected a positive {name}, found {value}")
        return float(value)


def _make_dense(options: _Options) -> Dense:
    options.spec.reject_unknown_options("dtype")
    return Dense(num_classes=options.num_classes, dtype=options.choice("dtype", ("float16", "float32", "uint8")))


def _make_topk(options: _Options) -> TopK:
    options.spec.reject_unknown_options("k", "temperatures", "gap_range", "levels", "values", "profile")
    k = options.whole("k", DEFAULT_K, most=options.num_classes)
    return TopK(
        k=k,
        num_classes=options.num_classes,
        temperatures=options.temperatures(),
        gap_range=options.positive("gap_range", DEFAULT_RANGE),
        levels=options.whole("levels", LARGEST_CODE, most=LARGEST_CODE),
        values=options.choice("values", ("uint8", "float16")),
        profile=options.profile() and k < options.num_classes,
    )


def _make_adaptive(options: _Options, calibration: Mapping[str, float]) -> Adaptive:
    names = ("max_k", "temperature", "mean_k", "kl", "temperatures", "gap_range", "levels", "profile")
    options.spec.reject_unknown_options(*names)
    given = options.spec.options
    if "mean_k" in given and "kl" in given:
        raise SpecError(f"{options.spec}: expected mean_k or kl, found both")
    if options.num_classes < 3:
        raise SpecError(f"{options.spec}: expected at least 3 classes, found {options.num_classes}; take dense")
    max_k = options.whole("max_k", DEFAULT_MAX_K, most=options.num_classes - 1)
    mean_k = None if "kl" in given else options.positive("mean_k", min(12.0, (1 + max_k) / 2))
    if mean_k is not None and not 1 <= mean_k <= max_k:
        raise SpecError(f"{options.spec}: expected mean_k from 1 to max_k = {max_k}, found {mean_k:g}")
    return Adaptive(
        max_k=max_k,
        num_classes=options.num_classes,
        temperature=options.positive("temperature", 1.0),
        mean_k=mean_k,
        kl=options.positive("kl", 1.0) if "kl" in given else None,
        temperatures=options.temperatures(),
        gap_range=options.positive("gap_range", DEFAULT_RANGE),
        levels=options.whole("levels", LARGEST_CODE, most=LARGEST_CODE),
        profile=options.profile(),
        calibration=calibration,
    )


def _make_sampled(options: _Options) -> Sampled:
    options.spec.reject_unknown_options("draws", "temperature")
    return Sampled(
        draws=options.whole("draws", DEFAULT_DRAWS, most=65_534),
        num_classes=options.num_classes,
        temperature=options.positive("temperature", 1.0),
    )
