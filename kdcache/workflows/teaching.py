"""The teacher at work: checked logits for views of samples, and whole blocks of encoded records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.datasets import Dataset, open_dataset
from kdcache.learning.loader import channels_last, stack_images, to_unit_range
from kdcache.learning.operations import End
from kdcache.learning.samples import ViewedSamples
from kdcache.learning.teachers import Ensemble, Source
from kdcache.learning.views import make_views
from kdcache.records.errors import ConfigError, MismatchError, TeacherError
from kdcache.records.hashing import stable_integer
from kdcache.records.manifest import Block, FieldRecord
from kdcache.records.progress import Progress
from kdcache.records.specs import Spec
from kdcache.targets.codecs import Codec
from kdcache.targets.coding import top_classes
from kdcache.targets.profile import ProfileSum
from kdcache.workflows.devices import Precision, autocast, resolve_device, resolve_precision
from kdcache.workflows.evaluate import load_for

Advance = Callable[[int], None]
BlockArrays = dict[str, list[NDArray[Any]]]
BlockParts = list[list[NDArray[Any]]]


class Answer(NamedTuple):
    """A teacher's answers to one view of a batch of samples."""

    logits: Float[Tensor, "batch *positions classes"]
    """On the teacher's device."""
    labels: Int64[Tensor, "batch"]
    """The dataset's labels; of mixed views that of the larger share."""


