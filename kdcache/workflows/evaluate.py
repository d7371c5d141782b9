"""`kdcache evaluate`: how good a network is, and how like its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error, multiclass_recall

from kdcache.learning.augmentations import read_size
from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.datasets import Dataset, open_dataset
from kdcache.learning.loader import stack_images, to_unit_range
from kdcache.learning.samples import EvaluationEnd
from kdcache.learning.teachers import Ensemble, Source, load_teachers
from kdcache.records.errors import ConfigError, MismatchError
from kdcache.records.progress import Progress, Silent
from kdcache.records.specs import Spec
from kdcache.workflows.devices import resolve_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Numbers in [0, 1] unless said otherwise."""

    top1: float
    """Share of samples whose largest logit is at the label."""
    top5: float
    """Share of samples whose label is among the five largest logits (or all, for fewer classes)."""
    recall: float
    """Mean over classes of the share of its samples that are found (macro recall)."""
    calibration_error: float
    """Expected calibration error, 15 bins, L1. Source: Guo et al., arXiv 1706.04599, equation 3."""
    agreement: float | None
    """Share of samples on which network and teacher have the same largest logit; None without a teacher."""
    num_parameters: int
    """Trainable numbers of the network."""
    num_samples: int
    """How many samples were seen."""


def evaluate(
    model: Path,
    data: str,
    *,
    arch: str | None = None,
    teacher: Source | Sequence[Source] | None = None,
    teacher_arch: str | Sequence[str] | None = None,
    ensemble: Ensemble = "logits",
    input_size: int | str | None = None,
    batch_size: int = 256,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates a model file on a dataset.

    Args:
        model: The model file.
        data: Dataset spec, such as `fashion-mini,split=test`.
        arch: The model's architecture where its file does not say it.
        teacher: A teacher, or several as one, for the agreement, see `load_teachers`; None for none.
        teacher_arch: The teacher's architecture where its file does not say it; one for each of several.
        ensemble: What of several teachers is averaged: `logits` or `probabilities`.
        input_size: Pixels of the images that the model gets, `160` or `160x192`; when None what its file says, else as they are.
        batch_size: Samples in a forward pass.
        device: `auto`, `cpu`, `cuda`, …
        progress: Told how far it is.

    Raises:
        SpecError: No such dataset.
        CheckpointError: A file cannot be loaded; see `load_model`.
        MismatchError: Model and dataset have different class counts.
    """
    dataset = open_dataset(Spec.parse(data), trusted=True)
    torch_device = resolve_device(device)
    teacher_logits = None
    if teacher is not None:
        loaded = load_for(dataset, teacher, arch=teacher_arch, ensemble=ensemble)
        size = recorded_size(loaded)
        teacher_logits, _ = predict(
            loaded.model, dataset, size=size, batch_size=batch_size, device=torch_device, name="teacher", progress=progress
        )
    student = load_for(dataset, model, arch=arch)
    size = recorded_size(student) if input_size is None else read_size(input_size, "--input-size")
    logits, labels = predict(student.model, dataset, size=size, batch_size=batch_size, device=torch_device, progress=progress)
    return measure(student.model, logits, labels, teacher_logits=teacher_logits)


def recorded_size(model: LoadedModel) -> tuple[int, int] | None:
    """The height and width that a model file says it was trained on, or None."""
    size = model.metadata.get("input_size")
    return None if size is None else read_size(size, "input_size")


def load_for(
    dataset: Dataset, teacher: Source | Sequence[Source], *, arch: str | Sequence[str] | None, ensemble: Ensemble = "logits"
) -> LoadedModel:
    """Loads a model, or several as one, for a dataset's classes and images."""
    archs = [arch] if isinstance(arch, str) else arch or []
    return load_teachers(teacher, num_classes=dataset.num_classes, image_shape=dataset.sample_shape, archs=archs, ensemble=ensemble)


@torch.inference_mode()
def predict(
    model: nn.Module,
    dataset: Dataset,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int,
    device: torch.device,
    name: str = "evaluate",
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "samples classes"], Int64[Tensor, "samples"]]:
    """Logits of the whole samples in order, and their labels; both on the CPU. Images are brought to `size` where it is given."""
    if batch_size < 1:
        raise ConfigError(f"expected a positive batch size, found {batch_size}")
    was_training = model.training
    model.eval().to(device)
    logits, labels = [], []
    with (progress or Silent()).stage(name, total=len(dataset), unit="samples") as advance:
        end = EvaluationEnd(size) if size else None
        for images, batch_labels in DataLoader(dataset, batch_size=batch_size, collate_fn=partial(_collate, end=end)):  # type: ignore[arg-type]
            logits.append(model(to_unit_range(images, device)).float().cpu())
            labels.append(batch_labels)
            advance(len(batch_labels))
    model.train(was_training)
    return torch.cat(logits), torch.cat(labels)


def _collate(samples: Sequence[tuple[Tensor, int]], *, end: EvaluationEnd | None) -> tuple[Tensor, Tensor]:
    images = [image if end is None else end(image) for image, _ in samples]
    return stack_images(images, advice="say which the network takes: --input-size 224"), torch.tensor([label for _, label in samples])


def measure(
    model: nn.Module,
    logits: Float[Tensor, "samples classes"],
    labels: Int64[Tensor, "samples"],
    *,
    teacher_logits: Float[Tensor, "samples classes"] | None = None,
) -> Evaluation:
    """The numbers of an evaluation from logits.

    Raises:
        MismatchError: The model gives fewer classes than the labels need.
    """
    num_classes = logits.shape[-1]
    if int(labels.max()) >= num_classes:
        raise MismatchError(f"the model gives {num_classes} classes, the dataset has the label {int(labels.max())}")
    agreement = None if teacher_logits is None else (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()
    return Evaluation(
        top1=multiclass_accuracy(logits, labels, num_classes, average="micro").item(),
        top5=multiclass_accuracy(logits, labels, num_classes, average="micro", top_k=min(5, num_classes)).item(),
        recall=multiclass_recall(logits, labels, num_classes, average="macro").item(),
        calibration_error=multiclass_calibration_error(logits, labels, num_classes, n_bins=15, norm="l1").item(),
        agreement=agreement,
        num_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        num_samples=len(labels),
    )
