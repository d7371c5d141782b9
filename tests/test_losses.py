"""Losses over sparse soft targets against PyTorch's own loss over the full logits."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stored import keep_ragged
from torch import Tensor

from kdcache.learning.losses import TAILS, Tail, check_weights, distillation_loss, hard_label_loss, kd_loss
from kdcache.records.errors import ConfigError, KdcacheError
from kdcache.records.specs import Spec
from kdcache.targets.codecs import make_codec
from kdcache.targets.profile import Profile
from kdcache.targets.soft_targets import SoftTargets

Logits = Callable[..., Tensor]
Keep = Callable[..., SoftTargets]
TEMPERATURES = [0.5, 1.0, 2.0, 3.0, 4.0, 10.0]
SPARSE = [(10, 3), (10, 9), (100, 16), (1000, 5)]


@pytest.fixture(scope="module")
def pair(teacher_logits: Logits) -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes a student's logits, which want a gradient, and a teacher's, both in float64."""

    def make(*shape: int) -> tuple[Tensor, Tensor]:
        return teacher_logits(*shape, seed=1).double().requires_grad_(), teacher_logits(*shape, seed=2).double()

    return make


def full_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) from the full logits by PyTorch's own function, the mean over records."""
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").sum(-1).mean()


def with_profile(soft: SoftTargets, seed: int = 3) -> SoftTargets:
    """The same targets with a profile of random rows, for the policy that needs one."""
    shape = (soft.num_classes, soft.num_classes)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=soft.log_probs.dtype)
    return dataclasses.replace(soft, profile=Profile((3 * rows).log_softmax(-1)))


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    """The loss's gradient by the student's logits."""
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


def masked(logits: Tensor, index: Tensor) -> Tensor:
    """The log-probabilities of the classes that are not kept, among themselves; -inf for those that are."""
    return logits.scatter(-1, index, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(32, 10), (8, 3, 50), (2, 3, 4, 5)])
