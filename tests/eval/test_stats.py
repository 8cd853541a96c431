import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxplan.eval.stats import (
    Interval,
    bootstrap,
    bootstrap_crossed,
    interquartile_mean,
    paired_difference,
)

episodes = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def test_the_interval_of_a_large_normal_sample_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = bootstrap(values)
    error = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - error, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + error, abs=0.02)


def test_of_many_samples_about_95_percent_have_the_truth_in_their_interval():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = bootstrap(generator.exponential(1.0, 64), seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 180 <= hits <= 199


def test_an_exact_bootstrap_of_three_values_is_met():
    values = np.array([0.0, 1.0, 5.0])
    every = np.array([[a, b, c] for a in values for b in values for c in values])
    exact = np.quantile(every.mean(axis=1), [0.2, 0.8])
    interval = bootstrap(values, confidence=0.6)
    assert [interval.low, interval.high] == pytest.approx(exact)


@given(episodes)
def test_the_interval_lies_within_the_values_and_around_the_mean(values):
    interval = bootstrap(np.array(values))
    slack = 1e-9
    assert min(values) - slack <= interval.low <= interval.high
    assert interval.high <= max(values) + slack
    assert interval.mean == pytest.approx(np.mean(values))


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_no_episodes_have_no_mean_and_one_has_no_spread():
    assert all(math.isnan(x) for x in vars(bootstrap(np.array([]))).values())
    one = bootstrap(np.array([4.0]))
    assert one.mean == 4.0
    assert math.isnan(one.low)
    assert one.to_json() == {"mean": 4.0, "low": None, "high": None}


def test_a_constant_sample_has_an_interval_of_no_width():
    assert bootstrap(np.full(9, 2.0)) == Interval(2.0, 2.0, 2.0)


def test_episodes_without_a_value_leave_the_sample():
    assert bootstrap(np.array([np.nan, 2.0, 2.0])) == Interval(2.0, 2.0, 2.0)


def test_pairs_cancel_what_the_worlds_have_in_common():
    generator = np.random.default_rng(2)
    worlds = generator.normal(0.0, 50.0, 30)
    gain = generator.normal(1.0, 0.1, 30)
    interval = paired_difference(worlds + gain, worlds)
    assert 0.9 < interval.low < interval.mean < interval.high < 1.1


def test_pairs_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="the same worlds"):
        paired_difference(np.zeros(3), np.zeros(4))


def test_the_interquartile_mean_ignores_both_ends():
    values = np.array([-1e9, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 1e9])
    assert interquartile_mean(values) == np.mean([2.0, 4.0, 6.0, 8.0])
    rows = np.stack([values, values[::-1] + 1.0])
    np.testing.assert_allclose(interquartile_mean(rows), [5.0, 6.0])
    assert bootstrap(np.arange(50.0), statistic=interquartile_mean).mean == 24.5


def test_a_crossed_bootstrap_knows_the_chance_of_seeds_and_of_worlds():
    generator = np.random.default_rng(0)
    worlds, seeds = generator.normal(0, 2.0, 200), generator.normal(0, 1.0, 40)
    interval = bootstrap_crossed(3.0 + worlds[None, :] + seeds[:, None])
    error = 1.96 * math.sqrt(worlds.var() / 200 + seeds.var() / 40)
    assert interval.mean == pytest.approx(3.0 + worlds.mean() + seeds.mean())
    assert interval.low == pytest.approx(interval.mean - error, abs=0.03)
    assert interval.high == pytest.approx(interval.mean + error, abs=0.03)


def test_a_crossed_bootstrap_of_one_seed_is_that_of_its_worlds():
    values = np.random.default_rng(1).exponential(1.0, (1, 300))
    crossed, alone = bootstrap_crossed(values), bootstrap(values[0])
    assert crossed.mean == pytest.approx(alone.mean)
    assert crossed.low == pytest.approx(alone.low, abs=0.01)
    assert crossed.high == pytest.approx(alone.high, abs=0.01)
