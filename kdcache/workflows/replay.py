"""`kdcache verify --replay`: whether stored soft labels are what the teacher gives for the views that students will see."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.learning.cache import Cache, Joined
from kdcache.learning.checkpoints import LoadedModel
from kdcache.learning.datasets import open_dataset
from kdcache.learning.operations import End
from kdcache.learning.teachers import Ensemble, Source
from kdcache.records.errors import ConfigError, MismatchError
from kdcache.records.hashing import stable_integer
from kdcache.records.progress import Progress, Silent
from kdcache.records.specs import Spec
from kdcache.targets.sampled import Sampled
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.devices import Precision, resolve_device
from kdcache.workflows.evaluate import load_for
from kdcache.workflows.teaching import Teacher, arithmetic_of

VIEWS = 8
"""Views among which the replayed records are spread: a batch is of one view."""
ENCODING_SLACK, NOISE_SLACK, ROUNDING = 1.5, 4.0, 1e-6
"""A record's error may be so many times the largest error of encoding, plus so many times the largest noise, plus a rounding: a code
that noise has moved by one lies as near to the truth as before, and two batch sizes are a small sample of all."""
NAMED = 5
"""Records that are named in messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayResult:
    """The outcome of a replay. Errors are in nats: see `distance`."""

    num_records: int
    """Records that were made again."""
    error: float
    """Between the stored labels and the teacher's answers now: the root of the mean square over records."""
    encoding_error: float
    """Between what the codec would store of these answers and the answers: what `error` is where nothing is wrong."""
    noise: float
    """Between the teacher's answers at two batch sizes: the largest of any record."""
    limit: float
    """What a single record's error may be."""
    largest_error: float
    """The largest error of any record."""
    problems: tuple[str, ...]
    """What differs, one line each; empty where the labels belong to the views."""


