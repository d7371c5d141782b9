"""`kdcache dump`, stage one: teacher over every (sample, view), block by block, into a store that is whole or resumable."""

import getpass
import math
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.learning.cache import make_probes
from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.datasets import Dataset, with_absolute_paths
from kdcache.learning.teachers import Ensemble, Source, as_list
from kdcache.learning.views import library_versions
from kdcache.records.errors import CacheExistsError, ConfigError, MismatchError
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
from kdcache.store.ledger import BlockLedger, DumpPlan, read_plan, shown_views
from kdcache.store.reader import CacheReader, read_manifest
from kdcache.targets.codecs import Codec, make_codec
from kdcache.targets.coding import smallest_unsigned
from kdcache.targets.profile import profile_field, profile_table
from kdcache.workflows.cutting import ALL_VIEWS, cut_into_blocks, views_of
from kdcache.workflows.devices import Precision
from kdcache.workflows.teaching import BlockWorker, Teacher, open_teacher

NAMED_SAMPLES = 10
"""Samples that a note names."""
DUMP_LAYOUTS = ("zarr", "parquet")
"""The compact layout is learned from all records, so it is made of a cache that is there already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpResult:
    """What a dump left behind."""

    path: Path
    """The cache's directory."""
    manifest: Manifest
    """What it says of itself."""
    blocks_computed: int
    """Blocks that this run computed; the rest were there, or were not asked for."""


