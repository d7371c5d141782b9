"""Codecs: what comes back from a store is what went in, within bounds that follow from the encoding."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stored import codec, seeds_for, through_files
from torch import Tensor

from kdcache.records.errors import SpecError
from kdcache.targets.coding import LARGEST_CODE, MOST_CLASSES, smallest_unsigned, top_classes
from kdcache.targets.soft_targets import SoftTargets

Logits = Callable[..., Tensor]
ROUNDING = 2e-5
"""Float32 arithmetic on log-probabilities of up to some tens of nats."""

CLASS_COUNTS = [2, 10, 256, 257, 1000, 65_537, 151_936]
DIVERGENCES = [
    ("topk,k=1", CLASS_COUNTS, 3e-5),
    ("topk,k=5", CLASS_COUNTS[1:], 2e-4),
    ("topk,k=16", CLASS_COUNTS[2:], 2e-4),
    ("topk,k=16,values=float16", CLASS_COUNTS[2:], 3e-5),
    ("topk,k={all}", CLASS_COUNTS[:4], 5e-4),
    ("topk,k={all},values=float16", CLASS_COUNTS[:4], 1e-6),
    ("adaptive,mean_k=1.5,max_k=2", CLASS_COUNTS[1:], 2e-4),
    ("adaptive,mean_k=5,max_k=20", CLASS_COUNTS[2:], 2e-4),
    ("dense,dtype=uint8", CLASS_COUNTS, 1e-3),
    ("dense,dtype=float16", CLASS_COUNTS, 1e-5),
    ("dense,dtype=float32", CLASS_COUNTS, 1e-9),
]
"""The most nats that may lie between what a codec kept and the same classes exactly, at T from 1 to 4."""

EVERY_CODEC = [
    "topk,k=1", "topk,k=3", "topk,k=3,values=float16,temperatures=(1,4)", "topk,k=3,gap_range=1",
    "adaptive,mean_k=2,max_k=2", "adaptive,mean_k=1,max_k=1", "sampled,draws=5", "sampled,draws=300", "dense", "dense,dtype=float32", "dense,dtype=uint8",
]  # fmt: skip
"""Codecs for three classes and more."""


def batch_for(num_classes: int) -> int:
    """Many records where they are small, a few where they are large."""
    return 128 if num_classes <= 1000 else 8


def exact_distribution(logits: Tensor, soft: SoftTargets, temperature: float) -> Tensor:
    """In float64 from the full logits: probabilities of the places that the targets have, padding included, and of the rest."""
    full = (logits.double() / temperature).softmax(-1)
    if soft.index is None:
        return torch.cat([full, torch.zeros_like(full[..., :1])], -1)
    rest = full.scatter(-1, soft.index, 0).sum(-1, keepdim=True)
    return torch.cat([full.gather(-1, soft.index) * soft.kept, rest], -1)


def in_float64(soft: SoftTargets) -> SoftTargets:
    """The same numbers in a type whose own rounding does not matter."""
    tail_mass = None if soft.tail_mass is None else soft.tail_mass.double()
    return dataclasses.replace(soft, log_probs=soft.log_probs.double(), tail_mass=tail_mass)


def divergence(exact: Tensor, found: Tensor) -> Tensor:
    """KL(exact ‖ found) in nats, where a class that has nothing adds nothing."""
    return (torch.xlogy(exact, exact) - torch.xlogy(exact, found)).sum(-1)


def assert_equal_targets(found: SoftTargets, expected: SoftTargets) -> None:
    """Two soft targets are the same bit for bit, apart from how far ragged records are padded."""
    length = found.log_probs.shape[-1]
    assert torch.equal(found.log_probs, expected.log_probs[..., :length])
    assert (expected.log_probs[..., length:] == -torch.inf).all()
    for part, other in ((found.index, expected.index), (found.tail_mass, expected.tail_mass)):
        assert (part is None) == (other is None)
    if found.index is not None and expected.index is not None:
        assert torch.equal(found.index, expected.index[..., :length])
    if found.tail_mass is not None and expected.tail_mass is not None:
        assert torch.equal(found.tail_mass, expected.tail_mass)
    rest = ("num_classes", "temperatures", "sampled_at")
    assert [getattr(found, name) for name in rest] == [getattr(expected, name) for name in rest]


@pytest.mark.parametrize(
    ("spec", "num_classes", "nats"), [(spec, num_classes, nats) for spec, counts, nats in DIVERGENCES for num_classes in counts]
)
def test_round_trip_through_files(spec: str, num_classes: int, nats: float, tmp_path: Path, teacher_logits: Logits) -> None:
    """What files give back decodes to what was encoded: the most probable classes, their probabilities within the codec's bound."""
    logits = teacher_logits(batch_for(num_classes), num_classes)
    made = codec(spec.format(all=num_classes), num_classes).calibrated(logits)
    soft = made.decode(through_files(made, logits, tmp_path))
    assert_equal_targets(soft, made.decode(made.encode(logits)))
    if soft.index is not None:
        exact_order = logits.topk(soft.index.shape[-1], dim=-1).indices
        assert torch.equal(soft.index[soft.kept], exact_order[soft.kept])
        assert (soft.index[~soft.kept] == soft.index[..., :1].expand_as(soft.index)[~soft.kept]).all()
    assert torch.equal(soft.top1, logits.argmax(-1)) or spec == "dense,dtype=uint8"
    for temperature in (1.0, 2.0, 4.0):
        kept, tail = in_float64(soft).probs_at(temperature)
        found = torch.cat([kept, tail.unsqueeze(-1)], -1)
        assert divergence(exact_distribution(logits, soft, temperature), found).max() < nats


