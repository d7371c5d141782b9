"""Losses over sparse soft targets: plain functions of (student logits, SoftTargets).

Notation: p the teacher's and q the student's probabilities at temperature T, K the kept classes, C the class count,
m = 1 - Σ_K p the teacher's mass outside K.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kdcache.records.errors import ConfigError, MismatchError
from kdcache.targets.soft_targets import SoftTargets, check_temperature

Tail = Literal["bucket", "uniform", "profile", "renormalize"]
TAILS: tuple[Tail, ...] = get_args(Tail)


def kd_loss(
    student_logits: Float[Tensor, "*batch classes"], soft: SoftTargets, *, temperature: float = 4.0, tail: Tail = "bucket"
) -> Float[Tensor, ""]:
    """T² · KL(p ‖ q), the mean over records, in nats.

    When the targets keep every class, this is exactly the loss from the full logits. Otherwise the tail policy says what
    stands for the classes that were not kept:

    - `bucket`: all of them are one class, for teacher and student. The loss is smaller than the full one by
      T² · m · KL(p given tail ‖ q given tail), and the gradient by the student's logits differs from the full one by at most
      2 · m · T in the sum of absolute values over classes.
    - `uniform`: each gets m / (C - |K|). The same bound holds for the gradient.
    - `profile`: the mass is shared out as the teacher's mean answer to this top class has it, softened by T; the cache
      keeps this table. The same bound holds for the gradient.
    - `renormalize`: they get nothing and the kept ones are scaled to one. Biased: the student learns to put no mass there.

    Args:
        student_logits: The student's output.
        soft: The teacher's.
        temperature: T. Any positive number; the targets know their tail at the declared ones exactly.
        tail: The policy.

    Raises:
        ConfigError: Unknown policy, a temperature that is not positive or for which the targets were not sampled, or no profile.
        MismatchError: Student and teacher differ in the number of classes or of records.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2 (the factor T² keeps the
        gradient's size); `uniform` is the smoothed label of Shen and Xing, A Fast Knowledge Distillation Framework,
        arXiv 2112.01528, section 3; both bounds follow from the triangle inequality over the classes that were not kept.
    """
    check_temperature(temperature)
    if student_logits.shape[-1] != soft.num_classes:
        raise MismatchError(f"the student gives {student_logits.shape[-1]} logits, the teacher's targets have {soft.num_classes} classes")
    if tail not in TAILS:
        raise ConfigError(f"unknown tail policy {tail!r}; expected one of: {', '.join(TAILS)}")
    if student_logits.shape[:-1] != soft.log_probs.shape[:-1]:
        found = list(soft.log_probs.shape[:-1])
        raise MismatchError(f"the student gives {list(student_logits.shape[:-1])} records, the teacher's targets hold {found}")
    log_q = (student_logits / temperature).log_softmax(dim=-1)
    p, mass = soft.probs_at(temperature)
    log_q_kept = log_q if soft.index is None else log_q.gather(-1, soft.index)
    if soft.tail_mass is None:
        divergence = _kl_terms(p, log_q_kept)
    elif tail == "renormalize":
        divergence = _kl_terms((soft.log_probs / temperature).softmax(dim=-1), log_q_kept)
    else:
        divergence = _kl_terms(p, log_q_kept) + torch.xlogy(mass, mass) + _TAIL_TERMS[tail](soft, log_q, mass, temperature)
    return temperature**2 * divergence.mean()


def _bucket_terms(soft: SoftTargets, log_q: Tensor, mass: Tensor, temperature: float) -> Tensor:  # noqa: ARG001
    """- m log q(tail)."""
    assert soft.index is not None
    return -mass * log_q.scatter(-1, soft.index, -torch.inf).logsumexp(dim=-1)


def _uniform_terms(soft: SoftTargets, log_q: Tensor, mass: Tensor, temperature: float) -> Tensor:  # noqa: ARG001
    """- m log(C - |K|) - m · the mean of log q over the tail."""
    assert soft.index is not None
    kept = soft.kept
    rest = (soft.num_classes - kept.sum(dim=-1)).to(mass.dtype)
    log_q_kept = torch.where(kept, log_q.gather(-1, soft.index), 0.0)
    return -mass * rest.log() - mass * (log_q.sum(dim=-1) - log_q_kept.sum(dim=-1)) / rest


def _profile_terms(soft: SoftTargets, log_q: Tensor, mass: Tensor, temperature: float) -> Tensor:
    """M · Σ s (log s - log q) over the tail, with s the profile's shares of it."""
    assert soft.index is not None
    if soft.profile is None:
        raise ConfigError(
            "the tail policy profile needs the teacher's mean answers, which this cache does not keep; dump with profile=True"
        )
    log_share = (soft.profile.rows(soft.top1) / temperature).scatter(-1, soft.index, -torch.inf).log_softmax(dim=-1)
    return mass * _kl_terms(log_share.exp(), log_q)


_TAIL_TERMS: dict[str, Callable[[SoftTargets, Tensor, Tensor, float], Tensor]] = {
    "bucket": _bucket_terms,
    "uniform": _uniform_terms,
    "profile": _profile_terms,
}


def hard_label_loss(student_logits: Float[Tensor, "*batch classes"], soft: SoftTargets) -> Float[Tensor, ""]:
    """Cross-entropy with the teacher's most probable class, the mean over records, in nats.

    Source: hard-label distillation, Touvron et al., DeiT, arXiv 2012.12877, equation 3.
    """
    return F.cross_entropy(student_logits.flatten(0, -2), soft.top1.flatten())


def distillation_loss(
    student_logits: Float[Tensor, "*batch classes"],
    soft: SoftTargets,
    labels: Int64[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    hard: float = 0.0,
    tail: Tail = "bucket",
) -> Float[Tensor, ""]:
    """Alpha · KD + hard · CE(teacher's top class) + (1 - alpha - hard) · CE(label), the mean over records, in nats.

    Args:
        student_logits: The student's output.
        soft: The teacher's.
        labels: The dataset's own labels; where samples are mixed, the share of each class.
        temperature: T of the KD term.
        alpha: Weight of the KD term, in [0, 1].
        hard: Weight of the teacher's hard label; alpha + hard is at most 1.
        tail: Tail policy of the KD term; see `kd_loss`.

    Raises:
        ConfigError: The weights do not lie in [0, 1].

    Source: Hinton et al., arXiv 1503.02531, section 2.
    """
    check_weights(alpha, hard)
    loss = student_logits.new_zeros(())
    if alpha > 0:
        loss = loss + alpha * kd_loss(student_logits, soft, temperature=temperature, tail=tail)
    if hard > 0:
        loss = loss + hard * hard_label_loss(student_logits, soft)
    if alpha + hard < 1:
        targets = labels.flatten(0, -2) if labels.is_floating_point() else labels.flatten()
        loss = loss + (1 - alpha - hard) * F.cross_entropy(student_logits.flatten(0, -2), targets)
    return loss


def check_weights(alpha: float, hard: float) -> None:
    """Refuses weights of the loss terms that are not a mixture.

    Raises:
        ConfigError: A weight or their sum is outside [0, 1].
    """
    if not (0 <= alpha <= 1 and 0 <= hard <= 1 and alpha + hard <= 1):
        raise ConfigError(f"expected weights in [0, 1] that add up to at most 1, found alpha={alpha} and hard={hard}")


def _kl_terms(p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p - log q) over the last axis; zero where p is zero."""
    return (torch.xlogy(p, p) - p * log_q).sum(dim=-1)