def dump(
    teacher: Source | Sequence[Source],
    data: str,
    out: Path,
    *,
    arch: str | Sequence[str] | None = None,
    ensemble: Ensemble = "logits",
    views: int | str = 4,
    augment: str = "crop-flip",
    codec: str = "auto",
    seed: int = 0,
    batch_size: int = 256,
    block_samples: int | None = None,
    layout: str = "zarr",
    precision: Precision = "auto",
    device: str = "auto",
    license: str | None = None,  # noqa: A002
    skip_unreadable: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> DumpResult:
    """Runs the teacher once over every view of every sample and stores its soft labels.

    Run again, it computes the blocks that are not marked yet; killed at any moment and run again, it ends in the same
    bytes as an undisturbed run (same machine and versions).

    Run with more views where a cache of the same recipe is, it computes the new ones only. The cache can be read all the while.
    It ends as a dump of all views at once would have, but for what depends on history: its profile stays the one of the views
    that it began with, its groups of views are those in which they were dumped, and its provenance tells of both dumps.

    Args:
        teacher: The teacher: a file, or a spec that brings its weights, see `load_teacher`; or several of these, averaged.
        data: Dataset spec.
        out: The cache's directory.
        arch: The teacher's architecture where its file does not say it; one for each of several, in their order.
        ensemble: What of several teachers is averaged: `logits`, or `probabilities` (at T = 1).
        views: Views of each sample; or `FIRST:STOP`, such as `8:16` for views 8 to 15, for a part that `merge` joins with others; or
            `all` views that the augmentation can make, where their number is finite.
        augment: Pipeline name or TOML file.
        codec: Codec spec, see `make_codec`; `auto` keeps everything for few classes and the top 16 for many.
        seed: Seed of the views.
        batch_size: Samples in a forward pass.
        block_samples: Samples in a chunk file; chosen by the dataset's size when None.
        layout: How the records lie in files: `zarr` (mapped, for training) or `parquet` (for other tools); see `convert`.
        precision: Arithmetic of the forward pass.
        device: Where the teacher runs.
        license: Licence of the labels, for those who share them.
        skip_unreadable: Whether to read every sample before the first block, and to leave out, and record, those that cannot be read.
        command: What the user typed, for the provenance; None for a call from Python.
        progress: Told how far it is.

    Raises:
        SpecError: Unknown dataset, pipeline or codec.
        ConfigError: A number is out of its range, or a dump cannot write this layout.
        CheckpointError: The teacher cannot be loaded.
        MismatchError: Teacher and dataset have different class counts, a label is no class, or it is another one than in the cache that
            is to get more views.
        CacheBusyError: Another process dumps there.
        CacheExistsError: Another recipe's cache is there, and the differing fields are listed; or it is packed, or other views are
            there than those before the ones that are asked for.
        TeacherError: The teacher gave NaN, infinity or a wrong shape; the sample is named, its block not written.
        UnreadableSampleError: A sample cannot be read; it is named.
    """
    progress = progress or Silent()
    if layout not in DUMP_LAYOUTS:
        raise ConfigError(
            f"expected a layout of {', '.join(DUMP_LAYOUTS)}, found {layout!r}; `kdcache convert` makes others of a whole cache"
        )
    running, loaded = open_teacher(
        teacher, data, arch=arch, ensemble=ensemble, augment=augment, seed=seed, batch_size=batch_size, precision=precision, device=device,
        enumerated=views == ALL_VIEWS, skip_unreadable=skip_unreadable, progress=progress,
    )  # fmt: skip
    dataset = running.dataset
    asked_codec = make_codec(Spec.parse(codec), num_classes=dataset.num_classes)
    _tell_of_skipped(dataset, progress)
    provenance = _provenance(teacher, dataset, batch_size=batch_size, device=running.device, command=command)
    complete = read_manifest(out) if (out / MANIFEST_NAME).exists() else None
    measured_codec, positions = _measure(running, asked_codec, _known_calibration(out, complete, asked_codec))
    fields = measured_codec.fields(positions)
    plan = DumpPlan(
        recipe=Recipe(
            teacher=_teacher_record(loaded, dataset, running.precision, positions),
            dataset=dataset.record(),
            views=running.samples.views.record,
            codec=str(measured_codec.spec),
        ),
        layout=layout,
        grid=cut_into_blocks(
            len(dataset), fields, views=views_of(views, num_all=running.samples.views.num_all), block_samples=block_samples
        ),
        batch_size=batch_size,
        calibration=dict(measured_codec.calibration),
    )
    if complete:
        plan = _plan_to_grow(plan, complete, out, dataset, fields, keep_cut=block_samples is None)
        _require_same_licence(license, complete, out)
    worker = BlockWorker(running, measured_codec, fields, sums_profile=measured_codec.keeps_profile and complete is None)
    with BlockLedger.open(out, plan, complete) as ledger:
        computed = 0
        if complete and ledger.is_complete:
            manifest = complete
            progress.note(f"{out} is complete already; it holds {complete.grid.num_views} views")
        else:
            backend = make_backend(layout, fields)
            if complete:
                added = range(complete.grid.views.stop, plan.grid.views.stop)
                progress.note(f"{out} holds views {shown_views(complete.grid.views)}; adding {shown_views(added)}")
            computed = _dump_blocks(out, plan, ledger, worker, backend, progress)
            manifest = _commit(plan, ledger, worker, backend, complete, provenance, license)
        ledger.close()
    return DumpResult(path=out, manifest=manifest, blocks_computed=computed)


def _plan_to_grow(
    plan: DumpPlan, complete: Manifest, root: Path, dataset: Dataset, fields: Sequence[FieldRecord], *, keep_cut: bool
) -> DumpPlan:
    """The plan where there is a cache already: that cache's grid, with as many more views as were asked for and are not there."""
    if keep_cut:
        plan = replace(plan, grid=replace(plan.grid, block_samples=complete.grid.block_samples))
    grown = plan.beside(complete, root=root)
    stored = tuple(field for field in complete.fields if field.per_view)
    if grown.grid != complete.grid and (
        stored != tuple(fields) or content_digest({"label": [_labels(dataset)]}) != complete.contents["label"]
    ):
        raise MismatchError(
            f"{root} has the recipe that was asked for, but other labels or fields than it would get now: the dataset's labels have"
            " changed, or another version of kdcache wrote it; choose another --out"
        )
    return grown


def _require_same_licence(licence: str | None, complete: Manifest, root: Path) -> None:
    if licence and complete.license and licence != complete.license:
        raise CacheExistsError(f"{root} is under the licence {complete.license!r}, asked for was {licence!r}; choose another --out")


def _known_calibration(out: Path, complete: Manifest | None, codec: Codec) -> dict[str, float]:
    """The codec's constants where they were measured already: for a complete cache, or for a dump that was begun."""
    begun = read_plan(out)
    for found in (complete, begun and begun[0]):
        if found and found.recipe.codec == str(codec.spec):
            return found.calibration
    return {}


def _measure(teacher: Teacher, codec: Codec, constants: dict[str, float]) -> tuple[Codec, tuple[int, ...]]:
    """The codec with its constants, known or measured now, and the position axes of the teacher's answers."""
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
    plan: DumpPlan,
    ledger: BlockLedger,
    worker: BlockWorker,
    backend: Backend,
    complete: Manifest | None,
    provenance: Provenance,
    licence: str | None,
) -> Manifest:
    """Writes what belongs to no block and, last, the manifest."""
    dataset, grid = worker.teacher.dataset, plan.grid
    shared = _stored_shared_fields(ledger.root) if complete else _shared_fields(worker, ledger, grid)
    fields = (*worker.fields, *(field for field, _ in shared))
    arrays = {field.name: array for field, array in shared}
    records = [ledger.find(block) for block in grid.blocks()]
    blocks = tuple(record for record in records if record is not None)
    assert len(blocks) == len(records), "a block lost its mark"
    class_counts = np.bincount(dataset.labels, minlength=dataset.num_classes).tolist()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        recipe=plan.recipe,
        recipe_key=plan.recipe.key,
        layout=plan.layout,
        grid=grid,
        fields=fields,
        calibration=plan.calibration,
        contents={name: content_digest({name: [array]}) for name, array in arrays.items()},
        statistics=Statistics.of_blocks(blocks, class_counts=tuple(class_counts)),
        probes=make_probes(worker.teacher.samples, views=grid.views),
        provenance=provenance,
        license=licence,
        metadata_files=backend.write_shared(ledger.staged, fields, grid, arrays),
        blocks=blocks,
    )
    if complete:
        manifest = _with_history(manifest, complete, backend)
    ledger.commit(manifest)
    return manifest


