"""The teacher's answer to a batch, as a student meets it: kept classes, their log-probabilities, the mass of the rest."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kdcache.records.errors import ConfigError

SMALLEST_MASS = 1e-6
"""Tail masses are held this far from 0 and 1 where their logarithm is taken (interpolation between temperatures)."""


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Teacher outputs for a batch, at any temperature.

    Axes: `*batch` is (batch,) for classification and (batch, *positions) for dense outputs; `kept` the kept classes,
    the most probable first (all classes in their own order when `index` is None); `declared` the declared temperatures.
    """

    log_probs: Float[Tensor, "*batch kept"]
    """Log-probabilities at temperature 1 of the kept classes, in nats; exact up to a constant for each record."""

    index: Int64[Tensor, "*batch kept"] | None
    """Which classes are kept; None when all are."""

    tail_mass: Float[Tensor, "*batch declared"] | None
    """Probability of everything that is not kept, at each declared temperature; None when all classes are kept."""

    temperatures: tuple[float, ...]
    """The declared temperatures, ascending."""

    num_classes: int
    """Length of the full class axis."""

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

    @property
    def top1(self) -> Int64[Tensor, "*batch"]:
        """The teacher's most probable class."""
        return self.log_probs.argmax(dim=-1) if self.index is None else self.index[..., 0]

    @property
    def keeps_all(self) -> bool:
        """Whether nothing was cut off."""
        return self.log_probs.shape[-1] == self.num_classes

    def tail_mass_at(self, temperature: float) -> Float[Tensor, "*batch"]:
        """Probability of everything that is not kept, at any temperature.

        Stored at the declared temperatures. In between, the log-odds of the tail are interpolated linearly in 1/T,
        where they are smooth; towards infinite temperature their end is known exactly: (classes - kept) / kept. Below the
        lowest declared temperature they go on with the last slope.
        """
        if self.tail_mass is None or self.keeps_all:
            return self.log_probs.new_zeros(self.log_probs.shape[:-1])
        if temperature in self.temperatures:
            return self.tail_mass[..., self.temperatures.index(temperature)]
        kept = self.log_probs.shape[-1]
        uniform = math.log((self.num_classes - kept) / kept)
        inverse = [0.0, *(1 / declared for declared in reversed(self.temperatures))]
        log_odds = torch.logit(self.tail_mass.clamp(SMALLEST_MASS, 1 - SMALLEST_MASS)).flip(-1)
        log_odds = torch.cat([torch.full_like(log_odds[..., :1], uniform), log_odds], dim=-1)
        right = next((i for i, beta in enumerate(inverse) if beta >= 1 / temperature), len(inverse) - 1)
        weight = (1 / temperature - inverse[right - 1]) / (inverse[right] - inverse[right - 1])
        return torch.lerp(log_odds[..., right - 1], log_odds[..., right], weight).sigmoid()

    def probs_at(self, temperature: float) -> tuple[Float[Tensor, "*batch kept"], Float[Tensor, "*batch"]]:
        """Probabilities of the kept classes, and of everything else together. They add up to one.

        Raises:
            ConfigError: The temperature is not a positive number.
        """
        check_temperature(temperature)
        tail = self.tail_mass_at(temperature)
        return (self.log_probs / temperature).softmax(dim=-1) * (1 - tail).unsqueeze(-1), tail


def check_temperature(temperature: float) -> None:
    """Refuses what is not a temperature.

    Raises:
        ConfigError: It is not a positive, finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"expected a positive temperature, found {temperature}")
