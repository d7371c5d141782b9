"""`kdcache dump`, stage one: teacher over every (sample, view), block by block, into a store that is whole or resumable."""

import getpass
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.learning.cache import make_probes
from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.datasets import Dataset, open_dataset
from kdcache.learning.loader import collate_views, to_unit_range
from kdcache.learning.views import SeededViews, library_versions, make_views
from kdcache.records.errors import ConfigError, MismatchError, TeacherError
from kdcache.records.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Block,
    BlockGrid,
    BlockRecord,
    FieldRecord,
    Manifest,
    Provenance,
    Recipe,
    Statistics,
    TeacherRecord,
)
from kdcache.records.progress import Progress, Silent
from kdcache.records.specs import Spec
from kdcache.store.files import write_atomically
from kdcache.store.ledger import BlockLedger, DumpPlan
from kdcache.store.zarr_backend import write_chunks, write_metadata, write_sample_field
from kdcache.targets.codecs import Codec, make_codec, smallest_unsigned
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.devices import Precision, autocast, resolve_device, resolve_precision
from kdcache.workflows.evaluate import load_for

ROWS_IN_A_BLOCK = 65_536
"""Rows of a chunk file: 2-8 MB at k = 16 to 64, where opening costs nothing against reading."""
SMALLEST_BLOCKS = 4
"""A small set is cut into at least this many sample ranges, so that a killed dump does not begin from nothing …"""
FEWEST_ROWS = 4096
"""… unless they would be smaller than this."""
VIEWS_IN_A_BLOCK = 4
"""Views made from one decoded sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpResult:
    """What a dump left behind."""

    path: Path
    """The cache's directory."""
    manifest: Manifest
    """What it says of itself."""
    blocks_computed: int
    """Blocks that this run computed; the rest were there."""


def dump(
    teacher: Path,
    data: str,
    out: Path,
    *,
    arch: str | None = None,
    views: int = 4,
    augment: str = "crop-flip",
    codec: str = "auto",
    seed: int = 0,
    batch_size: int = 256,
    block_samples: int | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    license: str | None = None,  # noqa: A002
    command: str | None = None,
    progress: Progress | None = None,
) -> DumpResult:
    """Runs the teacher once over every view of every sample and stores its soft labels.

    Run again, it computes the blocks that are not marked yet; killed at any moment and run again, it ends in the same
    bytes as an undisturbed run (same machine and versions).

    Args:
        teacher: The teacher's file; see `load_model`.
        data: Dataset spec.
        out: The cache's directory.
        arch: The teacher's architecture where its file does not say it.
        views: Views of each sample.
        augment: Pipeline name or TOML file.
        codec: Codec spec; `auto` keeps everything for few classes and the top 16 for many.
        seed: Seed of the views.
        batch_size: Samples in a forward pass.
        block_samples: Samples in a chunk file; chosen by the dataset's size when None.
        precision: Arithmetic of the forward pass.
        device: Where the teacher runs.
        license: Licence of the labels, for those who share them.
        command: What the user typed, for the provenance; None for a call from Python.
        progress: Told how far it is.

    Raises:
        SpecError: Unknown dataset, pipeline or codec.
        CheckpointError: The teacher cannot be loaded.
        MismatchError: Teacher and dataset have different class counts, or a label is no class.
        CacheBusyError: Another process dumps there.
        CacheExistsError: Another recipe's cache is there; the differing fields are listed.
        TeacherError: The teacher gave NaN, infinity or a wrong shape; the sample is named, its block not written.
    """
    progress = progress or Silent()
    dataset = open_dataset(Spec.parse(data), trusted=True)
    _check_labels(dataset)
    loaded = load_for(dataset, teacher, arch=arch)
    torch_device = resolve_device(device)
    arithmetic = resolve_precision(precision, torch_device)
    seeded_views = make_views(augment, seed=seed, image_shape=dataset.image_shape)
    target_codec = make_codec(Spec.parse(codec), num_classes=dataset.num_classes)
    plan = DumpPlan(
        recipe=Recipe(
            teacher=_teacher_record(loaded, dataset, arithmetic),
            dataset=dataset.record(),
            views=seeded_views.record,
            codec=str(target_codec.spec),
        ),
        grid=_cut(len(dataset), views=views, block_samples=block_samples),
        batch_size=batch_size,
    )
    worker = _BlockWorker(
        dataset,
        seeded_views,
        loaded.model.to(torch_device).to(memory_format=torch.channels_last),
        target_codec,
        batch_size=batch_size,
        precision=arithmetic,
        device=torch_device,
    )
    provenance = _provenance(teacher, Spec.parse(data), batch_size=batch_size, device=torch_device, command=command)
    with BlockLedger.open(out, plan) as ledger:
        if (out / MANIFEST_NAME).exists():
            manifest = Manifest.from_bytes((out / MANIFEST_NAME).read_bytes(), where=str(out / MANIFEST_NAME))
            computed = 0
            progress.note(f"{out} is complete already")
        else:
            computed = _dump_blocks(out, plan, ledger, worker, progress)
            manifest = _commit(out, plan, ledger, worker, provenance, license)
        ledger.close()
    return DumpResult(path=out, manifest=manifest, blocks_computed=computed)


