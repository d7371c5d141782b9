"""Codecs: how logits become the arrays of a store and soft targets again. The one seam for new compression."""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.records.errors import SpecError
from kdcache.records.manifest import FieldRecord
from kdcache.records.specs import Spec
from kdcache.targets.soft_targets import SoftTargets

Arrays = Mapping[str, Tensor]

DENSE_UP_TO = 32
"""Class counts up to which keeping everything costs no more than picking: the default codec there is `dense`."""

DEFAULT_K = 16
LARGEST_CODE = 254
"""Codes are 0 to 254; 255 is the fill value, which no record holds."""


SMALLEST_TAIL = math.sin(math.pi / 4 / LARGEST_CODE) ** 2 / 4
"""What code 0 stands for where something was cut off: a quarter of the mass that would have become code 1, never nothing."""


class Codec(Protocol):
    """Turns logits into arrays by field name, and back."""

    spec: Spec
    """Resolved, so that it means the same for ever."""

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """The arrays that this codec stores, for outputs with these position axes."""

    def encode(self, logits: Float[Tensor, "batch *positions classes"]) -> dict[str, Tensor]:
        """Finite float32 logits to arrays, one entry a field, on the same device."""

    def decode(self, arrays: Arrays) -> SoftTargets:
        """The arrays of any rows to soft targets."""


class TopK:
    """The k largest log-probabilities as uint8 gaps, and the mass of the rest at each declared temperature.

    Rank 0 stores the fall from the log-sum-exp to the largest logit, each further rank the fall from the rank before, as
    `range · (code / 254)²`: fine steps where falls are small and probability is high. Each fall is taken from the
    *decoded* rank before, so errors do not add up. The tail's mass m is stored as `sin²(π/2 · code / 254)`: equal steps
    in the arcsine of √m, the metric in which equal steps cost equal KL (Fisher information of a Bernoulli variable).

    Args:
        k: Classes kept.
        num_classes: Length of the class axis.
        temperatures: Declared temperatures, at which the tail's mass is stored.
        gap_range: The largest fall that a code can say, in nats; larger ones are stored as this.
    """

    def __init__(self, *, k: int, num_classes: int, temperatures: tuple[float, ...], gap_range: float) -> None:
        self.k, self.num_classes, self.temperatures, self.gap_range = k, num_classes, temperatures, gap_range
        self.spec = Spec(
            source="",
            name="topk",
            options={"k": k, "temperatures": temperatures, "gap_range": gap_range},
        )

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """`logits/index`, `logits/gap` and `logits/tail`."""
        dtype, fill = smallest_unsigned(self.num_classes)
        axes = tuple(f"position{i}" for i in range(len(positions)))
        inner, names = (*positions, self.k), (*axes, "rank")
        gap = {"decode": "fall = gap_range * (code / 254)**2; log_prob = -cumsum(fall)", "gap_range": self.gap_range}
        tail = {"decode": "mass = sin(pi / 2 * code / 254)**2", "temperatures": list(self.temperatures)}
        return (
            FieldRecord(name="logits/index", dtype=dtype, inner=inner, inner_names=names, fill_value=fill,
                        attributes={"num_classes": self.num_classes}),
            FieldRecord(name="logits/gap", dtype="uint8", inner=inner, inner_names=names, fill_value=255, attributes=gap),
            FieldRecord(name="logits/tail", dtype="uint8", inner=(*positions, len(self.temperatures)),
                        inner_names=(*axes, "temperature"), fill_value=255, attributes=tail),
        )  # fmt: skip

    def encode(self, logits: Float[Tensor, "batch *positions classes"]) -> dict[str, Tensor]:
        """Finite float32 logits to `logits/index`, `logits/gap`, `logits/tail`."""
        values, index = logits.topk(self.k, dim=-1)
        log_probs = values - logits.logsumexp(dim=-1, keepdim=True)
        rest = logits.scatter(-1, index, -math.inf)
        masses = [((rest / t).logsumexp(dim=-1) - (logits / t).logsumexp(dim=-1)).exp() for t in self.temperatures]
        angles = torch.stack(masses, dim=-1).clamp(0, 1).sqrt().asin()
        return {
            "logits/index": index.to(_torch_dtype(smallest_unsigned(self.num_classes)[0])),
            "logits/gap": self._encode_gaps(log_probs),
            "logits/tail": (angles * (LARGEST_CODE * 2 / math.pi)).round().to(torch.uint8),
        }

    def decode(self, arrays: Arrays) -> SoftTargets:
        """The arrays of any rows to soft targets."""
        tail = (arrays["logits/tail"].float() * (math.pi / 2 / LARGEST_CODE)).sin().square()
        if self.k < self.num_classes:
            tail = tail.clamp(SMALLEST_TAIL, 1 - SMALLEST_TAIL)
        return SoftTargets(
            log_probs=-self._falls(arrays["logits/gap"]).cumsum(dim=-1),
            index=arrays["logits/index"].long(),
            tail_mass=tail,
            temperatures=self.temperatures,
            num_classes=self.num_classes,
        )

    def _encode_gaps(self, log_probs: Tensor) -> Tensor:
        codes = torch.empty_like(log_probs, dtype=torch.uint8)
        decoded = torch.zeros_like(log_probs[..., 0])
        for rank in range(self.k):
            fall = (decoded - log_probs[..., rank]).clamp(0, self.gap_range)
            code = (fall / self.gap_range).sqrt().mul(LARGEST_CODE).round().to(torch.uint8)
            codes[..., rank] = code
            decoded = decoded - self._falls(code)
        return codes

    def _falls(self, codes: Tensor) -> Tensor:
        return (codes.float() / LARGEST_CODE).square() * self.gap_range


