"""Soft targets: probabilities at any temperature, from what is stored at a few."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from stored import codec, keep_ragged, seeds_for
from torch import Tensor

from kdcache.records.errors import ConfigError
from kdcache.targets.soft_targets import SoftTargets

Logits = Callable[..., Tensor]
Keep = Callable[..., SoftTargets]
TEMPERATURES = [0.05, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 16.0, 1e3, 1e6]


def exact_tail(logits: Tensor, soft: SoftTargets, temperature: float) -> Tensor:
    """The true mass of the classes that are not kept."""
    assert soft.index is not None
    return (logits / temperature).softmax(-1).scatter(-1, soft.index, 0).sum(-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("num_classes", "k"), [(10, 1), (10, 3), (10, 9), (1000, 16)])
def test_probabilities_add_up_to_one(temperature: float, num_classes: int, k: int, teacher_logits: Logits, keep_exactly: Keep) -> None:
    """At any temperature the kept classes and the rest have probabilities in [0, 1] that add up to one."""
    probs, tail = keep_exactly(teacher_logits(64, num_classes), k).probs_at(temperature)
    assert torch.allclose(probs.sum(-1) + tail, torch.ones(64), atol=2e-6)
    for values in (probs, tail):
        assert (values >= 0).all()
        assert (values <= 1).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_targets_that_keep_everything_are_the_softmax(temperature: float, teacher_logits: Logits) -> None:
    """Where every class is kept, the probabilities are the softmax of the logits over T, at any T, and there is no rest."""
    logits = teacher_logits(64, 30).double()
    soft = SoftTargets.from_logits(logits)
    probs, tail = soft.probs_at(temperature)
    assert (probs - (logits / temperature).softmax(-1)).abs().max() < 1e-12
    assert not tail.any()
    assert torch.equal(soft.top1, logits.argmax(-1))
    assert soft.keeps_all


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("num_classes", "k"), [(10, 3), (100, 16), (1000, 16)])
def test_declared_temperatures_are_exact(temperature: float, num_classes: int, k: int, teacher_logits: Logits, keep_exactly: Keep) -> None:
    """At a declared temperature the kept classes and the rest have the very probabilities of the full softmax."""
    logits = teacher_logits(256, num_classes).double()
    soft = keep_exactly(logits, k)
    probs, tail = soft.probs_at(temperature)
    assert soft.index is not None
    assert (tail - exact_tail(logits, soft, temperature)).abs().max() < 1e-12
    assert (probs - (logits / temperature).softmax(-1).gather(-1, soft.index)).abs().max() < 1e-12


@pytest.mark.parametrize(("num_classes", "k"), [(10, 3), (100, 16), (257, 16), (1000, 5), (1000, 32)])
@pytest.mark.parametrize(
    ("temperature", "mean", "largest"),
    [(1.5, 0.015, 0.05), (3.0, 0.015, 0.05), (6.0, 0.02, 0.1), (8.0, 0.025, 0.1), (16.0, 0.02, 0.1), (0.75, 0.05, 0.12)],
)
def test_undeclared_temperatures_are_close(
    num_classes: int, k: int, temperature: float, mean: float, largest: float, teacher_logits: Logits, keep_exactly: Keep
) -> None:
    """Between and above declared temperatures the mass of the rest is right to 0.025 on average and 0.1 at worst; below, to 0.12."""
    logits = teacher_logits(512, num_classes).double()
    soft = keep_exactly(logits, k)
    error = (soft.tail_mass_at(temperature) - exact_tail(logits, soft, temperature)).abs()
    assert error.mean() < mean
    assert error.max() < largest


def test_mass_has_no_jumps(teacher_logits: Logits, keep_exactly: Keep) -> None:
    """Just beside a declared temperature the mass of the rest is that of the declared one."""
    soft = keep_exactly(teacher_logits(64, 100).double(), 16)
    for declared in soft.temperatures:
        for temperature in (declared * (1 - 1e-9), declared * (1 + 1e-9)):
            assert (soft.tail_mass_at(temperature) - soft.tail_mass_at(declared)).abs().max() < 2e-6


@pytest.mark.parametrize("temperatures", [(1.0,), (4.0,), (1.0, 2.0, 4.0)])
@pytest.mark.parametrize(("num_classes", "k"), [(10, 3), (100, 16), (100, 60)])
def test_mass_rises_from_nothing_to_the_uniform_share(
    temperatures: tuple[float, ...], num_classes: int, k: int, teacher_logits: Logits, keep_exactly: Keep
) -> None:
    """The mass of the rest grows with T, from what certainty leaves at T = 0 to (classes - kept) / classes at infinite T."""
    logits = teacher_logits(64, num_classes).double()
    soft = keep_exactly(logits, k, temperatures=temperatures)
    grid = [0.02, 0.1, 0.3, 0.6, 1.0, 1.3, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 50.0, 1e3, 1e6, 1e9]
    mass = torch.stack([soft.tail_mass_at(temperature) for temperature in grid])
    clamped = mass.clamp(2e-6, 1 - 2e-6)
    assert (clamped.diff(dim=0) >= -1e-9).all()
    assert (mass[-1] - (num_classes - k) / num_classes).abs().max() < 1e-6
    at_lowest = exact_tail(logits, soft, temperatures[0])
    assert (mass[0][at_lowest < 0.4 * (num_classes - k) / num_classes] < 1e-3).all()


EXTREME_MASSES = [0.0, 1e-38, 1e-30, 2.4e-6, 0.5, 1 - 1e-6, 1 - 1e-7, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0, 4.0), (0.5, 20.0)])
@pytest.mark.parametrize("fall", [0.0, 1e-6, 30.0])
def test_extreme_masses_give_masses_at_any_temperature(fall: float, temperatures: tuple[float, ...], dtype: torch.dtype) -> None:
    """Whatever masses are declared, sensible or not, the mass at any other temperature is a number in [0, 1], gradients included.

    At infinite temperature it is the share of the classes that are not kept.
    """
    combinations = torch.cartesian_prod(*(torch.tensor(EXTREME_MASSES, dtype=dtype) for _ in temperatures)).reshape(-1, len(temperatures))
    log_probs = torch.tensor([0.0, -fall, -2 * fall], dtype=dtype).expand(len(combinations), -1)
    soft = SoftTargets(
        log_probs=log_probs,
        index=torch.tensor([4, 0, 9]).expand(len(combinations), -1),
        tail_mass=combinations,
        temperatures=temperatures,
        num_classes=1000,
    )
    for temperature in (1e-3, 0.1, 0.7, 1.0, 1.5, 3.0, 5.0, 100.0, 1e6, 1e12):
        probs, tail = soft.probs_at(temperature)
        assert tail.isfinite().all()
        assert ((tail >= 0) & (tail <= 1)).all()
        assert probs.isfinite().all()
        assert (probs.sum(-1) + tail - 1).abs().max() < 1e-5
    assert (soft.tail_mass_at(1e12) - 997 / 1000).abs().max() < 1e-5


RAGGED = [1, 5, 2, 9, 1, 7]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_padding_changes_no_probability(temperature: float, teacher_logits: Logits, keep_exactly: Keep) -> None:
    """A record that keeps fewer classes than others of its batch has the probabilities that it has alone, and padding has none."""
    logits = teacher_logits(len(RAGGED), 10).double()
    soft = keep_ragged(logits, RAGGED)
    probs, tail = soft.probs_at(temperature)
    assert torch.equal(soft.kept.sum(-1), torch.tensor(RAGGED))
    assert torch.equal(soft.top1, logits.argmax(-1))
    assert not probs[~soft.kept].any()
    for row, k in enumerate(RAGGED):
        alone_probs, alone_tail = keep_exactly(logits[row : row + 1], k).probs_at(temperature)
        assert (probs[row, :k] - alone_probs[0]).abs().max() < 1e-12
        assert (tail[row] - alone_tail[0]).abs() < 1e-12


def test_each_record_has_its_own_limit(teacher_logits: Logits) -> None:
    """At infinite temperature a record's rest has the share of the classes that this record leaves out, however many others keep."""
    soft = keep_ragged(teacher_logits(len(RAGGED), 10).double(), RAGGED)
    expected = (10 - torch.tensor(RAGGED)) / 10
    assert (soft.tail_mass_at(1e9) - expected).abs().max() < 1e-6