def replay(
    cache: Path,
    teacher: Source | Sequence[Source],
    *,
    num_records: int = 64,
    data: str | None = None,
    arch: str | Sequence[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> ReplayResult:
    """Makes some views again, has the teacher answer to them, and compares the answers with the stored labels.

    Args:
        cache: The cache's directory.
        teacher: The teacher, or all of several, in any order; see `dump`. They are averaged as the cache's were.
        num_records: How many (sample, view) records to make again, spread over the whole cache.
        data: Dataset spec, where the cached set lies elsewhere now.
        arch: The teacher's architecture where its file does not say it; one for each of several.
        device: Where the teacher runs.
        progress: Told how far it is.

    Raises:
        CacheNotFoundError: There is no cache.
        IntegrityError: A file that is needed is damaged.
        MismatchError: The dataset is not the cached one.
        CheckpointError: The teacher cannot be loaded.
        ConfigError: The number of records is not positive.
        TeacherError: The teacher gave NaN, infinity or a wrong shape.
    """
    if num_records < 1:
        raise ConfigError(f"expected at least one record to replay, found {num_records}")
    opened = Cache(cache)
    recipe, manifest = opened.manifest.recipe, opened.manifest
    spec = Spec.parse(data or manifest.provenance.dataset_spec)
    dataset = open_dataset(spec, trusted=data is not None, skipped=manifest.provenance.skipped)
    joined = opened.join(dataset, end=End(recipe.views.teacher_end))
    loaded = load_for(dataset, teacher, arch=arch, ensemble=cast(Ensemble, recipe.teacher.ensemble or "logits"))
    torch_device = resolve_device(device)
    running = Teacher(
        joined.samples, loaded.model, batch_size=manifest.provenance.batch_size,
        precision=arithmetic_of(loaded, cast(Precision, recipe.teacher.precision), torch_device), device=torch_device,
    )  # fmt: skip
    problems = [*_weights_problem(opened, loaded), *_pixels_problem(joined)]
    parts = []
    with (progress or Silent()).stage("replay", total=num_records, unit="records") as advance:
        for rows, view in spread(len(dataset), manifest.grid.views, num_records):
            size = max(running.batch_size, 2)  # a batch of one tells nothing of noise
            for batch in (rows[start : start + size] for start in range(0, len(rows), size)):
                parts.append(_Errors.of(opened, joined, running, batch, view))
                advance(len(batch))
    errors = _Errors.joined(parts)
    limit = ENCODING_SLACK * errors.encoding.max().item() + NOISE_SLACK * errors.noise.max().item() + ROUNDING
    problems += _label_problems(errors, limit)
    return ReplayResult(
        num_records=len(errors.cached),
        error=_root_mean_square(errors.cached),
        encoding_error=_root_mean_square(errors.encoding),
        noise=errors.noise.max().item(),
        limit=limit,
        largest_error=errors.cached.max().item(),
        problems=tuple(problems),
    )


def distance(soft: SoftTargets, logits: Float[Tensor, "batch *positions classes"]) -> Float[Tensor, "batch"]:
    """How far soft targets are from the full answers, in nats: 0 where they are the same, whatever they leave out.

    The larger of two: the spread of log p(kept) - log q(kept) under p, which is √(2 KL) for small differences; and, at the declared
    temperature where it is largest, twice the difference of arcsin √mass of what was not kept, which is the same for these two masses.

    Args:
        soft: Stored labels.
        logits: The teacher's answers.
    """
    index = soft.index if soft.index is not None else torch.arange(soft.num_classes, device=logits.device).expand_as(soft.log_probs)
    log_q = logits.log_softmax(dim=-1).gather(-1, index)
    weights = log_q.masked_fill(~soft.kept, -math.inf).softmax(dim=-1)
    ratio = torch.where(soft.kept, soft.log_probs.clamp(min=-1e4) - log_q.clamp(min=-1e4), 0.0)
    ratio = ratio - (weights * ratio).sum(dim=-1, keepdim=True)
    found = (weights * ratio.square()).sum(dim=-1).sqrt()
    if soft.tail_mass is not None:
        left_out = torch.ones_like(logits, dtype=torch.bool).scatter(-1, index, False)
        for i, temperature in enumerate(soft.temperatures):
            mass = ((logits / temperature).softmax(dim=-1) * left_out).sum(dim=-1)
            found = torch.maximum(found, 2 * (_angle(soft.tail_mass[..., i]) - _angle(mass)).abs())
    return found.flatten(1).amax(dim=1) if found.ndim > 1 else found


def spread(num_samples: int, views: range, num_records: int) -> Iterator[tuple[list[int], int]]:
    """Rows and their view, a few views with as many rows each: the same ones every time, spread over everything."""
    generator = np.random.default_rng(stable_integer("replay", num_samples, len(views)))
    chosen = sorted(generator.permutation(len(views))[: min(VIEWS, num_records)].tolist())
    for i, view in enumerate(chosen):
        count = min(num_samples, num_records * (i + 1) // len(chosen) - num_records * i // len(chosen))
        yield np.sort(generator.permutation(num_samples)[:count]).tolist(), views[view]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Errors:
    """Errors of records, one a record."""

    places: list[tuple[str, int]]
    cached: Tensor
    encoding: Tensor
    noise: Tensor

    @classmethod
    def of(cls, cache: Cache, joined: Joined, teacher: Teacher, rows: list[int], view: int) -> "_Errors":
        decoded = [teacher.dataset[row] for row in rows]
        logits = teacher.answer(decoded, rows, view).logits.cpu()
        alone = torch.cat([teacher.answer([item], [row], view).logits for item, row in zip(decoded, rows, strict=True)]).cpu()
        soft = joined.soft_targets(np.array(rows), np.full(len(rows), view))
        encoded = cache.codec.decode(cache.codec.encode(logits, teacher.seeds(rows, view)))
        return cls(
            places=[(teacher.dataset.name_of(row), view) for row in rows],
            cached=_difference(soft, encoded) if isinstance(cache.codec, Sampled) else distance(soft, logits),
            encoding=torch.full((len(rows),), 1 / cache.codec.draws) if isinstance(cache.codec, Sampled) else distance(encoded, logits),
            noise=distance(SoftTargets.from_logits(alone), logits),
        )

    @classmethod
    def joined(cls, parts: list["_Errors"]) -> "_Errors":
        return cls(
            places=[place for part in parts for place in part.places],
            cached=torch.cat([part.cached for part in parts]),
            encoding=torch.cat([part.encoding for part in parts]),
            noise=torch.cat([part.noise for part in parts]),
        )


def _difference(soft: SoftTargets, other: SoftTargets) -> Float[Tensor, "batch"]:
    """Total variation between two draws with the same seeds: what one draw that noise has moved makes, is 1 / draws."""
    found = (_shares(soft) - _shares(other)).abs().sum(dim=-1) / 2
    return found.flatten(1).amax(dim=1) if found.ndim > 1 else found


def _shares(soft: SoftTargets) -> Tensor:
    """[batch, *positions, classes] shares of the draws."""
    assert soft.index is not None
    nothing = torch.zeros(*soft.index.shape[:-1], soft.num_classes)
    return nothing.scatter_add(-1, soft.index, soft.log_probs.exp())


def _weights_problem(cache: Cache, loaded: LoadedModel) -> list[str]:
    expected = cache.manifest.recipe.teacher.sha256
    return [] if loaded.sha256 == expected else [f"the teacher has other weights than the cache's: {loaded.sha256}, expected {expected}"]


def _pixels_problem(joined: Joined) -> list[str]:
    try:
        joined.check_probes()
    except MismatchError as error:
        return [str(error)]
    return []


def _label_problems(errors: _Errors, limit: float) -> list[str]:
    bad = (~(errors.cached <= limit)).nonzero().flatten().tolist()
    worst = sorted(bad, key=lambda i: -errors.cached[i].item())[:NAMED]
    if not worst:
        return []
    named = ", ".join(f"view {view} of {name} ({errors.cached[i].item():.3g})" for i in worst for name, view in [errors.places[i]])
    return [
        f"the stored labels of {len(bad)} of {len(errors.cached)} records are not what the teacher gives for these views; errors in nats,"
        f" at most {limit:.3g} expected: {named}{', …' if len(bad) > NAMED else ''}"
    ]


def _angle(mass: Tensor) -> Tensor:
    return mass.clamp(0, 1).sqrt().asin()


def _root_mean_square(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
