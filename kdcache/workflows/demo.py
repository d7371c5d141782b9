"""`kdcache demo`: the main job on embedded data, from the teacher's check to a report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kdcache.data import embedded_teacher
from kdcache.records.progress import Progress, Silent
from kdcache.store.files import write_atomically
from kdcache.workflows.dump import dump
from kdcache.workflows.evaluate import Evaluation, evaluate
from kdcache.workflows.fit import fit
from kdcache.workflows.learner import TrainingOptions
from kdcache.workflows.report import curves, render_report, table
from kdcache.workflows.runs import Row, RunFiles
from kdcache.workflows.train import DistillationOptions, train
from kdcache.workflows.verify import info

DATA = "fashion-mini"
STUDENT = "small"
VIEWS = 6
CODEC = "topk,k=5"
EPOCHS = 20
DISTILLATION = DistillationOptions(temperature=2.0, alpha=0.9)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRow:
    """One network of the demo's table."""

    name: str
    """Who it is."""
    evaluation: Evaluation
    """Its numbers on the test split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo found."""

    folder: Path
    """Where everything lies."""
    rows: tuple[DemoRow, ...]
    """Teacher, student from the cache, student without it."""
    cache: Path
    """The cache."""
    cache_bytes: int
    """Its size."""
    float32_bytes: int
    """What the full logits of the same views take as float32."""
    num_records: int
    """Soft labels in it."""
    students: tuple[Path, ...]
    """The trained students."""
    metrics: Path
    """One JSON object a line, for each epoch and student."""
    report: Path
    """A self-contained page with the table and the curves."""
    seconds: dict[str, float]
    """Wall-clock time by stage."""


def demo(out: Path, *, seed: int = 0, epochs: int = EPOCHS, progress: Progress | None = None) -> DemoResult:
    """Runs the whole way once: teacher, dump, student from the cache, the same student without it, comparison, report.

    Run again in the same folder, it goes on where it was cut off.

    Args:
        out: Folder for everything.
        seed: Seed of the students' weights and order.
        epochs: Passes over the 10,000 samples, for both students.
        progress: Told how far it is.

    Raises:
        ExistsError: Another run is in the folder.
    """
    progress = progress or Silent()
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Result]) -> Result:
        progress.note(f"── {stage}")
        started = time.perf_counter()
        result = work()
        seconds[stage] = round(time.perf_counter() - started, 1)
        return result

    teacher, test = embedded_teacher(), f"{DATA},split=test"
    options = TrainingOptions(epochs=epochs, seed=seed)
    teacher_score = timed("check the teacher", lambda: evaluate(teacher, test, teacher=teacher, progress=progress))
    dumped = timed(
        "dump its soft labels",
        lambda: dump(teacher, DATA, out / "cache", views=VIEWS, codec=CODEC, license="MIT", command="kdcache demo", progress=progress),
    )
    trained = timed(
        "train from the cache",
        lambda: train([STUDENT], dumped.path, out / "with-cache", distillation=DISTILLATION, options=options, progress=progress),
    )
    plain = timed(
        "train without it",
        lambda: fit(STUDENT, DATA, out / "without-cache" / "last.safetensors", options=options, progress=progress),
    )
    students = (trained.students[0].last, plain.model)
    scores = timed("compare", lambda: [evaluate(student, test, teacher=teacher, progress=progress) for student in students])
    rows = (
        DemoRow(name="teacher (large)", evaluation=teacher_score),
        DemoRow(name=f"{STUDENT}, from the cache", evaluation=scores[0]),
        DemoRow(name=f"{STUDENT}, without it", evaluation=scores[1]),
    )
    summary = info(dumped.path)
    files = RunFiles.in_folder(out)
    metrics = _named(trained.rows, rows[1].name) + _named(plain.rows, rows[2].name)
    files.write_metrics(metrics)
    result = DemoResult(
        folder=out,
        rows=rows,
        cache=dumped.path,
        cache_bytes=summary.size_bytes,
        float32_bytes=summary.float32_bytes,
        num_records=dumped.manifest.grid.num_samples * dumped.manifest.grid.num_views,
        students=students,
        metrics=files.metrics,
        report=out / "report.html",
        seconds=seconds,
    )
    write_atomically(result.report, _render(result, metrics).encode())
    return result


def _named(rows: list[Row], name: str) -> list[Row]:
    return [{**row, "student": name} for row in rows]


def _render(result: DemoResult, metrics: list[Row]) -> str:
    header = ("", "top-1", "macro recall", "agreement with the teacher", "parameters")
    scores = [
        (
            row.name,
            f"{row.evaluation.top1:.2%}",
            f"{row.evaluation.recall:.2%}",
            f"{row.evaluation.agreement:.2%}",
            f"{row.evaluation.num_parameters:,}",
        )
        for row in result.rows
    ]
    sizes = [
        ("cache on the disk", f"{result.cache_bytes:,} bytes"),
        ("full float32 logits", f"{result.float32_bytes:,} bytes"),
        ("soft labels", f"{result.num_records:,}"),
    ]
    reference = (result.rows[0].name, result.rows[0].evaluation.top1)
    return render_report(
        "kdcache demo",
        [
            ("Accuracy on the test split", table(header, scores)),
            ("Top-1 by epoch", curves(metrics, key="top1", label="top-1", reference=reference)),
            ("Training loss by epoch", curves(metrics, key="loss", label="loss, nats")),
            ("Size", table(("", ""), sizes)),
            ("Seconds by stage", table(("", "s"), [(name, f"{value:.1f}") for name, value in result.seconds.items()])),
        ],
    )
