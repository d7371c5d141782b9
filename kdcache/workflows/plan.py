"""`kdcache plan`: what a cache would cost and keep, codec by codec, before the teacher runs over everything."""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from kdcache.learning.teachers import Ensemble, Source, as_list
from kdcache.records.errors import ConfigError
from kdcache.records.progress import Progress, Silent
from kdcache.records.specs import Spec
from kdcache.targets.codecs import Codec, make_codec
from kdcache.targets.sampled import Sampled
from kdcache.workflows.cutting import cut_into_blocks
from kdcache.workflows.devices import Precision
from kdcache.workflows.dump import sample_fields
from kdcache.workflows.plan_page import check_page, write_page
from kdcache.workflows.teaching import Teacher, open_teacher
from kdcache.workflows.tradeoff import PlannedCodec, Sample, candidate_codecs, measure_codecs, take_sample

KL_BOUND = 0.05
"""Largest KL that is accepted unless asked otherwise, in nats: k = 32 to 64 of 1000 classes at T = 1, where so much is published to be
enough. At T = 4, where the tail has most of the mass, it takes more than 256 classes of 1000, 32 of 100, one of ten."""

RECORDS_A_CLASS = 16
"""With fewer in the sample, the profile that is measured is too poor to stand for the cache's."""

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanResult:
    """What was measured, and what follows."""

    num_samples: int
    """Samples of the dataset."""
    num_views: int
    """Views of each; the cache has samples × views records."""
    num_classes: int
    """Length of the teacher's class axis."""
    num_measured: int
    """Records that the teacher answered for this plan: first views of evenly spaced samples."""
    teacher_accuracy: float | None
    """Share of these whose largest logit is at the label; None for outputs with position axes."""
    temperature: float
    """T of the students' loss, at which codecs are compared."""
    kl_bound: float
    """Largest KL at this temperature that is accepted, in nats."""
    budget_bytes: int | None
    """Largest cache that is accepted; None for any."""
    codecs: tuple[PlannedCodec, ...]
    """All that were looked at."""
    recommended: str | None
    """The smallest codec within bound and budget; None where there is none."""
    best_within_budget: str | None
    """The codec with the least KL that the budget allows; None where it allows none, or none that has a KL."""
    verdict: str
    """What is recommended and why, in a sentence."""
    command: str | None
    """The dump to run next, with the recommended codec, else with the best one within the budget; None without either."""
    out: Path | None
    """The curve or page that was written."""

    @property
    def chosen(self) -> PlannedCodec | None:
        """The codec of `command`."""
        name = self.recommended or self.best_within_budget
        return next((codec for codec in self.codecs if codec.codec == name), None)