def test_full_targets_give_the_full_loss(
    shape: tuple[int, ...], temperature: float, tail: Tail, pair: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Where every class is kept, value and gradient are those of F.kl_div over the full logits to 1e-6, whatever the policy."""
    student, teacher = pair(*shape)
    full = full_loss(student, teacher, temperature)
    found = kd_loss(student, SoftTargets.from_logits(teacher), temperature=temperature, tail=tail)
    assert found.item() == pytest.approx(full.item(), abs=1e-6, rel=1e-6)
    assert (gradient(found, student) - gradient(full, student)).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dense_cache_gives_the_full_loss_in_float32(temperature: float, teacher_logits: Logits) -> None:
    """Targets that went through the float32 dense codec give the loss and gradient of F.kl_div to 1e-6."""
    student, teacher = teacher_logits(64, 10, seed=1).requires_grad_(), teacher_logits(64, 10, seed=2)
    codec = make_codec(Spec.parse("dense,dtype=float32"), num_classes=10)
    found = kd_loss(student, codec.decode(codec.encode(teacher)), temperature=temperature)
    full = F.kl_div((student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean") * temperature**2
    assert found.item() == pytest.approx(full.item(), rel=1e-6)
    assert (gradient(found, student) - gradient(full, student)).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("num_classes", "k"), SPARSE)
def test_bucket_loses_the_divergence_inside_the_tail_and_nothing_else(
    num_classes: int, k: int, temperature: float, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep
) -> None:
    """The bucket's loss is at most the full one; what is missing is T² · m · KL(p given tail ‖ q given tail), to rounding."""
    student, teacher = pair(32, num_classes)
    soft = keep_exactly(teacher, k)
    assert soft.index is not None
    found = kd_loss(student, soft, temperature=temperature, tail="bucket")
    full = full_loss(student, teacher, temperature)
    log_p, log_q = masked(teacher / temperature, soft.index), masked(student / temperature, soft.index)
    inside = torch.where(log_p.isfinite(), log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    missing = temperature**2 * (soft.tail_mass_at(temperature) * inside).mean()
    assert found <= full
    assert (full - found).item() == pytest.approx(missing.item(), abs=1e-10)


@pytest.mark.parametrize("tail", ["bucket", "uniform", "profile"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("num_classes", "k"), SPARSE)
def test_gradient_is_within_twice_the_tails_mass(
    num_classes: int, k: int, temperature: float, tail: Tail, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep
) -> None:
    """A record's gradient differs from the full one by at most 2 · m · T in the sum of absolute values over classes."""
    student, teacher = pair(32, num_classes)
    soft = with_profile(keep_exactly(teacher, k))
    found = gradient(kd_loss(student, soft, temperature=temperature, tail=tail), student)
    difference = 32 * (found - gradient(full_loss(student, teacher, temperature), student)).abs().sum(-1)
    assert (difference <= 2 * temperature * soft.tail_mass_at(temperature) + 1e-9).all()
    assert difference.max() > 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("num_classes", "k"), SPARSE)
def test_uniform_is_the_full_loss_of_a_flat_tail(
    num_classes: int, k: int, temperature: float, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep
) -> None:
    """With `uniform`, each class that was not kept has the same share of the rest: value and gradient of F.kl_div with these."""
    student, teacher = pair(32, num_classes)
    soft = keep_exactly(teacher, k)
    assert soft.index is not None
    kept, mass = soft.probs_at(temperature)
    p = (mass / (num_classes - k)).unsqueeze(-1).expand(-1, num_classes).scatter(-1, soft.index, kept)
    full = temperature**2 * F.kl_div((student / temperature).log_softmax(-1), p, reduction="batchmean")
    found = kd_loss(student, soft, temperature=temperature, tail="uniform")
    assert found.item() == pytest.approx(full.item(), abs=1e-9)
    assert (gradient(found, student) - gradient(full, student)).abs().max() < 1e-9


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("num_classes", "k"), SPARSE)
def test_renormalize_is_the_full_loss_of_the_kept_classes(
    num_classes: int, k: int, temperature: float, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep
) -> None:
    """With `renormalize`, the kept classes share everything by their softmax and the others get nothing, at any temperature."""
    student, teacher = pair(32, num_classes)
    soft = keep_exactly(teacher, k)
    assert soft.index is not None
    p = torch.zeros_like(teacher).scatter(-1, soft.index, (soft.log_probs / temperature).softmax(-1))
    full = temperature**2 * F.kl_div((student / temperature).log_softmax(-1), p, reduction="batchmean")
    found = kd_loss(student, soft, temperature=temperature, tail="renormalize")
    assert found.item() == pytest.approx(full.item(), abs=1e-9)
    assert (gradient(found, student) - gradient(full, student)).abs().max() < 1e-9


RAGGED = [1, 9, 3, 1, 15, 6]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_padding_does_not_matter(tail: Tail, temperature: float, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep) -> None:
    """Records that keep different numbers of classes have the loss and the gradient that each has alone, at any temperature."""
    student, teacher = pair(len(RAGGED), 20)
    found = kd_loss(student, with_profile(keep_ragged(teacher, RAGGED)), temperature=temperature, tail=tail)
    alone = [
        kd_loss(student[row : row + 1], with_profile(keep_exactly(teacher[row : row + 1], k)), temperature=temperature, tail=tail)
        for row, k in enumerate(RAGGED)
    ]
    expected = torch.stack(alone).mean()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert (gradient(found, student) - gradient(expected, student)).abs().max() < 1e-12


@pytest.mark.parametrize("tail", TAILS)
def test_a_student_that_rules_classes_out_stays_finite(tail: Tail) -> None:
    """A student that is certain, in any class, gives finite losses and gradients on records that keep 1 to 15 classes."""
    teacher = torch.randn(len(RAGGED), 20, generator=torch.Generator().manual_seed(1))
    student = (torch.eye(20)[: len(RAGGED)] * 1e3).requires_grad_()
    found = kd_loss(student, with_profile(keep_ragged(teacher, RAGGED)), tail=tail)
    assert found.isfinite()
    assert gradient(found, student).isfinite().all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("num_classes", [2, 10])
def test_with_all_classes_kept_the_policies_are_one(
    num_classes: int, temperature: float, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep
) -> None:
    """With k equal to the class count, every policy gives the full loss and its gradient."""
    student, teacher = pair(32, num_classes)
    soft = dataclasses.replace(keep_exactly(teacher, num_classes), tail_mass=None, temperatures=())
    full = full_loss(student, teacher, temperature)
    for tail in TAILS:
        found = kd_loss(student, soft, temperature=temperature, tail=tail)
        assert found.item() == pytest.approx(full.item(), abs=1e-9)
        assert (gradient(found, student) - gradient(full, student)).abs().max() < 1e-9


@pytest.mark.parametrize("temperature", [0.5, 1.5, 3.0, 20.0])
@pytest.mark.parametrize("tail", ["bucket", "uniform", "profile"])
def test_any_temperature_works(tail: Tail, temperature: float, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep) -> None:
    """At a temperature that was not declared, the loss is finite, not negative, and least where the student is the teacher."""
    student, teacher = pair(32, 100)
    soft = with_profile(keep_exactly(teacher, 90))
    found = kd_loss(student, soft, temperature=temperature, tail=tail)
    assert found.isfinite()
    at_teacher = kd_loss(teacher, soft, temperature=temperature, tail=tail)
    assert -1e-9 <= at_teacher < 0.3 * found
    assert gradient(found, student).isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_of_the_values(
    tail: Tail, temperature: float, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep
) -> None:
    """The gradient agrees with finite differences of the loss."""
    student, teacher = pair(3, 8)
    soft = with_profile(keep_exactly(teacher, 3))
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, soft, temperature=temperature, tail=tail), student)


