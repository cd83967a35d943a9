"""Invariants of any learning-rate curve; the original's own numbers are in golden/test_schedule.py."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.train.schedule import learning_rate

RATES = st.floats(1e-7, 1e-2)


@given(
    lr=RATES, low=RATES, start=RATES, warmup=st.integers(0, 50), per_epoch=st.integers(1, 40), epochs=st.integers(1, 3)
)
def test_any_curve(lr: float, low: float, start: float, warmup: int, per_epoch: int, epochs: int) -> None:
    optimizer = OptimizerSection(lr=lr, min_lr=low, warmup_lr=start, warmup_steps=warmup)
    total = per_epoch * epochs
    rates = [learning_rate(s, optimizer, steps_per_epoch=per_epoch, total_steps=total) for s in range(total + 1)]
    tiny = 1e-9 * max(lr, low)
    assert all(min(lr, low, start) - tiny <= rate <= max(lr, low) + tiny for rate in rates)
    after = rates[min(warmup, total) :]
    assert all((a - b) * (lr - low) >= -tiny * tiny for a, b in itertools.pairwise(after))
    assert warmup > total or rates[-1] == pytest.approx(low)
    assert warmup == 0 or rates[0] == min(lr, start)


def test_warm_up_counts_within_an_epoch() -> None:
    """As in the original, a warm-up longer than an epoch restarts."""
    optimizer = OptimizerSection(lr=1.0, min_lr=0.0, warmup_lr=0.0, warmup_steps=8)
    rates = [learning_rate(s, optimizer, steps_per_epoch=4, total_steps=100) for s in range(8)]
    assert rates == [0.0, 0.125, 0.25, 0.375] * 2


def test_a_min_above_the_rate_climbs() -> None:
    """The published stage 4 has such a schedule."""
    optimizer = OptimizerSection(lr=1e-5, min_lr=8e-5)
    rates = [learning_rate(s, optimizer, steps_per_epoch=10, total_steps=20) for s in range(21)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == pytest.approx((1e-5, 8e-5))
