"""The codec that keeps all classes: log-probabilities as floats, or as one byte each with a scale for each record."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.records.manifest import FieldRecord
from kdcache.records.specs import Spec
from kdcache.targets.coding import LARGEST_CODE, position_names, torch_dtype
from kdcache.targets.soft_targets import SoftTargets

SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16."""


class Dense:
    """Log-probabilities of all classes at temperature 1, from which those at any other follow.

    As `uint8`, class c is stored as its fall from the largest log-probability, `scale · (code / 254)²`, where the scale is the
    record's largest fall as float16.

    Args:
        num_classes: Length of the class axis.
        dtype: `float16`, `float32` or `uint8`.
    """

    calibration: Mapping[str, float] = {}
    calibration_samples = 0
    keeps_profile = False

    def __init__(self, *, num_classes: int, dtype: str) -> None:
        self.num_classes, self.dtype = num_classes, dtype
        self.spec = Spec(source="", name="dense", options={"dtype": dtype})

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """`logits/value`, and for uint8 `logits/scale`."""
        axes, by_byte = position_names(positions), self.dtype == "uint8"
        value = FieldRecord(
            name="logits/value",
            dtype=self.dtype,
            inner=(*positions, self.num_classes),
            inner_names=(*axes, "class"),
            fill_value=255 if by_byte else "NaN",
            attributes={"decode": "log_prob = -scale * (code / 254)**2" if by_byte else "log_prob = value"},
        )
        scale = FieldRecord(name="logits/scale", dtype="float16", inner=positions, inner_names=axes, fill_value="NaN")
        return (value, scale) if by_byte else (value,)

    def calibrated(self, logits: Float[Tensor, "batch *positions classes"]) -> Self:
        """Itself: nothing is measured."""
        return self

    def encode(self, logits: Float[Tensor, "batch *positions classes"], seeds: Sequence[int] = ()) -> dict[str, Tensor]:
        """Finite float32 logits to the fields. Falls of more than 60,000 nats are stored as 60,000."""
        if self.dtype != "uint8":
            return {"logits/value": logits.log_softmax(dim=-1).clamp(min=-60_000).to(torch_dtype(self.dtype))}
        falls = (logits.amax(dim=-1, keepdim=True) - logits).clamp(max=60_000)
        scale = falls.amax(dim=-1, keepdim=True).clamp(min=SMALLEST_SCALE).half()
        codes = (falls / scale.float()).clamp(max=1).sqrt().mul(LARGEST_CODE).round()
        return {"logits/value": codes.to(torch.uint8), "logits/scale": scale.squeeze(-1)}

    def decode(self, arrays: Mapping[str, Tensor]) -> SoftTargets:
        """The arrays of any rows to soft targets."""
        log_probs = arrays["logits/value"].float()
        if self.dtype == "uint8":
            scale = arrays["logits/scale"].float().unsqueeze(-1)
            log_probs = -(log_probs / LARGEST_CODE).square() * scale
        return SoftTargets(log_probs=log_probs, index=None, tail_mass=None, temperatures=(), num_classes=self.num_classes)
