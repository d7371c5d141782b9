"""The codec that keeps a sample of the teacher's distribution, so that the gradient of the loss is unbiased."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kdcache.records.manifest import FieldRecord, Lengths
from kdcache.records.specs import Spec
from kdcache.targets.coding import index_field, position_names, smallest_unsigned, torch_dtype
from kdcache.targets.soft_targets import SoftTargets


class Sampled:
    """Classes drawn from the teacher's probabilities at one temperature, and how often each was drawn.

    The share of draws estimates each probability without bias, and KD's gradient by the student's logits, q - p, is linear in p:
    its expectation over views is the full one, which no truncation gives. The draws are systematic, one uniform number u for
    n evenly spaced points (i + u) / n of the cumulative distribution, which has the same expectation as independent
    draws and less variance; u follows from the sample's key and the view (SHAKE-128 of the seed, 53 bits a position).

    Args:
        draws: n.
        num_classes: Length of the class axis.
        temperature: T of the distribution; the only one at which these targets can be used.

    Source: Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, arXiv 2503.16870, section 3
        (there with independent draws); systematic sampling: Madow and Madow, On the Theory of Systematic Sampling, 1944.
    """

    calibration: Mapping[str, float] = {}
    calibration_samples = 0
    keeps_profile = False

    def __init__(self, *, draws: int, num_classes: int, temperature: float) -> None:
        self.draws, self.num_classes, self.temperature = draws, num_classes, temperature
        self.most = min(draws, num_classes)
        self.spec = Spec(source="", name="sampled", options={"draws": draws, "temperature": temperature})

    def fields(self, positions: tuple[int, ...]) -> tuple[FieldRecord, ...]:
        """`logits/count`, and ragged `logits/index` and `logits/hits`."""
        most, axes = (math.prod(positions) * self.most,), position_names(positions)
        lengths = Lengths(field="logits/count", minus=0)
        count_dtype, count_fill = smallest_unsigned(self.most + 1)
        hits_dtype, hits_fill = smallest_unsigned(self.draws + 1)
        attributes = {"decode": "prob = hits / draws", "draws": self.draws, "temperature": self.temperature}
        return (
            FieldRecord(name="logits/count", dtype=count_dtype, inner=positions, inner_names=axes, fill_value=count_fill),
            index_field(self.num_classes, most, ("entry",), lengths),
            FieldRecord(name="logits/hits", dtype=hits_dtype, inner=most, inner_names=("entry",), fill_value=hits_fill,
                        lengths=lengths, attributes=attributes),
        )  # fmt: skip

    def calibrated(self, logits: Float[Tensor, "batch *positions classes"]) -> Self:
        """Itself: nothing is measured."""
        return self

    def encode(self, logits: Float[Tensor, "batch *positions classes"], seeds: Sequence[int] = ()) -> dict[str, Tensor]:
        """Finite float32 logits to the fields, the most often drawn class first; ragged fields are padded.

        Args:
            logits: The teacher's.
            seeds: One whole number for each record of the batch: equal seeds draw equally.
        """
        assert len(seeds) == len(logits), "each record needs a seed to draw with"
        drawn = self._draw(logits, self._uniforms(logits, seeds))
        slot = torch.cat([torch.zeros_like(drawn[..., :1]), (drawn[..., 1:] != drawn[..., :-1]).long().cumsum(dim=-1)], dim=-1)
        hits = torch.zeros_like(drawn).scatter_add(-1, slot, torch.ones_like(drawn))[..., : self.most]
        classes = torch.zeros_like(drawn).scatter(-1, slot, drawn)[..., : self.most]
        hits, order = hits.sort(dim=-1, descending=True, stable=True)
        return {
            "logits/count": (slot[..., -1] + 1).to(torch_dtype(smallest_unsigned(self.most + 1)[0])),
            "logits/index": classes.gather(-1, order).to(torch_dtype(smallest_unsigned(self.num_classes)[0])),
            "logits/hits": hits.to(torch_dtype(smallest_unsigned(self.draws + 1)[0])),
        }

    def decode(self, arrays: Mapping[str, Tensor]) -> SoftTargets:
        """The arrays of any rows to soft targets; records with fewer classes than others are padded, see `SoftTargets`."""
        count, index, hits = (arrays[f"logits/{name}"].long() for name in ("count", "index", "hits"))
        kept = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
        return SoftTargets(
            log_probs=torch.where(kept, hits, 0).float().div(self.draws).log(),
            index=torch.where(kept, index, index[..., :1]),
            tail_mass=None,
            temperatures=(),
            num_classes=self.num_classes,
            sampled_at=self.temperature,
        )

    def _uniforms(self, logits: Tensor, seeds: Sequence[int]) -> Float64[Tensor, "batch *positions"]:
        positions = logits.shape[1:-1]
        size = 8 * math.prod(positions)
        data = b"".join(hashlib.shake_128(seed.to_bytes(8, "little")).digest(size) for seed in seeds)
        words = np.frombuffer(data, "<u8").reshape(len(seeds), *positions)
        return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53).to(logits.device)

    def _draw(self, logits: Float[Tensor, "*batch classes"], uniforms: Float64[Tensor, "*batch"]) -> Tensor:
        """[*batch, draws] classes, ascending."""
        cumulative = (logits / self.temperature).double().softmax(dim=-1).cumsum(dim=-1)
        points = (torch.arange(self.draws, device=logits.device) + uniforms.unsqueeze(-1)) / self.draws
        drawn = torch.searchsorted(cumulative, points * cumulative[..., -1:], right=True)
        last = (cumulative < cumulative[..., -1:]).sum(dim=-1, keepdim=True)  # the last class that has any probability
        return torch.minimum(drawn, last)