def _with_history(grown: Manifest, before: Manifest, backend: Backend) -> Manifest:
    """The manifest of a cache that got more views: what holds labels and tables stays as it is, and so does what it was before."""
    stored = set(backend.shared_paths([field for field in before.fields if not field.per_view], before.grid))
    kept = {file.path: file for file in before.metadata_files if file.path in stored}
    return replace(
        grown,
        format_version=before.format_version,
        provenance=before.provenance,
        history=(*before.history, replace(grown.provenance, views=(before.grid.views.stop, grown.grid.views.stop))),
        license=grown.license or before.license,
        metadata_files=tuple(kept.get(file.path, file) for file in grown.metadata_files),
        extra=before.extra,
    )


def _stored_shared_fields(root: Path) -> list[tuple[FieldRecord, NDArray[Any]]]:
    """The fields that belong to no block, as a complete cache has them."""
    reader = CacheReader(root)
    return [(field, reader.shared(field.name)) for field in reader.manifest.fields if not field.per_view]


def _shared_fields(worker: BlockWorker, ledger: BlockLedger, grid: BlockGrid) -> list[tuple[FieldRecord, NDArray[Any]]]:
    """The fields that belong to no block: sample keys, labels and, if the codec keeps one, the profile."""
    dataset = worker.teacher.dataset
    key, label = sample_fields(dataset)
    shared: list[tuple[FieldRecord, NDArray[Any]]] = [(key, dataset.keys), (label, _labels(dataset))]
    if worker.codec.keeps_profile:
        sums = sum((ledger.sums(block) for block in grid.blocks()), start=np.zeros((), np.int64))
        shared.append((profile_field(worker.codec.num_classes), profile_table(sums)))
    return shared


def _labels(dataset: Dataset) -> NDArray[Any]:
    """The labels as they are stored."""
    return dataset.labels.astype(sample_fields(dataset)[1].dtype)


def sample_fields(dataset: Dataset) -> tuple[FieldRecord, FieldRecord]:
    """The fields of a sample, whatever the codec: its key and its label."""
    key = FieldRecord(name="key", dtype="uint8", inner=(dataset.keys.shape[1],), inner_names=("byte",), axes=SAMPLE_AXES)
    label_dtype, no_label = smallest_unsigned(dataset.num_classes)
    return key, FieldRecord(name="label", dtype=label_dtype, inner=(), inner_names=(), axes=SAMPLE_AXES, fill_value=no_label)


def _teacher_record(loaded: LoadedModel, dataset: Dataset, precision: Precision, positions: tuple[int, ...]) -> TeacherRecord:
    return TeacherRecord(
        spec=str(loaded.spec),
        sha256=loaded.sha256,
        num_classes=dataset.num_classes,
        precision=precision,
        positions=positions,
        members=loaded.members,
        ensemble=loaded.ensemble,
    )


def _tell_of_skipped(dataset: Dataset, progress: Progress) -> None:
    if dataset.skipped:
        first = ", ".join(sample.name for sample in dataset.skipped[:NAMED_SAMPLES])
        more = f", … ({MANIFEST_NAME} will name all)" if len(dataset.skipped) > NAMED_SAMPLES else ""
        progress.note(
            f"left out {len(dataset.skipped)} of {len(dataset) + len(dataset.skipped)} samples that cannot be read: {first}{more}"
        )


def _provenance(
    teacher: Source | Sequence[Source], dataset: Dataset, *, batch_size: int, device: torch.device, command: str | None
) -> Provenance:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    names = [str(source) for source in as_list(teacher)]
    created = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return Provenance(
        created=created.isoformat(timespec="seconds"),
        created_by=_user(),
        command=command or "kdcache.dump(…)",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})",
        batch_size=batch_size,
        versions={"python": platform.python_version(), "numpy": np.__version__, **library_versions()},
        teacher_file=(names[0] if len(names) == 1 else shlex.join(names)).encode("utf-8", "replace").decode(),
        dataset_spec=str(with_absolute_paths(dataset.spec)),
        skipped=dataset.skipped,
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a user database
        return "unknown"