def plan(
    teacher: Source | Sequence[Source],
    data: str,
    *,
    arch: str | Sequence[str] | None = None,
    ensemble: Ensemble = "logits",
    views: int = 4,
    augment: str = "crop-flip",
    codecs: Sequence[str] = (),
    samples: int = 512,
    temperature: float = 4.0,
    budget: str | int | None = None,
    kl: float = KL_BOUND,
    batch_size: int = 256,
    precision: Precision = "auto",
    device: str = "auto",
    out: Path | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Runs the teacher over a few samples and says what each codec would cost for all of them, and what it would keep.

    Args:
        teacher: The teacher, or several as one; see `dump`.
        data: Dataset spec.
        arch: The teacher's architecture where its file does not say it; one for each of several.
        ensemble: What of several teachers is averaged: `logits` or `probabilities`.
        views: Views of each sample in the cache.
        augment: Pipeline name or TOML file.
        codecs: Codec specs to look at; a choice by the number of classes when empty.
        samples: How many samples the teacher answers; all of them if there are fewer.
        temperature: T of the students' loss.
        budget: Largest cache, as bytes or such as `500MB` or `2GiB`; None for any.
        kl: Largest KL(full ‖ cached) at this temperature, in nats.
        batch_size: Samples in a forward pass.
        precision: Arithmetic of the forward pass.
        device: Where the teacher runs.
        out: Where to write the rate-distortion curve: `.html`, `.svg` or `.png`; None for nowhere.
        progress: Told how far it is.

    Raises:
        SpecError: Unknown dataset, pipeline or codec.
        ConfigError: A number is out of its range, or a codec that draws does so at another temperature.
        CheckpointError: The teacher cannot be loaded.
        MismatchError: Teacher and dataset have different class counts, or a label is no class.
        TeacherError: The teacher gave NaN, infinity or a wrong shape.
    """
    progress = progress or Silent()
    budget_bytes = _check_numbers(samples=samples, views=views, temperature=temperature, kl=kl, budget=budget)
    if out is not None:
        check_page(out)
    running, _ = open_teacher(
        teacher, data, arch=arch, ensemble=ensemble, augment=augment, seed=0, batch_size=batch_size, precision=precision, device=device
    )
    dataset = running.dataset
    specs = [Spec.parse(text) for text in codecs] or candidate_codecs(dataset.num_classes, temperature)
    asked = {str(spec): _make_codec(spec, num_classes=dataset.num_classes, temperature=temperature) for spec in specs}
    with progress.stage("teacher", total=min(samples, len(dataset)), unit="samples") as advance:
        sample = take_sample(running, samples, advance)
    made = {name: codec.calibrated(sample.logits) for name, codec in asked.items()}
    with progress.stage("codecs", total=len(sample.rows), unit="records") as advance:
        measured = measure_codecs(
            made,
            sample,
            temperature=temperature,
            cut=lambda fields: cut_into_blocks(len(dataset), fields, views=range(views), block_samples=None),
            shared=sample_fields(dataset),
            advance=advance,
        )
    if any(codec.keeps_profile for codec in made.values()) and len(sample.rows) < RECORDS_A_CLASS * dataset.num_classes:
        progress.note(
            f"note: {len(sample.rows)} records make a poor profile of {dataset.num_classes} classes, so the tail policy profile looks"
            f" worse here than from a cache of {len(dataset) * views:,} records; more --samples show more of it"
        )
    recommended, best, verdict = _recommend(measured, temperature=temperature, kl=kl, budget=budget_bytes)
    chosen = recommended or best
    command = None if chosen is None else _dump_command(
        teacher, data, arch=arch, ensemble=ensemble, views=views, augment=augment, codec=chosen.codec,
        batch_size=batch_size, precision=precision, device=device,
    )  # fmt: skip
    if out is not None:
        write_page(
            out,
            measured,
            temperature=temperature,
            kl_bound=kl,
            budget_bytes=budget_bytes,
            num_records=len(dataset) * views,
            chosen=chosen,
            verdict=verdict,
            command=command,
        )
    return PlanResult(
        num_samples=len(dataset),
        num_views=views,
        num_classes=dataset.num_classes,
        num_measured=len(sample.rows),
        teacher_accuracy=_accuracy(running, sample),
        temperature=temperature,
        kl_bound=kl,
        budget_bytes=budget_bytes,
        codecs=tuple(measured),
        recommended=recommended.codec if recommended else None,
        best_within_budget=best.codec if best else None,
        verdict=verdict,
        command=command,
        out=out,
    )


def parse_bytes(text: str | int) -> int:
    """A number of bytes: `1GB` and `500MB` are decimal as disks are sold, `2GiB` is binary, a bare number is bytes.

    Raises:
        ConfigError: It is none, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip(), re.IGNORECASE)
    size = int(Decimal(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"expected --budget to be a positive size such as 500MB, 2GiB or 1000000 (bytes), found {text!r}")
    return size


def _check_numbers(*, samples: int, views: int, temperature: float, kl: float, budget: str | int | None) -> int | None:
    """Before any work; gives the budget in bytes."""
    for name, number in (("samples", samples), ("views", views)):
        if number < 1:
            raise ConfigError(f"expected --{name} to be at least 1, found {number}")
    for name, value in (("temperature", temperature), ("kl", kl)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"expected --{name} to be a positive number, found {value}")
    return None if budget is None else parse_bytes(budget)


def _make_codec(spec: Spec, *, num_classes: int, temperature: float) -> Codec:
    codec = make_codec(spec, num_classes=num_classes)
    if isinstance(codec, Sampled) and codec.temperature != temperature:
        raise ConfigError(
            f"--codec {spec} draws at temperature {codec.temperature:g} and holds there only, found --temperature {temperature:g};"
            f" expected --codec {spec.with_options(temperature=temperature)}"
        )
    return codec


def _accuracy(teacher: Teacher, sample: Sample) -> float | None:
    if sample.logits.ndim != 2:
        return None
    return float((sample.logits.argmax(dim=-1).cpu().numpy() == teacher.dataset.labels[sample.rows]).mean())


def _recommend(
    codecs: Sequence[PlannedCodec], *, temperature: float, kl: float, budget: int | None
) -> tuple[PlannedCodec | None, PlannedCodec | None, str]:
    """The smallest codec within bound and budget, the most faithful one within the budget, and what to say of them."""
    affordable = [codec for codec in codecs if budget is None or codec.cache_bytes <= budget]
    faithful = [codec for codec in codecs if codec.kl_at(temperature) <= kl]
    both = [codec for codec in affordable if codec in faithful]
    best = min((codec for codec in affordable if codec.kl is not None), key=lambda codec: codec.kl_at(temperature), default=None)
    bound, within = f"a KL of at most {kl:g} nat at T={temperature:g}", "" if budget is None else " within the budget"
    if both:
        chosen = min(both, key=lambda codec: codec.cache_bytes)
        tail = chosen.kl_tail and chosen.kl_tail[f"{temperature:g}"]
        policy = f", with the tail policy {tail}" if tail else ""
        return chosen, best, f"{chosen.codec} is the smallest with {bound}{within}{policy}"
    if not affordable:
        smallest = min(codecs, key=lambda codec: codec.cache_bytes)
        return None, None, (
            f"no codec fits into --budget {budget:,} bytes: the smallest, {smallest.codec}, takes {smallest.cache_bytes:,};"
            " take fewer --views or a larger --budget"
        )  # fmt: skip
    if best is None:
        return None, None, "codecs that draw have no KL to compare: look at their cosines, or add others with --codec"
    closest = f"the most faithful{within} is {best.codec} with {best.kl_at(temperature):.3g} nat"
    if not faithful:
        return None, best, f"no codec here has {bound}: {closest}"
    needed = min(faithful, key=lambda codec: codec.cache_bytes)
    return None, best, (
        f"no codec with {bound} fits into --budget {budget:,} bytes: {needed.codec} takes {needed.cache_bytes:,}; {closest}."
        " Fewer --views, a larger --budget or a lower --temperature would help"
    )  # fmt: skip


def _dump_command(
    teacher: Source | Sequence[Source],
    data: str,
    *,
    arch: str | Sequence[str] | None,
    ensemble: Ensemble,
    views: int,
    augment: str,
    codec: str,
    batch_size: int,
    precision: str,
    device: str,
) -> str:
    """As a shell takes it; settings that are what dump does anyway are left out."""
    archs = [arch] if isinstance(arch, str) else arch or []
    options = [("--teacher", str(source)) for source in as_list(teacher)] + [("--arch", spec) for spec in archs]
    options += [("--data", data), ("--views", str(views)), ("--augment", augment), ("--codec", codec)]
    defaults = {"--ensemble": "logits", "--batch-size": "256", "--precision": "auto", "--device": "auto"}
    given = {"--ensemble": ensemble, "--batch-size": str(batch_size), "--precision": precision, "--device": device}
    options += [(name, value) for name, value in given.items() if value != defaults[name]]
    return shlex.join(["kdcache", "dump", *(word for option in options for word in option), "--out", "runs/cache"])
