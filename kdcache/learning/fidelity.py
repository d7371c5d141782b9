"""How much of the teacher soft targets keep, beside its full answers: mass, KL divergence, direction of the gradient."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kdcache.learning.losses import Tail, kd_loss
from kdcache.targets.soft_targets import SoftTargets

STUDENT_SHARE = 0.5
"""The student whose gradients are compared has learnt half of the teacher: its logits are this share of the teacher's."""

TINY = torch.finfo(torch.float64).tiny


class FullAnswers:
    """The teacher's full answers to some records, beside which soft targets of the same records are measured. All in float64.

    Args:
        logits: The answers.
        temperatures: Where mass and KL will be asked for.
        temperature: T of the gradient.
    """

    def __init__(self, logits: Float[Tensor, "*batch classes"], *, temperatures: Sequence[float], temperature: float) -> None:
        exact = logits.double()
        self.temperature = temperature
        self._log_probs = {t: (exact / t).log_softmax(dim=-1) for t in temperatures}
        self._student = STUDENT_SHARE * exact
        self._gradient = self._gradient_of(SoftTargets.from_logits(exact), "bucket")

    def retained_mass(self, soft: SoftTargets, temperature: float) -> Float64[Tensor, "*batch"]:
        """The teacher's probability of the kept classes."""
        p = self._log_probs[temperature].exp()
        return p.sum(dim=-1) if soft.index is None else torch.where(soft.kept, p.gather(-1, soft.index), 0.0).sum(dim=-1)

    def divergence(self, soft: SoftTargets, temperature: float, tail: Tail) -> Float64[Tensor, "*batch"]:
        """KL(full ‖ soft targets) in nats.

        Args:
            soft: As they come from a store; not drawn ones, whose empty classes make it infinite.
            temperature: T, one of those that were declared.
            tail: `uniform` or `profile`, the policies that say how the mass of the rest is shared out.
        """
        log_p = self._log_probs[temperature]
        log_q = completed_probs(soft, temperature, tail).clamp(min=TINY).log()
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)

    def gradient_cosine(self, soft: SoftTargets, tail: Tail) -> Float64[Tensor, "*batch"]:
        """Cosine between the gradients of the KD loss by the student's logits, from soft targets and from the full answers."""
        return (self._gradient_of(_as_float64(soft), tail) * self._gradient).sum(dim=-1)

    def _gradient_of(self, soft: SoftTargets, tail: Tail) -> Float64[Tensor, "*batch classes"]:
        """Each record's gradient, of length one: the loss is a mean over records, so those of others have no part in it."""
        student = self._student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kd_loss(student, soft, temperature=self.temperature, tail=tail), student)
        return torch.nn.functional.normalize(gradient, dim=-1, eps=TINY)


def completed_probs(soft: SoftTargets, temperature: float, tail: Tail) -> Float64[Tensor, "*batch classes"]:
    """Probabilities of all classes: those of the kept ones, and the mass of the rest shared out by a tail policy."""
    kept, mass = _as_float64(soft).probs_at(temperature)
    if soft.index is None:
        return kept
    scores = kept.new_zeros((*kept.shape[:-1], soft.num_classes))
    if tail == "profile":
        assert soft.profile is not None
        scores = soft.profile.rows(soft.top1).double() / temperature
    shares = scores.scatter(-1, soft.index, -torch.inf).softmax(dim=-1)
    return (mass.unsqueeze(-1) * shares).scatter_add(-1, soft.index, kept)


def _as_float64(soft: SoftTargets) -> SoftTargets:
    return replace(soft, log_probs=soft.log_probs.double(), tail_mass=None if soft.tail_mass is None else soft.tail_mass.double())
