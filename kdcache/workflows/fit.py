"""`kdcache fit`: plain supervised training. It makes teachers, and the students without distillation to compare with."""

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F

from kdcache.learning.datasets import Dataset, held_out_split, open_dataset
from kdcache.learning.loader import ViewLoader
from kdcache.learning.models import resolve_model_spec
from kdcache.learning.samples import ViewedSamples
from kdcache.learning.views import make_views
from kdcache.records.errors import ConfigError
from kdcache.records.progress import Progress, Silent
from kdcache.records.specs import Spec
from kdcache.workflows.devices import resolve_device
from kdcache.workflows.learner import Learner, Outputs, TrainingOptions, is_finished, run_training
from kdcache.workflows.runs import Row, RunFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a supervised training left behind."""

    model: Path
    """The weights after the last epoch."""
    metrics: Path
    """`metrics.jsonl`."""
    top1: float | None
    """Held-out accuracy of the last epoch; None without a held-out set."""
    rows: list[Row]
    """The metrics, one row an epoch."""


def fit(
    model: str,
    data: str,
    out: Path,
    *,
    augment: str = "crop-flip",
    eval_data: str | None = None,
    options: TrainingOptions | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Trains a network on labels alone. Run again, it goes on where it was cut off.

    Args:
        model: Model spec, such as `large`.
        data: Dataset spec, such as `fashion-mini`.
        out: The `.safetensors` file to make; configuration, metrics and checkpoint lie beside it.
        augment: Pipeline name or TOML file; every epoch shows a fresh view of each sample.
        eval_data: Held-out dataset spec; the training set's own test split where there is one when None.
        options: How to train.
        progress: Told how far it is.

    Raises:
        SpecError: Unknown model, dataset or pipeline.
        ExistsError: Another configuration's run is there.
    """
    options, progress = options or TrainingOptions(), progress or Silent()
    if out.suffix != ".safetensors":
        raise ConfigError(f"expected --out to end in .safetensors, found {out}")
    data_spec = Spec.parse(data)
    dataset = open_dataset(data_spec, trusted=True)
    held_out = open_held_out(data_spec, eval_data, trusted=True)
    samples = ViewedSamples(dataset, make_views(augment, seed=options.seed, image_shape=dataset.sample_shape))
    spec = resolve_model_spec(Spec.parse(model), num_classes=dataset.num_classes, image_shape=samples.shape)
    files = RunFiles.beside(out)
    files.begin({"model": model, "data": data, "augment": augment, "eval_data": eval_data or "", **options.config()})
    record = dataset.record()
    output = Outputs(last=out, best=None, metadata={"trained_on": record.spec, "dataset": record.sha256, **samples.metadata()})
    if is_finished([output], files):
        progress.note(f"{out} is finished already")
        return _result(out, files, files.read_metrics())
    loader = ViewLoader(
        samples,
        batch_size=options.batch_size,
        seed=options.seed,
        drop_last=True,
        num_workers=options.workers,
        device=resolve_device(options.device),
    )
    learner = Learner(
        Spec.parse(model).name,
        spec,
        options,
        num_steps=options.epochs * len(loader),
        warmup_steps=round(options.warmup_epochs * len(loader)),
    )
    rows = run_training(
        [learner],
        [output],
        loader,
        lambda logits, batch: F.cross_entropy(logits, batch.labels),
        held_out=held_out,
        options=options,
        files=files,
        progress=progress,
    )
    return _result(out, files, rows)


def open_held_out(data: Spec, eval_data: str | None, *, trusted: bool) -> Dataset | None:
    """The held-out set: as asked for, else the training set's own, else None; `trusted`: whether the user typed `data`."""
    if eval_data:
        return open_dataset(Spec.parse(eval_data), trusted=True)
    own = held_out_split(data)
    return None if own is None else open_dataset(own, trusted=trusted)


def _result(out: Path, files: RunFiles, rows: list[Row]) -> FitResult:
    return FitResult(model=out, metrics=files.metrics, top1=rows[-1].get("top1"), rows=rows)