class Teacher:
    """A teacher in evaluation mode that answers to views of a dataset's samples.

    Args:
        samples: Makes the views, with the teacher's own end.
        model: Images in [0, 1] to logits [batch, *positions, classes].
        batch_size: Samples in a forward pass.
        precision: Arithmetic of the forward pass.
        device: Where it runs.

    Raises:
        ConfigError: The batch size is not positive.
    """

    def __init__(self, samples: ViewedSamples, model: nn.Module, *, batch_size: int, precision: Precision, device: torch.device) -> None:
        if batch_size < 1:
            raise ConfigError(f"expected a positive batch size, found {batch_size}")
        self.samples, self.batch_size = samples, batch_size
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()
        self.precision, self.device = precision, device

    @property
    def dataset(self) -> Dataset:
        """Where the samples come from."""
        return self.samples.dataset

    @torch.inference_mode()
    def answer(self, decoded: Sequence[tuple[Tensor, int]], rows: Sequence[int], view: int) -> Answer:
        """Answers to one view of decoded samples, the dataset's items of these rows.

        Raises:
            TeacherError: The teacher gave NaN, infinity or a wrong shape, or put itself into training mode.
        """
        views = [self.samples.view(sample, row, view) for sample, row in zip(decoded, rows, strict=True)]
        pixels = channels_last(to_unit_range(stack_images([made.image for made in views]), self.device))
        with autocast(self.precision, self.device):
            logits: Tensor = self.model(pixels).float()
        self._check_mode()
        self._check(logits, rows, view)
        return Answer(logits, torch.tensor([made.main_label for made in views]))

    def sample(self, num_samples: int) -> Iterator[tuple[list[int], Tensor]]:
        """Rows and logits of evenly spaced samples, first view, batch by batch."""
        for rows in self.spaced_rows(num_samples):
            yield rows, self.answer([self.dataset[row] for row in rows], rows, 0).logits

    def spaced_rows(self, num_samples: int) -> list[list[int]]:
        """Evenly spaced samples, at most as many as there are, in batches."""
        count = min(num_samples, len(self.dataset))
        chosen = [i * len(self.dataset) // count for i in range(count)]
        return [chosen[start : start + self.batch_size] for start in range(0, count, self.batch_size)]

    def seeds(self, rows: Sequence[int], view: int) -> list[int]:
        """What a codec that draws draws with: one whole number for each record."""
        return [stable_integer("codec", self.samples.views.record.seed, self.dataset.keys[row].tobytes(), view) for row in rows]

    def _check_mode(self) -> None:
        """In training mode, batch norm and dropout would give each image another answer in each batch."""
        training = next((name or "the whole" for name, module in self.model.named_modules() if module.training), None)
        if training is not None:
            raise TeacherError(f"the teacher puts itself into training mode (module {training}); its answers would be left to chance")

    def _check(self, logits: Tensor, rows: Sequence[int], view: int) -> None:
        expected = self.dataset.num_classes
        if logits.ndim < 2 or logits.shape[0] != len(rows) or logits.shape[-1] != expected:
            found = list(logits.shape)
            raise TeacherError(f"expected logits [{len(rows)}, {expected}] or [{len(rows)}, *positions, {expected}], found {found}")
        bad = (~logits.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(bad):
            row = rows[int(bad[0])]
            key = self.dataset.keys[row].tobytes().hex()
            raise TeacherError(
                f"the teacher gives NaN or infinity for view {view} of sample {row} (key {key}); nothing of this block was"
                " written. Check the sample and the weights, or try --precision float32"
            )


def open_teacher(
    teacher: Source | Sequence[Source],
    data: str,
    *,
    arch: str | Sequence[str] | None,
    ensemble: Ensemble,
    augment: str,
    seed: int,
    batch_size: int,
    precision: Precision,
    device: str,
    enumerated: bool = False,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> tuple[Teacher, LoadedModel]:
    """A teacher, ready to answer to views of a dataset, and what its file says of it.

    Args:
        teacher: The teacher, or several as one; see `load_teachers`.
        data: Dataset spec that the user typed.
        arch: The teacher's architecture where its file does not say it; one for each of several.
        ensemble: What of several teachers is averaged.
        augment: Pipeline name or TOML file.
        seed: Seed of the views.
        batch_size: Samples in a forward pass.
        precision: Arithmetic of the forward pass.
        device: Where it runs.
        enumerated: Whether view `v` is the v-th of all that there are.
        skip_unreadable: Whether to read every sample first and to leave out those that cannot be read.
        progress: Told how far that reading is.

    Raises:
        SpecError: Unknown dataset or augmentation.
        CheckpointError: The teacher cannot be loaded.
        ConfigError: The batch size is not positive, or there is no such device.
        MismatchError: Teacher and dataset have different class counts, or a label is no class.
    """
    dataset = open_dataset(Spec.parse(data), trusted=True, skip_unreadable=skip_unreadable, progress=progress)
    _check_labels(dataset)
    loaded = load_for(dataset, teacher, arch=arch, ensemble=ensemble)
    torch_device = resolve_device(device)
    arithmetic = arithmetic_of(loaded, precision, torch_device)
    views = make_views(augment, seed=seed, image_shape=dataset.sample_shape, enumerated=enumerated)
    samples = ViewedSamples(dataset, views, end=End(views.record.teacher_end))
    return Teacher(samples, loaded.model, batch_size=batch_size, precision=arithmetic, device=torch_device), loaded


def arithmetic_of(loaded: LoadedModel, precision: Precision, device: torch.device) -> Precision:
    """The resolved arithmetic of a teacher's forward pass.

    Raises:
        ConfigError: The teacher brings its own, and it is not the one that is asked for.
    """
    if loaded.float32_only and precision == "bfloat16":
        raise ConfigError(f"{loaded.spec} runs in float32, as it was exported; expected --precision float32 or auto, found bfloat16")
    return resolve_precision("float32" if loaded.float32_only else precision, device)


def _check_labels(dataset: Dataset) -> None:
    """Before any teacher work: a label that is no class could not be stored."""
    bad = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= dataset.num_classes))
    if len(bad):
        raise MismatchError(
            f"expected labels from 0 to {dataset.num_classes - 1}, found {dataset.labels[bad[0]]} at sample {bad[0]}"
            f" ({len(bad)} samples in all)"
        )


class BlockWorker:
    """Computes blocks: a pure function from a block to arrays.

    Args:
        teacher: Gives the logits.
        codec: Encodes them.
        fields: What the codec stores.
        sums_profile: Whether to add up the records' profile.
    """

    def __init__(self, teacher: Teacher, codec: Codec, fields: Sequence[FieldRecord], *, sums_profile: bool) -> None:
        self.teacher, self.codec, self.fields, self.sums_profile = teacher, codec, fields, sums_profile

    def compute(self, block: Block, advance: Advance) -> tuple[BlockArrays, dict[str, float], NDArray[np.int64] | None]:
        """A block's records by field and view, sums over them, and the sums of its profile if that is wanted."""
        pieces: dict[str, BlockParts] = {field.name: [[] for _ in range(*block.views)] for field in self.fields}
        totals: dict[str, float] = {}
        profile = ProfileSum(self.codec.num_classes, self.teacher.device) if self.sums_profile else None
        for rows, decoded in self._decoded_batches(block):
            for offset, view in enumerate(range(*block.views)):
                logits, labels = self.teacher.answer(decoded, rows, view)
                encoded = self.codec.encode(logits, self.teacher.seeds(rows, view))
                for name, array in to_stored(encoded, self.fields).items():
                    pieces[name][offset].append(array)
                top = top_classes(logits, 1)[1].squeeze(-1)
                self._add_totals(totals, encoded, top, labels)
                if profile:
                    profile.add(logits, top)
                advance(len(rows))
        arrays = {name: [np.concatenate(parts) for parts in views] for name, views in pieces.items()}
        return arrays, totals, profile.numpy() if profile else None

    def _decoded_batches(self, block: Block) -> Iterator[tuple[range, list[tuple[Tensor, int]]]]:
        """Rows and items of a block's batches; each image is decoded once for all views of the block."""
        for start in range(block.samples[0], block.samples[1], self.teacher.batch_size):
            rows = range(start, min(start + self.teacher.batch_size, block.samples[1]))
            yield rows, [self.teacher.dataset[row] for row in rows]

    def _add_totals(self, totals: dict[str, float], encoded: Mapping[str, Tensor], top: Tensor, labels: Tensor) -> None:
        """Adds a batch to a block's sums: records, entries, top-1 hits, retained mass by temperature."""
        soft = self.codec.decode(encoded)
        batch = {"records": float(top.numel()), "entries": float(soft.kept.sum())}
        if top.ndim == 1:
            batch["top1_hits"] = float((top.cpu() == labels).sum())
        if soft.tail_mass is not None:
            batch |= {f"retained@{t:g}": (1 - soft.tail_mass_at(t)).double().sum().item() for t in soft.temperatures}
        for name, value in batch.items():
            totals[name] = totals.get(name, 0.0) + value


def to_stored(encoded: Mapping[str, Tensor], fields: Sequence[FieldRecord]) -> dict[str, NDArray[Any]]:
    """A batch's arrays as they are stored: ragged fields flat, without their padding."""
    arrays = {name: array.cpu().numpy() for name, array in encoded.items()}
    for field in fields:
        if field.lengths:
            padded = arrays[field.name]
            lengths = arrays[field.lengths.field].astype(np.int64) - field.lengths.minus
            arrays[field.name] = padded[np.arange(padded.shape[-1]) < lengths[..., None]]
    return arrays