@pytest.mark.parametrize("draws", [1, 5, 50, 400])
@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_draws_round_trip_through_files(num_classes: int, draws: int, tmp_path: Path, teacher_logits: Logits) -> None:
    """Of drawn targets, files give back every class and how often it was drawn; no class is there twice, none was impossible."""
    logits = teacher_logits(batch_for(num_classes), num_classes)
    made, seeds = codec(f"sampled,draws={draws}", num_classes), seeds_for(len(logits))
    arrays = through_files(made, logits, tmp_path, seeds)
    soft = made.decode(arrays)
    assert_equal_targets(soft, made.decode(made.encode(logits, seeds)))
    assert soft.index is not None
    shares = torch.zeros_like(logits).scatter_add(-1, soft.index, soft.log_probs.exp())
    assert torch.equal((shares > 0).sum(-1), arrays["logits/count"].long())
    assert torch.allclose(shares.sum(-1), torch.ones(len(logits)))
    assert (shares * draws - (shares * draws).round()).abs().max() < 1e-4


@pytest.mark.parametrize(("num_classes", "gap_range"), [*((count, 32.0) for count in CLASS_COUNTS), (1000, 20.0)])
def test_topk_log_probs_are_within_a_step(num_classes: int, gap_range: float, teacher_logits: Logits) -> None:
    """A decoded log-probability is off by less than the two codes around its own fall lie apart; errors do not add up over the ranks.

    A fall is measured from the decoded rank before. Where that lies below the truth already, nothing is added to its error.
    """
    k = min(16, num_classes)
    logits = teacher_logits(batch_for(num_classes), num_classes)
    topk = codec(f"topk,k={k},gap_range={gap_range}", num_classes)
    steps = fall_of_each_code(gap_range)
    decoded = topk.decode(topk.encode(logits)).log_probs
    exact = logits.log_softmax(-1).topk(k, dim=-1).values
    exact = exact - exact[:, :1]
    assert not decoded[:, 0].any()
    bound = torch.zeros_like(decoded[:, 0])
    for rank in range(1, k):
        fall = decoded[:, rank - 1] - exact[:, rank]
        assert fall.max() < gap_range
        above = torch.searchsorted(steps, fall.clamp(min=0).contiguous(), right=True).clamp(max=LARGEST_CODE)
        bound = torch.where(fall >= 0, steps[above] - steps[above - 1], bound)
        assert ((decoded[:, rank] - exact[:, rank]).abs() <= bound + ROUNDING).all()