@pytest.mark.parametrize("tail", TAILS)
def test_positions_are_records(tail: Tail, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep) -> None:
    """An output with position axes has the loss of its positions taken as records of one batch."""
    student, teacher = pair(4, 3, 5, 20)
    flat_student, flat_teacher = student.flatten(0, 2), teacher.flatten(0, 2)
    labels = torch.arange(60) % 20
    soft, flat = with_profile(keep_exactly(teacher, 4)), with_profile(keep_exactly(flat_teacher, 4))
    assert kd_loss(student, soft, tail=tail).item() == pytest.approx(kd_loss(flat_student, flat, tail=tail).item(), abs=1e-12)
    found = distillation_loss(student, soft, labels.reshape(4, 3, 5), alpha=0.5, hard=0.2, tail=tail)
    assert found.item() == pytest.approx(distillation_loss(flat_student, flat, labels, alpha=0.5, hard=0.2, tail=tail).item(), abs=1e-12)


@pytest.mark.parametrize("sure", [1.0, 1e4])
@pytest.mark.parametrize("tail", TAILS)
def test_certain_targets_stay_finite(tail: Tail, sure: float) -> None:
    """A teacher that is sure, or that knows nothing, gives finite losses and gradients through the default codec."""
    student = torch.zeros(2, 1000, requires_grad=True)
    teacher = torch.zeros(2, 1000)
    teacher[0, 5] = sure
    codec = make_codec(Spec.parse("topk,k=4"), num_classes=1000)
    found = kd_loss(student, with_profile(codec.decode(codec.encode(teacher))), temperature=1.0, tail=tail)
    assert found.isfinite()
    assert gradient(found, student).isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_a_tail_that_holds_everything_stays_finite(tail: Tail) -> None:
    """One class kept out of very many, hardly more probable than the others: losses and gradients are finite."""
    num_classes = 2048 if tail == "profile" else 200_000
    student = torch.zeros(1, num_classes, requires_grad=True)
    codec = make_codec(Spec.parse("topk,k=1"), num_classes=num_classes)
    soft = codec.decode(codec.encode(torch.zeros(1, num_classes)))
    found = kd_loss(student, with_profile(soft) if tail == "profile" else soft, temperature=4.0, tail=tail)
    assert found.isfinite()
    assert gradient(found, student).isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_factor_keeps_the_gradients_size(temperature: float, pair: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The gradient is T · (q - p) / records, so raising T does not make the KD term vanish beside a hard-label term."""
    student, teacher = pair(16, 10)
    found = gradient(kd_loss(student, SoftTargets.from_logits(teacher), temperature=temperature), student)
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / 16
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("alpha", "hard"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.9, 0.0), (0.9, 0.1), (0.5, 0.2), (0.7, 0.3)])
@pytest.mark.parametrize("tail", TAILS)
def test_distillation_loss_is_the_sum_of_its_parts(
    alpha: float, hard: float, tail: Tail, pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep
) -> None:
    """The mixture is alpha · KD + hard · CE(teacher's class) + (1 - alpha - hard) · CE(label), in value and gradient."""
    student, teacher = pair(16, 20)
    labels = torch.arange(16)
    soft = with_profile(keep_exactly(teacher, 5))
    found = distillation_loss(student, soft, labels, temperature=2.0, alpha=alpha, hard=hard, tail=tail)
    parts = (
        alpha * kd_loss(student, soft, temperature=2.0, tail=tail)
        + hard * F.cross_entropy(student, teacher.argmax(-1))
        + (1 - alpha - hard) * F.cross_entropy(student, labels)
    )
    assert found.item() == pytest.approx(parts.item(), abs=1e-12)
    assert (gradient(found, student) - gradient(parts, student)).abs().max() < 1e-12


def test_hard_label_is_the_teachers_first_class(pair: Callable[..., tuple[Tensor, Tensor]], keep_exactly: Keep) -> None:
    """The hard-label loss is the cross-entropy with the teacher's most probable class, however many classes are kept."""
    student, teacher = pair(16, 20)
    expected = F.cross_entropy(student, teacher.argmax(-1)).item()
    for soft in (keep_exactly(teacher, 1), keep_exactly(teacher, 20), SoftTargets.from_logits(teacher)):
        assert hard_label_loss(student, soft).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("alpha", "hard"), [(-0.1, 0.0), (1.1, 0.0), (0.5, 0.6), (0.0, -0.5), (float("nan"), 0.0), (0.0, float("nan"))])
def test_weights_that_are_no_mixture_are_refused(alpha: float, hard: float, keep_exactly: Keep, teacher_logits: Logits) -> None:
    """Weights outside [0, 1], or that add up to more than one, are a ConfigError that shows both."""
    with pytest.raises(ConfigError, match=f"found alpha={alpha} and hard={hard}"):
        check_weights(alpha, hard)
    logits = teacher_logits(2, 5)
    with pytest.raises(ConfigError):
        distillation_loss(logits, keep_exactly(logits, 2), torch.zeros(2, dtype=torch.int64), alpha=alpha, hard=hard)


@pytest.mark.parametrize("hundredths", range(101))
def test_weights_that_add_up_to_one_are_accepted(hundredths: int) -> None:
    """Any two decimal weights whose sum is one pass, however floating point rounds the sum."""
    check_weights(hundredths / 100, (100 - hundredths) / 100)


def test_wrong_arguments_are_refused(keep_exactly: Keep, teacher_logits: Logits) -> None:
    """An unknown policy, an impossible temperature and another class count are errors of their own, with both sides shown."""
    logits = teacher_logits(4, 10)
    soft = keep_exactly(logits, 3)
    with pytest.raises((ConfigError, TypeError), match="bukcet"):
        kd_loss(logits, soft, tail="bukcet")  # type: ignore[arg-type]
    for temperature in (0.0, -2.0, float("inf")):
        with pytest.raises(ConfigError, match=f"positive temperature, found {temperature}"):
            kd_loss(logits, soft, temperature=temperature)
    with pytest.raises(ValueError, match="the student gives 11 logits, the teacher's targets have 10 classes"):
        kd_loss(teacher_logits(4, 11), soft)


def test_another_class_count_is_one_of_kdcaches_errors(keep_exactly: Keep, teacher_logits: Logits) -> None:
    """A student with another number of classes than the teacher is reported as a mistake of the user's, not as a crash."""
    with pytest.raises(KdcacheError):
        kd_loss(teacher_logits(4, 11), keep_exactly(teacher_logits(4, 10), 3))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("records", [1, 3])
def test_batches_of_different_sizes_are_refused(records: int, tail: Tail, keep_exactly: Keep, teacher_logits: Logits) -> None:
    """Targets of fewer records than the student's batch are never broadcast over it or compared with a part of it."""
    for soft in (keep_exactly(teacher_logits(records, 10), 3), SoftTargets.from_logits(teacher_logits(records, 10))):
        with pytest.raises((ValueError, RuntimeError)):
            kd_loss(teacher_logits(5, 10), soft, tail=tail)
