"""The training loop that `fit` and `train` share: any number of learners, each with its own optimizer, over one loader."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdcache.learning.checkpoints import read_metadata, save_model
from kdcache.learning.datasets import Dataset
from kdcache.learning.loader import Batch, ViewLoader, channels_last
from kdcache.learning.models import build_model
from kdcache.records.errors import ConfigError, ExistsError
from kdcache.records.manifest import recipe_differences
from kdcache.records.progress import Progress
from kdcache.records.specs import Spec
from kdcache.workflows.devices import Precision, autocast, resolve_device, resolve_precision
from kdcache.workflows.evaluate import measure, predict
from kdcache.workflows.runs import Config, Row, RunFiles

Optimizer = Literal["sgd", "adamw"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

Loss = Callable[[Tensor, Batch], Tensor]
"""(logits, batch) to the mean loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """How to train, whatever the loss is."""

    epochs: int = 30
    """Passes over the samples; each shows one view of every sample."""
    batch_size: int = 128
    """Samples in a step."""
    optimizer: Optimizer = "sgd"
    """`sgd` is with Nesterov momentum 0.9."""
    lr: float = 0.1
    """Largest learning rate: reached after the warm-up, then down to zero on a cosine."""
    weight_decay: float = 5e-4
    """Weight decay of every parameter."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    seed: int = 0
    """Seed of the weights and of the order."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass."""
    device: str = "auto"
    """Where to train."""
    workers: int = 0
    """Processes that decode and augment; 0 for none but the main one."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.workers < 0 or self.warmup_epochs < 0:
            raise ConfigError(f"expected epochs and batch size of at least 1 and nothing negative, found {self}")
        if not (self.lr > 0 and self.weight_decay >= 0):
            raise ConfigError(f"expected lr > 0 and weight_decay >= 0, found {self.lr} and {self.weight_decay}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"unknown optimizer {self.optimizer!r}; expected one of: {', '.join(OPTIMIZERS)}")

    def config(self) -> Config:
        """What a run records, with the names of the command line's options."""
        return asdict(self)


