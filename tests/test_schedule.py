"""Which samples and views an epoch shows: pure functions of (seed, epoch)."""

from collections import Counter

import numpy as np
import pytest

from kdcache.learning.schedule import EpochOrder, ViewSchedule
from kdcache.records.errors import ConfigError

Batches = list[list[tuple[int, tuple[int, ...]]]]


def order_of(
    num_samples: int,
    *,
    batch_size: int = 4,
    seed: int = 0,
    schedule: ViewSchedule | None = None,
    views_per_load: int = 1,
    drop_last: bool = False,
) -> EpochOrder:
    """The order over samples 0 to num_samples - 1."""
    return EpochOrder(
        [np.arange(num_samples)], batch_size=batch_size, seed=seed, schedule=schedule or ViewSchedule(views=range(3)),
        views_per_load=views_per_load, drop_last=drop_last,
    )  # fmt: skip


def epoch_of(order: EpochOrder, epoch: int, position: int = 0) -> Batches:
    """The batches of an epoch."""
    order.epoch, order.position = epoch, position
    batches = list(order)
    assert len(order) == len(batches)
    return batches


def test_a_cycle_shows_each_view_once_before_any_again() -> None:
    """Epoch e shows view e mod V of every sample, whatever the number of epochs; a part of a cache begins at its own first view."""
    schedule = ViewSchedule(views=range(2, 5))
    assert [set(schedule.views_of(epoch, 7).tolist()) for epoch in range(5)] == [{2}, {3}, {4}, {2}, {3}]
    assert set(ViewSchedule().views_of(9, 7).tolist()) == {9}


def test_random_views_are_drawn_anew_for_each_sample_and_epoch() -> None:
    """Views are uniform, keyed by seed and epoch, and the same again for the same ones."""
    schedule = ViewSchedule(views=range(8), order="random", seed=1)
    views = np.concatenate([schedule.views_of(epoch, 1000) for epoch in range(8)])
    assert (np.bincount(views) > 850).all()
    assert len(np.bincount(views)) == 8
    assert np.array_equal(schedule.views_of(3, 1000), views[3000:4000])
    assert not np.array_equal(ViewSchedule(views=range(8), order="random", seed=2).views_of(3, 1000), views[3000:4000])


def test_enumerated_views_are_drawn_by_their_weights() -> None:
    """Where views are enumerated, `auto` draws them as often as the random operations would have."""
    weights = np.array([0.5, 0.3, 0.2, 0.0])
    views = ViewSchedule(views=range(4), weights=weights).views_of(0, 20_000)
    assert np.allclose(np.bincount(views, minlength=4) / 20_000, weights, atol=0.02)


def test_a_cycle_over_enumerated_views_mixes_them() -> None:
    """Every sample shows every view once in V epochs, and an epoch shows many different ones."""
    schedule = ViewSchedule(views=range(162), order="cycle", weights=np.full(162, 1 / 162))
    views = np.stack([schedule.views_of(epoch, 50) for epoch in range(162)])
    assert all(sorted(column) == list(range(162)) for column in views.T.tolist())
    assert len(set(views[0].tolist())) > 30
    assert np.array_equal(schedule.views_of(162, 50), views[0])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("views_per_load", [1, 2, 4])
def test_several_views_a_load_show_the_same_records(views_per_load: int, drop_last: bool) -> None:
    """In as many epochs as views a load, the same (sample, view) records are shown as with one, in as many steps, and no other."""
    plain, several = order_of(64, batch_size=8), order_of(64, batch_size=8, views_per_load=views_per_load, drop_last=drop_last)
    assert several.num_batches == plain.num_batches
    for begin in (0, views_per_load):
        epochs = range(begin, begin + views_per_load)
        expected = Counter((row, views[0]) for epoch in epochs for batch in epoch_of(plain, epoch) for row, views in batch)
        loads = [item for epoch in epochs for batch in epoch_of(several, epoch) for item in batch]
        assert Counter((row, view) for row, views in loads for view in views) == expected
        assert len(loads) == 64
        assert all(len(views) == views_per_load for _, views in loads)


def test_several_views_a_load_leave_nothing_out() -> None:
    """Where the parts of a pass are not equal, the last one is smaller, and every sample is still shown once."""
    several = order_of(50, batch_size=8, views_per_load=4)
    batches = [epoch_of(several, epoch) for epoch in range(4)]
    assert sorted(row for epoch in batches for batch in epoch for row, _ in batch) == list(range(50))
    assert max(map(len, batches)) == several.num_batches


@pytest.mark.parametrize("views_per_load", [1, 2])
def test_an_epoch_can_be_taken_up_at_any_batch(views_per_load: int) -> None:
    """What is left from a position on is the end of the whole epoch."""
    order = order_of(50, batch_size=8, views_per_load=views_per_load)
    for epoch in range(3):
        whole = epoch_of(order, epoch)
        for position in range(len(whole) + 1):
            assert epoch_of(order, epoch, position) == whole[position:]


def test_numbers_that_make_no_batches_are_refused() -> None:
    """A batch is made of whole loads."""
    for batch_size, views_per_load in ((8, 3), (0, 1), (8, 0), (2, 4)):
        with pytest.raises(ConfigError, match="multiple of the views per load"):
            order_of(10, batch_size=batch_size, views_per_load=views_per_load)


def test_fewer_batches_than_views_a_load_are_refused() -> None:
    """Where partial batches are left out, every epoch of a pass has a batch at least: none is empty, with a loss of nothing."""
    assert order_of(36, batch_size=36, views_per_load=4, drop_last=True).num_batches == 1
    with pytest.raises(ConfigError, match="36 samples make 2 batches of 64 with 4 views of each, expected at least 4"):
        order_of(36, batch_size=64, views_per_load=4, drop_last=True)
