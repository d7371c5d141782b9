"""Every figure on the benchmark page, each a ratio measured in one run beside the bare alternative.

Run: python tests/benchmarks/run.py            (a few minutes on two cores; prints Markdown)
"""

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kdcache.data import embedded_teacher

import kdcache
from kdcache.learning.checkpoints import load_model
from kdcache.learning.datasets import open_dataset
from kdcache.learning.loader import ViewLoader, to_unit_range
from kdcache.learning.losses import distillation_loss
from kdcache.learning.models import resolve_model_spec
from kdcache.learning.views import make_views
from kdcache.records.manifest import BlockGrid, BlockRecord
from kdcache.records.specs import Spec
from kdcache.store.reader import CacheReader
from kdcache.store.zarr_backend import write_chunks, write_sample_field
from kdcache.targets.codecs import Codec, make_codec
from kdcache.workflows.learner import Learner

REPEATS = 5
ROWS, VIEWS = 65_536, 16

Pairs = tuple[np.ndarray, np.ndarray]


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(ours: Callable[[], object], bare: Callable[[], object]) -> tuple[float, float, float]:
    """Medians of alternating runs: our seconds, the bare seconds, and their ratio."""
    ours(), bare()
    pairs = [(seconds(ours), seconds(bare)) for _ in range(REPEATS)]
    return (
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        statistics.median(pair[0] / pair[1] for pair in pairs),
    )


def bench_dump(folder: Path) -> str:
    """A whole dump against the teacher's bare inference loop over the same decoded, augmented batches."""
    dataset = open_dataset(Spec.parse("fashion-mini"), trusted=True)
    teacher = load_model(embedded_teacher(), num_classes=10, image_shape=(1, 28, 28)).model.to(memory_format=torch.channels_last)
    views, keys = make_views("crop-flip", seed=0, image_shape=(1, 28, 28)), dataset.keys
    device = torch.device("cpu")

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, len(dataset), 256):
            rows = range(start, min(start + 256, len(dataset)))
            images = [dataset[row][0] for row in rows]
            for view in range(2):
                batch = torch.stack([views(image, keys[row].tobytes(), view) for image, row in zip(images, rows, strict=True)])
                teacher(to_unit_range(batch, device).contiguous(memory_format=torch.channels_last))

    def ours() -> None:
        shutil.rmtree(folder / "dump", ignore_errors=True)
        kdcache.dump(embedded_teacher(), "fashion-mini", folder / "dump", views=2, codec="topk,k=5", device="cpu")

    ours_s, bare_s, r = ratio(ours, bare)
    return f"| dump, 20,000 views, `large` teacher, k=5 | {ours_s:.2f} s | bare inference loop, same batches: {bare_s:.2f} s | {r:.3f} |"


def bench_step(folder: Path) -> str:
    """An epoch of a student from the cache against the same epoch of plain supervised training."""
    dataset = open_dataset(Spec.parse("fashion-mini"), trusted=True)
    cache = kdcache.Cache(folder / "dump")
    options = kdcache.TrainingOptions(device="cpu")
    spec = resolve_model_spec(Spec.parse("small"), num_classes=10, image_shape=(1, 28, 28))

    def epoch_of(loader: ViewLoader, loss: Callable[..., torch.Tensor]) -> Callable[[], None]:
        learner = Learner("small", spec, options, num_steps=10**6, warmup_steps=1)

        def epoch() -> None:
            for batch in loader.epoch(0):
                learner.step(batch, loss)

        return epoch

    common = {"batch_size": 128, "drop_last": True}
    plain = ViewLoader(dataset, cache.views, **common)
    cached = ViewLoader(dataset, cache.views, num_views=2, gather=cache.join(dataset), **common)
    ours = epoch_of(cached, lambda logits, batch: distillation_loss(logits, batch.soft, batch.labels))
    bare = epoch_of(plain, lambda logits, batch: F.cross_entropy(logits, batch.labels))
    ours_s, bare_s, r = ratio(ours, bare)
    return f"| student's epoch from the cache (`small`, 10,000 samples, KD + CE) | {ours_s:.2f} s | plain supervised epoch: {bare_s:.2f} s | {r:.3f} |"


