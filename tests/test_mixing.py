"""MixUp and CutMix: functions of the key, with the published distributions, the same at any batch size and worker count."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdcache.learning.datasets import Dataset, wrap_dataset
from kdcache.learning.loader import ViewLoader, _collate, _Items, mixed_labels
from kdcache.learning.losses import distillation_loss
from kdcache.learning.mixing import ONE, Mix, Mixing, mix_images
from kdcache.learning.samples import ViewedSamples
from kdcache.learning.schedule import ViewSchedule
from kdcache.learning.views import SeededViews
from kdcache.records.errors import MismatchError
from kdcache.records.hashing import stable_integer
from kdcache.records.manifest import MixingRecord, ViewsRecord
from kdcache.targets.soft_targets import SoftTargets

BOTH = MixingRecord(mixup=0.4, cutmix=1.0, probability=1.0, switch=0.5)
FLIP = ({"op": "RandomHorizontalFlip", "p": 0.5},)
NUM_SAMPLES = 30
Array = np.ndarray[Any, np.dtype[Any]]


def views_with(mixing: MixingRecord | None, pipeline: tuple[dict[str, Any], ...] = FLIP) -> SeededViews:
    """Views that are flipped half of the time, and mixed."""
    return SeededViews(ViewsRecord(pipeline=pipeline, seed=3, versions={}, mixing=mixing))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Images of noise, each of another class."""
    images = torch.randint(0, 256, (NUM_SAMPLES, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return wrap_dataset([(image, label) for label, image in enumerate(images)], num_classes=NUM_SAMPLES)


@pytest.fixture(scope="module")
def keys() -> Array:
    """Sample keys."""
    return np.random.default_rng(0).integers(0, 256, (500, 16), np.uint8)


def chosen(record: MixingRecord, keys: Array, num_views: int = 8) -> list[Mix | None]:
    """The mixes of all views of all samples."""
    mixing = Mixing(record, seed=0, keys=keys)
    return [mixing.choose(key.tobytes(), view) for key in keys for view in range(num_views)]


def test_a_mix_depends_on_seed_key_and_view_alone(keys: Array) -> None:
    """Neither the order of the set nor what was asked before changes a mix; seed, key and view do."""
    mixing, shuffled = Mixing(BOTH, seed=0, keys=keys), Mixing(BOTH, seed=0, keys=keys[::-1])
    wanted = [(key.tobytes(), view) for key in keys[:20] for view in range(4)]
    mixes = {place: mixing.choose(*place) for place in wanted}
    assert {place: shuffled.choose(*place) for place in reversed(wanted)} == mixes
    assert len({mix.share for mix in mixes.values() if mix}) == len(wanted)
    assert Mixing(BOTH, seed=1, keys=keys).choose(*wanted[0]) != mixes[wanted[0]]


def test_shares_are_drawn_from_the_beta_distribution(keys: Array) -> None:
    """λ has the mean 1/2 and the variance 1 / (4 (2 α + 1)) of Beta(α, α)."""
    for alpha in (0.2, 1.0, 4.0):
        shares = np.array([mix.share for mix in chosen(MixingRecord(mixup=alpha, cutmix=0, probability=1, switch=0.5), keys) if mix])
        assert abs(shares.mean() - 0.5) < 0.02
        assert abs(shares.var() * 4 * (2 * alpha + 1) - 1) < 0.06


def test_kinds_come_as_often_as_asked_for(keys: Array) -> None:
    """`probability` of the views are mixed, `switch` of these by CutMix; with one kind only, by that one."""
    mixes = chosen(MixingRecord(mixup=0.2, cutmix=1.0, probability=0.6, switch=0.25), keys)
    mixed = [mix for mix in mixes if mix]
    assert abs(len(mixed) / len(mixes) - 0.6) < 0.02
    assert abs(sum(mix.centre is not None for mix in mixed) / len(mixed) - 0.25) < 0.03
    assert all(mix and mix.centre for mix in chosen(MixingRecord(mixup=0, cutmix=1, probability=1, switch=0), keys[:50]))


def test_partners_are_spread_over_all_samples(keys: Array) -> None:
    """Every sample is a partner about as often as any other (chi-square)."""
    counts = Counter(mix.partner for mix in chosen(BOTH, keys, num_views=40) if mix)
    expected = 40 * len(keys) / len(keys)
    chi_square = sum((counts[key.tobytes()] - expected) ** 2 / expected for key in keys)
    assert abs(chi_square - len(keys)) < 5 * (2 * len(keys)) ** 0.5


def test_mixup_is_the_weighted_mean_of_the_pixels() -> None:
    """λ of the one and 1 - λ of the other, rounded once; λ = 1 and 0 give one of them as it is."""
    own, partner = torch.full((1, 4, 4), 200, dtype=torch.uint8), torch.full((1, 4, 4), 101, dtype=torch.uint8)
    for share in (0.0, 0.25, 0.5, 0.7, 1.0):
        mixed, kept = mix_images(own, partner, Mix(partner=b"", share=share, centre=None))
        assert abs(kept - share) <= 0.5 / ONE
        assert abs(mixed[0, 0, 0].item() - (share * 200 + (1 - share) * 101)) <= 0.51
        assert mixed.dtype == torch.uint8
        assert mixed.unique().numel() == 1


def test_cutmix_pastes_a_box_and_counts_its_pixels() -> None:
    """The share is that of the pixels that stayed, also where the border cuts the box."""
    own, partner = torch.zeros(3, 20, 30, dtype=torch.uint8), torch.full((3, 20, 30), 255, dtype=torch.uint8)
    for centre in ((0.5, 0.5), (0.0, 0.9), (1.0, 0.02)):
        mixed, share = mix_images(own, partner, Mix(partner=b"", share=0.64, centre=centre))
        assert (mixed == 0).float().mean().item() == pytest.approx(share)
        rows, columns = (mixed[0] == 255).any(1).nonzero().flatten(), (mixed[0] == 255).any(0).nonzero().flatten()
        assert (mixed[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 255).all()
    whole, share = mix_images(own, partner, Mix(partner=b"", share=0.64, centre=(0.5, 0.5)))
    assert share == pytest.approx(0.64, abs=0.02)
    assert torch.equal(whole[0], whole[2])


def test_views_of_two_sizes_are_not_mixed() -> None:
    """A partner of another size is refused, and the remedy named."""
    with pytest.raises(MismatchError, match="size=N"):
        mix_images(
            torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 5, dtype=torch.uint8), Mix(partner=b"", share=0.5, centre=None)
        )


@pytest.fixture(scope="module")
def expected(dataset: Dataset) -> dict[tuple[int, int], tuple[bytes, list[float]]]:
    """Pixels and label shares by (label, view), made one by one and by hand."""
    samples = ViewedSamples(dataset, views_with(BOTH))
    assert samples.mixing
    made = {}
    for row in range(NUM_SAMPLES):
        for view in range(2):
            key = dataset.keys[row].tobytes()
            mix = samples.mixing.choose(key, view)
            assert mix
            partner = next(other for other in range(NUM_SAMPLES) if dataset.keys[other].tobytes() == mix.partner)
            flip = views_with(None)
            mixed, share = mix_images(flip(dataset[row][0], key, view), flip(dataset[partner][0], mix.partner, view), mix)
            shares = torch.zeros(NUM_SAMPLES)
            shares[row] += share
            shares[partner] += 1 - share
            made[row, view] = (mixed.numpy().tobytes(), shares.tolist())
    return made


def rows_and_views(rows: Array, views: Array) -> SoftTargets:
    """In place of a teacher's answers: which (row, view) a record is."""
    pairs = torch.stack([torch.from_numpy(rows), torch.from_numpy(views)], -1).float()
    return SoftTargets(log_probs=pairs, index=None, tail_mass=None, temperatures=(), num_classes=2)


@pytest.mark.parametrize(("num_workers", "batch_size", "views_per_load"), [(0, 1, 1), (0, 8, 2), (0, 64, 1), (1, 7, 1), (2, 64, 2)])
def test_mixed_views_do_not_depend_on_their_batch(
    num_workers: int, batch_size: int, views_per_load: int, dataset: Dataset, expected: dict[tuple[int, int], tuple[bytes, list[float]]]
) -> None:
    """Pixels and label shares are those that each view has when made alone, at any batch size, worker count and order."""
    loader = ViewLoader(
        ViewedSamples(dataset, views_with(BOTH)), batch_size=batch_size, seed=batch_size, schedule=ViewSchedule(views=range(2)),
        gather=rows_and_views, num_workers=num_workers, views_per_load=views_per_load,
    )  # fmt: skip
    found = {}
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            assert batch.soft is not None
            for image, shares, (row, view) in zip(batch.images, batch.labels, batch.soft.log_probs.long().tolist(), strict=True):
                found[row, view] = ((image * 255).round().to(torch.uint8).numpy().tobytes(), shares)
    assert found.keys() == expected.keys()
    for place, (pixels, shares) in expected.items():
        assert found[place][0] == pixels
        assert torch.allclose(found[place][1], torch.tensor(shares))


def test_cross_entropy_takes_shares_of_classes() -> None:
    """The loss of a mixed sample is λ times that of its own label and 1 - λ times that of its partner's."""
    logits: Tensor = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    soft = SoftTargets.from_logits(logits)
    own, other, share = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 3]), torch.linspace(0, 1, 5)
    mixed = share.unsqueeze(-1) * torch.eye(4)[own] + (1 - share).unsqueeze(-1) * torch.eye(4)[other]
    by_hand = -(share * logits.log_softmax(-1)[range(5), own] + (1 - share) * logits.log_softmax(-1)[range(5), other]).mean()
    assert torch.allclose(distillation_loss(logits, soft, mixed, alpha=0.0), by_hand)


