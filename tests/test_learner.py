"""The training loop's own promises."""

import pytest

from kdcache.workflows.learner import learning_rate_factor


@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(100, 10), (100, 0), (100, 1), (1, 1), (5, 20), (1, 0)])
def test_learning_rate_rises_then_falls(num_steps: int, warmup_steps: int) -> None:
    """For any lengths, also none of a warm-up, the rate is positive before the end, rises to at most 1, then falls."""
    factors = [learning_rate_factor(step, num_steps=num_steps, warmup_steps=warmup_steps) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = min(warmup_steps, num_steps - 1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup_steps < num_steps:
        assert factors[warmup_steps] == 1
    assert learning_rate_factor(num_steps, num_steps=num_steps, warmup_steps=min(warmup_steps, num_steps - 1)) < 1e-9
