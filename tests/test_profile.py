"""The profile, the teacher's mean answer to each top class: exact sums, and a tail that looks like it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks.synthetic import class_structure, sample_logits
from stored import NUM_SAMPLES, NUM_VIEWS, LinearTeacher, codec, dump_noise, keep_ragged, tree
from torch import Tensor

from kdcache.learning.cache import Cache
from kdcache.learning.losses import kd_loss
from kdcache.records.consistency import check_manifest
from kdcache.records.errors import ConfigError
from kdcache.records.manifest import BlockGrid
from kdcache.targets.profile import (
    PRIOR_RECORDS,
    PROFILE,
    SHARPNESS,
    UNIT,
    UP_TO_CLASSES,
    Profile,
    ProfileSum,
    profile_field,
    profile_table,
)
from kdcache.targets.soft_targets import SoftTargets

Logits = Callable[..., Tensor]
CPU = torch.device("cpu")


def summed(*batches: Tensor) -> ProfileSum:
    """The sums over batches of logits."""
    sums = ProfileSum(batches[0].shape[-1], CPU)
    for logits in batches:
        sums.add(logits, logits.argmax(-1))
    return sums


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5])
def test_sums_do_not_depend_on_the_order(scale: float, teacher_logits: Logits) -> None:
    """Sums are the same to the last bit in any order of records, however they are cut into batches and blocks."""
    logits = teacher_logits(200, 7) * scale
    whole = summed(logits).numpy()
    shuffled = logits[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    np.testing.assert_array_equal(summed(shuffled).numpy(), whole)
    np.testing.assert_array_equal(summed(*logits.split(13)).numpy(), whole)
    np.testing.assert_array_equal(summed(logits.reshape(10, 4, 5, 7)).numpy(), whole)
    np.testing.assert_array_equal(summed(logits[:90]).numpy() + summed(logits[90:]).numpy(), whole)
    assert whole[:, -1].sum() == 200


def test_rows_are_mean_log_probabilities(teacher_logits: Logits) -> None:
    """Row t is the mean log-probability at T=1 over the records with t on top and the prior ones, to float16's last place."""
    logits = teacher_logits(500, 6)
    table = profile_table(summed(logits).numpy())
    assert table.dtype == np.float16
    log_probs = logits.double().log_softmax(-1)
    for top in range(6):
        own = log_probs[logits.argmax(-1) == top]
        exact = torch.cat([own, log_probs.mean(0).expand(PRIOR_RECORDS, -1)]).mean(0)
        np.testing.assert_allclose(table[top].astype(np.float64), exact, rtol=2.0**-11, atol=UNIT)


def test_many_records_outweigh_the_prior(teacher_logits: Logits) -> None:
    """With many records for a class, its row is their own mean to a few hundredths of a nat."""
    logits = teacher_logits(40, 4)
    sums = 1000 * summed(logits).numpy()
    own = logits[logits.argmax(-1) == 2].double().log_softmax(-1).mean(0).numpy()
    np.testing.assert_allclose(profile_table(sums)[2].astype(np.float64), own, atol=0.05)


def test_a_class_that_is_never_on_top_gets_the_mean_of_all(teacher_logits: Logits) -> None:
    """The row of a class that no record has on top is the mean of all records; without any record the table is still finite."""
    logits = teacher_logits(300, 8)
    logits[:, 5] = -20
    table = profile_table(summed(logits).numpy())
    exact = logits.double().log_softmax(-1).mean(0).numpy()
    np.testing.assert_allclose(table[5].astype(np.float64), exact, rtol=2.0**-11, atol=UNIT)
    assert np.isfinite(profile_table(ProfileSum(8, CPU).numpy())).all()


def test_extreme_logits_give_a_finite_table() -> None:
    """Records that are certain beyond all measure leave finite numbers of float16 in the table."""
    logits = torch.tensor([[3e38, -3e38, 0.0], [0.0, 1e6, 0.0], [5.0, 5.0, 5.0]])
    assert np.isfinite(profile_table(summed(logits).numpy())).all()


