"""Means, deviations and differences over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """A difference in percentage points, with the ends of its 95 % interval (NaN where there is none)."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    paired: bool = True

    def __str__(self) -> str:
        mean, low, high = (f'{round(value, 2) + 0.0:+.2f}' for value in (self.mean, self.low, self.high))  # no -0.00
        interval = '(one seed)' if math.isnan(self.low) else f'[{low}, {high}]'
        return f'{mean} {interval}{"" if self.paired else " unpaired"}'


def difference(values: dict[str, float], baseline: dict[str, float]) -> Difference:
    """Mean of values - baseline with the 95 % interval of that mean.

    Paired over the seeds (keys) that both have, by Student's t. Where they have none in common, the difference of the
    two means, by Welch's.
    """
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        a, b = list(values.values()), list(baseline.values())
        mean = float(np.mean(a) - np.mean(b))
        if min(len(a), len(b)) < 2:
            return Difference(mean, paired=False)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        return Difference(mean, float(interval.low), float(interval.high), paired=False)
    differences = np.array([values[seed] - baseline[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) == 1:
        return Difference(mean)
    half = float(stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(differences))
    return Difference(mean, mean - half, mean + half)


def mean_sd(values: Sequence[float]) -> str:
    """'mean ± sample standard deviation', the mean alone of one value."""
    return f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else f'{values[0]:.2f}'