def fall_of_each_code(gap_range: float) -> Tensor:
    """What a codec with this range decodes each code to, ascending."""
    codes = torch.arange(LARGEST_CODE + 1, dtype=torch.uint8)[:, None]
    index = torch.tensor([[0, 1]], dtype=torch.uint8).expand(len(codes), -1)
    return -codec(f"topk,k=2,gap_range={gap_range}", 2).decode({"logits/index": index, "logits/gap": codes}).log_probs[:, 1]


@pytest.mark.parametrize("gap_range", [1.0, 32.0])
def test_codes_for_falls_are_finest_at_the_smallest(gap_range: float) -> None:
    """Codes for falls go from nothing to the range in steps that never shrink: a small fall is known best."""
    falls = fall_of_each_code(gap_range)
    assert falls[0] == 0
    assert falls[-1] == pytest.approx(gap_range)
    assert (falls.diff() > 0).all()
    assert (falls.diff().diff() > -1e-5 * gap_range).all()


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_float16_values_are_within_half_a_unit(num_classes: int, teacher_logits: Logits) -> None:
    """With values=float16, the log-probabilities below the first one's come back within half a unit in float16's last place."""
    k = min(16, num_classes)
    logits = teacher_logits(batch_for(num_classes), num_classes)
    topk = codec(f"topk,k={k},values=float16", num_classes)
    decoded = topk.decode(topk.encode(logits)).log_probs
    exact = logits.topk(k, dim=-1).values
    exact = exact - exact[:, :1]
    assert ((decoded - exact).abs() <= (exact.abs() * 2.0**-11).clamp(min=2.0**-25)).all()


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_topk_keeps_the_largest_in_order(num_classes: int, teacher_logits: Logits) -> None:
    """The kept classes are those of the largest logits, the largest first, and decoded values never rise with the rank."""
    k = min(16, num_classes)
    logits = teacher_logits(batch_for(num_classes), num_classes)
    topk = codec(f"topk,k={k}", num_classes)
    soft = topk.decode(topk.encode(logits))
    assert soft.index is not None
    assert torch.equal(soft.index, logits.topk(k, dim=-1).indices)
    assert (soft.log_probs.diff(dim=-1) <= 0).all()
    assert torch.equal(soft.top1, logits.argmax(-1))
    assert (soft.num_classes, soft.temperatures) == (num_classes, (1.0, 2.0, 4.0))


@pytest.mark.parametrize("num_classes", [count for count in CLASS_COUNTS if count > 2])
def test_topk_tail_mass_is_within_half_a_step(num_classes: int, teacher_logits: Logits) -> None:
    """The mass of the rest is off by at most half a step of its angle, π / (4 · 254) = 0.0031, at every declared temperature."""
    k = min(5, num_classes)
    logits = teacher_logits(batch_for(num_classes), num_classes)
    topk = codec(f"topk,k={k},temperatures=(0.5,1,4,20)", num_classes)
    tail = topk.decode(topk.encode(logits)).tail_mass
    assert tail is not None
    index = logits.topk(k, dim=-1).indices
    for i, temperature in enumerate((0.5, 1, 4, 20)):
        exact = (logits.double() / temperature).softmax(-1).scatter(-1, index, 0).sum(-1)
        assert (tail[:, i] - exact).abs().max() <= math.pi / 4 / LARGEST_CODE + 1e-6
        step = math.pi / 2 / LARGEST_CODE
        assert (tail[:, i].double().sqrt().asin() - exact.sqrt().asin()).abs().max() <= step / 2 + 1e-3