def with_tail_of_profile(soft: SoftTargets, table: Tensor, temperature: float) -> Tensor:
    """The full distribution that the policy `profile` stands for, built record by record and class by class in float64."""
    assert soft.index is not None
    kept, mass = soft.probs_at(temperature)
    rows = []
    for record in range(len(kept)):
        index = soft.index[record][soft.kept[record]].tolist()
        rest = [c for c in range(soft.num_classes) if c not in index]
        shares = (table[soft.top1[record]].double()[rest] / temperature).softmax(-1)
        full = torch.zeros(soft.num_classes, dtype=torch.float64)
        full[index] = kept[record][soft.kept[record]].double()
        full[rest] = mass[record].double() * shares
        rows.append(full)
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 10.0])
@pytest.mark.parametrize("counts", [[3] * 6, [1, 7, 2, 19, 1, 12]], ids=["topk", "ragged"])
def test_the_policy_is_the_full_loss_with_the_profiles_tail(counts: list[int], temperature: float, teacher_logits: Logits) -> None:
    """With `profile`, value and gradient are those of F.kl_div when the tail's mass is shared out as the profile has it, softened by T."""
    student = teacher_logits(6, 20, seed=1).double().requires_grad_()
    table = (teacher_logits(20, 20, seed=9) / 2).log_softmax(-1).double()
    soft = dataclasses.replace(keep_ragged(teacher_logits(6, 20, seed=2).double(), counts), profile=Profile(table))
    full = with_tail_of_profile(soft, table, temperature)
    expected = temperature**2 * F.kl_div((student / temperature).log_softmax(-1), full, reduction="batchmean")
    found = kd_loss(student, soft, temperature=temperature, tail="profile")
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10


def test_a_wild_profile_keeps_loss_and_gradient_finite(teacher_logits: Logits) -> None:
    """A profile with log-probabilities down to float16's least gives finite losses and gradients, at low temperatures too."""
    table = torch.full((20, 20), -60_000.0).fill_diagonal_(0)
    soft = dataclasses.replace(keep_ragged(teacher_logits(4, 20), [1, 5, 19, 2]), profile=Profile(table))
    for temperature in (0.05, 1.0, 4.0):
        student = teacher_logits(4, 20, seed=1).requires_grad_()
        found = kd_loss(student, soft, temperature=temperature, tail="profile")
        assert found.isfinite()
        assert torch.autograd.grad(found, student)[0].isfinite().all()


def test_the_profile_brings_the_tail_nearer(record_property: Callable[[str, object], None]) -> None:
    """Where tails follow the top class, as in a hierarchy of classes, the KL from the full distribution at T=4 falls by a tenth or more.

    That takes records enough to average over: here 100 for each class, and others than are measured.
    """
    structure = class_structure(300, seed=3)
    table = Profile.from_numpy(profile_table(summed(*(sample_logits(structure, 6000, seed=seed)[0] for seed in range(5))).numpy()))
    logits = sample_logits(structure, 256, seed=9)[0]
    made = codec("topk,k=16", 300)
    soft = dataclasses.replace(made.decode(made.encode(logits)), profile=table)
    exact = (logits.double() / 4).softmax(-1)
    left = {}
    for name, rows in (("uniform", torch.zeros(300, 300)), ("profile", table.rows(torch.arange(300)))):
        full = with_tail_of_profile(soft, rows, 4.0)
        left[name] = (torch.xlogy(exact, exact) - torch.xlogy(exact, full)).sum(-1).mean().item()
    shown = f"KL from the full distribution at T=4: {left['uniform']:.4f} uniform, {left['profile']:.4f} profile"
    record_property("kl", shown)
    print(shown)
    assert left["profile"] < 0.9 * left["uniform"], shown