def bench_gather(folder: Path) -> list[str]:
    """Random batches of 256 from a million records against a bare memory map of the same bytes; the encoder; the writer."""
    codec = make_codec(Spec.parse("topk,k=16"), num_classes=1000)
    logits = torch.randn(16_384, 1000, generator=torch.Generator().manual_seed(0)) * 3
    encode_s = statistics.median(seconds(lambda: codec.encode(logits)) for _ in range(REPEATS))
    arrays = {name: np.tile(array.numpy(), (4, 1))[None] for name, array in codec.encode(logits).items()}
    names = list(arrays)
    reader, write_s = million_records(folder, codec, arrays)

    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, ROWS, 256), rng.integers(0, VIEWS, 256)) for _ in range(400)]
    one_view = [(rows, np.full(256, number % VIEWS)) for number, (rows, _) in enumerate(batches)]
    record = np.dtype([("index", "<u2", 16), ("gap", "u1", 16), ("tail", "u1", 3)])
    flat = np.memmap(folder / "flat", dtype=record, mode="w+", shape=(ROWS * VIEWS,))
    flat["gap"] = 1
    flat.flush()

    def ours(of: Sequence[Pairs]) -> Callable[[], None]:
        def work() -> None:
            for rows, views in of:
                codec.decode({name: torch.from_numpy(array) for name, array in reader.gather(names, rows, views).items()})

        return work

    def bare(of: Sequence[Pairs]) -> Callable[[], None]:
        def work() -> None:
            for rows, views in of:
                flat[views * ROWS + rows]

        return work

    lines = []
    for title, of in (("every record from another view", batches), ("one view a batch, as training reads", one_view)):
        ours_s, bare_s, _ = ratio(ours(of), bare(of))
        number = 256 * len(of)
        lines.append(
            f"| gather + decode, 2^20 records, k=16 of 1000, batches of 256, {title} | {number / ours_s / 1e6:.2f} M records/s |"
            f" bare memory map, no decode: {number / bare_s / 1e6:.2f} M/s | {bare_s / ours_s:.2f} of its rate |"
        )
    lines.append(f"| encoder, k=16 of 1000, two threads | {len(logits) / encode_s / 1e3:.0f} k records/s | | |")
    lines.append(f"| writer (checksum, sha256, fsync) | {ROWS * VIEWS / write_s / 1e6:.2f} M records/s | | |")
    return lines


def million_records(folder: Path, codec: Codec, arrays: dict[str, np.ndarray]) -> tuple[CacheReader, float]:
    """A cache of 65,536 samples × 16 views that holds the same records in every view, and the seconds that writing took."""
    made = kdcache.Manifest.from_bytes((folder / "dump" / "manifest.json").read_bytes(), where="benchmark")
    root, grid = folder / "big", BlockGrid(num_samples=ROWS, num_views=VIEWS, block_samples=ROWS, block_views=1)
    started = time.perf_counter()
    blocks = tuple(
        BlockRecord(block=block, files=write_chunks(root, codec.fields(()), grid, block, arrays), totals={}) for block in grid.blocks()
    )
    write_s = time.perf_counter() - started
    of_samples = [field for field in made.fields if not field.per_view]
    content = {field.name: np.zeros((ROWS, *field.inner), field.dtype) for field in of_samples}
    recipe = replace(made.recipe, dataset=replace(made.recipe.dataset, num_samples=ROWS))
    manifest = replace(
        made,
        recipe=recipe,
        recipe_key=recipe.key,
        grid=grid,
        fields=(*codec.fields(()), *of_samples),
        blocks=blocks,
        probes=(),
        metadata_files=tuple(file for field in of_samples for file in write_sample_field(root, field, grid, content[field.name])),
    )
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    return CacheReader(root), write_s


def bench_size() -> list[str]:
    """Bytes and added KL of a record: the codec's coding against the same entries in float32."""
    lines = []
    teacher = load_model(embedded_teacher(), num_classes=10, image_shape=(1, 28, 28)).model
    dataset = open_dataset(Spec.parse("fashion-mini,split=test"), trusted=True)
    with torch.inference_mode():
        real = teacher(torch.stack([dataset[row][0] for row in range(2000)]).float() / 255)
    generator = torch.Generator().manual_seed(0)
    synthetic = torch.randn(4096, 40, generator=generator) @ torch.randn(40, 1000, generator=generator) * 0.6
    for title, logits, text in (
        ("embedded teacher", real, "topk,k=5"),
        ("embedded teacher", real, "dense"),
        ("synthetic, low rank", synthetic, "topk,k=16"),
    ):
        codec = make_codec(Spec.parse(text), num_classes=logits.shape[-1])
        arrays = codec.encode(logits)
        size = sum(array[0].numel() * array.element_size() for array in arrays.values())
        soft, entries = codec.decode(arrays), next(iter(arrays.values())).shape[-1]
        added = ", ".join(f"{added_kl(logits, soft, t):.1e}" for t in (1.0, 2.0, 4.0))
        lines.append(
            f"| {title}, {logits.shape[-1]} classes | `{text}` | {size} | {size / entries:.2f} |"
            f" {4 * logits.shape[-1] / size:.1f} | {added} |"
        )
    return lines


def added_kl(logits: torch.Tensor, soft: kdcache.SoftTargets, temperature: float) -> float:
    """Mean KL(exact kept classes and tail ‖ decoded ones) in nats: what the coding alone adds, beside the truncation."""
    exact = (logits.double() / temperature).softmax(-1)
    kept = exact if soft.index is None else exact.gather(-1, soft.index)
    decoded, mass = soft.probs_at(temperature)
    p = torch.cat([kept, (1 - kept.sum(-1, keepdim=True)).clamp(min=0)], -1)
    q = torch.cat([decoded, mass.unsqueeze(-1)], -1).double()
    return torch.where(p > 1e-12, p * (p.clamp(min=1e-12).log() - q.clamp(min=1e-12).log()), 0.0).sum(-1).mean().item()


def main() -> None:
    """Prints the page's tables."""
    print(f"Machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}.\n")
    print("| what | kdcache | beside | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(bench_dump(folder), bench_step(folder), *bench_gather(folder), sep="\n")
    print("\n| logits | codec | bytes a record | bytes an entry | times smaller than float32 | added KL at T=1, 2, 4 (nat) |")
    print("|---|---|---|---|---|---|")
    print(*bench_size(), sep="\n")


if __name__ == "__main__":
    main()