@pytest.mark.parametrize(("num_classes", "k"), [(100, 16), (1000, 5), (1000, 16), (1000, 32), (65_537, 16)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_quantisation_costs_next_to_nothing(
    num_classes: int, k: int, temperature: float, teacher_logits: Logits, keep_exactly: Callable[..., SoftTargets]
) -> None:
    """Between decoded and exact sparse targets lie less than 1e-4 nat on average (measured: 4e-6 to 2e-5) and 2e-4 at most."""
    logits = teacher_logits(batch_for(num_classes), num_classes)
    topk = codec(f"topk,k={k}", num_classes)
    kept, tail = topk.decode(topk.encode(logits)).probs_at(temperature)
    exact_kept, exact_tail = keep_exactly(logits.double(), k).probs_at(temperature)
    found, exact = torch.cat([kept, tail[:, None]], -1).double(), torch.cat([exact_kept, exact_tail[:, None]], -1)
    assert divergence(found, exact).mean() < 1e-4
    assert divergence(found, exact).max() < 2e-4


@pytest.mark.parametrize("values", ["uint8", "float16"])
@pytest.mark.parametrize("num_classes", [1, 2, 10, 257])
def test_topk_of_all_classes_has_no_tail(num_classes: int, values: str, teacher_logits: Logits) -> None:
    """With k equal to the class count every class is there once and nothing is left over, at any temperature."""
    logits = teacher_logits(64, num_classes)
    topk = codec(f"topk,k={num_classes},values={values}", num_classes)
    assert "logits/tail" not in [field.name for field in topk.fields(())]
    assert not topk.keeps_profile
    soft = topk.decode(topk.encode(logits))
    assert soft.keeps_all
    assert soft.tail_mass is None
    assert soft.index is not None
    assert torch.equal(soft.index.sort(-1).values, torch.arange(num_classes).expand(64, -1))
    for temperature in (0.5, 1.0, 3.0):
        probs, tail = soft.probs_at(temperature)
        assert not tail.any()
        full = (logits / temperature).softmax(-1).gather(-1, soft.index)
        assert (probs - full).abs().max() < 0.02


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_dense_log_probs_are_within_half_a_unit(num_classes: int, dtype: str, teacher_logits: Logits) -> None:
    """Dense log-probabilities of all classes come back within half a unit in the last place of their type."""
    logits = teacher_logits(batch_for(num_classes), num_classes)
    dense = codec(f"dense,dtype={dtype}", num_classes)
    soft = dense.decode(dense.encode(logits))
    exact = logits.log_softmax(-1)
    bound = torch.zeros(()) if dtype == "float32" else (exact.abs() * 2.0**-11).clamp(min=2.0**-25)
    assert ((soft.log_probs - exact).abs() <= bound).all()
    assert soft.keeps_all
    assert soft.index is None
    assert soft.tail_mass is None


@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_byte_wide_dense_is_within_a_step(num_classes: int, teacher_logits: Logits) -> None:
    """With dtype=uint8 a fall x from the top is off by at most √(range · x) / 254 and a little, where the range is the record's own.

    Half a code away from 254 · √(x / range), which is √(range · x) / 254 + range / (4 · 254²); and the range is kept as float16.
    """
    logits = teacher_logits(batch_for(num_classes), num_classes)
    dense = codec("dense,dtype=uint8", num_classes)
    found = -dense.decode(dense.encode(logits)).log_probs
    exact = logits.amax(-1, keepdim=True) - logits
    range_ = exact.amax(-1, keepdim=True)
    step = (range_ * exact).sqrt() / LARGEST_CODE + range_ / 4 / LARGEST_CODE**2
    assert ((found - exact).abs() <= step + range_ * 2.0**-11).all()
    assert (found.gather(-1, logits.argmax(-1, keepdim=True)) == 0).all()


@pytest.mark.parametrize(
    "spec", ["topk,k=2", "topk,k=2,values=float16", "dense", "dense,dtype=uint8", "adaptive,mean_k=1.5,max_k=2", "sampled"]
)
@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [3e38, -3e38, 0.0], [-1e5, -1e5, -1e5], [1e-30, 0.0, -1e-30]])
def test_extreme_logits_stay_finite(spec: str, logits: list[float]) -> None:
    """Finite logits of any size give finite probabilities that add up to one, with the largest class first."""
    batch = torch.tensor([logits])
    made = codec(spec, 3).calibrated(batch)
    soft = made.decode(made.encode(batch, seeds_for(1)))
    assert soft.log_probs[soft.kept].isfinite().all()
    for temperature in (0.1, 1.0, 4.0) if soft.sampled_at is None else (1.0,):
        probs, tail = soft.probs_at(temperature)
        assert probs.sum(-1) + tail == pytest.approx(1, abs=1e-6)
        assert (probs >= 0).all()
    assert logits[soft.top1.item()] == max(logits)