def test_without_a_profile_the_policy_says_how_to_get_one(teacher_logits: Logits) -> None:
    """The tail policy `profile` on targets of a cache without one is a ConfigError that names the dump's option."""
    soft = keep_ragged(teacher_logits(3, 20), [1, 2, 3])
    with pytest.raises(ConfigError, match="does not keep; dump with profile=True"):
        kd_loss(teacher_logits(3, 20, seed=1), soft, tail="profile")


@pytest.mark.parametrize("spec", ["topk,k=4", "adaptive,mean_k=4,max_k=9"])
def test_a_dumped_cache_has_its_profile(spec: str, tmp_path: Path) -> None:
    """A cache holds the mean answers to all its views, and its targets bring them along."""
    dump_noise(tmp_path, codec=spec, num_classes=12)
    dump_noise(tmp_path, "all", codec="dense,dtype=float32", num_classes=12)
    cache = Cache(tmp_path / "cache")
    rows, views = (axis.ravel() for axis in np.meshgrid(np.arange(NUM_SAMPLES), np.arange(NUM_VIEWS)))
    exact = Cache(tmp_path / "all").soft_targets(rows, views).log_probs
    np.testing.assert_array_equal(cache.reader.shared(PROFILE), profile_table(summed(exact).numpy()))
    soft = cache.soft_targets(rows, views)
    assert soft.profile is not None
    assert torch.equal(soft.profile.rows(torch.arange(12)), torch.from_numpy(cache.reader.shared(PROFILE)).float() * SHARPNESS)
    assert kd_loss(exact, soft, temperature=4.0, tail="profile").isfinite()
    assert soft.to(CPU).profile is soft.profile


@pytest.mark.parametrize("spec", ["topk,k=4,profile=False", "topk,k=12", "dense", "sampled"])
def test_a_cache_without_a_profile_says_so(spec: str, tmp_path: Path) -> None:
    """Where nothing is left out, or the dump was told so, there is no profile, in the store or in the targets."""
    manifest = dump_noise(tmp_path, codec=spec, num_classes=12).manifest
    assert PROFILE not in [field.name for field in manifest.fields]
    cache = Cache(tmp_path / "cache")
    assert cache.profile is None
    assert cache.soft_targets(np.arange(3), np.zeros(3, np.int64)).profile is None


def test_a_resumed_dump_has_the_same_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump that was broken off between and within blocks, and went on, ends in the same bytes as an undisturbed one."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    dump_noise(tmp_path, "undisturbed", codec="topk,k=4", num_classes=30)
    for images in (50, 90, 1):
        monkeypatch.setattr(LinearTeacher, "images_seen", 0)
        monkeypatch.setattr(LinearTeacher, "images_left", images)
        with pytest.raises(KeyboardInterrupt):
            dump_noise(tmp_path, codec="topk,k=4", num_classes=30)
    monkeypatch.setattr(LinearTeacher, "images_left", float("inf"))
    assert 0 < dump_noise(tmp_path, codec="topk,k=4", num_classes=30).blocks_computed < 6
    assert tree(tmp_path / "cache") == tree(tmp_path / "undisturbed")


def test_the_largest_profile_fits_any_block_length(tmp_path: Path) -> None:
    """A table belongs to no block, so a cache with blocks of 65,536 samples may hold the largest one."""
    manifest = dump_noise(tmp_path, codec="topk,k=4", num_classes=30).manifest
    grid = BlockGrid(num_samples=65_536, num_views=1, block_samples=65_536, block_views=1)
    dataset = dataclasses.replace(manifest.recipe.dataset, num_samples=65_536)
    large = dataclasses.replace(
        manifest,
        grid=grid,
        recipe=dataclasses.replace(manifest.recipe, dataset=dataset),
        fields=tuple(profile_field(UP_TO_CLASSES) if field.name == PROFILE else field for field in manifest.fields),
        blocks=(dataclasses.replace(manifest.blocks[0], block=grid.blocks()[0]),),
        probes=(),
    )
    check_manifest(large, where="m")
