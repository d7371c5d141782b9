"""Several views of each decoded image, on a folder of JPEG files: images a second of the loader and of a student's whole epoch.

Run: python tests/benchmarks/decoding.py      (about three minutes on one core; prints Markdown)
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import machine, seconds, table
from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import functional

from kdcache.learning.datasets import Dataset, open_dataset
from kdcache.learning.loader import ViewLoader
from kdcache.learning.models import resolve_model_spec
from kdcache.learning.samples import ViewedSamples
from kdcache.learning.schedule import ViewSchedule
from kdcache.learning.views import make_views
from kdcache.records.specs import Spec
from kdcache.workflows.learner import Learner, TrainingOptions

IMAGES, CLASSES, BATCH, SIZE, REPEATS = 256, 4, 64, 128, 5


def write_images(folder: Path) -> None:
    """JPEG files of 500 × 375 pixels, ImageNet's usual size, with as much detail as photographs: about 60 kB each."""
    generator = torch.Generator().manual_seed(0)
    for number in range(IMAGES):
        coarse, fine = (torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in ((12, 16), (94, 125)))
        image = functional.resize(coarse, [375, 500], antialias=True) // 2 + functional.resize(fine, [375, 500], antialias=True) // 2
        path = folder / f"class{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(image, quality=90).numpy().tobytes())


def loader_of(dataset: Dataset, views_per_load: int) -> ViewLoader:
    """Batches of random crops, eight views a sample in all."""
    views = make_views(f"rrc-flip,size={SIZE}", seed=0, image_shape=dataset.image_shape)
    schedule = ViewSchedule(views=range(8))
    return ViewLoader(ViewedSamples(dataset, views), batch_size=BATCH, schedule=schedule, views_per_load=views_per_load, drop_last=True)


def rates(dataset: Dataset) -> Iterator[str]:
    """A line for each number of views a load."""
    spec = resolve_model_spec(Spec.parse("tiny"), num_classes=CLASSES, image_shape=(3, SIZE, SIZE))
    learner = Learner("tiny", spec, TrainingOptions(device="cpu"), num_steps=10**6, warmup_steps=1)
    loaders = {count: loader_of(dataset, count) for count in (1, 2, 4, 8)}
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in loaders}
    for epoch in range(REPEATS + 1):
        for count, loader in loaders.items():
            reading = seconds(lambda loader=loader, epoch=epoch: [None for _ in loader.epoch(epoch)])
            training = seconds(
                lambda loader=loader, epoch=epoch: [
                    learner.step(batch, lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch.labels))
                    for batch in loader.epoch(epoch)
                ]
            )
            found[count].append((reading, training))
    medians = {count: [statistics.median(pair[i] for pair in pairs[1:]) for i in (0, 1)] for count, pairs in found.items()}
    for count, (reading, training) in medians.items():
        speeds = [medians[1][0] / reading, medians[1][1] / training]
        yield f"{count} | {IMAGES / reading:,.0f} | {speeds[0]:.2f} | {IMAGES / training:,.0f} | {speeds[1]:.2f}"


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name))
        dataset = open_dataset(Spec.parse(f"folder:{name}"), trusted=True)
        table("views a load|loader, images/s|times as fast|`tiny`'s epoch, images/s|times as fast", rates(dataset))


if __name__ == "__main__":
    main()
