"""Codecs: what comes back from a store is what went in, within bounds that follow from the encoding."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec
from kdcache.targets.codecs import LARGEST_CODE, Codec, make_codec, smallest_unsigned
from kdcache.targets.soft_targets import SoftTargets

Logits = Callable[..., Tensor]
ROUNDING = 2e-5
"""Float32 arithmetic on log-probabilities of up to some tens of nats."""

CLASS_COUNTS = [2, 10, 256, 257, 1000, 70_000]


def codec(spec: str, num_classes: int) -> Codec:
    """The codec that a spec string names."""
    return make_codec(Spec.parse(spec), num_classes=num_classes)


def batch_for(num_classes: int) -> int:
    """Many records where they are small, a few where they are large."""
    return 128 if num_classes <= 1000 else 8


def half_step(fall: Tensor, gap_range: float) -> Tensor:
    """The largest error of one stored fall: half a code away from x = 254 · sqrt(fall / range), where fall = range · (x / 254)²."""
    x = LARGEST_CODE * (fall / gap_range).sqrt()
    return gap_range * (x + 0.25) / LARGEST_CODE**2


@pytest.mark.parametrize(("num_classes", "gap_range"), [*((count, 32.0) for count in CLASS_COUNTS), (1000, 20.0)])
def test_topk_log_probs_are_within_half_a_step(num_classes: int, gap_range: float, teacher_logits: Logits) -> None:
    """A decoded log-probability is off by at most half a step at its own fall; errors do not add up over the ranks.

    A fall is measured from the decoded rank before. Where that lies below the truth already, nothing is added to its error.
    """
    k = min(16, num_classes)
    logits = teacher_logits(batch_for(num_classes), num_classes)
    topk = codec(f"topk,k={k},gap_range={gap_range}", num_classes)
    decoded = topk.decode(topk.encode(logits)).log_probs
    exact = logits.log_softmax(-1).topk(k, dim=-1).values
    before = torch.cat([torch.zeros_like(decoded[:, :1]), decoded[:, :-1]], dim=-1)
    bound = torch.zeros_like(decoded[:, 0])
    for rank in range(k):
        fall = before[:, rank] - exact[:, rank]
        assert fall.max() < gap_range
        bound = torch.where(fall >= 0, half_step(fall.clamp(min=0), gap_range), bound)
        assert ((decoded[:, rank] - exact[:, rank]).abs() <= bound + ROUNDING).all()


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


@pytest.mark.parametrize(("num_classes", "k"), [(100, 16), (1000, 5), (1000, 16), (1000, 32), (70_000, 16)])
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
    divergence = (torch.xlogy(found, found) - torch.xlogy(found, exact)).sum(-1)
    assert divergence.mean() < 1e-4
    assert divergence.max() < 2e-4


@pytest.mark.parametrize("num_classes", [2, 10, 257])
def test_topk_of_all_classes_has_no_tail(num_classes: int, teacher_logits: Logits) -> None:
    """With k equal to the class count every class is there once and nothing is left over, at any temperature."""
    logits = teacher_logits(64, num_classes)
    topk = codec(f"topk,k={num_classes}", num_classes)
    soft = topk.decode(topk.encode(logits))
    assert soft.keeps_all
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


@pytest.mark.parametrize("spec", ["topk,k=2", "dense"])
@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [3e38, -3e38, 0.0], [-1e5, -1e5, -1e5], [1e-30, 0.0, -1e-30]])
def test_extreme_logits_stay_finite(spec: str, logits: list[float]) -> None:
    """Finite logits of any size give finite probabilities that add up to one, with the largest class first."""
    made = codec(spec, 3)
    soft = made.decode(made.encode(torch.tensor([logits])))
    assert soft.log_probs.isfinite().all()
    for temperature in (0.1, 1.0, 4.0):
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


@pytest.mark.parametrize("spec", ["topk,k=3,temperatures=(1,4)", "topk,k=3,gap_range=1", "dense", "dense,dtype=float32"])
@pytest.mark.parametrize("num_classes", [3, 255, 256, 65_535, 65_536])
def test_fill_values_are_never_written(spec: str, num_classes: int) -> None:
    """No record holds a field's fill value, not even one of the last class, of certainty or of no knowledge at all."""
    logits = torch.zeros(6, num_classes)
    logits[1, -1] = logits[2, 0] = 1e4
    logits[3] = torch.linspace(-500, 500, num_classes)
    logits[4] = -logits[3]
    logits[5, -3:] = torch.tensor([1.0, 2.0, 3.0])
    made = codec(spec, num_classes)
    arrays = made.encode(logits)
    for field in made.fields(()):
        values = arrays[field.name]
        if field.fill_value == "NaN":
            assert not values.isnan().any()
        else:
            assert values.long().max() < field.fill_value
            assert torch.iinfo(values.dtype).max == field.fill_value


