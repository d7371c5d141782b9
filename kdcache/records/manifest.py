"""The records of a cache: recipe, block grid, manifest. These dataclasses are the format's documentation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

from kdcache.records.errors import FormatError, IntegrityError
from kdcache.records.hashing import canonical_json, sha256
from kdcache.records.jsonrecord import from_json, optional, to_json

FORMAT_VERSION = "1.0"
MANIFEST_NAME = "manifest.json"
RECORD_AXES = ("view", "sample")
SAMPLE_AXES = ("sample",)
TABLE_AXES = ()
NO_DIGEST = "sha256:" + 64 * "0"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberRecord:
    """One teacher of several whose answers are averaged."""

    spec: str
    """Architecture, resolved."""
    sha256: str
    """Digest as of a teacher that stands alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecord:
    """Which teacher."""

    spec: str
    """Architecture, resolved; `ensemble` for several teachers."""
    sha256: str
    """Digest over the tensors by name; of a `.pt2` or an `.onnx` over the file; of several teachers over their records."""
    num_classes: int
    """Length of the logits' class axis."""
    precision: str
    """Arithmetic of the forward pass: `float32` or `bfloat16`."""
    positions: tuple[int, ...] = ()
    """Axes of the logits between batch and classes: () for classification, (length,) for tokens, (height, width) for pixels."""
    members: tuple[MemberRecord, ...] = optional(())
    """Several teachers, sorted by digest, in which order they are averaged; empty for one."""
    ensemble: str = optional("")
    """What of several teachers is averaged: `logits` or `probabilities`; empty for one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRecord:
    """Which samples, in which order."""

    spec: str
    """The dataset's spec without what says where it lies."""
    num_samples: int
    """How many samples it has."""
    sha256: str
    """Digest over the sample keys in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingRecord:
    """How two samples become one: MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899)."""

    mixup: float
    """α of MixUp's λ ~ Beta(α, α); 0 for no MixUp."""
    cutmix: float
    """α of CutMix's λ ~ Beta(α, α); 0 for no CutMix."""
    probability: float
    """Share of the views that are mixed."""
    switch: float
    """Share of the mixed views that are CutMix, where there are both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsRecord:
    """How view `v` of a sample is made; the number of views is coverage, not recipe."""

    pipeline: tuple[dict[str, Any], ...]
    """Operations of torchvision.transforms.v2 in order: `{"op": NAME, argument: value, …}`. Teacher and student share them."""
    seed: int
    """Seed of every random choice."""
    versions: dict[str, str]
    """Versions of the libraries that decide about pixels."""
    mixing: MixingRecord | None = optional(None)
    """How views are mixed with those of another sample; None for not at all."""
    teacher_end: tuple[dict[str, Any], ...] = optional(())
    """Operations without random choices that only the teacher's images go through, after the shared ones."""
    enumerated: bool = optional(False)
    """Whether view `v` is the v-th of all that the pipeline can make, instead of a random one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that determines the numbers in a cache."""

    teacher: TeacherRecord
    """Which teacher."""
    dataset: DatasetRecord
    """Which samples."""
    views: ViewsRecord
    """What the teacher sees of them."""
    codec: str
    """What is kept of its logits: the codec's spec, resolved."""

    @property
    def key(self) -> str:
        """The recipe key: known before any GPU work; equal keys mean interchangeable caches."""
        return sha256(canonical_json(to_json(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The unit of work: a range of samples × a range of consecutive views, computed by one worker."""

    sample_block: int
    """Index of the sample range, which is the chunk index along the sample axis."""
    samples: tuple[int, int]
    """First row and the row after the last."""
    views: tuple[int, int]
    """First view and the view after the last."""

    @property
    def id(self) -> str:
        """A short name, such as `s00002.v0000-0004`."""
        return f"s{self.sample_block:05d}.v{self.views[0]:04d}-{self.views[1]:04d}"

    @property
    def num_rows(self) -> int:
        """How many records the block holds."""
        return (self.samples[1] - self.samples[0]) * (self.views[1] - self.views[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockGrid:
    """How the work, and with it every array, is cut."""

    num_samples: int
    """Length of the sample axis."""
    num_views: int
    """How many views there are."""
    block_samples: int
    """Samples in a chunk file (the last one of an axis is padded with the fill value)."""
    block_views: int
    """Most views that are made from one decoded sample; each has chunk files of its own."""
    first_view: int = optional(0)
    """Number of the first view: more than 0 for a part, whose earlier views are in another cache."""
    added_views: tuple[int, ...] = optional(())
    """Views at which the groups of `block_views` begin anew: where views were added after a group that was not full."""

    @property
    def views(self) -> range:
        """The numbers of the views."""
        return range(self.first_view, self.first_view + self.num_views)

    @property
    def num_sample_blocks(self) -> int:
        """Chunks along the sample axis."""
        return -(-self.num_samples // self.block_samples)

    @property
    def num_blocks(self) -> int:
        """How many there are."""
        return self.num_sample_blocks * sum(-(-len(views) // self.block_views) for views in self._dumped_together())

    def blocks(self) -> tuple[Block, ...]:
        """All blocks, sample range by sample range."""
        return tuple(
            Block(sample_block=index, samples=self.sample_range(index), views=group)
            for index in range(self.num_sample_blocks)
            for group in self.view_groups
        )

    def sample_range(self, index: int) -> tuple[int, int]:
        """First row of a range of samples and the row after the last."""
        return index * self.block_samples, min((index + 1) * self.block_samples, self.num_samples)

    @property
    def view_groups(self) -> tuple[tuple[int, int], ...]:
        """The groups of views that share blocks: first view and view after the last."""
        return tuple(
            (first, min(first + self.block_views, views.stop))
            for views in self._dumped_together()
            for first in range(views.start, views.stop, self.block_views)
        )

    def group_of(self, view: int) -> tuple[int, int]:
        """The group that a view belongs to."""
        views = next(views for views in self._dumped_together() if view in views)
        first = view - (view - views.start) % self.block_views
        return first, min(first + self.block_views, views.stop)

    def with_groups(self, groups: Sequence[tuple[int, int]]) -> "BlockGrid":
        """The same samples with these groups of views, which follow each other and have at most `block_views`."""
        firsts = [first for first, _ in groups]
        added = tuple(first for before, first in pairwise(firsts) if first != before + self.block_views)
        return replace(self, first_view=firsts[0], num_views=groups[-1][1] - firsts[0], added_views=added)

    def grown(self, stop: int) -> "BlockGrid":
        """The same groups, and further ones up to the view before `stop`."""
        added = range(self.views.stop, stop, self.block_views)
        return self.with_groups([*self.view_groups, *((first, min(first + self.block_views, stop)) for first in added)])

    def _dumped_together(self) -> list[range]:
        cuts = [self.first_view, *self.added_views, self.views.stop]
        return [range(first, stop) for first, stop in pairwise(cuts)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Where the number of entries of each record of a ragged field stands."""

    field: str
    """The field of counts: unsigned integers, one a record and position."""
    minus: int
    """How many entries fewer than counted the ragged field holds at each: gaps are one fewer than classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldRecord:
    """One array of the store, axes (*axes, *inner)."""

    name: str
    """Path in the store, such as `logits/index`."""
    dtype: str
    """Type of an entry: `uint8`, `uint16`, `uint32`, `uint64`, `float16`, `float32`."""
    inner: tuple[int, ...]
    """Lengths of the axes after `axes`; for a ragged field one number: the most entries that a record can have."""
    inner_names: tuple[str, ...]
    """Their names."""
    axes: tuple[str, ...] = RECORD_AXES
    """Leading axes: (view, sample) for what belongs to a record, (sample,) for `key` and `label`, () for a table of the cache."""
    fill_value: int | float | str = 0
    """A value that no record holds, so that a missing chunk never reads as data; `NaN` for floats."""
    bits: int | None = None
    """Bits of an entry in the mapped layout, where entries are packed along the last axis; None for whole bytes."""
    lengths: Lengths | None = None
    """How many entries each record has, for a ragged field; None where all have the same."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What is needed to decode: quantiser, temperatures."""

    @property
    def per_view(self) -> bool:
        """Whether the first axis is the view."""
        return self.axes == RECORD_AXES


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of the store."""

    path: str
    """Relative to the cache's directory, with forward slashes."""
    size_bytes: int
    """Exact length."""
    sha256: str
    """Digest of the whole file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRecord:
    """A finished block. It is written after the block's files are on the disk: its presence is the mark."""

    block: Block
    """Which block."""
    files: tuple[FileRecord, ...]
    """Its files."""
    content: str
    """Digest of the records themselves, whatever the layout of the files: see `content_digest`."""
    totals: dict[str, float]
    """Sums over the block's records, from which the manifest's statistics are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What the stored labels look like."""

    teacher_accuracy: float | None
    """Share of records whose largest logit is at the dataset's label; None for outputs with position axes."""
    retained_mass: dict[str, float]
    """Mean probability mass of the kept classes, by temperature."""
    entries: float
    """Mean number of (class, value) entries of a record, or of each of its positions."""
    class_counts: tuple[int, ...]
    """Samples by label."""

    @classmethod
    def of_blocks(cls, blocks: Sequence[BlockRecord], *, class_counts: tuple[int, ...]) -> Self:
        """The statistics of a cache, from the sums of all its blocks."""
        totals: dict[str, float] = {}
        for block in blocks:
            for name, value in block.totals.items():
                totals[name] = totals.get(name, 0.0) + value
        return cls(
            teacher_accuracy=totals["top1_hits"] / totals["records"] if "top1_hits" in totals else None,
            retained_mass={name.partition("@")[2]: value / totals["records"] for name, value in totals.items() if "@" in name},
            entries=totals["entries"] / totals["records"],
            class_counts=class_counts,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The digest of one fully transformed input, recomputed before training."""

    row: int
    """Row of the sample."""
    view: int
    """Number of the view."""
    sha256: str
    """Digest of the view's pixels."""


def probed_view(number: int, views: range) -> int:
    """The view that probe `number` of a cache shows: the one of that number where it is there, so that a part has the whole's probes."""
    return number if number in views else views[number % len(views)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """A sample that the dump left out because it could not be read."""

    name: str
    """What the dataset calls it: its file, or its row."""
    key: str
    """The digest of the encoded sample in hexadecimal; empty where only decoding it would give one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a cache comes from. Not part of the recipe: it does not change the numbers."""

    created: str
    """UTC, ISO 8601; from SOURCE_DATE_EPOCH where that is set."""
    created_by: str
    """User name."""
    command: str
    """What was typed."""
    device: str
    """What the teacher ran on."""
    batch_size: int
    """Samples in a forward pass."""
    versions: dict[str, str]
    """Python and the libraries."""
    teacher_file: str
    """Where the teacher's weights were."""
    dataset_spec: str
    """The dataset's spec with its location, as training opens it by default."""
    skipped: tuple[SkippedSample, ...] = optional(())
    """Samples of the dataset that could not be read and were left out."""
    views: tuple[int, int] | None = optional(None)
    """First view and view after the last, of views that came later; None for those that the cache began with."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: written last, so its presence means that the cache is complete."""

    format_version: str
    """Major.minor. A reader refuses another major version and keeps unknown keys of a later minor one."""
    recipe: Recipe
    """What determines the numbers."""
    recipe_key: str
    """Digest of the recipe."""
    layout: str
    """How the arrays lie in files: `zarr` (mapped), `parquet` or `compact`. The records are the same."""
    grid: BlockGrid
    """How the arrays are cut."""
    fields: tuple[FieldRecord, ...]
    """All arrays."""
    calibration: dict[str, float]
    """Constants of the codec that were measured on the teacher when the dump began; mostly empty."""
    contents: dict[str, str]
    """Digest of each field that belongs to no block, by name: sample keys, labels, tables."""
    statistics: Statistics
    """Accuracy, retained mass, class counts."""
    probes: tuple[Probe, ...]
    """Digests of a few transformed inputs."""
    provenance: Provenance
    """Who, when, with what."""
    license: str | None
    """The licence under which the labels are shared; None when nobody said."""
    metadata_files: tuple[FileRecord, ...]
    """Files that belong to no block: Zarr metadata, sample keys, labels."""
    blocks: tuple[BlockRecord, ...]
    """Every block with its files: the truth about what is present."""
    history: tuple[Provenance, ...] = optional(())
    """Where views come from that were added or merged later."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Top-level keys that this version does not know."""

    @cached_property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file but the manifest itself."""
        return (*self.metadata_files, *(file for block in self.blocks for file in block.files))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size_bytes for file in self.files)

    @property
    def content(self) -> str:
        """The logical hash: equal for equal records, labels and tables on the same grid, whatever the layout."""
        return sha256(canonical_json({"blocks": [block.content for block in self.blocks], "fields": self.contents}))

    def to_bytes(self) -> bytes:
        """The file's content: indented JSON whose `digest` covers every byte of the file."""
        document = to_json(self)
        document |= document.pop("extra")
        document["digest"] = NO_DIGEST
        data = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        return data.replace(f'\n "digest": "{NO_DIGEST}"'.encode(), f'\n "digest": "{sha256(data)}"'.encode())

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """Reads and checks a manifest.

        Args:
            data: The file's content.
            where: Its path, for messages.

        Raises:
            FormatError: It is of another major version, or has not the form of a manifest.
            IntegrityError: It was changed or damaged after it was written.
        """
        document = _parse_object(data, where)
        version = document.get("format_version")
        if not isinstance(version, str) or version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
            raise FormatError(f"{where}: expected format {FORMAT_VERSION.split('.')[0]}.x, found {version!r}; a newer kdcache may read it")
        digest = document.pop("digest", None)
        if not isinstance(digest, str) or digest != _digest_of_file(data, digest):
            raise IntegrityError(f"{where} is damaged or was edited: its digest does not match; pull or dump the cache again")
        if _digest(document) is None:
            raise FormatError(f"{where}: expected JSON without NaN, infinity and lone surrogates")
        known = {name: document.pop(name) for name in cls.__dataclass_fields__ if name != "extra" and name in document}
        recipe_key = _digest(known.get("recipe"))
        manifest = from_json(cls, {**known, "extra": document}, where=where)
        if manifest.recipe_key != recipe_key:
            raise IntegrityError(f"{where}: the recipe key is {manifest.recipe_key}, but the recipe's digest is {recipe_key}")
        return manifest


def recipe_differences(found: object, wanted: object) -> list[str]:
    """The leaves in which two records differ, as `field: found → wanted` lines."""
    before, after = _leaves(to_json(found)), _leaves(to_json(wanted))
    names = sorted(before.keys() | after.keys())
    return [f"{name}: {before.get(name, 'absent')} → {after.get(name, 'absent')}" for name in names if before.get(name) != after.get(name)]


def _leaves(document: Any, path: str = "") -> dict[str, str]:
    if isinstance(document, dict):
        children = list(document.items())
    elif isinstance(document, list):
        children = list(enumerate(document))
    else:
        return {path: json.dumps(document, ensure_ascii=False)}
    leaves: dict[str, str] = {}
    for key, value in children:
        leaves |= _leaves(value, f"{path}.{key}" if path else str(key))
    return leaves


def _digest_of_file(data: bytes, digest: str) -> str | None:
    """The digest of a file's bytes with zeros in place of the digest that stands in it; None if it stands there twice, or is none."""
    try:
        return sha256(_replace_once(data, digest, NO_DIGEST))
    except ValueError:
        return None


def _replace_once(data: bytes, old: str, new: str) -> bytes:
    parts = data.split(json.dumps(old).encode())
    if len(parts) != 2:
        raise ValueError(f"expected {old} once")
    return json.dumps(new).encode().join(parts)


def _digest(document: object) -> str | None:
    """The digest of a JSON value; None for one that has no canonical form (NaN, infinity, lone surrogates)."""
    try:
        return sha256(canonical_json(document))
    except (ValueError, RecursionError):
        return None


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_object_with_unique_keys)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is damaged: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise FormatError(f"{where}: expected a JSON object, found {type(document).__name__}")
    return document