class _BlockWorker:
    """Computes blocks: a pure function from a block to arrays."""

    def __init__(
        self,
        dataset: Dataset,
        views: SeededViews,
        model: nn.Module,
        codec: Codec,
        *,
        batch_size: int,
        precision: Precision,
        device: torch.device,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"expected a positive batch size, found {batch_size}")
        self.dataset, self.views, self.model, self.codec = dataset, views, model.eval(), codec
        self.batch_size, self.precision, self.device = batch_size, precision, device
        self.fields = codec.fields(())

    def compute(self, block: Block, advance: Callable[[int], None]) -> tuple[dict[str, NDArray[np.generic]], dict[str, float]]:
        """A block's arrays, [views of the block, samples of the block, *inner], and its totals."""
        num_views, num_samples = block.views[1] - block.views[0], block.samples[1] - block.samples[0]
        arrays = {field.name: np.empty((num_views, num_samples, *field.inner), field.dtype) for field in self.fields}
        totals: dict[str, float] = {}
        for start, images, labels in self._decoded_batches(block):
            for offset, view in enumerate(range(*block.views)):
                encoded = self._encode_view(images, start, view)
                for name, rows in encoded.items():
                    arrays[name][offset, start - block.samples[0] :][: len(images)] = rows.cpu().numpy()
                _add_totals(totals, self.codec.decode(encoded), labels)
                advance(len(images))
        return arrays, totals

    def _decoded_batches(self, block: Block) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """(first row, images, labels) of a block's batches; each image is decoded once for all views of the block."""
        for start in range(block.samples[0], block.samples[1], self.batch_size):
            samples = [self.dataset[row] for row in range(start, min(start + self.batch_size, block.samples[1]))]
            yield start, [image for image, _ in samples], torch.tensor([label for _, label in samples])

    @torch.inference_mode()
    def _encode_view(self, images: list[Tensor], start: int, view: int) -> dict[str, Tensor]:
        keys = self.dataset.keys
        rows = range(start, start + len(images))
        seen = [(self.views(image, keys[row].tobytes(), view), 0, row, view) for image, row in zip(images, rows, strict=True)]
        pixels = to_unit_range(collate_views(seen)[0], self.device).contiguous(memory_format=torch.channels_last)
        with autocast(self.precision, self.device):
            logits = self.model(pixels).float()
        self._check(logits, start, view)
        return self.codec.encode(logits)

    def _check(self, logits: Float[Tensor, "batch classes"], start: int, view: int) -> None:
        expected = self.dataset.num_classes
        if logits.ndim != 2 or logits.shape[1] != expected:
            raise TeacherError(f"expected logits [batch, {expected}] from the teacher, found {list(logits.shape)}")
        bad = (~logits.isfinite()).any(dim=1).nonzero()
        if len(bad):
            row = start + int(bad[0])
            key = self.dataset.keys[row].tobytes().hex()
            raise TeacherError(
                f"the teacher gives NaN or infinity for view {view} of sample {row} (key {key}); nothing of this block was"
                " written. Check the sample and the weights, or try --precision float32"
            )


def _dump_blocks(out: Path, plan: DumpPlan, ledger: BlockLedger, worker: _BlockWorker, progress: Progress) -> int:
    """Computes, writes and marks every block that is not marked yet; gives how many there were."""
    blocks = plan.grid.blocks()
    missing = [block for block in blocks if ledger.find(block) is None]
    done = len(blocks) - len(missing)
    if done:
        progress.note(f"going on: {done} of {len(blocks)} blocks are done")
    with progress.stage("dump", total=sum(block.num_rows for block in missing), unit="views") as advance:
        for number, block in enumerate(missing, start=done + 1):
            arrays, totals = worker.compute(block, advance)
            files = write_chunks(out, worker.fields, plan.grid, block, arrays)
            ledger.mark(BlockRecord(block=block, files=files, totals=totals))
            progress.note(f"block {block.id} is on the disk ({number} of {len(blocks)})")
    return len(missing)


