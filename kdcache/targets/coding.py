"""What the codecs share: which classes are kept, falls as bytes, masses as bytes, and the fields that hold them."""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from kdcache.records.errors import SpecError
from kdcache.records.manifest import FieldRecord, Lengths

LARGEST_CODE = 254
"""Codes are 0 to 254; 255 is the fill value, which no record holds."""

SMALLEST_TAIL = math.sin(math.pi / 4 / LARGEST_CODE) ** 2 / 4
"""What code 0 stands for where something was cut off: a quarter of the mass that would have become code 1, never nothing."""

MOST_CLASSES = 2**32
LARGEST_EXACT = 2**53
"""Whole numbers up to here survive JSON readers that take every number for a double."""


def top_classes(logits: Float[Tensor, "*batch classes"], k: int) -> tuple[Float[Tensor, "*batch {k}"], Int64[Tensor, "*batch {k}"]]:
    """The k largest logits, the largest first, and their classes; of equal logits the lower class comes first and is kept."""
    values, index = logits.topk(k, dim=-1)
    crowded = (logits >= values[..., -1:]).sum(dim=-1) > k
    tied = crowded | (values[..., 1:] == values[..., :-1]).any(dim=-1)
    if tied.any():
        index[tied] = _top_by_value_and_class(logits[tied], k)
        values = logits.gather(-1, index)
    return values, index


def _top_by_value_and_class(logits: Float[Tensor, "rows classes"], k: int) -> Int64[Tensor, "rows {k}"]:
    """As `top_classes`, by one whole number for each (logit, class): float32 bits that compare as the floats do, then the class."""
    bits = (logits.float() + 0.0).view(torch.int32)  # adding zero makes -0 the same as 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logits.shape[-1] - 1
    keys = (ordered << 32) | torch.arange(last, -1, -1, device=logits.device)
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def encode_falls(log_probs: Float[Tensor, "*batch kept"], fall_range: float, levels: int) -> UInt8[Tensor, "*batch falls"]:
    """The falls from each rank to the next as codes for `range · (code / levels)²`.

    Each fall is taken from the *decoded* rank before, so errors do not add up.
    """
    codes = torch.empty_like(log_probs[..., 1:], dtype=torch.uint8)
    decoded = log_probs[..., 0].clone()
    for rank in range(codes.shape[-1]):
        fall = (decoded - log_probs[..., rank + 1]).clamp(0, fall_range)
        code = (fall / fall_range).sqrt().mul(levels).round()
        codes[..., rank] = code.to(torch.uint8)
        decoded = decoded - (code / levels).square() * fall_range
    return codes


def decode_falls(codes: UInt8[Tensor, "*batch falls"], fall_range: float, levels: int) -> Float[Tensor, "*batch kept"]:
    """Log-probabilities of the kept classes below the first one's, [*batch, falls + 1].

    Sums of squared codes are whole numbers, which float32 holds exactly for up to 258 falls: there is one rounding, at the end.
    """
    sums = torch.empty(*codes.shape[:-1], codes.shape[-1] + 1, device=codes.device)
    sums[..., 0] = 0
    torch.cumsum(codes.float().square_(), dim=-1, out=sums[..., 1:])
    return sums.mul_(-fall_range / levels**2)


def tail_masses(
    logits: Float[Tensor, "*batch classes"],
    index: Int64[Tensor, "*batch kept"],
    temperatures: tuple[float, ...],
    *,
    kept: Tensor | None = None,
) -> Float[Tensor, "*batch temperatures"]:
    """The mass of all classes that are not kept, at each temperature.

    Args:
        logits: All of them.
        index: The kept classes.
        temperatures: Where the mass is wanted.
        kept: Which of `index` are kept after all, [*batch, kept]; None for all.
    """
    rest = logits.scatter(-1, index, -math.inf)
    values = logits.gather(-1, index)
    masses = []
    for temperature in temperatures:
        inside = values / temperature
        log_outside = (rest / temperature).logsumexp(dim=-1)
        if kept is not None:
            log_outside = torch.logaddexp(log_outside, inside.masked_fill(kept, -math.inf).logsumexp(dim=-1))
            inside = inside.masked_fill(~kept, -math.inf)
        masses.append((log_outside - inside.logsumexp(dim=-1)).sigmoid())
    return torch.stack(masses, dim=-1)


def encode_masses(masses: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Masses m as codes for `sin²(π/2 · code / 254)`.

    Equal steps in the arcsine of √m cost equal KL (Fisher information of a Bernoulli variable).
    """
    return masses.clamp(0, 1).sqrt().asin().mul(LARGEST_CODE * 2 / math.pi).round().to(torch.uint8)


def decode_masses(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Masses from their codes; never nothing and never all, as something was cut off and something kept."""
    return _mass_table(codes.device).take(codes.long())


@lru_cache
def _mass_table(device: torch.device) -> Tensor:
    codes = torch.arange(256, device=device).float()
    return codes.mul_(math.pi / 2 / LARGEST_CODE).sin_().square_().clamp_(SMALLEST_TAIL, 1 - SMALLEST_TAIL)


def smallest_unsigned(num_values: int) -> tuple[str, int]:
    """The smallest unsigned type that holds the numbers below `num_values` and, as its largest, a fill that is none of them.

    Raises:
        SpecError: There are more than 2^32.
    """
    if num_values > MOST_CLASSES:
        raise SpecError(f"expected at most {MOST_CLASSES} classes, found {num_values}")
    bits = next(bits for bits in (8, 16, 32, 64) if num_values <= 2**bits - 1)
    return f"uint{bits}", min(2**bits, LARGEST_EXACT) - 1


def index_field(num_classes: int, inner: tuple[int, ...], names: tuple[str, ...], lengths: Lengths | None = None) -> FieldRecord:
    """`logits/index`: classes in the fewest bits that hold them and a fill value that is none."""
    dtype, largest = smallest_unsigned(num_classes)
    bits = max(1, num_classes.bit_length())
    packed = bits < int(dtype.removeprefix("uint"))
    return FieldRecord(
        name="logits/index",
        dtype=dtype,
        inner=inner,
        inner_names=names,
        fill_value=2**bits - 1 if packed else largest,
        bits=bits if packed else None,
        lengths=lengths,
        attributes={"num_classes": num_classes},
    )


def gap_field(
    fall_range: float, levels: int, inner: tuple[int, ...], names: tuple[str, ...], lengths: Lengths | None = None
) -> FieldRecord:
    """`logits/gap`: falls from rank to rank."""
    bits = (levels + 1).bit_length()
    return FieldRecord(
        name="logits/gap",
        dtype="uint8",
        inner=inner,
        inner_names=names,
        fill_value=2**bits - 1,
        bits=bits if bits < 8 else None,
        lengths=lengths,
        attributes={
            "decode": "fall = gap_range * (code / levels)**2; log_prob = -cumsum(fall)",
            "gap_range": fall_range,
            "levels": levels,
        },
    )


def tail_field(temperatures: tuple[float, ...], positions: tuple[int, ...]) -> FieldRecord:
    """`logits/tail`: the mass of what is not kept."""
    return FieldRecord(
        name="logits/tail",
        dtype="uint8",
        inner=(*positions, len(temperatures)),
        inner_names=(*position_names(positions), "temperature"),
        fill_value=255,
        attributes={"decode": "mass = sin(pi / 2 * code / 254)**2", "temperatures": list(temperatures)},
    )


def position_names(positions: tuple[int, ...]) -> tuple[str, ...]:
    """Names of position axes."""
    return tuple(f"position{i}" for i in range(len(positions)))


def torch_dtype(name: str) -> torch.dtype:
    """The type of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