def test_falls_beyond_the_range_are_stored_as_the_range() -> None:
    """A fall that is larger than the codec can say becomes the largest that it can say, and the order stays."""
    logits = torch.tensor([[0.0, -50.0, -50.5, -200.0]])
    topk = codec("topk,k=3,gap_range=10", 4)
    decoded = topk.decode(topk.encode(logits)).log_probs
    assert decoded[0].tolist() == pytest.approx([0, -10, -20])


@pytest.mark.parametrize("spec", EVERY_CODEC)
@pytest.mark.parametrize("num_classes", [3, 255, 256, 65_535, 65_536])
def test_fill_values_are_never_written(spec: str, num_classes: int) -> None:
    """No record holds a field's fill value, not even one of the last class, of certainty or of no knowledge at all."""
    logits = torch.zeros(6, num_classes)
    logits[1, -1] = logits[2, 0] = 1e4
    logits[3] = torch.linspace(-500, 500, num_classes)
    logits[4] = -logits[3]
    logits[5, -3:] = torch.tensor([1.0, 2.0, 3.0])
    made = codec(spec, num_classes).calibrated(logits)
    arrays = made.encode(logits, seeds_for(6))
    for field in made.fields(()):
        values = arrays[field.name]
        if field.fill_value == "NaN":
            assert not values.isnan().any()
        else:
            assert isinstance(field.fill_value, int)
            assert values.long().max() < field.fill_value
            largest = torch.iinfo(values.dtype).max if field.bits is None else 2**field.bits - 1
            assert field.fill_value == largest


@pytest.mark.parametrize(
    ("num_classes", "dtype", "bits"),
    [
        (2, "uint8", 2),
        (10, "uint8", 4),
        (255, "uint8", None),
        (256, "uint16", 9),
        (257, "uint16", 9),
        (1000, "uint16", 10),
        (65_535, "uint16", None),
        (65_536, "uint32", 17),
        (65_537, "uint32", 17),
        (151_936, "uint32", 18),
        (2**32 - 1, "uint32", None),
        (2**32, "uint64", 33),
    ],
)
def test_class_numbers_take_the_smallest_type(num_classes: int, dtype: str, bits: int | None) -> None:
    """Class numbers take the smallest unsigned type, and the fewest bits, that have a value to spare for what was never written."""
    assert smallest_unsigned(num_classes)[0] == dtype
    for spec in ("topk,k=1", "adaptive", "sampled") if num_classes > 2 else ("topk,k=1", "sampled"):
        index = codec(spec, num_classes).fields(())[0 if spec == "topk,k=1" else 1]
        assert (index.name, index.dtype, index.bits) == ("logits/index", dtype, bits)
        assert index.fill_value == 2 ** (bits or int(dtype[4:])) - 1
    if num_classes < 2**20:
        arrays = codec("topk,k=1", num_classes).encode(torch.arange(num_classes).float()[None])
        assert arrays["logits/index"].dtype == getattr(torch, dtype)
        assert arrays["logits/index"].long().item() == num_classes - 1


