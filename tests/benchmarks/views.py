"""Students from caches of 1 to 16 random views and of all 162 there are, beside a student that has the live teacher beside it.

The student of all views and the online one see the same batches: one gets the stored labels, the other the teacher's answers to these
very pixels. All students have the same first weights and order of samples for a seed.

Run: python tests/benchmarks/views.py [--epochs 20] [--seeds 3]      (an hour and a half on one core; prints Markdown)
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from kdcache.data import embedded_teacher
from measuring import machine, table
from torch import Tensor

import kdcache
from kdcache.learning.checkpoints import load_model
from kdcache.learning.datasets import Dataset, open_dataset
from kdcache.learning.loader import Batch, ViewLoader
from kdcache.learning.losses import distillation_loss
from kdcache.learning.models import resolve_model_spec
from kdcache.learning.schedule import ViewSchedule
from kdcache.records.specs import Spec
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.evaluate import measure, predict
from kdcache.workflows.learner import Learner, TrainingOptions

DATA, CODEC, TEMPERATURE, BATCH = "fashion-mini", "dense,dtype=float32", 2.0, 128
CPU = torch.device("cpu")


def make_learner(name: str, options: TrainingOptions, *, num_batches: int) -> Learner:
    """A fresh student."""
    spec = resolve_model_spec(Spec.parse("small"), num_classes=10, image_shape=(1, 28, 28))
    return Learner(name, spec, options, num_steps=options.epochs * num_batches, warmup_steps=num_batches)


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """What every student minimises."""
    assert batch.soft is not None
    return distillation_loss(logits, batch.soft, batch.labels, temperature=TEMPERATURE)


def accuracy(learner: Learner, test: Dataset) -> float:
    """Top-1 on the test split."""
    return measure(learner.model, *predict(learner.model, test, batch_size=500, device=CPU)).top1


def loader_of(cache: kdcache.Cache, dataset: Dataset, num_views: int, seed: int) -> ViewLoader:
    """Batches from the first views of a cache."""
    joined = cache.join(dataset)
    return ViewLoader(
        joined.samples,
        batch_size=BATCH,
        seed=seed,
        schedule=ViewSchedule(views=range(num_views), seed=seed, weights=joined.samples.views.weights),
        gather=joined.soft_targets,
        drop_last=True,
    )


def train_one(loader: ViewLoader, options: TrainingOptions, test: Dataset) -> float:
    """The accuracy of a student from a cache."""
    learner = make_learner("cached", options, num_batches=len(loader))
    for epoch in range(options.epochs):
        for batch in loader.epoch(epoch):
            learner.step(batch, loss_of)
    return accuracy(learner, test)


def train_beside_teacher(loader: ViewLoader, options: TrainingOptions, test: Dataset) -> tuple[float, float, float]:
    """Accuracies of the cached and of the online student on the same batches, and the largest difference of their losses."""
    teacher = load_model(embedded_teacher(), num_classes=10, image_shape=(1, 28, 28)).model
    cached, online = (make_learner(name, options, num_batches=len(loader)) for name in ("cached", "online"))
    largest = 0.0
    for epoch in range(options.epochs):
        for batch in loader.epoch(epoch):
            with torch.inference_mode():
                answers = teacher(batch.images)
            live = Batch(images=batch.images, labels=batch.labels, soft=SoftTargets.from_logits(answers.clone()))
            difference = (cached.step(batch, loss_of) - online.step(live, loss_of)).abs().item()
            largest = max(largest, difference) if epoch == 0 else largest
    return accuracy(cached, test), accuracy(online, test), largest


def rows(folder: Path, epochs: int, seeds: int) -> Iterator[str]:
    """The table."""
    dataset, test = (open_dataset(Spec.parse(f"{DATA},split={split}"), trusted=True) for split in ("train", "test"))
    started = time.perf_counter()
    random = kdcache.Cache(kdcache.dump(embedded_teacher(), DATA, folder / "random", views=16, codec=CODEC).path)
    every = kdcache.Cache(kdcache.dump(embedded_teacher(), DATA, folder / "all", views="all", codec=CODEC).path)
    print(f"\nBoth dumps: {time.perf_counter() - started:.0f} s.", flush=True)
    runs = [TrainingOptions(epochs=epochs, seed=seed, device="cpu") for seed in range(seeds)]
    together = [train_beside_teacher(loader_of(every, dataset, every.num_views, options.seed), options, test) for options in runs]
    yield row("every view there is (162)", [run[0] for run in together])
    yield row("none: the live teacher beside it", [run[1] for run in together])
    print(f"<!-- largest difference of the losses in the first epoch: {max(run[2] for run in together):.2e} nat -->")
    for num_views in (1, 2, 4, 8, 16):
        yield row(f"{num_views}", [train_one(loader_of(random, dataset, num_views, options.seed), options, test) for options in runs])


def row(what: str, found: list[float]) -> str:
    """One line of the table."""
    each = ", ".join(f"{value:.2%}" for value in found)
    return f"{what} | {statistics.mean(found):.2%} | {each}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        table("views in the cache|top-1, mean|by seed", rows(Path(name), arguments.epochs, arguments.seeds))


if __name__ == "__main__":
    main()