def test_a_mixed_set_needs_all_partners(dataset: Dataset) -> None:
    """Part of a set whose views are mixed with any of it is refused, not mixed with others silently."""
    part = wrap_dataset([dataset[row] for row in range(20)], num_classes=NUM_SAMPLES)
    with pytest.raises(MismatchError, match="any of 30 samples, of which 10 are not in the dataset"):
        ViewedSamples(part, views_with(BOTH), partners=dataset.keys)
    ViewedSamples(part, views_with(None), partners=dataset.keys)


def mixed_by_format(
    seed: int, key: bytes, view: int, record: MixingRecord, keys: list[bytes], image_of: Callable[[bytes], Array]
) -> tuple[Array, float, bytes]:
    """A mixed view made from section 11 of FORMAT.md alone: pixels, own share, partner's key."""
    own = image_of(key).astype(np.int64)
    root = stable_integer("mix", seed, key, view)
    state = np.random.RandomState([root % 2**32, root >> 32])
    m, c, y, x = state.random_sample(4)
    if m >= record.probability:
        return own, 1.0, key
    is_cut = record.cutmix > 0 and (record.mixup == 0 or c < record.switch)
    share = state.beta(*2 * [record.cutmix if is_cut else record.mixup])
    ordered = sorted(set(keys))
    partner_key = ordered[stable_integer("partner", seed, key, view) % len(ordered)]
    partner = image_of(partner_key).astype(np.int64)
    if not is_cut:
        w = round(share * 2**16)
        return (own * w + partner * (2**16 - w) + 2**15) >> 16, w / 2**16, partner_key
    s, (_, height, width) = (1 - share) ** 0.5, own.shape
    rows = slice(max(0, round(y * height - s * height / 2)), min(height, round(y * height + s * height / 2)))
    columns = slice(max(0, round(x * width - s * width / 2)), min(width, round(x * width + s * width / 2)))
    own[:, rows, columns] = partner[:, rows, columns]
    return own, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width), partner_key