def test_more_classes_than_a_label_can_say_are_refused() -> None:
    """The format ends at 2^32 classes: one more, or none at all, is a SpecError that says so, whatever the codec."""
    dtype, fill = smallest_unsigned(MOST_CLASSES)
    assert dtype == "uint64"
    assert MOST_CLASSES <= fill < 2**64
    with pytest.raises(SpecError, match="expected at most 4294967296 classes, found 4294967297"):
        smallest_unsigned(MOST_CLASSES + 1)
    for spec in ("auto", "topk", "adaptive", "sampled", "dense"):
        assert codec(spec, MOST_CLASSES).fields(())
        for num_classes in (MOST_CLASSES + 1, 0, -1):
            with pytest.raises(SpecError, match=f"expected 1 to 4294967296 classes, found {num_classes}"):
                codec(spec, num_classes)


def order_by_value_then_class(logits: Tensor) -> Tensor:
    """All classes, the largest logit first and of equal ones the lower class, sorted by NumPy."""
    values = -logits.double().numpy()
    classes = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    return torch.from_numpy(np.lexsort((classes, values), axis=-1))


TIED = {
    "all equal": torch.zeros(4, 40),
    "two values": (torch.arange(160).reshape(4, 40) % 3 == 0).float(),
    "zeros of both signs": torch.where(torch.arange(160).reshape(4, 40) % 2 == 0, 0.0, -0.0),
    "bfloat16": torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).bfloat16().float(),
    "whole numbers": torch.randint(-3, 4, (4, 40), generator=torch.Generator().manual_seed(4)).float(),
    "large": torch.randint(-3, 4, (4, 40), generator=torch.Generator().manual_seed(5)) * 1e38,
    "subnormal": torch.randint(-3, 4, (4, 40), generator=torch.Generator().manual_seed(6)) * 1e-44,
    "some rows only": torch.randn(4, 40, generator=torch.Generator().manual_seed(7)) * torch.tensor([[0.0], [1], [0], [1]]),
}


@pytest.mark.parametrize("k", [1, 2, 5, 39, 40])
@pytest.mark.parametrize("kind", TIED)
def test_of_equal_logits_the_lower_class_comes_first(kind: str, k: int) -> None:
    """Classes stand in the order of their logits, and of equal ones the lower number is first and is the one that is kept."""
    logits = TIED[kind]
    values, index = top_classes(logits, k)
    assert torch.equal(index, order_by_value_then_class(logits)[:, :k])
    assert torch.equal(values, logits.gather(-1, index))
    topk = codec(f"topk,k={k}", 40)
    stored = topk.encode(logits)["logits/index"]
    assert torch.equal(stored.long(), index)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_classes", [257, 65_537])
def test_ties_are_settled_for_many_classes(num_classes: int, precision: str, teacher_logits: Logits) -> None:
    """Where a teacher in bfloat16 gives hundreds of equal logits, the kept ones are still the lowest classes of them."""
    logits = teacher_logits(16, num_classes)
    logits = logits.bfloat16().float() if precision == "bfloat16" else logits
    assert torch.equal(top_classes(logits, 16)[1], order_by_value_then_class(logits)[:, :16])


@pytest.mark.parametrize("spec", EVERY_CODEC)
@pytest.mark.parametrize("kind", ["bfloat16", "some rows only", "all equal"])
def test_a_record_does_not_depend_on_its_batch(spec: str, kind: str) -> None:
    """A record is coded alone as in any batch, bit for bit, ties and draws included."""
    logits = TIED[kind]
    made, seeds = codec(spec, 40).calibrated(logits), seeds_for(4)
    whole = made.encode(logits, seeds)
    for row in range(4):
        for name, array in made.encode(logits[row : row + 1], seeds[row : row + 1]).items():
            assert torch.equal(array[0].double(), whole[name][row].double())


