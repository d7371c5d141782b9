"""`kdcache train`, stage two: any number of students from one cache. The teacher is never loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from kdcache.learning.augmentations import read_size
from kdcache.learning.cache import Cache, Joined, Order
from kdcache.learning.datasets import Dataset, open_dataset
from kdcache.learning.loader import Batch
from kdcache.learning.losses import Tail, check_weights, distillation_loss
from kdcache.learning.models import resolve_model_spec
from kdcache.learning.operations import End
from kdcache.learning.samples import ViewedSamples, resize_end
from kdcache.learning.schedule import ViewOrder
from kdcache.records.errors import ConfigError
from kdcache.records.hashing import sha256_file
from kdcache.records.manifest import MANIFEST_NAME
from kdcache.records.progress import Progress, Silent
from kdcache.records.specs import Spec
from kdcache.targets.soft_targets import check_temperature
from kdcache.workflows.devices import resolve_device
from kdcache.workflows.fit import open_held_out
from kdcache.workflows.learner import Learner, Outputs, TrainingOptions, is_finished, run_training
from kdcache.workflows.runs import Row, RunFiles

LOW_MASS = {"bucket": 0.5, "uniform": 0.5, "profile": 0.5, "renormalize": 0.9}
"""Below this mean retained mass at the chosen temperature a run begins with a warning, by tail policy."""

FEWEST_PROFILED = 16
"""Records a class on average from which on the teacher's mean answers are worth pointing to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationOptions:
    """What the students learn from the teacher's answers; see `distillation_loss`."""

    temperature: float = 4.0
    """T of the KD term: any, whatever the cache declares."""
    alpha: float = 0.9
    """Weight of the KD term."""
    hard: float = 0.0
    """Weight of the cross-entropy with the teacher's top class; the dataset's label has the rest."""
    tail: Tail = "bucket"
    """What stands for the classes that were not kept."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        check_weights(self.alpha, self.hard)


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """One trained student."""

    name: str
    """Its name in metrics and folders."""
    last: Path
    """Weights after the last epoch."""
    best: Path
    """Weights after the epoch with the best held-out accuracy."""
    top1: float | None
    """Held-out accuracy after the last epoch; None without a held-out set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a training left behind."""

    students: tuple[Student, ...]
    """In the order asked for."""
    metrics: Path
    """`metrics.jsonl`."""
    rows: list[Row]
    """The metrics, one row for each epoch and student."""


def train(
    students: Sequence[str],
    cache: Path,
    out: Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    distillation: DistillationOptions | None = None,
    options: TrainingOptions | None = None,
    order: Order = "auto",
    view_order: ViewOrder = "auto",
    views_per_load: int = 1,
    input_size: int | str | None = None,
    allow_changed_pixels: bool = False,
    skip_unknown: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains students from a cache, all on the same batches. Run again, it goes on where it was cut off.

    Args:
        students: Model specs; a spec that is given twice is trained twice.
        cache: The cache's directory; its manifest names dataset and views.
        out: Folder for weights, metrics and configuration.
        data: Dataset spec, where the cached set lies elsewhere now, or a part of it is wanted.
        eval_data: Held-out dataset spec; the dataset's own test split where there is one when None.
        distillation: What to learn from the teacher.
        options: How to train.
        order: In which order the samples are shown: `random`, or `windows` of a few ranges of samples for a store that random
            access is slow to; `auto` by the cache's layout.
        view_order: Whether a sample shows its views in a `cycle` or at `random`; `auto` is a cycle of random views and random among
            enumerated ones.
        views_per_load: Views that are made of a sample each time it is decoded, for one batch: an epoch has as many steps as ever
            and decodes as many times fewer images.
        input_size: Pixels of the images that the students get, `160` or `160x192`: the shared views at another size than the teacher's;
            as they are when None.
        allow_changed_pixels: Train even though the students would not see the pixels that the teacher saw: its answers then
            belong to slightly other images.
        skip_unknown: Train on the samples that are in the cache, and leave out the others: changed or added ones.
        progress: Told how far it is.

    Raises:
        CacheNotFoundError: There is no cache.
        IncompleteCacheError: Its dump is not finished.
        IntegrityError: A file of it is damaged; all bad files are listed.
        MismatchError: The dataset is not the cached one, or its pixels would differ.
        ExistsError: Another configuration's run is in `out`.
    """
    options, distillation, progress = options or TrainingOptions(), distillation or DistillationOptions(), progress or Silent()
    opened = Cache(cache)
    opened.reader.verify_all()
    data_spec = Spec.parse(data or opened.manifest.provenance.dataset_spec)
    dataset = open_dataset(data_spec, trusted=data is not None, skipped=opened.manifest.provenance.skipped)
    end = _end_of(dataset, input_size)
    joined = opened.join(dataset, end=end, skip_unknown=skip_unknown)
    _tell_of_left_out(dataset, joined, progress)
    if not allow_changed_pixels:
        joined.check_probes()
    held_out = open_held_out(data_spec, eval_data, trusted=data is not None)
    _warn_of_low_mass(opened, distillation, progress)
    loader = joined.loader(
        batch_size=options.batch_size,
        seed=options.seed,
        order=order,
        view_order=view_order,
        views_per_load=views_per_load,
        drop_last=True,
        num_workers=options.workers,
        device=resolve_device(options.device),
    )
    learners = _make_learners(students, joined.samples, opened, options, num_batches=len(loader))
    outputs = [_outputs(out / learner.name, opened, joined.samples, options) for learner in learners]
    files = RunFiles.in_folder(out)
    files.begin(
        {
            "student": list(students),
            "cache": str(cache),
            "data": data or "",
            "eval_data": eval_data or "",
            "temperature": distillation.temperature,
            "alpha": distillation.alpha,
            "hard": distillation.hard,
            "tail": distillation.tail,
            "order": order,
            "view_order": view_order,
            "views_per_load": views_per_load,
            "input_size": input_size or "",
            "skip_unknown": skip_unknown,
            **options.config(),
        }
    )
    if is_finished(outputs, files):
        progress.note(f"{out} is finished already")
        return _result(learners, outputs, files, files.read_metrics())

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        assert batch.soft is not None
        return distillation_loss(
            logits, batch.soft, batch.labels,
            temperature=distillation.temperature, alpha=distillation.alpha, hard=distillation.hard, tail=distillation.tail,
        )  # fmt: skip

    rows = run_training(learners, outputs, loader, loss, held_out=held_out, options=options, files=files, progress=progress)
    return _result(learners, outputs, files, rows)


