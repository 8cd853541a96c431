"""Means with honest error bars: the bootstrap over episodes.

An episode is what is independent; turns and tokens of one episode are not, so rates
are first taken per episode, then averaged.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Num

Statistic: TypeAlias = Callable[[np.ndarray], Any]  # reduces the last axis

_RESAMPLES = 10_000
_CHUNK = 1 << 22  # resampled values in memory at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic of a sample with its bootstrap interval.

    Attributes:
        mean: the statistic of the sample itself, a mean unless said otherwise.
        low: lower end; NaN for fewer than two values, which say nothing of spread.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Write what is not known (NaN) as null."""
        return {
            name: None if math.isnan(value) else value
            for name, value in dataclasses.asdict(self).items()
        }


def bootstrap(
    values: Num[np.ndarray, " episodes"],
    confidence: float = 0.95,
    seed: int = 0,
    statistic: Statistic | None = None,
) -> Interval:
    """Percentile bootstrap interval (Efron 1979) of a statistic over episodes.

    Args:
        values: one number an episode; NaN where an episode has none (the plan tokens
            per plan of an episode without plans), which leaves the sample.
        confidence: share of resamples inside the interval.
        seed: of the resampling; the same values and seed give the same interval.
        statistic: reduces the last axis; the mean by default.
    """
    values = values.astype(np.float64)
    values = values[~np.isnan(values)]
    statistic = statistic or mean
    if values.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    point = float(statistic(values))
    if values.size == 1:
        return Interval(point, math.nan, math.nan)
    resampled = _resample(values, statistic, np.random.default_rng(seed))
    return _percentiles(point, resampled, confidence)


def bootstrap_crossed(
    values: Num[np.ndarray, "seeds worlds"], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean where both seeds of training and worlds are by chance.

    The pigeonhole bootstrap (Owen 2007, 10.1214/07-AOAS122): rows and columns are drawn
    with replacement, each on its own. With one seed, or one world, that axis stays.

    Args:
        values: one number for each seed and world; all seeds play the same worlds.
        confidence: share of resamples inside the interval.
        seed: of the resampling; the same values and seed give the same interval.
    """
    generator = np.random.default_rng(seed)
    rows, columns = (
        generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES) / count
        for count in values.shape
    )
    resampled = np.einsum("ns,sw,nw->n", rows, values, columns, optimize=True)
    return _percentiles(float(np.mean(values)), resampled, confidence)


def paired_difference(
    values: Num[np.ndarray, " episodes"],
    baseline: Num[np.ndarray, " baseline_episodes"],
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of ``values - baseline``, episode by episode.

    Args:
        values: one number a world.
        baseline: the same worlds in the same order; what the worlds have in common
            cancels.
        confidence: share of resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: different numbers of episodes.
    """
    if values.shape != baseline.shape:
        raise ValueError(
            f"paired_difference: {values.shape} and {baseline.shape} episodes; "
            "pairs must play the same worlds"
        )
    return bootstrap(values - baseline, confidence, seed)


def mean(
    values: Float[np.ndarray, "*samples episodes"],
) -> Float[np.ndarray, "*samples"] | np.float64:
    """Mean over the last axis."""
    return np.mean(values, axis=-1)


def interquartile_mean(
    values: Float[np.ndarray, "*samples episodes"],
) -> Float[np.ndarray, "*samples"] | np.float64:
    """Mean of the middle half (IQM, arXiv:2108.13264), over the last axis.

    ``n // 4`` values are cut at each end, as scipy's ``trim_mean`` does.
    """
    count = np.shape(values)[-1]
    cut = count // 4
    return np.mean(np.sort(values, axis=-1)[..., cut : count - cut], axis=-1)


def _percentiles(
    point: float, resampled: Float[np.ndarray, " samples"], confidence: float
) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(point, float(low), float(high))


def _resample(
    values: Float[np.ndarray, " episodes"],
    statistic: Statistic,
    generator: np.random.Generator,
) -> Float[np.ndarray, " samples"]:
    """Apply the statistic to samples of the same size, drawn with replacement."""
    rows = max(1, _CHUNK // values.size)
    done = []
    for first in range(0, _RESAMPLES, rows):
        shape = (min(rows, _RESAMPLES - first), values.size)
        done.append(statistic(values[generator.integers(values.size, size=shape)]))
    return np.concatenate(done)


def show_interval(interval: Mapping[str, float | None], form: str = ".2f") -> str:
    """Mean and bounds of `Interval.to_json`; a dash for a mean that is not known.

    Args:
        interval: without bounds where there are none.
        form: of each number, as for ``format``.
    """
    known = [interval[name] for name in ("mean", "low", "high")]
    mean, *bounds = ("-" if value is None else format(value, form) for value in known)
    return mean if None in known else f"{mean} [{', '.join(bounds)}]"
