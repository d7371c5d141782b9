"""Teachers with position axes, tokens or pixels: dumped with any codec, gathered and trained on like others."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import kdcache_json
from stored import BATCH_SIZE, NUM_SAMPLES, NUM_VIEWS, LinearTeacher, codec, dump_noise
from torch import Tensor

from kdcache.learning.cache import Cache
from kdcache.learning.checkpoints import load_model
from kdcache.learning.datasets import open_dataset
from kdcache.learning.loader import to_unit_range
from kdcache.learning.losses import TAILS, distillation_loss, kd_loss
from kdcache.records.errors import TeacherError
from kdcache.records.hashing import stable_integer
from kdcache.records.specs import Spec
from kdcache.targets.soft_targets import SoftTargets

NUM_CLASSES = 20
POSITIONS = [(5,), (3, 2)]
CODECS = [
    "topk,k=4", "topk,k=1", "topk,k=20", "topk,k=4,values=float16", "adaptive,mean_k=3,max_k=8", "adaptive,kl=0.2,max_k=1",
    "sampled,draws=9", "dense", "dense,dtype=float32", "dense,dtype=uint8",
]  # fmt: skip


Positions = tuple[int, ...]
CacheOf = Callable[[str, Positions], Path]


@pytest.fixture(scope="module")
def cache_of(tmp_path_factory: pytest.TempPathFactory) -> CacheOf:
    """Dumps with a codec and position axes, each once; tests must not change the cache."""
    folder = tmp_path_factory.mktemp("positions")

    @cache
    def dumped(spec: str, positions: Positions) -> Path:
        return dump_noise(folder, f"{spec}-{positions}", codec=spec, num_classes=NUM_CLASSES, positions=positions).path

    return dumped


@pytest.fixture(scope="module")
def live(cache_of: CacheOf) -> Callable[[Positions], Tensor]:
    """The teacher's own answers to all views, [views, samples, *positions, classes], in the batches that a dump cuts."""

    @cache
    def answers(positions: Positions) -> Tensor:
        root = cache_of("dense", positions)
        manifest, views = Cache(root).manifest, Cache(root).views
        dataset = open_dataset(Spec.parse(manifest.provenance.dataset_spec), trusted=True)
        arch = Spec.parse(manifest.recipe.teacher.spec)
        model = load_model(Path(manifest.provenance.teacher_file), num_classes=NUM_CLASSES, image_shape=(3, 8, 8), arch=arch).model
        logits = torch.empty(NUM_VIEWS, NUM_SAMPLES, *positions, NUM_CLASSES)
        for block in manifest.grid.blocks():
            for start in range(*block.samples, BATCH_SIZE):
                rows = range(start, min(start + BATCH_SIZE, block.samples[1]))
                for view in range(*block.views):
                    images = [views(dataset[row][0], dataset.keys[row].tobytes(), view) for row in rows]
                    with torch.inference_mode():
                        logits[view, rows.start : rows.stop] = model(to_unit_range(torch.stack(images), torch.device("cpu")))
        return logits

    return answers


@pytest.mark.parametrize(("positions", "spec"), [*(((3, 2), spec) for spec in CODECS), *(((5,), spec) for spec in CODECS[::2])], ids=str)
def test_gathered_targets_are_the_live_ones(
    spec: str, positions: Positions, cache_of: CacheOf, live: Callable[[Positions], Tensor]
) -> None:
    """Random (row, view) pairs of a dumped cache give bit for bit what encoding the teacher's live logits gives."""
    cached = Cache(cache_of(spec, positions))
    manifest, keys = cached.manifest, cached.reader.shared("key")
    assert manifest.recipe.teacher.positions == positions
    assert manifest.statistics.teacher_accuracy is None
    made = codec(manifest.recipe.codec, NUM_CLASSES, **manifest.calibration)
    generator = np.random.default_rng(1)
    rows, views = generator.integers(NUM_SAMPLES, size=40), generator.integers(NUM_VIEWS, size=40)
    soft = cached.soft_targets(rows, views)
    assert soft.log_probs.shape[:-1] == (40, *positions)
    for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
        seed = stable_integer("codec", manifest.recipe.views.seed, keys[row].tobytes(), view)
        record = made.decode(made.encode(live(positions)[view, row][None], [seed]))
        length = min(record.log_probs.shape[-1], soft.log_probs.shape[-1])
        assert torch.equal(soft.log_probs[i][..., :length], record.log_probs[0][..., :length])
        assert not soft.kept[i][..., length:].any()
        assert not record.kept[0][..., length:].any()
        if soft.index is not None and record.index is not None:
            assert torch.equal(soft.index[i][..., :length], record.index[0][..., :length])
        if soft.tail_mass is not None and record.tail_mass is not None:
            assert torch.equal(soft.tail_mass[i], record.tail_mass[0])