@pytest.mark.parametrize("positions", [(), (7,), (3, 5)])
@pytest.mark.parametrize("spec", EVERY_CODEC)
def test_position_axes_are_carried_along(spec: str, positions: tuple[int, ...], teacher_logits: Logits, tmp_path: Path) -> None:
    """Outputs with position axes are coded position by position, in arrays of the shapes that the fields say."""
    logits = teacher_logits(6, *positions, 50)
    made, seeds = codec(spec, 50).calibrated(logits), seeds_for(6)
    arrays = made.encode(logits, seeds)
    fields = made.fields(positions)
    assert arrays.keys() == {field.name for field in fields}
    for field in fields:
        assert arrays[field.name].dtype == getattr(torch, field.dtype)
        assert len(field.inner) == len(field.inner_names)
        if field.lengths is None:
            assert arrays[field.name].shape == (6, *field.inner)
        else:
            assert arrays[field.name].shape[:-1] == (6, *positions)
            assert (math.prod(positions) * arrays[field.name].shape[-1],) == field.inner
    soft = made.decode(through_files(made, logits, tmp_path, seeds))
    assert soft.log_probs.shape[:-1] == (6, *positions)
    assert_equal_targets(soft, made.decode(arrays))
    if "sampled" not in spec:
        flat = made.decode(made.encode(logits.reshape(-1, 50)))
        assert torch.equal(made.decode(arrays).log_probs.flatten(0, -2), flat.log_probs)


@pytest.mark.parametrize("spec", EVERY_CODEC)
def test_any_rows_decode_alone(spec: str, teacher_logits: Logits) -> None:
    """Decoding some rows of the arrays gives the same as decoding all and taking these rows."""
    logits = teacher_logits(20, 300)
    made = codec(spec, 300).calibrated(logits)
    arrays = made.encode(logits, seeds_for(20))
    rows = torch.tensor([3, 17, 3, 0])
    some = made.decode({name: torch.from_numpy(array.numpy()[rows.numpy()]) for name, array in arrays.items()})
    whole = made.decode(arrays)
    expected = dataclasses.replace(
        whole,
        log_probs=whole.log_probs[rows],
        index=None if whole.index is None else whole.index[rows],
        tail_mass=None if whole.tail_mass is None else whole.tail_mass[rows],
    )
    assert_equal_targets(some, expected)


TOPK = "topk,gap_range=32.0,k={k},levels=254,profile={profile},temperatures=(1.0,2.0,4.0),values=uint8"
ADAPTIVE = "adaptive,gap_range=32.0,levels=254,max_k={max_k},mean_k={mean_k},profile={profile},temperature=1.0,temperatures=(1.0,2.0,4.0)"