def _commit(out: Path, plan: DumpPlan, ledger: BlockLedger, worker: _BlockWorker, provenance: Provenance, licence: str | None) -> Manifest:
    """Writes what belongs to no block and, last, the manifest."""
    dataset, grid = worker.dataset, plan.grid
    key_field = FieldRecord(name="key", dtype="uint8", inner=(dataset.keys.shape[1],), inner_names=("byte",), per_view=False, fill_value=0)
    label_dtype, no_label = smallest_unsigned(dataset.num_classes)
    label_field = FieldRecord(name="label", dtype=label_dtype, inner=(), inner_names=(), per_view=False, fill_value=no_label)
    fields = (*worker.fields, key_field, label_field)
    records = [ledger.find(block) for block in grid.blocks()]
    blocks = tuple(record for record in records if record is not None)
    assert len(blocks) == len(records), "a block lost its mark"
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        recipe=plan.recipe,
        recipe_key=plan.recipe.key,
        grid=grid,
        fields=fields,
        statistics=_statistics(blocks, dataset),
        probes=make_probes(dataset, worker.views, num_views=grid.num_views),
        provenance=provenance,
        license=licence,
        metadata_files=(
            *write_metadata(out, fields, grid),
            *write_sample_field(out, key_field, grid, dataset.keys),
            *write_sample_field(out, label_field, grid, dataset.labels),
        ),
        blocks=blocks,
    )
    write_atomically(out / MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _add_totals(totals: dict[str, float], soft: SoftTargets, labels: Tensor) -> None:
    """Adds a batch to a block's sums: records, top-1 hits, retained mass by temperature."""
    retained = {f"retained@{t:g}": (1 - soft.tail_mass_at(t)).double().sum().item() for t in soft.temperatures}
    hits = float((soft.top1.cpu() == labels).sum())
    for name, value in {"records": float(len(labels)), "top1_hits": hits, **retained}.items():
        totals[name] = totals.get(name, 0.0) + value


def _statistics(blocks: tuple[BlockRecord, ...], dataset: Dataset) -> Statistics:
    totals: dict[str, float] = {}
    for block in blocks:
        for name, value in block.totals.items():
            totals[name] = totals.get(name, 0.0) + value
    retained = {name.partition("@")[2]: value / totals["records"] for name, value in totals.items() if "@" in name}
    return Statistics(
        teacher_accuracy=totals["top1_hits"] / totals["records"],
        retained_mass=retained,
        class_counts=tuple(np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()),
    )


def _check_labels(dataset: Dataset) -> None:
    """Before any teacher work: a label that is no class could not be stored."""
    bad = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= dataset.num_classes))
    if len(bad):
        raise MismatchError(
            f"expected labels from 0 to {dataset.num_classes - 1}, found {dataset.labels[bad[0]]} at sample {bad[0]}"
            f" ({len(bad)} samples in all)"
        )


def _teacher_record(loaded: LoadedModel, dataset: Dataset, precision: Precision) -> TeacherRecord:
    return TeacherRecord(spec=str(loaded.spec), sha256=loaded.sha256, num_classes=dataset.num_classes, precision=precision)


def _cut(num_samples: int, *, views: int, block_samples: int | None) -> BlockGrid:
    """Cuts the work so that chunk files are of equal length and not padded by more than a few rows."""
    if views < 1 or (block_samples is not None and block_samples < 1):
        raise ConfigError(f"expected at least one view and one sample in a block, found {views} and {block_samples}")
    largest = block_samples or min(ROWS_IN_A_BLOCK, max(FEWEST_ROWS, -(-num_samples // SMALLEST_BLOCKS)))
    num_blocks = -(-num_samples // largest)
    return BlockGrid(
        num_samples=num_samples, num_views=views, block_samples=-(-num_samples // num_blocks), block_views=min(views, VIEWS_IN_A_BLOCK)
    )


def _provenance(teacher: Path, data: Spec, *, batch_size: int, device: torch.device, command: str | None) -> Provenance:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    created = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return Provenance(
        created=created.isoformat(timespec="seconds"),
        created_by=_user(),
        command=command or "kdcache.dump(…)",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        batch_size=batch_size,
        versions={"python": platform.python_version(), "numpy": np.__version__, **library_versions()},
        teacher_file=str(teacher).encode("utf-8", "replace").decode(),
        dataset_spec=str(_with_absolute_root(data)),
    )


def _with_absolute_root(data: Spec) -> Spec:
    """So that training finds the dataset from any folder of this machine."""
    root = data.options.get("root")
    return data if root is None else data.with_options(root=str(Path(str(root)).absolute()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        return "unknown"
