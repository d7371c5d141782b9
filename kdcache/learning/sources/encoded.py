"""Images that some table or store keeps encoded, one a row."""

from collections.abc import Callable

from torch import Tensor

from kdcache.learning.sources.images import decode_rgb
from kdcache.learning.sources.source import Keys, Labels, Rows, as_keys, bytes_key


class EncodedImages:
    """Encoded images, decoded as in a folder.

    Args:
        read: Gives the bytes of a row; raises `UnreadableSampleError` where there are none.
        labels: Their labels, [rows].
        classes: Names or numbers of the classes.
    """

    def __init__(self, read: Callable[[int], bytes], labels: Labels, classes: object) -> None:
        self._read, self._labels, self.classes = read, labels, classes

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode_rgb(self._read(index), name=f"row {index}"), int(self._labels[index])

    def sample_keys(self, rows: Rows) -> Keys:
        """BLAKE2b of the encoded images, the same keys as in a folder of them."""
        return as_keys([bytes_key(self._read(row)) for row in rows.tolist()])

    def sample_labels(self, rows: Rows) -> Labels:
        """The labels of some rows."""
        labels: Labels = self._labels[rows]
        return labels

    def sample_name(self, row: int) -> None:  # noqa: ARG002
        """None: a sample is known by its row."""
        return