@pytest.mark.parametrize(
    ("spec", "num_classes", "resolved"),
    [
        ("auto", 10, "dense,dtype=float16"),
        ("auto", 32, "dense,dtype=float16"),
        ("auto", 33, TOPK.format(k=16, profile=True)),
        ("auto", 151_936, TOPK.format(k=16, profile=False)),
        ("topk", 10, TOPK.format(k=10, profile=False)),
        ("topk", 2048, TOPK.format(k=16, profile=True)),
        ("topk", 2049, TOPK.format(k=16, profile=False)),
        ("topk,profile=False", 100, TOPK.format(k=16, profile=False)),
        (
            "topk,temperatures=(4,1,1.0),k=3,values=float16",
            10,
            "topk,gap_range=32.0,k=3,levels=254,profile=True,temperatures=(1.0,4.0),values=float16",
        ),
        ("topk,temperatures=2,gap_range=8", 100, "topk,gap_range=8.0,k=16,levels=254,profile=True,temperatures=(2.0,),values=uint8"),
        ("adaptive", 3, ADAPTIVE.format(max_k=2, mean_k=1.5, profile=True)),
        ("adaptive", 1000, ADAPTIVE.format(max_k=128, mean_k=12.0, profile=True)),
        ("adaptive,max_k=20,mean_k=4", 151_936, ADAPTIVE.format(max_k=20, mean_k=4.0, profile=False)),
        (
            "adaptive,kl=1e-1,temperatures=1",
            100,
            "adaptive,gap_range=32.0,kl=0.1,levels=254,max_k=99,profile=True,temperature=1.0,temperatures=(1.0,)",
        ),
        ("sampled", 1000, "sampled,draws=50,temperature=1.0"),
        ("sampled,draws=65534,temperature=2", 1000, "sampled,draws=65534,temperature=2.0"),
        ("dense,dtype=float32", 1000, "dense,dtype=float32"),
        ("dense,dtype=uint8", 1000, "dense,dtype=uint8"),
    ],
)
def test_specs_are_resolved(spec: str, num_classes: int, resolved: str) -> None:
    """A codec's own spec says everything that it was left to choose, and names the same codec when it is read again."""
    made = codec(spec, num_classes)
    assert str(made.spec) == resolved
    assert codec(resolved, num_classes).spec == made.spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "unknown codec 'nope'; expected auto, topk"),
        ("py:topk", "unknown codec 'py:topk'"),
        ("auto,k=3", "unknown codec 'auto,k=3'"),
        ("topk,k=0", "topk,k=0: expected k from 1 to 100 (100 classes), found 0"),
        ("topk,k=101", "topk,k=101: expected k from 1 to 100 (100 classes), found 101"),
        ("topk,k=2.0", "found 2.0"),
        ("topk,k=True", "found True"),
        ("topk,rank=3", "unknown option rank; topk takes: gap_range, k, levels, profile, temperatures, values"),
        ("topk,temperatures=()", "at least one temperature"),
        ("topk,temperatures=(1,'warm')", "expected a number for temperatures, found 'warm'"),
        ("topk,temperatures=(0,)", "expected a positive temperatures, found 0"),
        ("topk,temperatures=(-1,)", "expected a positive temperatures, found -1"),
        ("topk,gap_range=0", "expected a positive gap_range, found 0"),
        ("topk,gap_range=wide", "expected a number for gap_range, found 'wide'"),
        ("topk,values=int4", "expected values to be one of uint8, float16, found 'int4'"),
        ("topk,profile=1", "expected profile=True (up to 2048 classes) or False, found 1"),
        ("adaptive,k=3", "unknown option k; adaptive takes: gap_range, kl, levels, max_k, mean_k, profile, temperature, temperatures"),
        ("adaptive,mean_k=5,kl=0.1", "expected mean_k or kl, found both"),
        ("adaptive,mean_k=30,max_k=20", "expected mean_k from 1 to max_k = 20, found 30"),
        ("adaptive,mean_k=0.5", "expected mean_k from 1 to max_k = 99, found 0.5"),
        ("adaptive,mean_k=-1", "expected a positive mean_k, found -1"),
        ("adaptive,mean_k=many", "expected a number for mean_k, found 'many'"),
        ("adaptive,max_k=100", "expected max_k from 1 to 99 (100 classes), found 100"),
        ("adaptive,kl=0", "expected a positive kl, found 0"),
        ("adaptive,temperature=0", "expected a positive temperature, found 0"),
        ("sampled,draws=0", "expected draws from 1 to 65534 (100 classes), found 0"),
        ("sampled,draws=65535", "expected draws from 1 to 65534 (100 classes), found 65535"),
        ("sampled,temperature=-2", "expected a positive temperature, found -2"),
        ("sampled,k=3", "unknown option k; sampled takes: draws, temperature"),
        ("dense,dtype=int8", "expected dtype to be one of float16, float32, uint8, found 'int8'"),
        ("dense,k=3", "unknown option k; dense takes: dtype"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    """A codec that does not exist, or options that make no sense, are a SpecError that says what was expected."""
    with pytest.raises(SpecError, match=re.escape(message)):
        codec(spec, 100)


def test_options_that_need_more_or_fewer_classes_are_refused() -> None:
    """Adaptive k needs something to leave out, and a profile of very many classes would be larger than the cache: SpecErrors."""
    with pytest.raises(SpecError, match="expected at least 3 classes, found 2; take dense"):
        codec("adaptive", 2)
    for name in ("topk", "adaptive"):
        with pytest.raises(SpecError, match=r"expected profile=True \(up to 2048 classes\) or False, found True"):
            codec(f"{name},profile=True", 2049)
