"""What codecs cost and what they keep, measured on a sample of a teacher's answers."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.learning.fidelity import FullAnswers
from kdcache.learning.losses import TAILS, Tail
from kdcache.records.manifest import BlockGrid, FieldRecord
from kdcache.records.specs import Spec, Value
from kdcache.store.zarr_backend import chunk_bytes, row_bytes, shard_bytes
from kdcache.targets.codecs import DEFAULT_TEMPERATURES, Codec
from kdcache.targets.coding import top_classes
from kdcache.targets.profile import Profile, ProfileSum, profile_field, profile_table
from kdcache.targets.soft_targets import SoftTargets
from kdcache.workflows.teaching import Advance, Teacher

KEPT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEAN_KEPT = (2, 4, 8, 16, 32, 64)
DRAWS = (10, 50, 200)
DTYPES = ("uint8", "float16", "float32")

FOLDS = 4
"""Each part of the sample is measured with the profile of the other three: its own records would flatter it."""
NUMBERS_AT_ONCE = 2**22
"""Logits that are measured at a time: 32 MB in float64."""
SHARING_TAILS: tuple[Tail, ...] = ("uniform", "profile")
"""The tail policies that say what each class gets, so that there is a KL."""

Options = dict[str, Value]
Cut = Callable[[Sequence[FieldRecord]], BlockGrid]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCodec:
    """What one codec would cost, and what it would keep of this teacher: means over the records of the sample."""

    codec: str
    """What to type after `--codec`."""
    entries: float
    """(class, value) entries of a record."""
    record_bytes: float
    """Bytes of a record, one (sample, view), in the mapped layout."""
    cache_bytes: int
    """Bytes of the whole cache in the mapped layout: records, keys, labels, and the profile if the codec keeps one; not Zarr's
    metadata and the manifest, some kilobytes."""
    retained_mass: dict[str, float]
    """The teacher's probability of the classes that are kept, by temperature."""
    kl: dict[str, float] | None
    """KL(full ‖ cached) in nats by temperature, with the better tail policy of `uniform` and `profile`; None for a codec that
    draws, which is right in expectation and not record by record."""
    kl_tail: dict[str, Tail] | None
    """Which policy that is, by temperature; None where nothing is cut off. The profile is the sample's, which is poorer than
    that of a whole cache."""
    cosine: dict[Tail, float]
    """Cosine between the KD gradients from the cache and from the full answers at the plan's temperature, by tail policy, for a
    student whose logits are half of the teacher's. The direction only: `renormalize` also pulls too hard."""
    unbiased: bool
    """Whether the codec draws, so that the gradient's expectation is the full one for every student, whatever its cosine."""
    views_per_second: float
    """Views that a dump makes on this machine: decoded, augmented, answered by the teacher, encoded."""
    hours: float
    """Of the whole dump, at this rate."""

    @property
    def family(self) -> str:
        """The codec's name without its options."""
        return Spec.parse(self.codec).name

    @property
    def best_tail(self) -> Tail:
        """The tail policy with the best direction of the gradient; of those that are equal to a thousandth, the first."""
        return max(self.cosine, key=lambda tail: round(self.cosine[tail], 3))

    def kl_at(self, temperature: float) -> float:
        """KL at one of the plan's temperatures; infinite for a codec that draws."""
        return math.inf if self.kl is None else self.kl[f"{temperature:g}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Some of a teacher's answers, and how long they took."""

    rows: list[int]
    """Which samples of the dataset."""
    logits: Tensor
    """[records, *positions, classes], where the teacher runs."""
    seeds: list[int]
    """What codecs that draw draw with, one a record."""
    decode_seconds: float
    """To read and decode one sample."""
    answer_seconds: float
    """To make one view and have it answered."""


def take_sample(teacher: Teacher, num_samples: int, advance: Advance) -> Sample:
    """The teacher's answers to the first view of evenly spaced samples; one batch more than these warms it up, untimed."""
    batches = teacher.spaced_rows(num_samples)
    teacher.answer([teacher.dataset[row] for row in batches[0]], batches[0], 0)
    logits, decoding, answering = [], 0.0, 0.0
    for rows in batches:
        started = time.perf_counter()
        items = [teacher.dataset[row] for row in rows]
        decoded = time.perf_counter()
        logits.append(teacher.answer(items, rows, 0).logits)
        decoding, answering = decoding + decoded - started, answering + time.perf_counter() - decoded
        advance(len(rows))
    chosen = [row for rows in batches for row in rows]
    return Sample(
        rows=chosen,
        logits=torch.cat(logits),
        seeds=teacher.seeds(chosen, 0),
        decode_seconds=decoding / len(chosen),
        answer_seconds=answering / len(chosen),
    )


def candidate_codecs(num_classes: int, temperature: float) -> list[Spec]:
    """The codecs that are worth a look for so many classes, for students that are trained at this temperature."""
    at = _shortest(temperature)
    declared: Options = {}
    if temperature not in DEFAULT_TEMPERATURES:
        declared = {"temperatures": tuple(_shortest(t) for t in sorted({*DEFAULT_TEMPERATURES, temperature}))}
    topk: list[Options] = [{"k": k, **declared} for k in KEPT if k < num_classes]
    adaptive: list[Options] = [{"mean_k": k, "temperature": at, **declared} for k in MEAN_KEPT if 2 * k <= num_classes]
    sampled: list[Options] = [{"draws": draws, "temperature": at} for draws in DRAWS if num_classes > 1]
    dense: list[Options] = [{"dtype": dtype} for dtype in DTYPES]
    families = {"topk": topk, "adaptive": adaptive, "sampled": sampled, "dense": dense}
    return [Spec(source="", name=name, options=options) for name, family in families.items() for options in family]


def _shortest(number: float) -> Value:
    """As one would type it: 4, not 4.0."""
    return int(number) if number == int(number) else number


def measure_codecs(
    codecs: Mapping[str, Codec], sample: Sample, *, temperature: float, cut: Cut, shared: Sequence[FieldRecord], advance: Advance
) -> list[PlannedCodec]:
    """Encodes and decodes a sample with each codec and compares what comes out with the full answers.

    Args:
        codecs: Codecs by what the user types, calibrated.
        sample: The answers.
        temperature: T of the students' loss.
        cut: How the whole cache will be cut, by its fields.
        shared: What the cache holds beside its records, whatever the codec.
        advance: Told how many records are done.
    """
    temperatures = sorted({*DEFAULT_TEMPERATURES, temperature})
    tallies = [_Tally(name, codec, positions=tuple(sample.logits.shape[1:-1])) for name, codec in codecs.items()]
    folds = _folds(sample)
    profiles, profile_seconds = _profiles(sample, folds) if any(codec.keeps_profile for codec in codecs.values()) else (None, 0.0)
    at_once = max(1, NUMBERS_AT_ONCE // sample.logits[0].numel())
    for fold, fold_places in enumerate(folds):
        for start in range(0, len(fold_places), at_once):
            places = fold_places[start : start + at_once]
            logits, seeds = sample.logits[places], [sample.seeds[place] for place in places.tolist()]
            full = FullAnswers(logits.cpu(), temperatures=temperatures, temperature=temperature)
            for tally in tallies:
                tally.add(logits, seeds, full, temperatures, profiles[fold] if profiles else None)
            advance(len(seeds))
    return [tally.planned(sample, temperatures, cut=cut, shared=shared, profile_seconds=profile_seconds) for tally in tallies]


class _Tally:
    """Adds up over records what one codec costs and keeps."""

    def __init__(self, name: str, codec: Codec, *, positions: tuple[int, ...]) -> None:
        self.name, self.codec, self.fields = name, codec, codec.fields(positions)
        self._sums: dict[str, float] = defaultdict(float)

    def add(self, logits: Tensor, seeds: list[int], full: FullAnswers, temperatures: Sequence[float], profile: Profile | None) -> None:
        """Adds some records."""
        started = time.perf_counter()
        arrays = {name: array.cpu() for name, array in self.codec.encode(logits, seeds).items()}
        self._sums["seconds"] += time.perf_counter() - started
        for field in self.fields:
            if field.lengths:
                self._sums[f"length {field.name}"] += (arrays[field.lengths.field].long() - field.lengths.minus).sum().item()
        soft = replace(self.codec.decode(arrays), profile=profile if self.codec.keeps_profile else None)
        for name, values in _fidelity(full, soft, temperatures).items():
            self._sums[name] += values.double().reshape(len(seeds), -1).mean(dim=1).sum().item()

    def planned(
        self, sample: Sample, temperatures: Sequence[float], *, cut: Cut, shared: Sequence[FieldRecord], profile_seconds: float
    ) -> PlannedCodec:
        """The means, and what follows for the whole cache."""
        grid = cut(self.fields)
        means = {name: value / len(sample.rows) for name, value in self._sums.items()}
        if self.codec.keeps_profile:
            shared = (*shared, profile_field(self.codec.num_classes))
        encode_seconds = means["seconds"] + (profile_seconds if self.codec.keeps_profile else 0)
        view_seconds = sample.decode_seconds / grid.block_views + sample.answer_seconds + encode_seconds
        tails = {f"{t:g}": _better_tail(means, t) for t in temperatures}
        cosine = {tail: means[f"cosine {tail}"] for tail in TAILS if f"cosine {tail}" in means}
        drawn = "kl@1 uniform" not in means
        return PlannedCodec(
            codec=self.name,
            entries=means["entries"],
            record_bytes=sum(_field_bytes(field, means) for field in self.fields),
            cache_bytes=_cache_bytes((*self.fields, *shared), means, grid),
            retained_mass={f"{t:g}": means[f"retained@{t:g}"] for t in temperatures},
            kl=None if drawn else {t: means[f"kl@{t} {tail}"] for t, tail in tails.items()},
            kl_tail=None if drawn or len(cosine) == 1 else tails,
            cosine=cosine,
            unbiased=drawn,
            views_per_second=1 / view_seconds,
            hours=grid.num_samples * grid.num_views * view_seconds / 3600,
        )


def _fidelity(full: FullAnswers, soft: SoftTargets, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """What soft targets keep, each number [*batch]."""
    tails = [tail for tail in TAILS if tail != "profile" or soft.profile is not None]
    found: dict[str, Tensor] = {"entries": soft.kept.sum(dim=-1)}
    for t in temperatures:
        found[f"retained@{t:g}"] = full.retained_mass(soft, t)
        for tail in (tail for tail in tails if tail in SHARING_TAILS and soft.sampled_at is None):
            found[f"kl@{t:g} {tail}"] = full.divergence(soft, t, tail)
    return found | {f"cosine {tail}": full.gradient_cosine(soft, tail) for tail in (tails if soft.tail_mass is not None else tails[:1])}


def _better_tail(means: Mapping[str, float], temperature: float) -> Tail:
    return min(SHARING_TAILS, key=lambda tail: means.get(f"kl@{temperature:g} {tail}", math.inf))


def _folds(sample: Sample) -> list[Tensor]:
    """Places in the sample, dealt out by chance: a dataset's order may have a rhythm."""
    order = torch.randperm(len(sample.rows), generator=torch.Generator().manual_seed(0))
    return [order[fold::FOLDS] for fold in range(min(FOLDS, len(order)))]


def _profiles(sample: Sample, folds: Sequence[Tensor]) -> tuple[list[Profile], float]:
    """For each fold the profile of all others, and the seconds that a record costs in it."""
    sums: list[NDArray[np.int64]] = []
    seconds = 0.0
    for places in folds:
        own, logits = ProfileSum(sample.logits.shape[-1], sample.logits.device), sample.logits[places]
        started = time.perf_counter()
        own.add(logits, top_classes(logits, 1)[1].squeeze(-1))
        seconds += time.perf_counter() - started
        sums.append(own.numpy())
    total = sum(sums, start=np.zeros((), np.int64))
    return [Profile.from_numpy(profile_table(total - own)) for own in sums], seconds / len(sample.rows)


def _field_bytes(field: FieldRecord, means: Mapping[str, float]) -> float:
    """Bytes of a record in a field, on average."""
    if field.lengths is None:
        return row_bytes(field)
    bits = field.bits or 8 * np.dtype(field.dtype).itemsize
    return means[f"length {field.name}"] * bits / 8


def _cache_bytes(fields: Sequence[FieldRecord], means: Mapping[str, float], grid: BlockGrid) -> int:
    """Bytes of all chunk files: padded to whole chunks, each with its checksum, and shards with their index."""
    samples = [block.samples[1] - block.samples[0] for block in grid.blocks() if block.views[0] == 0]
    size = 0
    for field in fields:
        if field.lengths:
            files = sum(shard_bytes(field, grid, round(means[f"length {field.name}"] * count)) for count in samples)
        else:
            files = chunk_bytes(field, grid) * (len(samples) if field.axes else 1)
        size += files * (grid.num_views if field.per_view else 1)
    return size
