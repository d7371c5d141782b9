"""What the benchmarks share: timing, the machine, and stores of realistic records."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from synthetic import class_structure, sample_logits

from kdcache.records.manifest import (
    FORMAT_VERSION,
    SAMPLE_AXES,
    BlockGrid,
    BlockRecord,
    DatasetRecord,
    FieldRecord,
    Manifest,
    Provenance,
    Recipe,
    Statistics,
    TeacherRecord,
    ViewsRecord,
)
from kdcache.store.backends import make_backend
from kdcache.store.content import content_digest
from kdcache.targets.codecs import Codec
from kdcache.targets.profile import ProfileSum, profile_field, profile_table
from kdcache.workflows.teaching import to_stored

REPEATS = 7
ROWS = 65_536


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(ours: Callable[[], object], bare: Callable[[], object], *, repeats: int = REPEATS) -> tuple[float, float, float]:
    """Medians of alternating runs: our seconds, the bare seconds, and their ratio."""
    ours(), bare()
    pairs = [(seconds(ours), seconds(bare)) for _ in range(repeats)]
    return (
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        statistics.median(pair[0] / pair[1] for pair in pairs),
    )


def machine() -> str:
    """The machine, in a line."""
    return f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}."


def table(header: str, rows: Iterator[str]) -> None:
    """Prints Markdown, row by row as they come."""
    print(f"\n| {' | '.join(header.split('|'))} |\n|{'---|' * len(header.split('|'))}")
    for row in rows:
        print(f"| {row} |", flush=True)


def realistic_blocks(num_blocks: int, *, num_classes: int = 1000, rows: int = ROWS, seed: int = 0) -> Iterator[torch.Tensor]:
    """Logits of many different samples of one teacher, [rows, classes] at a time."""
    structure = class_structure(num_classes, seed=seed)
    for number in range(num_blocks):
        yield torch.cat(
            [sample_logits(structure, min(8192, rows - start), seed=number * 1000 + start)[0] for start in range(0, rows, 8192)]
        )


def encode_all(codec: Codec, logits: torch.Tensor) -> dict[str, NDArray[Any]]:
    """A block's arrays, encoded in batches as a dump does."""
    fields = codec.fields(())
    batches = [to_stored(codec.encode(batch, range(len(batch))), fields) for batch in logits.split(256)]
    return {field.name: np.concatenate([batch[field.name] for batch in batches]) for field in fields}


def make_store(root: Path, codec: Codec, blocks: Iterator[torch.Tensor], *, num_blocks: int, num_rows: int = ROWS) -> Manifest:
    """A store of records with these logits: one view, `num_blocks` ranges of `num_rows` samples."""
    backend = make_backend("zarr", ())
    grid = BlockGrid(num_samples=num_rows * num_blocks, num_views=1, block_samples=num_rows, block_views=1)
    profile = ProfileSum(codec.num_classes if codec.keeps_profile else 1, torch.device("cpu"))
    records, entries = [], 0
    for block, logits in zip(grid.blocks(), blocks, strict=True):
        arrays = {name: [array] for name, array in encode_all(codec, logits).items()}
        if codec.keeps_profile:
            profile.add(logits, logits.argmax(dim=-1))
        entries += next(iter(arrays.values()))[0].size if "logits/index" not in arrays else arrays["logits/index"][0].size
        files = backend.write_block(root, codec.fields(()), grid, block, arrays)
        records.append(BlockRecord(block=block, files=files, content=content_digest(arrays), totals={}))
    keys = np.random.default_rng(0).integers(0, 256, (grid.num_samples, 16)).astype(np.uint8)
    shared: list[tuple[FieldRecord, NDArray[Any]]] = [
        (FieldRecord(name="key", dtype="uint8", inner=(16,), inner_names=("byte",), axes=SAMPLE_AXES), keys),
        (
            FieldRecord(name="label", dtype="uint16", inner=(), inner_names=(), axes=SAMPLE_AXES, fill_value=65_535),
            np.zeros(len(keys), "u2"),
        ),
    ]
    if codec.keeps_profile:
        shared.append((profile_field(codec.num_classes), profile_table(profile.numpy())))
    fields, contents = (*codec.fields(()), *(field for field, _ in shared)), {field.name: array for field, array in shared}
    recipe = Recipe(
        teacher=TeacherRecord(spec="none", sha256="none", num_classes=codec.num_classes, precision="float32"),
        dataset=DatasetRecord(spec="none", num_samples=len(keys), sha256="none"),
        views=ViewsRecord(pipeline=(), seed=0, versions={}),
        codec=str(codec.spec),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        recipe=recipe,
        recipe_key=recipe.key,
        layout="zarr",
        grid=grid,
        fields=fields,
        calibration=dict(codec.calibration),
        contents={name: content_digest({name: [array]}) for name, array in contents.items()},
        statistics=Statistics(teacher_accuracy=None, retained_mass={}, entries=entries / len(keys), class_counts=()),
        probes=(),
        provenance=Provenance(
            created="", created_by="", command="", device="", batch_size=256, versions={}, teacher_file="", dataset_spec="none"
        ),
        license=None,
        metadata_files=backend.write_shared(root, fields, grid, contents),
        blocks=tuple(records),
    )
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest
