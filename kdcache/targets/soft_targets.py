"""The teacher's answer to a batch, as a student meets it: kept classes, their log-probabilities, the mass of the rest."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kdcache.records.errors import ConfigError
from kdcache.targets.profile import Profile

SMALLEST_MASS = 1e-6
"""Tail masses are held this far from 0 and 1 where their logarithm is taken (interpolation between temperatures)."""


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Teacher outputs for a batch, at any temperature.

    Axes: `*batch` is (batch,) for classification and (batch, *positions) for dense outputs; `kept` the kept classes,
    the most probable first (all classes in their own order when `index` is None); `declared` the declared temperatures.

    Where records keep different numbers of classes, `kept` is the largest, and the places behind a record's own classes hold
    its first class once more with a log-probability of -inf: they have no mass.
    """

    log_probs: Float[Tensor, "*batch kept"]
    """Log-probabilities at temperature 1 of the kept classes, in nats; exact up to a constant for each record."""

    index: Int64[Tensor, "*batch kept"] | None
    """Which classes are kept; None when all are."""

    tail_mass: Float[Tensor, "*batch declared"] | None
    """Probability of everything that is not kept, at each declared temperature; None when nothing is cut off."""

    temperatures: tuple[float, ...]
    """The declared temperatures, ascending."""

    num_classes: int
    """Length of the full class axis."""

    sampled_at: float | None = None
    """The temperature from whose distribution the entries were drawn, with their shares as probabilities; None when they are
    the distribution's own."""

    profile: Profile | None = None
    """The teacher's mean answer to each top class, which shapes the tail for the policy `profile`; None where it is not kept."""

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "*batch classes"]) -> Self:
        """Soft targets that keep everything: the live teacher's own."""
        return cls(log_probs=logits.log_softmax(dim=-1), index=None, tail_mass=None, temperatures=(), num_classes=logits.shape[-1])

    def to(self, device: torch.device) -> Self:
        """The same targets on another device."""
        return replace(
            self,
            log_probs=self.log_probs.to(device),
            index=None if self.index is None else self.index.to(device),
            tail_mass=None if self.tail_mass is None else self.tail_mass.to(device),
        )

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive parts of so many records; the last one may be smaller."""
        index = repeat(None) if self.index is None else torch.split(self.index, size)
        tail_mass = repeat(None) if self.tail_mass is None else torch.split(self.tail_mass, size)
        for log_probs, kept, mass in zip(torch.split(self.log_probs, size), index, tail_mass, strict=False):
            yield type(self)(  # not `replace`, which takes three times as long
                log_probs=log_probs,
                index=kept,
                tail_mass=mass,
                temperatures=self.temperatures,
                num_classes=self.num_classes,
                sampled_at=self.sampled_at,
                profile=self.profile,
            )

    @property
    def top1(self) -> Int64[Tensor, "*batch"]:
        """The teacher's most probable class."""
        return self.log_probs.argmax(dim=-1) if self.index is None else self.index[..., 0]

    @property
    def kept(self) -> Bool[Tensor, "*batch kept"]:
        """Which places hold a class of their record; all but padding."""
        return self.log_probs > -math.inf

    @property
    def keeps_all(self) -> bool:
        """Whether nothing was cut off."""
        return self.tail_mass is None and self.sampled_at is None

    def tail_mass_at(self, temperature: float) -> Float[Tensor, "*batch"]:
        """Probability of everything that is not kept, at any temperature.

        Stored at the declared temperatures. At others it follows from g(1/T) = log Σ exp(z / T) over the tail, a convex function
        that is known at the declared ones and, as the logarithm of how many classes the tail has, at 1/T = 0. Between two
        known points g is a parabola through both with the slope at the right one estimated from its neighbours; below the
        lowest declared temperature it goes on with the slope there, which lies between the last chord and the least kept logit,
        as no class of the tail has a larger one.
        """
        if self.tail_mass is None:
            return self.log_probs.new_zeros(self.log_probs.shape[:-1])
        if temperature in self.temperatures:
            return self.tail_mass[..., self.temperatures.index(temperature)]
        inverse = 1 / temperature
        log_tail = self._log_tail(inverse, [0.0, *(1 / declared for declared in reversed(self.temperatures))])
        return (log_tail - (self.log_probs * inverse).logsumexp(dim=-1)).sigmoid()

    def _log_tail(self, inverse: float, known: list[float]) -> Float[Tensor, "*batch"]:
        """G at 1/T = `inverse`, from the ascending points where it is known, the first of them 0."""
        assert self.tail_mass is not None
        mass = self.tail_mass.clamp(SMALLEST_MASS, 1 - SMALLEST_MASS).flip(-1)
        kept = [(self.log_probs * beta).logsumexp(dim=-1) for beta in known[1:]]
        num_tail = self.num_classes - self.kept.sum(dim=-1)
        g = [num_tail.to(self.log_probs.dtype).log(), *(torch.logit(mass[..., i]) + kept[i] for i in range(len(kept)))]
        last = len(known) - 1
        j = next((i for i in range(1, last) if inverse <= known[i]), last)
        chord = (g[j] - g[j - 1]) / (known[j] - known[j - 1])
        if j < last:
            next_chord = (g[j + 1] - g[j]) / (known[j + 1] - known[j])
            share = (known[j] - known[j - 1]) / (known[j + 1] - known[j - 1])
            slope = torch.lerp(chord, next_chord, share)
        else:
            least = self.log_probs.masked_fill(~self.kept, math.inf).amin(dim=-1)
            slope = (chord + torch.maximum(chord, least)) / 2
        if inverse > known[j]:
            return g[j] + slope * (inverse - known[j])
        before, behind = inverse - known[j - 1], known[j] - inverse
        return g[j - 1] + chord * before - (slope - chord) * (before * behind / (known[j] - known[j - 1]))

    def probs_at(self, temperature: float) -> tuple[Float[Tensor, "*batch kept"], Float[Tensor, "*batch"]]:
        """Probabilities of the kept classes, and of everything else together. They add up to one.

        Raises:
            ConfigError: The temperature is not a positive number, or not that of sampled targets.
        """
        check_temperature(temperature)
        if self.sampled_at is not None and temperature != self.sampled_at:
            raise ConfigError(
                f"these targets were sampled at temperature {self.sampled_at:g} and hold there only, found temperature {temperature:g};"
                f" use --temperature {self.sampled_at:g}, or dump with --codec sampled,temperature={temperature:g}"
            )
        tail = self.tail_mass_at(temperature)
        sharpness = 1.0 if self.sampled_at is not None else 1 / temperature
        return (self.log_probs * sharpness).softmax(dim=-1) * (1 - tail).unsqueeze(-1), tail


def check_temperature(temperature: float) -> None:
    """Refuses what is not a temperature.

    Raises:
        ConfigError: It is not a positive, finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"expected a positive temperature, found {temperature}")
