"""Sampled targets: over views, their mean is the teacher's distribution, which no truncation gives."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stored import NUM_SAMPLES, NUM_VIEWS, codec, dump_noise, seeds_for, tree
from torch import Tensor

from kdcache.learning.cache import Cache
from kdcache.learning.losses import TAILS, Tail, kd_loss
from kdcache.records.errors import ConfigError
from kdcache.records.hashing import stable_integer
from kdcache.targets.codecs import Codec
from kdcache.targets.soft_targets import SoftTargets

Logits = Callable[..., Tensor]


def draw_views(made: Codec, record: Tensor, num_views: int) -> SoftTargets:
    """One record's targets in many views, [views, …]."""
    seeds = [stable_integer("codec", 0, b"key", view) for view in range(num_views)]
    return made.decode(made.encode(record.expand(num_views, *record.shape), seeds))


def probabilities(soft: SoftTargets) -> Tensor:
    """Every class's share of the draws, [records, classes] in float64."""
    assert soft.index is not None
    shape = (*soft.log_probs.shape[:-1], soft.num_classes)
    return torch.zeros(shape, dtype=torch.float64).scatter_add(-1, soft.index, soft.log_probs.double().exp())


@pytest.mark.parametrize("draws", [1, 7, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_over_views_is_the_teachers_distribution(draws: int, temperature: float, teacher_logits: Logits) -> None:
    """Each class's mean share over 3000 views is its probability, to five standard errors of such a mean and, for rare classes, five hits.

    A class that expects x = draws · p hits has ⌊x⌋ or ⌈x⌉ of them, so with f = x - ⌊x⌋ a share's variance is f · (1 - f) / draws².
    """
    num_views = 3000
    made = codec(f"sampled,draws={draws},temperature={temperature}", 30)
    for record in teacher_logits(4, 30):
        shares = probabilities(draw_views(made, record, num_views))
        exact = (record.double() / temperature).softmax(-1)
        fraction = (exact * draws).frac()
        standard_error = (fraction * (1 - fraction)).sqrt() / draws / math.sqrt(num_views)
        assert ((shares.mean(0) - exact).abs() <= 5 * standard_error + 5 / draws / num_views).all()
        assert standard_error.max() < 0.01


@pytest.mark.parametrize("num_classes", [2, 30, 1000])
@pytest.mark.parametrize("draws", [1, 20, 500])
def test_no_class_is_a_hit_away_from_its_due(draws: int, num_classes: int, teacher_logits: Logits) -> None:
    """Of n draws a class of probability p gets n · p hits, rounded down or up, and never any when that is impossible."""
    logits = teacher_logits(64, num_classes)
    made = codec(f"sampled,draws={draws}", num_classes)
    arrays = made.encode(logits, seeds_for(64))
    hits = (probabilities(made.decode(arrays)) * draws).round()
    due = logits.double().softmax(-1) * draws
    assert (hits >= (due - 1e-6).floor()).all()
    assert (hits <= (due + 1e-6).ceil()).all()


def bias_of_gradient(student: Tensor, teacher: Tensor, soft: SoftTargets, temperature: float, tail: Tail) -> float:
    """How far the mean KD gradient over views is from the one of the full logits, in parts of its length."""
    views = student.expand(len(soft.log_probs), -1).clone().requires_grad_()
    full = views.detach().clone().requires_grad_()
    kd_loss(views, soft, temperature=temperature, tail=tail).backward()
    kd_loss(full, SoftTargets.from_logits(teacher.expand_as(full)), temperature=temperature).backward()
    assert views.grad is not None
    assert full.grad is not None
    exact = full.grad.sum(0)
    return ((views.grad.sum(0) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("temperature", "draws", "truncated"), [(1.0, 50, 0.05), (2.0, 50, 0.15)])
def test_drawn_targets_have_no_bias_where_truncated_ones_have(
    temperature: float, draws: int, truncated: float, teacher_logits: Logits, record_property: Callable[[str, object], None]
) -> None:
    """The KD gradient's mean over 2000 views is the full one for drawn targets; with as many entries kept, `renormalize` stays off.

    The error of the drawn ones goes down as views are added; that of truncated ones is the same in every view.
    """
    teacher = teacher_logits(1, 300, seed=5)[0] * 0.8
    student = teacher_logits(1, 300, seed=6)[0]
    sampled = codec(f"sampled,draws={draws},temperature={temperature}", 300)
    entries = round(draw_views(sampled, teacher, 2000).kept.sum(-1).double().mean().item())
    kept = codec(f"topk,k={entries},values=float16,temperatures={temperature}", 300)
    topk = kept.decode(kept.encode(teacher[None]))
    few, many = (bias_of_gradient(student, teacher, draw_views(sampled, teacher, views), temperature, "bucket") for views in (20, 2000))
    biased = bias_of_gradient(student, teacher, topk, temperature, "renormalize")
    shown = f"T={temperature:g}, {entries} entries: relative bias {many:.4f} drawn, {biased:.4f} truncated"
    record_property("bias", shown)
    print(shown)
    assert many < 0.01, shown
    assert many < few / 4, shown
    assert biased > truncated, shown


def test_draws_follow_from_seed_and_record_alone(teacher_logits: Logits) -> None:
    """Equal seeds draw equally, alone or in any batch; another view of the same sample draws otherwise."""
    logits = teacher_logits(32, 100)
    made = codec("sampled,draws=20", 100)
    first = made.decode(made.encode(logits, seeds_for(32, view=0)))
    again = made.decode(made.encode(logits, seeds_for(32, view=0)))
    other = made.decode(made.encode(logits, seeds_for(32, view=1)))
    assert torch.equal(probabilities(first), probabilities(again))
    changed = (probabilities(first) != probabilities(other)).any(-1)
    assert changed.double().mean() > 0.6
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    seeds = seeds_for(32, view=0)
    shuffled = made.decode(made.encode(logits[order], [seeds[row] for row in order.tolist()]))
    assert torch.equal(probabilities(shuffled), probabilities(first)[order])


def test_positions_draw_independently(teacher_logits: Logits) -> None:
    """The positions of one record draw with numbers of their own: equal logits give different draws."""
    logits = teacher_logits(1, 1, 1, 100).expand(2, 6, 5, 100)
    shares = probabilities((made := codec("sampled,draws=10", 100)).decode(made.encode(logits, seeds_for(2))))
    assert len(shares.flatten(0, 2).unique(dim=0)) > 20


@pytest.mark.parametrize("num_classes", [2, 30, 300])
@pytest.mark.parametrize("draws", [1, 20, 300, 65_534])
def test_hits_add_up_to_draws(draws: int, num_classes: int, teacher_logits: Logits) -> None:
    """A record's hits add up to the draws, the most often drawn class first, with no more entries than there are classes or draws."""
    made = codec(f"sampled,draws={draws}", num_classes)
    logits = teacher_logits(8, num_classes)
    arrays = made.encode(logits, seeds_for(8))
    hits, counts = arrays["logits/hits"].long(), arrays["logits/count"].long()
    present = torch.arange(hits.shape[-1]) < counts[:, None]
    assert (hits.masked_fill(~present, 0).sum(-1) == draws).all()
    assert (hits[present] > 0).all()
    assert (hits.masked_fill(~present, 0).diff(dim=-1) <= 0).all()
    assert hits.shape[-1] == min(draws, num_classes)
    assert {field.name: field.dtype for field in made.fields(())}["logits/hits"] == ("uint8" if draws < 255 else "uint16")


def test_a_certain_teacher_is_drawn_as_certain() -> None:
    """All draws of a certain teacher, at whichever end of the classes, are of its class."""
    logits = torch.zeros(3, 1000)
    logits[0, 0] = logits[1, 500] = logits[2, 999] = 1e4
    made = codec("sampled,draws=50", 1000)
    soft = made.decode(made.encode(logits, seeds_for(3)))
    assert soft.index is not None
    assert soft.index.tolist()[0][0] == 0
    assert torch.equal(soft.top1, torch.tensor([0, 500, 999]))
    assert torch.equal(soft.kept.sum(-1), torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("tail", TAILS)
def test_the_loss_refuses_another_temperature(tail: Tail, teacher_logits: Logits) -> None:
    """Drawn targets give the same loss under every tail policy, and none at a temperature that they were not drawn at: both are named."""
    made = codec("sampled,draws=20,temperature=2", 50)
    soft = made.decode(made.encode(teacher_logits(8, 50), seeds_for(8)))
    student = teacher_logits(8, 50, seed=1)
    expected = 4 * torch.nn.functional.kl_div((student / 2).log_softmax(-1).double(), probabilities(soft), reduction="batchmean")
    assert kd_loss(student, soft, temperature=2.0, tail=tail).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ConfigError, match=r"sampled at temperature 2 and hold there only, found temperature 4; .*--temperature 2"):
        kd_loss(student, soft, temperature=4.0, tail=tail)


def test_a_dump_draws_by_sample_and_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dumped cache holds the draws that follow from seed, key and view: again the same, other views others, another seed others."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    options = {"codec": "sampled,draws=12", "num_classes": 40, "augment": "none"}
    dump_noise(tmp_path, "first", **options)
    dump_noise(tmp_path, "again", **options)
    dump_noise(tmp_path, "other", **options, seed=1)
    assert tree(tmp_path / "first") == tree(tmp_path / "again")
    rows = np.arange(NUM_SAMPLES)
    first, other = (
        torch.stack([probabilities(Cache(tmp_path / name).soft_targets(rows, np.full(NUM_SAMPLES, view))) for view in range(NUM_VIEWS)])
        for name in ("first", "other")
    )
    assert (first != other).any(-1).double().mean() > 0.6
    for view in range(1, NUM_VIEWS):  # without augmentation all views have the same logits, so the draws alone differ
        assert (first[0] != first[view]).any(-1).double().mean() > 0.6
