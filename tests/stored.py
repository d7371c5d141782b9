"""What tests of codecs and manifests share: records through real files, a small dataset, teachers for it, signed manifests."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.learning.checkpoints import save_model
from kdcache.records.hashing import canonical_json, sha256, stable_integer
from kdcache.records.manifest import NO_DIGEST, BlockGrid, FieldRecord
from kdcache.records.specs import Spec
from kdcache.store.backends import make_backend
from kdcache.targets.codecs import Codec, make_codec
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.dump import DumpResult, dump

NUM_SAMPLES, NUM_VIEWS, BLOCK_SAMPLES, BATCH_SIZE = 50, 5, 20, 8
"""A cache of three ranges of rows, the last one padded, and two groups of views."""


def codec(spec: str, num_classes: int, **calibration: float) -> Codec:
    """The codec that a spec string names."""
    return make_codec(Spec.parse(spec), num_classes=num_classes, calibration=calibration)


def seeds_for(num_records: int, *, view: int = 0) -> list[int]:
    """Seeds as a dump derives them from sample keys."""
    return [stable_integer("codec", 0, row.to_bytes(16, "little"), view) for row in range(num_records)]


def through_files(made: Codec, logits: Tensor, folder: Path, seeds: Sequence[int] = ()) -> dict[str, Tensor]:
    """A codec's arrays for these logits, written to chunk files and read again; ragged ones padded with the fill value."""
    fields = made.fields(tuple(logits.shape[1:-1]))
    encoded = {name: array.numpy() for name, array in made.encode(logits, seeds).items()}
    assert encoded.keys() == {field.name for field in fields}
    for field in fields:
        array = encoded[field.name]
        assert array.dtype == np.dtype(field.dtype)
        if field.lengths is None:
            assert array.shape == (len(logits), *field.inner)
        else:
            encoded[field.name] = array[_present(field, encoded[field.lengths.field], array.shape[-1])]
    grid = BlockGrid(num_samples=len(logits), num_views=1, block_samples=len(logits), block_views=1)
    backend = make_backend("zarr", ())
    backend.write_block(folder, fields, grid, grid.blocks()[0], {name: [array] for name, array in encoded.items()})
    read = backend.read_records(folder, fields, grid, sample_block=0, view=0)
    for field in fields:
        if field.lengths is not None:
            counts = read[field.lengths.field]
            present = _present(field, counts, int(counts.max()) - field.lengths.minus)
            padded = np.full(present.shape, field.fill_value, field.dtype)
            padded[present] = read[field.name]
            read[field.name] = padded
    return {name: torch.from_numpy(np.array(array)) for name, array in read.items()}


def _present(field: FieldRecord, counts: NDArray[Any], most: int) -> NDArray[np.bool_]:
    assert field.lengths is not None
    present: NDArray[np.bool_] = np.arange(most) < counts[..., None].astype(np.int64) - field.lengths.minus
    return present


class Noise:
    """Small coloured images of noise."""

    def __init__(self, num_classes: int) -> None:
        self.classes = range(num_classes)
        self._images = torch.randint(0, 256, (NUM_SAMPLES, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], index % len(self.classes)


class LinearTeacher(nn.Module):
    """A linear teacher with position axes as asked for, whose answers can be spoilt from outside.

    Args:
        num_classes: Length of the class axis.
        positions: Axes between batch and classes.
    """

    spoilt: Tensor | None = None
    """The image, in [0, 1], to which `bad_logit` is an answer; None for a teacher without fault."""
    bad_logit = math.nan
    images_left: float = math.inf
    """After so many images it raises."""
    images_seen = 0
    """Images that all teachers of this kind saw since it was set to 0."""

    def __init__(self, num_classes: int, positions: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shape = (*positions, num_classes)
        self.body = nn.Linear(3 * 8 * 8, math.prod(self.shape))

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 3, 8, 8] to logits [batch, *positions, classes]."""
        kind = LinearTeacher
        kind.images_seen += len(images)
        if kind.images_seen > kind.images_left:
            raise KeyboardInterrupt
        logits: Tensor = self.body(images.flatten(1) - 0.5).reshape(-1, *self.shape)
        if kind.spoilt is not None:
            logits[(images == kind.spoilt).flatten(1).all(dim=1), ..., -1] = kind.bad_logit
        return logits


def dump_noise(
    folder: Path, out: str = "cache", *, codec: str, num_classes: int, positions: tuple[int, ...] = (), **options: Any
) -> DumpResult:
    """Dumps a linear teacher's answers to noise into `folder / out`; the teacher in a folder is always the same.

    Views, samples in a block and batch size are those above unless `options` of `dump` say otherwise.
    """
    arch = f"py:{__name__}:LinearTeacher,num_classes={num_classes},positions={positions}".replace(" ", "")
    path = folder / f"teacher-{num_classes}-{'-'.join(map(str, positions))}.safetensors"
    if not path.exists():
        torch.manual_seed(2)
        model = LinearTeacher(num_classes, positions)
        with torch.no_grad():
            model.body.weight.mul_(20)  # answers as decided as a trained teacher's
        save_model(path, model, spec=Spec.parse(arch), metadata={})
    usual = {"views": NUM_VIEWS, "block_samples": BLOCK_SAMPLES, "batch_size": BATCH_SIZE, "device": "cpu"}
    data = f"py:{__name__}:Noise,num_classes={num_classes}"
    return dump(path, data, folder / out, arch=arch, codec=codec, **(usual | options))


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def signed(document: dict[str, Any], **layout: Any) -> bytes:
    """A manifest file whose digest and recipe key are right, whatever else it says.

    Args:
        document: The manifest.
        layout: What `json.dumps` is told.
    """
    document = {**document, "digest": NO_DIGEST}
    if "recipe_key" in document:
        document["recipe_key"] = sha256(canonical_json(document.get("recipe")))
    data = json.dumps(document, **layout).encode()
    return data.replace(NO_DIGEST.encode(), sha256(data).encode())


def keep_ragged(logits: Tensor, counts: Sequence[int], *, temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)) -> SoftTargets:
    """Exact soft targets of as many of the largest logits as each record's count says, padded as `SoftTargets` has it."""
    log_probs, index = logits.log_softmax(-1).topk(max(counts), dim=-1)
    kept = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    index = torch.where(kept, index, index[:, :1])
    rest = [(logits / t).softmax(-1).scatter(-1, index, 0).sum(-1) for t in temperatures]
    return SoftTargets(
        log_probs=log_probs.masked_fill(~kept, -math.inf),
        index=index,
        tail_mass=torch.stack(rest, -1),
        temperatures=temperatures,
        num_classes=logits.shape[-1],
    )
