"""The codecs that keep the most probable classes of each record: as many of all (`topk`), or as many as it is worth (`adaptive`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace as replace_record
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdcache.records.manifest import FieldRecord, Lengths
from kdcache.records.specs import Spec, Value
from kdcache.targets.coding import (
    decode_falls,
    decode_masses,
    encode_falls,
    encode_masses,
    gap_field,
    index_field,
    position_names,
    smallest_unsigned,
    tail_field,
    tail_masses,
    top_classes,
    torch_dtype,
)
from kdcache.targets.soft_targets import SoftTargets

Arrays = Mapping[str, Tensor]

RECORDS_AT_ONCE = 256
"""Records that are measured together: in float64, so that all of them at once would take many times the memory of the logits."""


class TopK:
    """The k largest log-probabilities as falls from rank to rank, and the mass of the rest at each declared temperature.

    Only what lies between the kept classes is stored: the mass of the rest says how much all of them have together.

    Args:
        k: Classes kept.
        num_classes: Length of the class axis.
        temperatures: Declared temperatures, at which the tail's mass is stored.
        gap_range: The largest fall that a code can say, in nats; larger ones are stored as this.
        levels: The code of that fall; 254 takes a byte and adds 1e-5 nat, 94 takes 7 bits and adds less than 1e-4.
        values: `uint8` for falls of one byte, `float16` for log-probabilities below the first one's.
        profile: Whether the cache keeps the teacher's mean answer to each top class, which shapes the tail.
    """

    calibration: Mapping[str, float] = {}
    calibration_samples = 0

    def __init__(
        self, *, k: int, num_classes: int, temperatures: tuple[float, ...], gap_range: float, levels: int, values: str, profile: bool
    ) -> None:
        self.k, self.num_classes, self.temperatures, self.gap_range, self.levels = k, num_classes, temperatures, gap_range, levels
        self.values, self.keeps_profile = values, profile
        options: dict[str, Value] = {"k": k, "temperatures": temperatures, "gap_range": gap_range, "levels": levels}
        self.spec = Spec(source="", name="topk", options={**options, "values": values, "profile": profile})

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """`logits/index`, `logits/gap` or `logits/value` (not for k = 1), and `logits/tail` (not for k = classes)."""
        axes = position_names(positions)
        fields = [index_field(self.num_classes, (*positions, self.k), (*axes, "rank"))]
        if self.k > 1:
            inner, names = (*positions, self.k - 1), (*axes, "fall")
            gap = gap_field(self.gap_range, self.levels, inner, names)
            decode = {"decode": "log_prob = value, below the first class's"}
            value = replace_record(
                gap, name="logits/value", dtype="float16", inner_names=(*axes, "lower_rank"), fill_value="NaN", attributes=decode
            )
            fields.append(gap if self.values == "uint8" else value)
        if self.k < self.num_classes:
            fields.append(tail_field(self.temperatures, positions))
        return tuple(fields)

    def calibrated(self, logits: Float[Tensor, "batch *positions classes"]) -> Self:
        """Itself: nothing is measured."""
        return self

    def encode(self, logits: Float[Tensor, "batch *positions classes"], seeds: Sequence[int] = ()) -> dict[str, Tensor]:
        """Finite float32 logits to the fields."""
        values, index = top_classes(logits, self.k)
        arrays = {"logits/index": index.to(torch_dtype(smallest_unsigned(self.num_classes)[0]))}
        if self.k > 1 and self.values == "uint8":
            arrays["logits/gap"] = encode_falls(values, self.gap_range, self.levels)
        elif self.k > 1:
            arrays["logits/value"] = (values[..., 1:] - values[..., :1]).clamp(min=-60_000).half()
        if self.k < self.num_classes:
            arrays["logits/tail"] = encode_masses(tail_masses(logits, index, self.temperatures))
        return arrays

    def decode(self, arrays: Arrays) -> SoftTargets:
        """The arrays of any rows to soft targets."""
        index = arrays["logits/index"].long()
        if self.k == 1:
            log_probs = torch.zeros_like(index, dtype=torch.float32)
        elif self.values == "uint8":
            log_probs = decode_falls(arrays["logits/gap"], self.gap_range, self.levels)
        else:
            values = arrays["logits/value"].float()
            log_probs = torch.cat([torch.zeros_like(values[..., :1]), values], dim=-1)
        return SoftTargets(
            log_probs=log_probs,
            index=index,
            tail_mass=decode_masses(arrays["logits/tail"]) if self.k < self.num_classes else None,
            temperatures=self.temperatures,
            num_classes=self.num_classes,
        )


class Adaptive:
    """As `topk`, with a k of each record's own: the one that minimises KL(full ‖ k kept, uniform tail) + slope · k.

    All records then gain as much from their last entry, which is the least KL that so many entries can have. The slope is
    measured once on a sample of the teacher's answers, for the mean k or the mean KL that is asked for.

    Args:
        max_k: Most classes kept; fewer than there are.
        num_classes: Length of the class axis.
        temperature: T of the KL.
        mean_k: Entries that a record is to have on average, or None.
        kl: Mean KL that is to be left, in nats, or None; exactly one of the two.
        temperatures: As for `topk`.
        gap_range: As for `topk`.
        levels: As for `topk`.
        profile: As for `topk`.
        calibration: `{"slope": nats an entry}`, or empty before it is measured.

    Source: bits are best spent at equal slopes of the rate-distortion curves (Shoham and Gersho, IEEE Transactions on
        Acoustics, Speech, and Signal Processing 36(9), 1988).
    """

    def __init__(
        self,
        *,
        max_k: int,
        num_classes: int,
        temperature: float,
        mean_k: float | None,
        kl: float | None,
        temperatures: tuple[float, ...],
        gap_range: float,
        levels: int,
        profile: bool,
        calibration: Mapping[str, float],
    ) -> None:
        self.max_k, self.num_classes, self.temperature, self.mean_k, self.kl = max_k, num_classes, temperature, mean_k, kl
        self.temperatures, self.gap_range, self.levels = temperatures, gap_range, levels
        self.keeps_profile, self.calibration = profile, calibration
        options: dict[str, Value] = {"max_k": max_k, "temperature": temperature, "temperatures": temperatures, "gap_range": gap_range}
        target: dict[str, Value] = {"mean_k": mean_k} if kl is None else {"kl": kl}
        self.spec = Spec(source="", name="adaptive", options={**options, "levels": levels, "profile": profile, **target})

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """`logits/count`, ragged `logits/index` and `logits/gap`, and `logits/tail`."""
        most = math.prod(positions) * self.max_k
        count_dtype, fill = smallest_unsigned(self.max_k + 1)
        axes = position_names(positions)
        fields = [
            FieldRecord(name="logits/count", dtype=count_dtype, inner=positions, inner_names=axes, fill_value=fill),
            index_field(self.num_classes, (most,), ("entry",), Lengths(field="logits/count", minus=0)),
        ]
        if self.max_k > 1:
            most_falls = math.prod(positions) * (self.max_k - 1)
            fields.append(gap_field(self.gap_range, self.levels, (most_falls,), ("fall",), Lengths(field="logits/count", minus=1)))
        return (*fields, tail_field(self.temperatures, positions))

    @property
    def calibration_samples(self) -> int:
        """As many as fit into half a gigabyte, up to 2048."""
        return max(64, min(2048, 2**27 // self.num_classes))

    def calibrated(self, logits: Float[Tensor, "batch *positions classes"]) -> "Adaptive":
        """The same codec with its slope measured on these logits."""
        parts = torch.split(logits.flatten(0, -2), RECORDS_AT_ONCE)
        distortion = torch.cat([self._distortion(part, top_classes(part, self.max_k)[0]) for part in parts])
        low, high = -40.0, 10.0  # the slope's logarithm; a larger slope keeps less and leaves more
        for _ in range(60):
            middle = (low + high) / 2
            count = self._best_count(distortion, math.exp(middle))
            left = distortion.gather(-1, count.unsqueeze(-1) - 1).mean().item()
            keeps_too_much = left < self.kl if self.kl is not None else count.double().mean().item() > (self.mean_k or 0)
            low, high = (middle, high) if keeps_too_much else (low, middle)
        return Adaptive(
            max_k=self.max_k, num_classes=self.num_classes, temperature=self.temperature, mean_k=self.mean_k, kl=self.kl,
            temperatures=self.temperatures, gap_range=self.gap_range, levels=self.levels, profile=self.keeps_profile,
            calibration={"slope": math.exp(low if self.kl is not None else high)},
        )  # fmt: skip

    def encode(self, logits: Float[Tensor, "batch *positions classes"], seeds: Sequence[int] = ()) -> dict[str, Tensor]:
        """Finite float32 logits to the fields; the ragged ones are padded to `max_k` entries."""
        values, index = top_classes(logits, self.max_k)
        count = self._best_count(self._distortion(logits, values), self.calibration["slope"])
        kept = torch.arange(self.max_k, device=logits.device) < count.unsqueeze(-1)
        arrays = {
            "logits/count": count.to(torch_dtype(smallest_unsigned(self.max_k + 1)[0])),
            "logits/index": index.to(torch_dtype(smallest_unsigned(self.num_classes)[0])),
            "logits/tail": encode_masses(tail_masses(logits, index, self.temperatures, kept=kept)),
        }
        return arrays | ({"logits/gap": encode_falls(values, self.gap_range, self.levels)} if self.max_k > 1 else {})

    def decode(self, arrays: Arrays) -> SoftTargets:
        """The arrays of any rows to soft targets; records that keep less than others are padded, see `SoftTargets`."""
        count, index = arrays["logits/count"].long(), arrays["logits/index"].long()
        kept = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
        log_probs = (
            decode_falls(arrays["logits/gap"], self.gap_range, self.levels)
            if self.max_k > 1
            else torch.zeros_like(index, dtype=torch.float32)
        )
        return SoftTargets(
            log_probs=log_probs[..., : index.shape[-1]].masked_fill(~kept, -math.inf),
            index=torch.where(kept, index, index[..., :1]),
            tail_mass=decode_masses(arrays["logits/tail"]),
            temperatures=self.temperatures,
            num_classes=self.num_classes,
        )

    def _distortion(self, logits: Float[Tensor, "*batch classes"], values: Float[Tensor, "*batch kept"]) -> Float[Tensor, "*batch kept"]:
        """KL(full ‖ first k kept, the rest uniform) for k = 1 to max_k, in nats, as float64."""
        log_total = (logits / self.temperature).double().logsumexp(dim=-1, keepdim=True)
        everything = (logits / self.temperature).double() - log_total
        negentropy = (everything.exp() * everything).sum(dim=-1, keepdim=True)
        log_p = (values / self.temperature).double() - log_total
        p = log_p.exp()
        mass = (1 - p.cumsum(dim=-1)).clamp(min=0)
        rest = self.num_classes - torch.arange(1, self.max_k + 1, device=logits.device, dtype=torch.float64)
        return (negentropy - (p * log_p).cumsum(dim=-1) - torch.xlogy(mass, mass / rest)).clamp(min=0)

    @staticmethod
    def _best_count(distortion: Float[Tensor, "*batch kept"], slope: float) -> Int64[Tensor, "*batch"]:
        ranks = torch.arange(1, distortion.shape[-1] + 1, device=distortion.device, dtype=distortion.dtype)
        return (distortion + slope * ranks).argmin(dim=-1) + 1
