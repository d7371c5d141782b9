"""The two stages beside the bare alternatives: the teacher's own inference loop, and plain supervised training.

Run: python tests/benchmarks/stages.py            (two minutes on two cores; prints Markdown)
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from kdcache.data import embedded_teacher
from measuring import machine, ratio, table

import kdcache
from kdcache.learning.checkpoints import load_model
from kdcache.learning.datasets import open_dataset
from kdcache.learning.loader import ViewLoader, to_unit_range
from kdcache.learning.losses import distillation_loss
from kdcache.learning.models import resolve_model_spec
from kdcache.learning.views import make_views
from kdcache.records.specs import Spec
from kdcache.workflows.learner import Learner


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
    return f"dump, 20,000 views, `large` teacher, k=5 | {ours_s:.2f} s | bare inference loop, same batches: {bare_s:.2f} s | {r:.3f}"


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
    joined = cache.join(dataset)
    plain, cached = ViewLoader(joined.samples, **common), joined.loader(seed=0, **common)
    ours = epoch_of(cached, lambda logits, batch: distillation_loss(logits, batch.soft, batch.labels))
    bare = epoch_of(plain, lambda logits, batch: F.cross_entropy(logits, batch.labels))
    ours_s, bare_s, r = ratio(ours, bare)
    return f"student's epoch from the cache (`small`, 10,000 samples, KD + CE) | {ours_s:.2f} s | plain supervised epoch: {bare_s:.2f} s | {r:.3f}"


def main() -> None:
    """Prints the table."""
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        table("what|kdcache|beside|ratio", (bench(Path(name)) for bench in (bench_dump, bench_step)))


if __name__ == "__main__":
    main()