class Dense:
    """Log-probabilities of all classes at temperature 1, from which those at any other follow."""

    def __init__(self, *, num_classes: int, dtype: str) -> None:
        self.num_classes, self.dtype = num_classes, dtype
        self.spec = Spec(source="", name="dense", options={"dtype": dtype})

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """`logits/value`."""
        names = (*(f"position{i}" for i in range(len(positions))), "class")
        decode = {"decode": "log_prob = value"}
        return (
            FieldRecord(name="logits/value", dtype=self.dtype, inner=(*positions, self.num_classes), inner_names=names,
                        fill_value="NaN", attributes=decode),
        )  # fmt: skip

    def encode(self, logits: Float[Tensor, "batch *positions classes"]) -> dict[str, Tensor]:
        """Finite float32 logits to `logits/value`. Falls of more than 60,000 nats are stored as 60,000."""
        return {"logits/value": logits.log_softmax(dim=-1).clamp(min=-60_000).to(_torch_dtype(self.dtype))}

    def decode(self, arrays: Arrays) -> SoftTargets:
        """The arrays of any rows to soft targets."""
        values = arrays["logits/value"].float()
        return SoftTargets(log_probs=values, index=None, tail_mass=None, temperatures=(), num_classes=self.num_classes)


def make_codec(spec: Spec, *, num_classes: int) -> Codec:
    """The codec that a spec names.

    Args:
        spec: `auto`; `topk[,k=16][,temperatures=(1,2,4)][,gap_range=32]`; `dense[,dtype=float16|float32]`.
        num_classes: Length of the teacher's class axis.

    Raises:
        SpecError: No such codec, or its options do not fit the class count.
    """
    if str(spec) == "auto":
        spec = Spec.parse("dense" if num_classes <= DENSE_UP_TO else "topk")
    if spec.source == "" and spec.name == "dense":
        return _make_dense(spec, num_classes)
    if spec.source == "" and spec.name == "topk":
        return _make_topk(spec, num_classes)
    raise SpecError(f"unknown codec {str(spec)!r}; expected auto, topk[,k=…][,temperatures=(…)] or dense[,dtype=…]")


def smallest_unsigned(num_classes: int) -> tuple[str, int]:
    """The smallest unsigned type that holds every class and, as its largest value, a fill that is no class."""
    for bits in (8, 16, 32):
        if num_classes <= 2**bits - 1:
            return f"uint{bits}", 2**bits - 1
    raise SpecError(f"expected at most {2**32 - 1} classes, found {num_classes}")


def _make_dense(spec: Spec, num_classes: int) -> Dense:
    spec.reject_unknown_options("dtype")
    dtype = spec.options.get("dtype", "float16")
    if dtype not in ("float16", "float32"):
        raise SpecError(f"{spec}: expected dtype to be float16 or float32, found {dtype!r}")
    return Dense(num_classes=num_classes, dtype=str(dtype))


def _make_topk(spec: Spec, num_classes: int) -> TopK:
    spec.reject_unknown_options("k", "temperatures", "gap_range")
    k = spec.options.get("k", min(DEFAULT_K, num_classes))
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= num_classes:
        raise SpecError(f"{spec}: expected k from 1 to the class count {num_classes}, found {k!r}")
    given = spec.options.get("temperatures", (1.0, 2.0, 4.0))
    temperatures = tuple(sorted({_number(spec, item) for item in (given if isinstance(given, tuple) else (given,))}))
    if not temperatures:
        raise SpecError(f"{spec}: expected at least one temperature")
    if not all(math.isfinite(temperature) and temperature > 0 for temperature in temperatures):
        raise SpecError(f"{spec}: expected a positive temperature, found {given!r}")
    gap_range = _number(spec, spec.options.get("gap_range", 32.0))
    if not (math.isfinite(gap_range) and gap_range > 0):
        raise SpecError(f"{spec}: expected a positive gap_range, found {gap_range}")
    return TopK(k=k, num_classes=num_classes, temperatures=temperatures, gap_range=gap_range)


def _number(spec: Spec, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{spec}: expected a number, found {value!r}")
    return float(value)


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