@pytest.mark.parametrize("record", [BOTH, MixingRecord(mixup=0.2, cutmix=0.5, probability=0.5, switch=0.3)])
def test_mixed_views_are_what_the_format_says(record: MixingRecord, dataset: Dataset) -> None:
    """Another implementation that follows the page makes the same pixels and shares."""
    samples = ViewedSamples(dataset, views_with(record))
    images = {key.tobytes(): (row, dataset[row][0]) for row, key in enumerate(dataset.keys)}
    flip = views_with(None)
    for view in range(3):
        for key, (row, _) in images.items():
            pixels, share, partner = mixed_by_format(
                3, key, view, record, list(images), lambda other, view=view: flip(images[other][1], other, view).numpy()
            )
            made = samples.view(dataset[row], row, view)
            assert np.array_equal(made.image.numpy(), pixels)
            assert made.share == pytest.approx(share)
            assert (made.label, made.partner_label) == (row, images[partner][0])
            assert made.main_label == (row if share >= 0.5 else images[partner][0])


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_mixed_views_are_the_same_in_other_processes(
    start_method: str, dataset: Dataset, expected: dict[tuple[int, int], tuple[bytes, list[float]]]
) -> None:
    """A worker that was forked, and one that began from nothing, make the pixels that this process makes."""
    items = _Items(ViewedSamples(dataset, views_with(BOTH)))
    wanted = [[(row, (0, 1)) for row in range(NUM_SAMPLES)]]
    loader = DataLoader(items, batch_sampler=wanted, num_workers=1, collate_fn=_collate, multiprocessing_context=start_method)  # type: ignore[arg-type]
    ((images, labels, partners, shares, rows, views),) = list(loader)
    mixed = mixed_labels(labels, partners, shares, NUM_SAMPLES)
    for image, classes, row, view in zip(images, mixed, rows.tolist(), views.tolist(), strict=True):
        assert image.numpy().tobytes() == expected[row, view][0]
        assert torch.allclose(classes, torch.tensor(expected[row, view][1]))