def learning_rate_factor(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """The learning rate of a step as a share of the largest: a linear warm-up, then a cosine that ends near zero.

    Source: cosine annealing without restarts, Loshchilov and Hutter, SGDR, arXiv 1608.03983, equation 5.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Learner:
    """A network in training, with its own optimizer and schedule.

    Args:
        name: How files and metrics call it.
        spec: Its resolved architecture.
        options: How it is trained; the seed decides about its first weights, whatever else was built before.
        num_steps: Steps of the whole training.
        warmup_steps: Steps of the warm-up.
    """

    def __init__(self, name: str, spec: Spec, options: TrainingOptions, *, num_steps: int, warmup_steps: int) -> None:
        self.name, self.spec = name, spec
        self.device = resolve_device(options.device)
        self._precision = resolve_precision(options.precision, self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = build_model(spec, trusted=True)
        self.model.to(self.device).to(memory_format=torch.channels_last)
        self.optimizer = _make_optimizer(self.model, options)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, num_steps=num_steps, warmup_steps=warmup_steps)
        )

    def step(self, batch: Batch, loss: Loss) -> Tensor:
        """One optimizer step; gives the loss, detached."""
        self.model.train()
        with autocast(self._precision, self.device):
            logits = self.model(channels_last(batch.images))
        value = loss(logits.float(), batch)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._scheduler.step()
        return value.detach()

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where a learner's weights go."""

    last: Path
    """After the last epoch."""
    best: Path | None
    """After the epoch with the best held-out accuracy; None for not at all."""
    metadata: dict[str, str]
    """What to record in the files."""


def run_training(
    learners: Sequence[Learner],
    outputs: Sequence[Outputs],
    loader: ViewLoader,
    loss: Loss,
    *,
    held_out: Dataset | None,
    options: TrainingOptions,
    files: RunFiles,
    progress: Progress,
) -> list[Row]:
    """Trains all learners on the same batches, epoch by epoch, and writes their weights.

    A run that was cut short goes on after its last whole epoch and ends with the same weights (same machine and versions).

    Returns:
        One row for each epoch and learner: what `metrics.jsonl` holds.
    """
    first_epoch, rows = _restore(learners, outputs, files)
    for epoch in range(first_epoch, options.epochs):
        started = time.perf_counter()
        sums = torch.zeros(len(learners))
        with progress.stage(f"epoch {epoch + 1}/{options.epochs}", total=len(loader), unit="steps") as advance:
            for batch in loader.epoch(epoch):
                sums += torch.stack([learner.step(batch, loss).cpu() for learner in learners])
                advance(1)
        seconds = time.perf_counter() - started
        for learner, output, total in zip(learners, outputs, sums, strict=True):
            row: Row = {"epoch": epoch + 1, "student": learner.name, "loss": total.item() / len(loader), "seconds": round(seconds, 3)}
            row |= _held_out_metrics(learner, held_out, loader.input_size, options)
            _save_weights(learner, output, row, rows, last=epoch + 1 == options.epochs)
            rows.append(row)
            progress.note(_epoch_line(row, options.epochs))
        state = {"epoch": epoch + 1, "learners": [learner.state() for learner in learners], "origins": [item.metadata for item in outputs]}
        files.save(state, rows)
    files.write_metrics(rows)
    files.finish()
    return rows


def is_finished(outputs: Sequence[Outputs], files: RunFiles) -> bool:
    """Whether a run with this configuration has ended here.

    Raises:
        ExistsError: It has, but it learned from another cache or dataset, which lay in the same place.
    """
    if files.checkpoint.exists() or not files.metrics.exists() or not all(output.last.exists() for output in outputs):
        return False
    for output in outputs:
        found = read_metadata(output.last)
        _require_origin({key: found.get(key, "") for key in output.metadata}, output)
    return True


def _require_origin(found: dict[str, str], output: Outputs) -> None:
    differences = recipe_differences(found, output.metadata)
    if differences:
        listed = "\n  ".join(differences)
        raise ExistsError(f"{output.last} comes from other data; choose another --out or remove it. Differing:\n  {listed}")


def _restore(learners: Sequence[Learner], outputs: Sequence[Outputs], files: RunFiles) -> tuple[int, list[Row]]:
    loaded = files.load()
    if loaded is None:
        return 0, []
    state, rows = loaded
    for output, origin in zip(outputs, state["origins"], strict=True):
        _require_origin(origin, output)
    for learner, saved in zip(learners, state["learners"], strict=True):
        learner.restore(saved)
    return state["epoch"], rows


def _held_out_metrics(learner: Learner, held_out: Dataset | None, size: tuple[int, int] | None, options: TrainingOptions) -> Row:
    if held_out is None:
        return {}
    logits, labels = predict(learner.model, held_out, size=size, batch_size=max(options.batch_size, 256), device=learner.device)
    evaluation = measure(learner.model, logits, labels)
    return {"top1": evaluation.top1, "recall": evaluation.recall}


def _save_weights(learner: Learner, output: Outputs, row: Row, rows: Sequence[Row], *, last: bool) -> None:
    metadata = {**output.metadata, "epoch": str(row["epoch"])} | {key: str(row[key]) for key in ("top1", "recall") if key in row}
    earlier = [other["top1"] for other in rows if other["student"] == learner.name and "top1" in other]
    if output.best is not None and row.get("top1", 0.0) >= max(earlier, default=0.0):
        save_model(output.best, learner.model, spec=learner.spec, metadata=metadata)
    if last:
        save_model(output.last, learner.model, spec=learner.spec, metadata=metadata)


def _epoch_line(row: Row, epochs: int) -> str:
    accuracy = f", top-1 {row['top1']:.2%}" if "top1" in row else ""
    return f"{row['student']}: epoch {row['epoch']}/{epochs}, loss {row['loss']:.4f}{accuracy}, {row['seconds']:.1f} s"


def _make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