@pytest.mark.parametrize("spec", ["topk,k=4", "adaptive,mean_k=3,max_k=8", "sampled,draws=9", "dense"])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_losses_take_positions(spec: str, positions: Positions, cache_of: CacheOf) -> None:
    """The losses work on a cache with position axes and are those of its positions taken as records, gradients included."""
    soft = Cache(cache_of(spec, positions)).soft_targets(np.arange(10), np.full(10, 3))
    flat = SoftTargets(
        log_probs=soft.log_probs.flatten(0, -2),
        index=None if soft.index is None else soft.index.flatten(0, -2),
        tail_mass=None if soft.tail_mass is None else soft.tail_mass.flatten(0, -2),
        temperatures=soft.temperatures,
        num_classes=soft.num_classes,
        sampled_at=soft.sampled_at,
        profile=soft.profile,
    )
    student = torch.randn(10, *positions, NUM_CLASSES, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(10).reshape(10, *(1 for _ in positions)).expand(10, *positions)
    temperature = soft.sampled_at or 4.0
    for tail in TAILS if soft.profile else ("bucket", "uniform", "renormalize"):
        found = kd_loss(student, soft, temperature=temperature, tail=tail)
        whole = kd_loss(student.flatten(0, -2), flat, temperature=temperature, tail=tail)
        assert found.item() == pytest.approx(whole.item(), rel=1e-5)
        mixed = distillation_loss(student, soft, labels, temperature=temperature, alpha=0.5, hard=0.2, tail=tail)
        assert torch.autograd.grad(mixed, student)[0].isfinite().all()


@pytest.mark.parametrize("spec", ["topk,k=4", "adaptive,mean_k=3,max_k=8", "sampled,draws=9", "dense,dtype=uint8"])
def test_statistics_count_positions(spec: str, cache_of: CacheOf, tmp_path: Path) -> None:
    """Mean entries and retained mass of a cache with position axes are means over positions, and `info` shows them."""
    root = cache_of(spec, (3, 2))
    manifest = Cache(root).manifest
    views, rows = (axis.ravel() for axis in np.meshgrid(np.arange(NUM_VIEWS), np.arange(NUM_SAMPLES), indexing="ij"))
    soft = Cache(root).soft_targets(rows, views)
    assert manifest.statistics.entries == pytest.approx(soft.kept.sum(-1).double().mean().item())
    if soft.tail_mass is not None:
        for i, temperature in enumerate(soft.temperatures):
            mean = (1 - soft.tail_mass[..., i]).double().mean().item()
            assert manifest.statistics.retained_mass[f"{temperature:g}"] == pytest.approx(mean)
    shown = kdcache_json("info", root, cwd=tmp_path)["manifest"]
    assert shown["statistics"]["teacher_accuracy"] is None
    assert shown["recipe"]["teacher"]["positions"] == [3, 2]


@pytest.mark.parametrize(("shape", "found"), [((NUM_CLASSES + 1,), r"\[1, 21\]"), ((5, NUM_CLASSES + 1), r"\[1, 5, 21\]")])
def test_a_class_axis_of_another_length_is_refused(
    shape: tuple[int, ...], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher whose last axis is not the classes is a TeacherError that shows what was expected and found; nothing is written."""
    real = LinearTeacher.forward
    monkeypatch.setattr(LinearTeacher, "forward", lambda self, images: real(self, images).new_zeros(len(images), *shape))
    with pytest.raises(TeacherError, match=rf"expected logits \[1, 20\] or \[1, \*positions, 20\], found {found}"):
        dump_noise(tmp_path, codec="topk,k=4", num_classes=NUM_CLASSES)
    assert not (tmp_path / "cache").exists()
