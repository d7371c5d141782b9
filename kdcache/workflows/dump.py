"""`kdcache dump`, stage one: teacher over every (sample, view), block by block, into a store that is whole or resumable."""

import getpass
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.learning.cache import make_probes
from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.datasets import Dataset
from kdcache.learning.views import library_versions
from kdcache.records.consistency import LARGEST_BLOCK_BYTES, entries_bytes
from kdcache.records.errors import ConfigError
from kdcache.records.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SAMPLE_AXES,
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
from kdcache.store.backends import Backend, make_backend
from kdcache.store.content import content_digest
from kdcache.store.files import write_atomically
from kdcache.store.ledger import BlockLedger, DumpPlan, read_plan
from kdcache.store.reader import read_manifest
from kdcache.store.zarr_backend import row_bytes
from kdcache.targets.codecs import Codec, make_codec
from kdcache.targets.coding import smallest_unsigned
from kdcache.targets.profile import profile_field, profile_table
from kdcache.workflows.devices import Precision
from kdcache.workflows.teaching import BlockWorker, Teacher, open_teacher

ROWS_IN_A_BLOCK = 65_536
"""Most rows of a chunk file, where opening costs nothing against reading …"""
BYTES_IN_A_BLOCK = 8 * 2**20
"""… unless it would be larger than this."""
SMALLEST_BLOCKS = 4
"""A small set is cut into at least this many sample ranges, so that a killed dump does not begin from nothing …"""
FEWEST_ROWS = 4096
"""… unless they would be smaller than this."""
DUMP_LAYOUTS = ("zarr", "parquet")
"""The compact layout is learned from all records, so it is made of a cache that is there already."""
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
    layout: str = "zarr",
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
        codec: Codec spec, see `make_codec`; `auto` keeps everything for few classes and the top 16 for many.
        seed: Seed of the views.
        batch_size: Samples in a forward pass.
        block_samples: Samples in a chunk file; chosen by the dataset's size when None.
        layout: How the records lie in files: `zarr` (mapped, for training) or `parquet` (for other tools); see `convert`.
        precision: Arithmetic of the forward pass.
        device: Where the teacher runs.
        license: Licence of the labels, for those who share them.
        command: What the user typed, for the provenance; None for a call from Python.
        progress: Told how far it is.

    Raises:
        SpecError: Unknown dataset, pipeline or codec.
        ConfigError: A number is out of its range, or a dump cannot write this layout.
        CheckpointError: The teacher cannot be loaded.
        MismatchError: Teacher and dataset have different class counts, or a label is no class.
        CacheBusyError: Another process dumps there.
        CacheExistsError: Another recipe's cache is there; the differing fields are listed.
        TeacherError: The teacher gave NaN, infinity or a wrong shape; the sample is named, its block not written.
    """
    progress = progress or Silent()
    if layout not in DUMP_LAYOUTS:
        raise ConfigError(
            f"expected a layout of {', '.join(DUMP_LAYOUTS)}, found {layout!r}; `kdcache convert` makes others of a whole cache"
        )
    running, loaded = open_teacher(
        teacher, data, arch=arch, augment=augment, seed=seed, batch_size=batch_size, precision=precision, device=device
    )
    dataset = running.dataset
    asked_codec = make_codec(Spec.parse(codec), num_classes=dataset.num_classes)
    provenance = _provenance(teacher, Spec.parse(data), batch_size=batch_size, device=running.device, command=command)
    measured_codec, positions = _measure(running, asked_codec, out)
    fields = measured_codec.fields(positions)
    plan = DumpPlan(
        recipe=Recipe(
            teacher=_teacher_record(loaded, dataset, running.precision, positions),
            dataset=dataset.record(),
            views=running.views.record,
            codec=str(measured_codec.spec),
        ),
        layout=layout,
        grid=cut_into_blocks(len(dataset), fields, views=views, block_samples=block_samples),
        batch_size=batch_size,
        calibration=dict(measured_codec.calibration),
    )
    worker = BlockWorker(running, measured_codec, fields)
    with BlockLedger.open(out, plan) as ledger:
        if (out / MANIFEST_NAME).exists():
            manifest = read_manifest(out)
            computed = 0
            progress.note(f"{out} is complete already")
        else:
            backend = make_backend(layout, fields)
            computed = _dump_blocks(out, plan, ledger, worker, backend, progress)
            manifest = _commit(out, plan, ledger, worker, backend, provenance, license)
        ledger.close()
    return DumpResult(path=out, manifest=manifest, blocks_computed=computed)


def _measure(teacher: Teacher, codec: Codec, out: Path) -> tuple[Codec, tuple[int, ...]]:
    """The codec with its constants, from an unfinished dump or measured now, and the position axes of the teacher's answers."""
    begun = read_plan(out)
    constants = begun[0].calibration if begun and begun[0].recipe.codec == str(codec.spec) else {}
    ((_, first),) = teacher.sample(1)
    positions = tuple(first.shape[1:-1])
    if constants:
        return make_codec(codec.spec, num_classes=codec.num_classes, calibration=constants), positions
    wanted = -(-codec.calibration_samples // math.prod(positions))
    return codec.calibrated(torch.cat([logits for _, logits in teacher.sample(wanted)]) if wanted else first), positions


def _dump_blocks(out: Path, plan: DumpPlan, ledger: BlockLedger, worker: BlockWorker, backend: Backend, progress: Progress) -> int:
    """Computes, writes and marks every block that is not marked yet; gives how many there were."""
    blocks = plan.grid.blocks()
    missing = [block for block in blocks if ledger.find(block) is None]
    done = len(blocks) - len(missing)
    if done:
        progress.note(f"going on: {done} of {len(blocks)} blocks are done")
    with progress.stage("dump", total=sum(block.num_rows for block in missing), unit="views") as advance:
        for number, block in enumerate(missing, start=done + 1):
            arrays, totals, profile = worker.compute(block, advance)
            files = backend.write_block(out, worker.fields, plan.grid, block, arrays)
            if profile is not None:
                ledger.keep_sums(block, profile)
            ledger.mark(BlockRecord(block=block, files=files, content=content_digest(arrays), totals=totals))
            progress.note(f"block {block.id} is on the disk ({number} of {len(blocks)})")
    return len(missing)


def _commit(
    out: Path,
    plan: DumpPlan,
    ledger: BlockLedger,
    worker: BlockWorker,
    backend: Backend,
    provenance: Provenance,
    licence: str | None,
) -> Manifest:
    """Writes what belongs to no block and, last, the manifest."""
    dataset, grid = worker.teacher.dataset, plan.grid
    shared = _shared_fields(worker, ledger, grid)
    fields = (*worker.fields, *(field for field, _ in shared))
    arrays = {field.name: array for field, array in shared}
    records = [ledger.find(block) for block in grid.blocks()]
    blocks = tuple(record for record in records if record is not None)
    assert len(blocks) == len(records), "a block lost its mark"
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        recipe=plan.recipe,
        recipe_key=plan.recipe.key,
        layout=plan.layout,
        grid=grid,
        fields=fields,
        calibration=plan.calibration,
        contents={name: content_digest({name: [array]}) for name, array in arrays.items()},
        statistics=_statistics(blocks, dataset),
        probes=make_probes(dataset, worker.teacher.views, num_views=grid.num_views),
        provenance=provenance,
        license=licence,
        metadata_files=backend.write_shared(out, fields, grid, arrays),
        blocks=blocks,
    )
    write_atomically(out / MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _shared_fields(worker: BlockWorker, ledger: BlockLedger, grid: BlockGrid) -> list[tuple[FieldRecord, NDArray[Any]]]:
    """The fields that belong to no block: sample keys, labels and, if the codec keeps one, the profile."""
    dataset = worker.teacher.dataset
    key, label = sample_fields(dataset)
    shared: list[tuple[FieldRecord, NDArray[Any]]] = [(key, dataset.keys), (label, dataset.labels.astype(label.dtype))]
    if worker.codec.keeps_profile:
        sums = sum((ledger.sums(block) for block in grid.blocks()), start=np.zeros((), np.int64))
        shared.append((profile_field(worker.codec.num_classes), profile_table(sums)))
    return shared


def sample_fields(dataset: Dataset) -> tuple[FieldRecord, FieldRecord]:
    """The fields of a sample, whatever the codec: its key and its label."""
    key = FieldRecord(name="key", dtype="uint8", inner=(dataset.keys.shape[1],), inner_names=("byte",), axes=SAMPLE_AXES)
    label_dtype, no_label = smallest_unsigned(dataset.num_classes)
    return key, FieldRecord(name="label", dtype=label_dtype, inner=(), inner_names=(), axes=SAMPLE_AXES, fill_value=no_label)


def _statistics(blocks: tuple[BlockRecord, ...], dataset: Dataset) -> Statistics:
    totals: dict[str, float] = {}
    for block in blocks:
        for name, value in block.totals.items():
            totals[name] = totals.get(name, 0.0) + value
    retained = {name.partition("@")[2]: value / totals["records"] for name, value in totals.items() if "@" in name}
    return Statistics(
        teacher_accuracy=totals["top1_hits"] / totals["records"] if "top1_hits" in totals else None,
        retained_mass=retained,
        entries=totals["entries"] / totals["records"],
        class_counts=tuple(np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()),
    )


def _teacher_record(loaded: LoadedModel, dataset: Dataset, precision: Precision, positions: tuple[int, ...]) -> TeacherRecord:
    return TeacherRecord(
        spec=str(loaded.spec), sha256=loaded.sha256, num_classes=dataset.num_classes, precision=precision, positions=positions
    )


def cut_into_blocks(num_samples: int, fields: Sequence[FieldRecord], *, views: int, block_samples: int | None) -> BlockGrid:
    """Cuts the work so that chunk files are of equal length, not too long and not padded by more than a few rows."""
    if views < 1 or (block_samples is not None and block_samples < 1):
        raise ConfigError(f"expected at least one view and one sample in a block, found {views} and {block_samples}")
    most = LARGEST_BLOCK_BYTES // max(entries_bytes(field) for field in fields)
    if most < (block_samples or 1):
        raise ConfigError(f"records of this size allow at most {most} samples in a block, found --block-samples {block_samples}")
    by_size = BYTES_IN_A_BLOCK // max(row_bytes(field) for field in fields if field.lengths is None)
    by_number = max(FEWEST_ROWS, -(-num_samples // SMALLEST_BLOCKS))
    largest = block_samples or max(1, min(ROWS_IN_A_BLOCK, most, by_size, by_number))
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
