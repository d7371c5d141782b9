"""The teacher's mean answer to each top class: what the classes that were not kept look like, on average."""

from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from kdcache.records.manifest import TABLE_AXES, FieldRecord

PROFILE = "profile/log_prob"
UP_TO_CLASSES = 2048
"""Above this the table, 2 bytes times classes squared, is larger than what most caches hold."""

UNIT = 2.0**-16
"""Log-probabilities are summed as whole numbers of this many nats, so that no order of adding can change the sum."""

PRIOR_RECORDS = 16
"""Measured: without them, a profile of a few records a class is worse than none; with them it never was at T = 2 and 4."""

SHARPNESS = 0.6
"""What a mean log-probability is worth for a single record. Measured: with it the profile beats an even tail at T = 1, 2 and 4; with 1
it does not at 1, as records differ from their class's mean."""


def profile_field(num_classes: int) -> FieldRecord:
    """The table [top class, class]."""
    return FieldRecord(
        name=PROFILE,
        dtype="float16",
        inner=(num_classes, num_classes),
        inner_names=("top", "class"),
        axes=TABLE_AXES,
        fill_value="NaN",
        attributes={"decode": "mean log-probability at temperature 1 of records whose largest logit is at the top class"},
    )


class ProfileSum:
    """Adds records up to a profile. Sums of parts are exact, in any order.

    Args:
        num_classes: Length of the class axis.
        device: Where records will come from.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    def add(self, logits: Float[Tensor, "*batch classes"], top: Int64[Tensor, "*batch"]) -> None:
        """Adds records with their top classes."""
        units = logits.flatten(0, -2).log_softmax(dim=-1).clamp(min=-60_000).double().div(UNIT).round().long()
        ones = units.new_ones(len(units), 1)
        self.sums.index_add_(0, top.flatten(), torch.cat([units, ones], dim=1))

    def numpy(self) -> NDArray[np.int64]:
        """[top class, class] sums in units, and in the last column the number of records."""
        sums: NDArray[np.int64] = self.sums.cpu().numpy()
        return sums


def profile_table(sums: NDArray[np.int64]) -> NDArray[np.float16]:
    """The table from sums: each row as if `PRIOR_RECORDS` more records had the mean of all, so that few records say little."""
    counts, units = sums[:, -1:], sums[:, :-1]
    mean = units.sum(axis=0, dtype=np.float64) / max(int(counts.sum()), 1)
    rows: NDArray[np.float64] = (units + PRIOR_RECORDS * mean) / (counts + PRIOR_RECORDS) * UNIT
    return rows.astype(np.float16)


class Profile:
    """A profile at training, on whatever device its rows are asked for.

    Args:
        table: [top class, class] logarithms of the shares that classes have in a tail at temperature 1, each row up to a constant.
    """

    def __init__(self, table: Float[Tensor, "classes classes"]) -> None:
        self._tables = {table.device: table}
        self._table = table

    def rows(self, top: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch classes"]:
        """The logarithms of shares for these top classes."""
        if top.device not in self._tables:
            self._tables[top.device] = self._table.to(top.device)
        return self._tables[top.device][top]

    @classmethod
    def from_numpy(cls, table: NDArray[np.float16]) -> Self:
        """From the stored table of mean log-probabilities."""
        return cls(torch.from_numpy(table.astype(np.float32) * SHARPNESS))