def _tell_of_left_out(dataset: Dataset, joined: Joined, progress: Progress) -> None:
    if dataset.skipped:
        progress.note(f"left out {len(dataset.skipped)} samples that the dump could not read either")
    if joined.num_unknown:
        progress.note(f"left out {joined.num_unknown} of {len(dataset)} samples that are not in the cache")


def _end_of(dataset: Dataset, input_size: int | str | None) -> End | None:
    """What brings the shared views to the students' size."""
    if input_size is None:
        return None
    if len(dataset.sample_shape) != 3:
        raise ConfigError(f"--input-size is for images, found samples of shape {list(dataset.sample_shape)}; leave it out")
    return resize_end(read_size(input_size, "--input-size"))


def _make_learners(
    students: Sequence[str], samples: ViewedSamples, cache: Cache, options: TrainingOptions, *, num_batches: int
) -> list[Learner]:
    if not students:
        raise ConfigError("expected at least one student, such as --student small")
    num_classes = cache.manifest.recipe.teacher.num_classes
    learners: list[Learner] = []
    for text in students:
        spec = resolve_model_spec(Spec.parse(text), num_classes=num_classes, image_shape=samples.shape)
        base = Spec.parse(text).name.replace(":", ".").replace("/", ".")
        taken = [learner.name for learner in learners]
        name = base if base not in taken else next(f"{base}-{i}" for i in range(2, len(taken) + 3) if f"{base}-{i}" not in taken)
        warmup_steps = round(options.warmup_epochs * num_batches)
        learners.append(Learner(name, spec, options, num_steps=options.epochs * num_batches, warmup_steps=warmup_steps))
    return learners


def _outputs(folder: Path, cache: Cache, samples: ViewedSamples, options: TrainingOptions) -> Outputs:
    metadata = {
        **samples.metadata(),
        "recipe_key": cache.manifest.recipe_key,
        "manifest": sha256_file(cache.reader.root / MANIFEST_NAME),
        "seed": str(options.seed),
    }
    return Outputs(last=folder / "last.safetensors", best=folder / "best.safetensors", metadata=metadata)


def _warn_of_low_mass(cache: Cache, distillation: DistillationOptions, progress: Progress) -> None:
    """Says so when the cache keeps little of the teacher at this temperature, and what would help."""
    rows = np.arange(min(cache.manifest.grid.num_samples, 1024))
    soft = cache.soft_targets(rows, np.full_like(rows, cache.manifest.grid.first_view))
    soft.probs_at(distillation.temperature)  # sampled targets hold at one temperature: better said now than at the first step
    mass = 1 - soft.tail_mass_at(distillation.temperature).mean().item()
    if mass >= LOW_MASS[distillation.tail]:
        return
    records = cache.manifest.grid.num_samples * cache.num_views
    has_profile = cache.codec.keeps_profile and records >= FEWEST_PROFILED * cache.codec.num_classes
    better = "profile" if has_profile else "bucket" if distillation.tail == "renormalize" else None
    policy = f"train with --tail {better}, " if better and better != distillation.tail else ""
    progress.note(
        f"warning: at temperature {distillation.temperature:g} the codec {cache.codec.spec} keeps {mass:.0%} of the teacher's"
        f" probability, and the tail policy {distillation.tail} stands for the rest; {policy}train at a lower temperature, or dump more"
        f" classes (`kdcache plan --temperature {distillation.temperature:g}` shows how many)"
    )


def _result(learners: Sequence[Learner], outputs: Sequence[Outputs], files: RunFiles, rows: list[Row]) -> TrainResult:
    students = []
    for learner, output in zip(learners, outputs, strict=True):
        assert output.best is not None
        final = [row for row in rows if row["student"] == learner.name][-1]
        students.append(Student(name=learner.name, last=output.last, best=output.best, top1=final.get("top1")))
    return TrainResult(students=tuple(students), metrics=files.metrics, rows=rows)
