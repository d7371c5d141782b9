"""The datasets inside the package."""

import torch
from torch import Tensor

from kdcache.data import load_embedded
from kdcache.learning.sources.source import Keys, Labels, Rows
from kdcache.records.specs import Spec


class Embedded:
    """One split of an embedded dataset, in memory."""

    def __init__(self, spec: Spec) -> None:
        spec.reject_unknown_options("split")
        images, labels, self.classes = load_embedded(spec.name, str(spec.options.get("split", "train")))
        self._images, self._labels = torch.from_numpy(images), labels.astype("int64")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], int(self._labels[index])

    def sample_keys(self, rows: Rows) -> Keys | None:  # noqa: ARG002
        """None: keys come from the pixels, which are here already."""
        return None

    def sample_labels(self, rows: Rows) -> Labels:
        """The labels of some samples."""
        labels: Labels = self._labels[rows]
        return labels

    def sample_name(self, row: int) -> None:  # noqa: ARG002
        """None: a sample is known by its row."""
        return