def test_drawn_targets_hold_at_their_own_temperature(teacher_logits: Logits) -> None:
    """Targets that were drawn at one temperature are refused at any other, with both named and both ways out."""
    sampled = codec("sampled,draws=20,temperature=2", 30)
    soft = sampled.decode(sampled.encode(teacher_logits(4, 30), seeds_for(4)))
    assert not soft.keeps_all
    assert soft.probs_at(2.0)[0].sum(-1).tolist() == pytest.approx([1, 1, 1, 1])
    with pytest.raises(ConfigError, match=r"sampled at temperature 2 .*found temperature 4; use --temperature 2, or .*temperature=4"):
        soft.probs_at(4.0)


def test_only_differences_of_log_probs_matter(teacher_logits: Logits, keep_exactly: Keep) -> None:
    """A constant that is added to a record's log-probabilities changes no probability."""
    soft = keep_exactly(teacher_logits(8, 100).double(), 5)
    moved = dataclasses.replace(soft, log_probs=soft.log_probs + torch.arange(8)[:, None])
    for temperature in (0.5, 2.0, 3.0):
        assert torch.allclose(moved.probs_at(temperature)[0], soft.probs_at(temperature)[0], atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_temperature_is_refused(temperature: float, teacher_logits: Logits) -> None:
    """Zero, negative and infinite temperatures and NaN are a ConfigError that shows what was given."""
    with pytest.raises(ConfigError, match=f"positive temperature, found {temperature}"):
        SoftTargets.from_logits(teacher_logits(2, 3)).probs_at(temperature)


def test_moving_keeps_everything_else(teacher_logits: Logits, keep_exactly: Keep) -> None:
    """Targets on another device have the same shapes, classes and temperatures; what is absent stays absent."""
    soft = keep_exactly(teacher_logits(4, 30), 5).to(torch.device("meta"))
    assert soft.index is not None
    assert soft.tail_mass is not None
    assert {tensor.device.type for tensor in (soft.log_probs, soft.index, soft.tail_mass)} == {"meta"}
    assert (soft.log_probs.shape, soft.tail_mass.shape) == ((4, 5), (4, 3))
    assert (soft.temperatures, soft.num_classes) == ((1.0, 2.0, 4.0), 30)
    assert dataclasses.replace(soft, sampled_at=2.0).to(torch.device("meta")).sampled_at == 2.0
    full = SoftTargets.from_logits(teacher_logits(4, 30)).to(torch.device("meta"))
    assert full.index is None
    assert full.tail_mass is None


def test_shapes_must_fit(teacher_logits: Logits, keep_exactly: Keep) -> None:
    """Targets whose parts belong to different batches are refused by the annotations, which the tests enforce."""
    soft = keep_exactly(teacher_logits(4, 30), 5)
    assert soft.index is not None
    with pytest.raises(TypeError):
        dataclasses.replace(soft, index=soft.index[:3])