@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(2, "uint8"), (255, "uint8"), (256, "uint16"), (257, "uint16"), (65_535, "uint16"), (65_536, "uint32"), (70_000, "uint32")],
)
def test_class_numbers_take_the_smallest_type(num_classes: int, dtype: str) -> None:
    """Class numbers are stored in the smallest unsigned type that has a value to spare for what was never written."""
    assert smallest_unsigned(num_classes)[0] == dtype
    arrays = codec("topk,k=1", num_classes).encode(torch.arange(num_classes).float()[None])
    assert arrays["logits/index"].dtype == getattr(torch, dtype)
    assert arrays["logits/index"].long().item() == num_classes - 1


def test_more_classes_than_any_type_holds_are_refused() -> None:
    """A class count beyond 32 bits is a SpecError, not an overflow."""
    assert smallest_unsigned(2**32 - 1)[0] == "uint32"
    with pytest.raises(SpecError, match="expected at most 4294967295 classes"):
        smallest_unsigned(2**32)


@pytest.mark.parametrize("positions", [(), (7,), (3, 5)])
@pytest.mark.parametrize("spec", ["topk,k=4,temperatures=(1,3)", "dense,dtype=float16"])
def test_position_axes_are_carried_along(spec: str, positions: tuple[int, ...], teacher_logits: Logits) -> None:
    """Outputs with position axes are coded position by position, in arrays of the shapes that the fields say."""
    logits = teacher_logits(6, *positions, 50)
    made = codec(spec, 50)
    arrays = made.encode(logits)
    fields = made.fields(positions)
    assert arrays.keys() == {field.name for field in fields}
    for field in fields:
        assert arrays[field.name].shape == (6, *field.inner)
        assert arrays[field.name].dtype == getattr(torch, field.dtype)
        assert len(field.inner) == len(field.inner_names) == len(positions) + 1
    flat = made.encode(logits.reshape(-1, 50))
    for name, array in arrays.items():
        assert torch.equal(array.flatten(0, -2).long(), flat[name].long())
    soft = made.decode(arrays)
    assert soft.log_probs.shape[:-1] == (6, *positions)
    probs, tail = soft.probs_at(2.0)
    assert torch.allclose(probs.sum(-1) + tail, torch.ones(6, *positions))


def test_a_record_does_not_depend_on_its_batch(teacher_logits: Logits) -> None:
    """A record's bytes are the same alone and among others."""
    logits = teacher_logits(32, 1000)
    topk = codec("topk", 1000)
    whole, one = topk.encode(logits), topk.encode(logits[5:6])
    for name, array in one.items():
        assert torch.equal(array[0].long(), whole[name][5].long())


@pytest.mark.parametrize(
    ("spec", "num_classes", "resolved"),
    [
        ("auto", 10, "dense,dtype=float16"),
        ("auto", 32, "dense,dtype=float16"),
        ("auto", 33, "topk,gap_range=32.0,k=16,temperatures=(1.0,2.0,4.0)"),
        ("topk", 10, "topk,gap_range=32.0,k=10,temperatures=(1.0,2.0,4.0)"),
        ("topk,temperatures=(4,1,1.0),k=3", 10, "topk,gap_range=32.0,k=3,temperatures=(1.0,4.0)"),
        ("topk,temperatures=2,gap_range=8", 100, "topk,gap_range=8.0,k=16,temperatures=(2.0,)"),
        ("dense,dtype=float32", 1000, "dense,dtype=float32"),
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
        ("nope", "unknown codec 'nope'"),
        ("py:topk", "unknown codec 'py:topk'"),
        ("auto,k=3", "unknown codec 'auto,k=3'"),
        ("topk,k=0", "expected k from 1 to the class count 100, found 0"),
        ("topk,k=101", "found 101"),
        ("topk,k=2.0", "found 2.0"),
        ("topk,k=True", "found True"),
        ("topk,rank=3", "unknown option rank; topk takes: gap_range, k, temperatures"),
        ("topk,temperatures=()", "at least one temperature"),
        ("topk,temperatures=(1,'warm')", "expected a number, found 'warm'"),
        ("topk,temperatures=(0,)", "expected a positive temperature"),
        ("topk,temperatures=(-1,)", "expected a positive temperature"),
        ("topk,gap_range=0", "expected a positive gap_range"),
        ("topk,gap_range=wide", "expected a number, found 'wide'"),
        ("dense,dtype=int8", "expected dtype to be float16 or float32, found 'int8'"),
        ("dense,k=3", "unknown option k; dense takes: dtype"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    """A codec that does not exist, or options that make no sense, are a SpecError that says what was expected."""
    with pytest.raises(SpecError, match=re.escape(message)):
        codec(spec, 100)
